"""Statistics of feature maps that do not depend on where the channels came from: Gram matrices and what they compare.

Both distances have a naive form over all pairs of channels, which needs gigabytes; here they are matrix products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hubtransfer.functional.precision import in_full_precision


@in_full_precision
def channel_mmd(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Returns the squared maximum mean discrepancy of the channels of two maps, a mean over examples.

    .. math:: MMD^2 = \frac{1}{C_S^2} \sum_{ij} k(s_i, s_j) + \frac{1}{C_T^2} \sum_{ij} k(t_i, t_j)
       - \frac{2}{C_S C_T} \sum_{ij} k(s_i, t_j), \qquad k(a, b) = (a^\top b)^2

    with the activation s_i of a channel over positions, of length 1. As :math:`(a^\top b)^2 = \langle a a^\top, b
    b^\top \rangle`, it equals :math:`\|S^\top S / C_S - T^\top T / C_T\|_F^2`, which is what is computed when there are
    few positions; otherwise the Gram matrices of channels.

    Args:
        student: Maps (batch, channels, height, width).
        teacher: Maps (batch, other channels, height, width).

    >>> a, b = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 5.0]]]])   # k(a, b) = 0, k(a, a) = k(b, b) = 1
    >>> channel_mmd(a, b)
    tensor(2.)
    """
    s, t = F.normalize(student.flatten(2), dim=2), F.normalize(teacher.flatten(2), dim=2)
    (channels, positions), others = s.shape[1:], t.shape[1]
    if (channels + others) * positions <= channels**2 + others**2 + channels * others:
        return (_gram(s.mT, s) / channels - _gram(t.mT, t) / others).square().sum((1, 2)).mean()
    return _mean_square(_gram(s, s.mT)) + _mean_square(_gram(t, t.mT)) - 2 * _mean_square(_gram(s, t.mT))


@in_full_precision
def flow(top: Tensor, bottom: Tensor, places: Tensor | None = None) -> Tensor:
    r"""Returns the flow of the solution procedure, (batch, channels of top, channels of bottom).

    .. math:: G_{ij} = \frac{1}{HW} \sum_{hw} A_{ihw} B_{jhw}

    Args:
        top: Maps A where a part of the network begins, (batch, channels, height, width).
        bottom: Maps B where it ends, (batch, other channels, height, width).
        places: How many positions of each example count, (batch,), where others are padding and zero; all by default.

    >>> flow(torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[2.0, 4.0]]]]))   # (1 * 2 + 3 * 4) / 2
    tensor([[[7.]]])
    """
    count = top.shape[2] * top.shape[3] if places is None else places[:, None, None]
    return _gram(top.flatten(2), bottom.flatten(2).mT) / count


def _gram(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b)


def _mean_square(gram: Tensor) -> Tensor:
    return gram.square().mean()
