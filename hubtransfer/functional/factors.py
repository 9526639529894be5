"""Factors: what is left of feature maps after a paraphrase, compared without their scale."""

import torch.nn.functional as F
from torch import Tensor

from hubtransfer.functional.precision import in_full_precision


@in_full_precision
def factor_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Returns the mean absolute difference of factors, each example's scaled to length 1.

    .. math:: \frac{1}{B N} \sum_b \Big\| \frac{s_b}{\|s_b\|_2} - \frac{t_b}{\|t_b\|_2} \Big\|_1

    Args:
        student: s, (batch, ...), N numbers an example.
        teacher: t, the same shape.

    (3, 4) -> (0.6, 0.8) beside (0, -2) -> (0, -1): (0.6 + 1.8) / 2.

    >>> import torch
    >>> factor_distance(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, -2.0]]))
    tensor(1.2000)
    """
    return (F.normalize(student.flatten(1)) - F.normalize(teacher.flatten(1))).abs().mean()
