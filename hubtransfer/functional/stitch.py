"""Cross-stitch units: linear combinations of the same layer's activations in several networks, channel by channel."""

from collections.abc import Sequence

import torch
from torch import Tensor


def stitch(activations: Sequence[Tensor], alpha: Tensor, axis: int = 1) -> list[Tensor]:
    r"""Gives each network its own mixture of all networks' activations.

    .. math:: \tilde x_{ic} = \sum_j \alpha_{ijc}\, x_{jc}

    With the identity as alpha every activation stays bit for bit as it is (if all are finite).

    Source: https://arxiv.org/abs/1604.03539, equation 1.

    Args:
        activations: x_j, one a network, all of one shape with the channels on ``axis``.
        alpha: (networks, networks, channels).
        axis: where the channels are.

    >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])
    >>> alpha = torch.tensor([[[0.9, 1.0], [0.1, 0.0]], [[0.5, 0.0], [0.5, 1.0]]])
    >>> [mixed.tolist() for mixed in stitch([a, b], alpha)]
    [[[1.899999976158142, 2.0]], [[5.5, 20.0]]]
    """
    shape = [1] * activations[0].dim()
    shape[axis] = -1
    rows = [[weight.view(shape) for weight in row] for row in alpha]
    return [sum((w * x for w, x in zip(row[1:], activations[1:])), row[0] * activations[0]) for row in rows]


def stitch_start(networks: int, channels: int, same: float, different: float) -> Tensor:
    """Alpha (networks, networks, channels) at first, in 64 bits: ``same`` on the diagonal, ``different`` beside it.

    The other networks have equal parts of ``different``.

    >>> stitch_start(3, 1, same=0.9, different=0.1)[..., 0].tolist()[0]
    [0.9, 0.05, 0.05]
    """
    off = different / (networks - 1) if networks > 1 else 0.0
    alpha = torch.full((networks, networks), off, dtype=torch.float64).fill_diagonal_(same)
    return alpha[..., None].repeat(1, 1, channels)
