"""Distances of factors by hand, and that their scale does not count."""

import pytest
import torch

from hubtransfer.functional.factors import factor_distance


def test_distance_by_hand():
    # (3, 4) -> (0.6, 0.8) beside (0, -2) -> (0, -1): (0.6 + 1.8) / 2 = 1.2.
    assert factor_distance(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, -2.0]])).item() == pytest.approx(1.2)
    silent = torch.zeros(2, 4, requires_grad=True)
    factor_distance(silent, torch.randn(2, 4)).backward()
    assert silent.grad.isfinite().all()


def test_scale_does_not_count():
    factors = torch.randn(2, 4, 3, 3)
    assert factor_distance(7 * factors, factors).item() == pytest.approx(0, abs=1e-7)
