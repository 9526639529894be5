"""GradNorm's slopes against automatic differentiation of its objective, and its constraint by hand."""

import pytest
import torch

from hubtransfer.functional.training_rates import grad_norm_slopes, rescaled

EVERY = torch.tensor([True, True, True])


def slopes(weights, norms, losses, initial, there=EVERY, alpha=1.5):
    values = (torch.tensor(v, dtype=torch.float64) for v in (weights, norms, losses, initial))
    return grad_norm_slopes(*values, there, alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("seed", range(5))
def test_equals_autograd_of_the_objective(seed, alpha):
    generator = torch.Generator().manual_seed(seed)
    w, n, losses, first = torch.rand(4, 3, generator=generator, dtype=torch.float64) + 0.1
    w.requires_grad_()
    norms = w * n
    ratios = losses / first
    target = (norms.mean() * (ratios / ratios.mean()) ** alpha).detach()
    (norms - target).abs().sum().backward()
    torch.testing.assert_close(grad_norm_slopes(w.detach(), n, losses, first, EVERY, alpha), w.grad)


def test_the_slow_task_is_to_weigh_more():
    """Equal norms; task 0 has all of its loss left, the others a tenth: its derivative is negative, so it rises."""
    found = slopes([1.0] * 3, [2.0] * 3, [1.0, 0.1, 0.1], [1.0] * 3)
    assert found.tolist() == [-2.0, 2.0, 2.0]


def test_losses_of_zero_or_below():
    assert slopes([1.0] * 3, [2.0] * 3, [0.0] * 3, [1.0] * 3).tolist() == [0.0] * 3  # no progress left: rates 1
    below = slopes([1.0] * 3, [2.0] * 3, [-5.0, 1.0, 1.0], [1.0] * 3)
    assert below.tolist() == slopes([1.0] * 3, [2.0] * 3, [0.0, 1.0, 1.0], [1.0] * 3).tolist()
    unknown = slopes([1.0] * 3, [1.0, 2.0, 3.0], [1.0] * 3, [0.0] * 3)  # no first loss yet: rates 1, mean norm 2
    assert unknown.tolist() == [-1.0, 0.0, 3.0]


def test_absent_tasks_have_no_slope_and_keep_their_weight():
    there = torch.tensor([True, False, True])
    assert slopes([1.0] * 3, [1.0, 9.0, 3.0], [1.0] * 3, [1.0] * 3, there).tolist() == [-1.0, 0.0, 3.0]
    found = rescaled(torch.tensor([1.0, 7.0, 3.0]), torch.tensor([1.0, 0.5, 1.5]), there)
    torch.testing.assert_close(found, torch.tensor([0.625, 0.5, 1.875]))  # 1 and 3 scaled to the sum 3 - 0.5
    nobody = rescaled(torch.ones(3), torch.tensor([1.0, 0.5, 1.5]), ~EVERY)
    assert nobody.tolist() == [1.0, 0.5, 1.5]


def test_weights_stay_non_negative_with_sum_t():
    assert rescaled(torch.tensor([-1.0, 1.0, 3.0]), torch.ones(3), EVERY).tolist() == [0.0, 0.75, 2.25]
    assert rescaled(torch.tensor([-1.0, -1.0, 0.0]), torch.ones(3), EVERY).tolist() == [1.0] * 3
