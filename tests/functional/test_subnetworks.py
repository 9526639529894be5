"""Breadth-first search against a path count, proximal steps against a numerical minimum."""

from itertools import pairwise

import torch

from hubtransfer.functional.subnetworks import reaching_units, rows_shrunk, shrunk


def test_units_from_which_a_path_leads_to_an_output():
    random = torch.Generator().manual_seed(0)
    sizes = [4, 6, 5, 2]
    weights = [
        torch.randn(b, a, generator=random) * (torch.rand(b, a, generator=random) < 0.2) for a, b in pairwise(sizes)
    ]
    second = (weights[2] != 0).float()
    first = second @ (weights[1] != 0).float()  # numbers of paths
    found = reaching_units(weights)
    assert torch.equal(found[1], second.sum(0) > 0)
    assert torch.equal(found[0], first.sum(0) > 0)
    assert 0 < found[0].sum() < 6


def test_the_proximal_steps_are_minima():
    """prox(v) = argmin_w 1/2 |w - v|^2 + b |w|; any other point costs more."""
    random = torch.Generator().manual_seed(1)
    v = torch.randn(20, 3, generator=random, dtype=torch.float64)
    for step, norm in ((shrunk, lambda w: w.abs().sum()), (rows_shrunk, lambda w: w.norm(dim=1).sum())):
        w = step(v, 1.2)

        def cost(u, norm=norm):
            return 0.5 * (u - v).square().sum() + 1.2 * norm(u)

        assert (w == 0).any()
        assert (w != 0).any()
        for _ in range(200):
            assert cost(w) <= cost(w + 0.01 * torch.randn(w.shape, generator=random, dtype=torch.float64))


def test_rows_of_nothing_stay_nothing():
    assert torch.equal(rows_shrunk(torch.zeros(2, 3), 0.1), torch.zeros(2, 3))
    assert torch.equal(rows_shrunk(torch.zeros(2, 3), 0.0), torch.zeros(2, 3))
