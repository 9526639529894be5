"""Which units of a chain of linear layers some outputs depend on, and how units of a layer changed."""

from collections.abc import Sequence

import torch
from torch import Tensor


def reaching_units(weights: Sequence[Tensor], zero: float = 0.0) -> list[Tensor]:
    """Returns the hidden units from which a path of weights leads to some output, layer by layer.

    Breadth-first from the outputs back: a unit counts if a unit above it that counts reads it with a weight whose
    magnitude is above `zero`.

    Args:
        weights: Of each layer, (units, units below), input side first; the last one's rows are the outputs, all of
            which count.
        zero: Magnitudes up to this are no connection.

    Returns:
        For each hidden layer a bool tensor (units,), input side first.

    >>> first, last = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0, 2.0]])
    >>> reaching_units([first, last])
    [tensor([False,  True])]
    """
    above = torch.ones(len(weights[-1]), dtype=torch.bool, device=weights[-1].device)
    found = []
    for weight in reversed(weights[1:]):
        above = (weight[above].abs() > zero).any(0)
        found.append(above)
    return found[::-1]


def group_norms(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Returns each unit's :math:`\sqrt{\|w_i\|_2^2 + b_i^2}` over its incoming weights, (units,).

    The gradient at zero is zero.

    Args:
        weight: (units, units below).
        bias: (units,).

    >>> group_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([5., 0.])
    """
    whole = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
    return torch.linalg.vector_norm(whole, dim=1)
