"""Leaves behind a tensor: nearest first, each once, none without a graph."""

import torch
from torch import nn

from hubtransfer.functional.graphs import leaves_of


def test_nearest_first_and_each_once():
    first, shared, last = (nn.Parameter(torch.ones(2)) for _ in range(3))
    inner = (first * 2).tanh() + shared
    found = leaves_of([(inner * shared).exp() * last, inner])
    assert [id(leaf) for leaf in found] == [id(last), id(shared), id(first)]


def test_what_needs_no_gradient_is_not_there():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    assert leaves_of([frozen * 2, torch.ones(1)]) == []
    weight = nn.Parameter(torch.ones(2))
    assert leaves_of([weight * frozen]) == [weight]
    assert leaves_of([(weight * 2).detach() * frozen]) == []
