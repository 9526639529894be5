"""Leaves behind a tensor: nearest first, each once, none without a graph."""

import torch
from torch import nn

from hubtransfer.functional.graphs import convolution_with, leaves_of


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


def test_the_convolution_with_a_weight():
    conv, other = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 1)
    outputs = [other(conv(torch.ones(1, 2, 5, 5)).relu()).mean()]
    node = convolution_with(outputs, conv.weight)
    assert tuple(node._saved_input.shape) == (1, 2, 5, 5)
    assert convolution_with(outputs, other.weight)._saved_weight is other.weight


def test_other_uses_of_a_weight_are_not_taken_for_it():
    x = torch.ones(1, 2, 5, 5)
    twice, grouped, turned, line = (
        nn.Conv2d(2, 2, 1),
        nn.Conv2d(2, 2, 3, groups=2),
        nn.ConvTranspose2d(2, 2, 2),
        nn.Linear(5, 2),
    )
    for module, output in ((twice, twice(twice(x))), (grouped, grouped(x)), (turned, turned(x)), (line, line(x))):
        assert convolution_with([output], module.weight) is None
    conv = nn.Conv2d(2, 2, 3)
    assert convolution_with([conv(x) * conv.weight.sum()], conv.weight) is None
    assert convolution_with([torch.ones(1)], conv.weight) is None
