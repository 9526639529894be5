"""Likelihood roots: a logistic model by hand, all kinds, and that drawing classes agrees with the sum over classes."""

import pytest
import torch

from hubtransfer.functional.fisher import likelihood_roots, squared_norm


def information(logits, kind, **given):
    """Sum over columns of the squared gradient of each example's roots in its own logits, (batch, classes)."""
    z = logits.clone().requires_grad_()
    roots = likelihood_roots(z, kind, **given)
    return sum(torch.autograd.grad(roots[:, k].sum(), z, retain_graph=True)[0].square() for k in range(roots.shape[1]))


def test_exact_by_hand():
    """In the logits it is the diagonal of diag(p) - p p^T, p (1 - p); here p = (1/4, 3/4): 3/16 for both."""
    z = torch.tensor([[1.0, 3.0]], dtype=torch.float64).log()
    torch.testing.assert_close(information(z, "exact"), torch.full((1, 2), 3 / 16, dtype=torch.float64))


def test_one_class_by_hand():
    """The gradient of log p_y is (y = c) - p_c: for y = 0 (3/4, -3/4), for y = 1 (-1/4, 1/4)."""
    z = torch.tensor([[1.0, 3.0]], dtype=torch.float64).log()
    nine, one = torch.full((1, 2), 9 / 16, dtype=torch.float64), torch.full((1, 2), 1 / 16, dtype=torch.float64)
    torch.testing.assert_close(information(z, "label", labels=torch.tensor([0])), nine)
    torch.testing.assert_close(information(z, "label", labels=torch.tensor([1])), one)
    torch.testing.assert_close(information(z, "predicted"), one)
    torch.testing.assert_close(information(z, "sampled", uniform=torch.tensor([0.24])), nine)
    torch.testing.assert_close(information(z, "sampled", uniform=torch.tensor([0.26])), one)


def test_drawn_classes_agree_with_the_sum_over_classes_in_the_mean():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    many = z.expand(20_000, 4)
    drawn = information(many, "sampled", uniform=torch.rand(20_000, generator=generator)).mean(0)
    torch.testing.assert_close(drawn, information(z, "exact")[0], rtol=0.05, atol=0)


def test_a_number_just_below_one_draws_a_class_that_exists():
    z = torch.zeros(1, 7)
    assert likelihood_roots(z, "sampled", uniform=torch.tensor([1.0 - 1e-9], dtype=torch.float64)).isfinite().all()


def test_squared_norm():
    assert squared_norm(torch.tensor([[3.0, 4.0], [0.0, 2.0]])).tolist() == [[25.0], [4.0]]
    maps = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])  # of a dense head: (1, 2 classes, 1, 2)
    assert squared_norm(maps).tolist() == [[14.0]]


@pytest.mark.parametrize("kind", ["label", "sampled", "fisher"])
def test_what_is_missing_is_named(kind):
    with pytest.raises(ValueError, match=kind):
        likelihood_roots(torch.zeros(1, 2), kind)
