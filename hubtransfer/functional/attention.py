"""Attention maps: where in an image the channels of a feature map are active."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hubtransfer.functional.precision import in_full_precision


def attention(maps: Tensor, power: float = 2.0) -> Tensor:
    r"""Returns :math:`Q = \sum_c |A_c|^p`, (batch, height, width), of maps (batch, channels, height, width).

    >>> attention(torch.tensor([1.0, -2.0]).view(1, 2, 1, 1))
    tensor([[[5.]]])
    """
    return (maps.square() if power == 2 else maps.abs().pow(power)).sum(1)


@in_full_precision
def attention_distance(
    student: Tensor,
    teacher: Tensor,
    power: float = 2.0,
    form: Literal["paper", "code"] = "code",
    places: Tensor | None = None,
) -> Tensor:
    r"""Returns how far apart the attention of two feature maps is, a mean over examples.

    .. math:: d = \frac{1}{B} \sum_b \|q^b_S - q^b_T\|_2 \;\text{(paper)}, \qquad
       d = \frac{1}{B H W} \sum_b \|q^b_S - q^b_T\|_2^2 \;\text{(code)}, \qquad q = \frac{vec(Q)}{\|vec(Q)\|_2}

    Args:
        student: Maps (batch, channels, height, width).
        teacher: Maps (batch, other channels, height, width).
        power: p of the attention.
        form: The norm, or its square over the number of positions.
        places: How many positions of each example count, (batch,), where others are padding and zero; all by default.

    >>> a = torch.tensor([3.0, 4.0]).sqrt().view(1, 1, 1, 2)   # q = (0.6, 0.8)
    >>> b = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)          # q = (1, 0)
    >>> attention_distance(a, b)                               # (0.16 + 0.64) / 2
    tensor(0.4000)
    """
    difference = _direction(student, power) - _direction(teacher, power)
    if form == "paper":
        return torch.linalg.vector_norm(difference, dim=1).mean()
    if places is None:
        return difference.square().mean()
    return (difference.square().sum(1) / places).mean()


def _direction(maps: Tensor, power: float) -> Tensor:
    return F.normalize(attention(maps, power).flatten(1))
