"""Sparse chains of linear layers: which units some outputs depend on, and the proximal steps that make zeros exact."""

from collections.abc import Sequence

import torch
from torch import Tensor


def reaching_units(weights: Sequence[Tensor]) -> list[Tensor]:
    """Returns the hidden units from which a path of weights that are not zero leads to some output, layer by layer.

    Breadth-first from the outputs back: a unit counts if a unit above it that counts reads it.

    Args:
        weights: Of each layer, (units, units below), input side first; the last one's rows are the outputs, all of
            which count.

    Returns:
        For each hidden layer a bool tensor (units,), input side first.

    >>> first, last = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0, 2.0]])
    >>> reaching_units([first, last])
    [tensor([False,  True])]
    """
    above = torch.ones(len(weights[-1]), dtype=torch.bool, device=weights[-1].device)
    found = []
    for weight in reversed(weights[1:]):
        above = (weight[above] != 0).any(0)
        found.append(above)
    return found[::-1]


def shrunk(weights: Tensor, by: float) -> Tensor:
    r"""Returns :math:`\mathrm{sign}(w) \max(|w| - b, 0)`, the proximal step of the L1 norm.

    >>> shrunk(torch.tensor([3.0, -0.5, -2.0]), 1.0)
    tensor([ 2., -0., -1.])
    """
    return weights.sign() * (weights.abs() - by).clamp(min=0)


def rows_shrunk(weights: Tensor, by: float) -> Tensor:
    r"""Returns :math:`w_i \max(1 - b / \|w_i\|_2, 0)` for each row, the proximal step of the group lasso.

    >>> rows_shrunk(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
    tensor([[2.4000, 3.2000],
            [0.0000, 0.0000]])
    """
    norms = torch.linalg.vector_norm(weights, dim=1, keepdim=True)
    return weights * (1 - by / norms.clamp(min=torch.finfo(weights.dtype).tiny)).clamp(min=0)
