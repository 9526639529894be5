"""Ridge regression from sums: by hand, against least squares on the examples, and the choice of the penalty."""

import pytest
import torch

from hubtransfer.functional.ridge import best_penalty, ridge, squared_error


def sums(h, y):
    return h.T @ h, h.T @ y


def examples(n=40, features=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, features, generator=generator, dtype=torch.float64)
    y = torch.nn.functional.one_hot(torch.randint(3, (n,), generator=generator), 3).double()
    return h, y


def test_by_hand():
    # h = 1 and 2 with targets 3 and 5: G = 5, Q = 13; with penalty 1 W = 13 / 6; errors (3 - 13/6)^2 + (5 - 26/6)^2
    gram, cross = torch.tensor([[5.0]]), torch.tensor([[13.0]])
    weights = ridge(gram, cross, 1.0)
    assert weights.item() == pytest.approx(13 / 6)
    assert squared_error(weights, gram, cross, 34.0).item() == pytest.approx((5 / 6) ** 2 + (4 / 6) ** 2)


def test_it_is_least_squares_with_rows_for_the_penalty():
    """The penalty is as good as further examples sqrt(lambda) e_j with target zero."""
    h, y = examples()
    more = torch.cat([h, 0.7**0.5 * torch.eye(6, dtype=torch.float64)])
    expected = torch.linalg.lstsq(more, torch.cat([y, torch.zeros(6, 3, dtype=torch.float64)])).solution
    torch.testing.assert_close(ridge(*sums(h, y), 0.7), expected, rtol=1e-10, atol=1e-12)


def test_the_error_from_sums_is_that_of_the_examples():
    h, y = examples()
    weights = examples(6, 3, seed=1)[0].T[:, :6].T
    direct = (y - h @ weights).square().sum()
    torch.testing.assert_close(squared_error(weights, *sums(h, y), 40.0), direct, rtol=1e-12, atol=0)


def test_the_penalty_is_the_one_with_the_least_error_on_the_others():
    (h, y), (other, targets) = examples(12, 10), examples(30, 10, seed=1)
    penalties = [0.01, 1.0, 100.0]
    errors = [(targets - other @ ridge(*sums(h, y), penalty)).square().sum().item() for penalty in penalties]
    assert len(set(errors)) == 3
    best = penalties[errors.index(min(errors))]
    assert best_penalty(sums(h, y), sums(other, targets), 30.0, penalties) == best


def test_a_singular_system_is_passed_over_and_named_when_all_are():
    h = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    y = torch.tensor([[1.0], [0.0]])
    assert ridge(*sums(h, y), 0.0) is None
    assert best_penalty(sums(h, y), sums(h, y), 1.0, [0.0, 1.0]) == 1.0
    with pytest.raises(ValueError, match=r"singular with every penalty from 0.0 to 0.0"):
        best_penalty(sums(h, y), sums(h, y), 1.0, [0.0])
