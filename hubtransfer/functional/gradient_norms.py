"""How long several gradients of one convolution's weight are, without making the gradients."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def worth_it(inputs: Tensor, slope: Tensor, kernel: Sequence[int], count: int) -> bool:
    """Says whether `convolution_gradient_norms` takes fewer multiplications than making `count` gradients.

    Args:
        inputs: Of the convolution, (batch, channels, height, width).
        slope: One gradient of its output, (batch, outputs, height, width).
        kernel: Height and width of its kernel.
        count: Number of gradients.
    """
    places = len(slope) * slope.shape[2] * slope.shape[3]
    reads = inputs.shape[1] * kernel[0] * kernel[1]
    return places * (reads + count * slope.shape[1]) < count * reads * slope.shape[1]


def convolution_gradient_norms(
    inputs: Tensor,
    slopes: Sequence[Tensor],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    r"""Returns the L2 norm of the gradient of a convolution's weight, for each of several gradients of its output.

    The gradient is :math:`\sum_n \delta_n x_n^\top` over all places n of all examples, with the patch x_n that the
    convolution reads there and the slope :math:`\delta_n` of its output. So only inner products of places are needed:

    .. math:: \Big\| \sum_n \delta_n x_n^\top \Big\|_F^2 = \sum_{n, m} \langle x_n, x_m \rangle
       \langle \delta_n, \delta_m \rangle

    where the first factor is the same for all slopes. Late layers have few places and large weights.

    Args:
        inputs: (batch, channels, height, width), of a convolution in one group.
        slopes: Each (batch, outputs, height, width).
        kernel: Height and width.
        stride: Likewise.
        padding: Likewise.
        dilation: Likewise.

    Returns:
        (slopes,).

    >>> x, slope = torch.tensor([[[[3.0]]], [[[1.0]]]]), torch.tensor([[[[1.0]]], [[[1.0]]]])
    >>> convolution_gradient_norms(x, [slope], (1, 1), (1, 1), (0, 0), (1, 1))  # 1 * 3 + 1 * 1
    tensor([4.])
    """
    size, strides, pads, dilations = (tuple(pair) for pair in (kernel, stride, padding, dilation))
    patches = F.unfold(inputs, size, dilation=dilations, padding=pads, stride=strides)
    patches = patches.transpose(1, 2).flatten(0, 1)
    alike = patches @ patches.T
    found = []
    for slope in slopes:
        rows = slope.flatten(2).transpose(1, 2).flatten(0, 1)
        found.append((alike * (rows @ rows.T)).sum())
    return torch.stack(found).clamp(min=0).sqrt()
