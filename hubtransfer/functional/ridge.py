"""Ridge regression from sums alone: no example has to be kept.

The sums of two sets of examples are those of their union, in whatever order they came.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PENALTIES = tuple(10.0**power for power in range(-8, 9))
"""Seventeen orders of magnitude, from which RanPAC chooses."""


def ridge(gram: Tensor, cross: Tensor, penalty: float) -> Tensor | None:
    r"""Returns the weights of ridge regression, or `None` where the system is singular to working precision.

    .. math:: W = (G + \lambda I)^{-1} Q, \quad G = \sum_i h_i h_i^\top, \quad Q = \sum_i h_i y_i^\top

    which minimises :math:`\sum_i \|y_i - W^\top h_i\|^2 + \lambda \|W\|^2`. Solved in float64 by Cholesky's factors.

    Args:
        gram: G, (features, features), symmetric.
        cross: Q, (features, outputs).
        penalty: lambda, not negative.

    Returns:
        (features, outputs), float64.
    """
    matrix = gram.double() + penalty * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if failed else torch.cholesky_solve(cross.double(), factor)


def squared_error(weights: Tensor, gram: Tensor, cross: Tensor, squares: float) -> Tensor:
    r"""Returns the squared error of weights on examples of which only sums are known, a scalar.

    .. math:: \sum_i \|y_i - W^\top h_i\|^2 = \operatorname{tr}(W^\top G W) - 2 \operatorname{tr}(W^\top Q) +
       \sum_i \|y_i\|^2

    Args:
        weights: W, (features, outputs).
        gram: G, (features, features).
        cross: Q, (features, outputs).
        squares: Sum of squares of the targets; the number of examples where these are one-hot.
    """
    gram, cross = gram.to(weights), cross.to(weights)
    return (weights * (gram @ weights - 2 * cross)).sum() + squares


def best_penalty(
    fitted: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    squares: float,
    penalties: Sequence[float] = PENALTIES,
) -> float:
    """Returns the penalty whose weights, fitted on some examples, err least on others; the first of equals.

    Args:
        fitted: G and Q of the examples that weights are fitted on.
        held_out: G and Q of the others.
        squares: Sum of squares of the others' targets.
        penalties: What to choose from.

    Raises:
        ValueError: if the system is singular with every penalty.
    """
    errors: dict[float, float] = {}
    for penalty in penalties:
        weights = ridge(*fitted, penalty)
        if weights is not None:
            errors[penalty] = float(squared_error(weights, *held_out, squares))
    if not errors:
        raise ValueError(f"the Gram matrix is singular with every penalty from {min(penalties)} to {max(penalties)}")
    return min(errors, key=errors.__getitem__)
