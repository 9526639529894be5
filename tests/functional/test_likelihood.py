"""Surprise by hand, beside torch's Gaussian likelihood, and where it is least."""

import math

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.functional.likelihood import surprise


def test_surprise_by_hand():
    # Two channels, differences 2 and 0, variances 4 and e: (ln 4 + 4/4) / 2 and (1 + 0) / 2, their mean.
    target = torch.tensor([2.0, 7.0]).view(1, 2, 1, 1).expand(3, 2, 2, 2)
    mean = torch.tensor([0.0, 7.0]).view(1, 2, 1, 1).expand(3, 2, 2, 2)
    expected = ((math.log(4) + 1) / 2 + 0.5) / 2
    assert surprise(target, mean, torch.tensor([4.0, math.e])).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (3, 4)])
def test_surprise_equals_torchs_gaussian_likelihood(shape):
    torch.manual_seed(0)
    target, mean = torch.randn(shape).double(), torch.randn(shape).double().requires_grad_()
    variance = torch.rand(4).double().add(0.1).requires_grad_()
    full = variance.view(1, 4, *[1] * (len(shape) - 2)).expand(shape)
    one, two = surprise(target, mean, variance), F.gaussian_nll_loss(mean, target, full)
    assert one.item() == pytest.approx(two.item(), abs=1e-12)
    for a, b in zip(*(torch.autograd.grad(value, (mean, variance)) for value in (one, two))):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_the_best_variance_is_the_mean_square():
    """Minimised over sigma^2, the bound's variance is the error that mu leaves: 0 slope there."""
    torch.manual_seed(0)
    target, mean = torch.randn(6, 3, 4, 4).double(), torch.randn(6, 3, 4, 4).double()
    variance = (target - mean).square().mean((0, 2, 3)).requires_grad_()
    (slope,) = torch.autograd.grad(surprise(target, mean, variance), variance)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)
