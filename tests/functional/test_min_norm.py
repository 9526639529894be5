"""The min-norm solver: cases by hand, brute force over supports, and the optimality conditions up to 40 vectors."""

from itertools import combinations

import numpy as np
import pytest
import torch

from hubtransfer.functional.min_norm import min_norm_weights


def weights_of(*vectors):
    stacked = torch.tensor(vectors, dtype=torch.float64)
    return min_norm_weights(stacked @ stacked.T), stacked


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        # (a, 1-a): a^2 + 4 (1-a)^2 is smallest at a = 4/5
        ([(1.0, 0.0), (0.0, 2.0)], [0.8, 0.2]),
        # the longer of two parallel vectors is dominated
        ([(1.0, 0.0), (2.0, 0.0)], [1.0, 0.0]),
        # the segment from (1, 0) to (2, 1) is nearest to 0 at its first end: (1, 0).((2, 1) - (1, 0)) = 1 > 0
        ([(1.0, 0.0), (2.0, 1.0)], [1.0, 0.0]),
        # opposite: -a + 2 (1-a) = 0 at a = 2/3, the norm is 0
        ([(-1.0,), (2.0,)], [2 / 3, 1 / 3]),
        # a zero vector is the shortest point itself
        ([(0.0, 0.0), (3.0, 1.0)], [1.0, 0.0]),
        # nothing to choose between
        ([(0.0, 0.0), (0.0, 0.0)], [0.5, 0.5]),
        ([(5.0, 1.0)], [1.0]),
    ],
)
def test_by_hand(vectors, expected):
    found, _ = weights_of(*vectors)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_duplicates_give_the_same_vector():
    """Splitting a weight between equal vectors changes nothing: (1, 0), (1, 0), (0, 1) -> (1/2, 1/2)."""
    found, vectors = weights_of((1.0, 0.0), (1.0, 0.0), (0.0, 1.0))
    torch.testing.assert_close(found @ vectors, torch.tensor([0.5, 0.5], dtype=torch.float64))


def brute_force(gram):
    """The best over all supports; on each the point where all inner products with the combination agree."""
    terms, best = len(gram), np.inf
    for size in range(1, terms + 1):
        for support in map(list, combinations(range(terms), size)):
            part = gram[np.ix_(support, support)]
            system = np.block([[part, -np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
            right = np.append(np.zeros(size), 1.0)
            a = np.linalg.lstsq(system, right, rcond=None)[0][:size]
            if (a > -1e-12).all() and abs(a.sum() - 1) < 1e-9:
                best = min(best, a @ part @ a)
    return best


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
@pytest.mark.parametrize("seed", range(5))
def test_equals_brute_force(seed, rank):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(6, rank)) + rng.normal(size=rank)
    gram = vectors @ vectors.T
    found = min_norm_weights(torch.from_numpy(gram)).numpy()
    assert found @ gram @ found == pytest.approx(brute_force(gram), abs=1e-11 * gram.max())


@pytest.mark.parametrize("terms", [2, 5, 17, 40])
@pytest.mark.parametrize("rank", [1, 4, 60])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_optimality_conditions(terms, rank, scale):
    """Convex: a is a minimum if and only if a >= 0, 1a = 1 and no vector is nearer than the combination itself."""
    rng = np.random.default_rng(terms * rank)
    vectors = scale * (rng.normal(size=(terms, rank)) + 0.3)
    gram = vectors @ vectors.T
    found = min_norm_weights(torch.from_numpy(gram)).numpy()
    assert (found >= 0).all()
    assert found.sum() == pytest.approx(1)
    assert (gram @ found - found @ gram @ found).min() >= -1e-11 * gram.max()


def by_quadratic_program(vectors):
    """The shortest vector of the hull, by another route and another solver; (vector, weights).

    Where the hull does not hold 0, its shortest vector is v / |v|^2 for the smallest v with <v, g_t> >= 1 for all t: a
    strictly convex program in v however singular the Gram matrix is. Its multipliers are proportional to the weights.
    """
    quadprog = pytest.importorskip("quadprog", reason="the quadratic-programming solver is not installed")
    basis = np.linalg.qr(vectors.T)[0]  # coordinates in the span, where the program has full rank
    rows = vectors @ basis
    scale = np.abs(rows).max()
    try:
        identity, nothing = np.eye(rows.shape[1]), np.zeros(rows.shape[1])
        multipliers = quadprog.solve_qp(identity, nothing, rows.T / scale, np.ones(len(rows)))[4]
    except ValueError:  # no such v: the hull holds 0
        return np.zeros(vectors.shape[1]), None
    weights = multipliers / multipliers.sum()
    return weights @ vectors, weights


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("kind", ["random", "singular", "duplicates", "scales", "holds zero"])
def test_equals_a_quadratic_program_solver(seed, kind):
    """300 Gram matrices of up to 40 vectors: the shortest vector, which is unique, and the weights where they are."""
    rng = np.random.default_rng([seed, len(kind)])
    terms = int(rng.integers(2, 41)) if seed else 40
    dim = {"singular": max(2, terms // 2), "holds zero": max(1, terms // 4)}.get(kind, terms + 5)
    vectors = rng.normal(size=(terms, dim)) + (0 if kind == "holds zero" else rng.uniform(0.1, 1))
    if kind == "duplicates":
        vectors[terms // 2 :] = vectors[: terms - terms // 2]
    if kind == "scales":
        vectors *= 10 ** rng.uniform(-2, 2, size=(terms, 1))
    expected, weights = by_quadratic_program(vectors)
    gram = vectors @ vectors.T
    found = min_norm_weights(torch.from_numpy(gram)).numpy()
    assert abs(found @ gram @ found - expected @ expected) <= 1e-8 * gram.max()
    size = np.linalg.norm(vectors, axis=1).max()
    if weights is None:  # |sum| is the square root of a value that rounding leaves at about 1e-16
        assert np.linalg.norm(found @ vectors) < 1e-6 * size
        return
    np.testing.assert_allclose(found @ vectors, expected, rtol=0, atol=1e-8 * size)
    if kind in ("random", "scales"):
        np.testing.assert_allclose(found, weights, rtol=0, atol=1e-8)


def test_dtype_and_bad_input():
    assert min_norm_weights(torch.eye(3)).dtype == torch.float32
    with pytest.raises(ValueError, match="square"):
        min_norm_weights(torch.ones(2, 3))
    with pytest.raises(ValueError, match="not finite"):
        min_norm_weights(torch.tensor([[1.0, 0.0], [0.0, float("nan")]]))
