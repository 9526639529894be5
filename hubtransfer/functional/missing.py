"""Which labels are known: how each kind of label says that there is none.

| labels | marker |
|---|---|
| class indices | -100 (torch's `ignore_index`) or -1 |
| any number of labels at once | NaN or -1 |
| real values | NaN |
| pixels | 255, -100 or -1 |
"""

import torch
from torch import Tensor

MISSING_CLASS = -100
"""Class index of an example without a label (torch's default `ignore_index`)."""
VOID_PIXEL = 255
"""Class index of a pixel that counts nowhere."""


def known_classes(labels: Tensor) -> Tensor:
    """Says which class indices (n,) are known; rows of probabilities (n, classes) all are.

    >>> known_classes(torch.tensor([2, -100, -1, 0])).tolist()
    [True, False, False, True]
    """
    if labels.is_floating_point():
        return torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    labels = labels.long()  # in bytes -1 would be 255, and -100 would be 156
    return (labels != MISSING_CLASS) & (labels != -1)


def known_flags(labels: Tensor) -> Tensor:
    """Says which of any number of labels an example, (n, labels), are known.

    >>> known_flags(torch.tensor([[1.0, float("nan")], [-1.0, 0.0]])).tolist()
    [[True, False], [False, True]]
    """
    return labels >= 0  # false for NaN too


def known_values(labels: Tensor) -> Tensor:
    """Says which real values, of any shape, are known.

    >>> known_values(torch.tensor([-1.0, float("nan")])).tolist()
    [True, False]
    """
    return ~labels.isnan()


def known_pixels(labels: Tensor) -> Tensor:
    """Says which pixels' class indices, (n, h, w), are known.

    >>> known_pixels(torch.tensor([3, 255, -100, -1])).tolist()
    [True, False, False, False]
    """
    labels = labels.long()  # in bytes -100 would be 156
    return (labels != MISSING_CLASS) & (labels != -1) & (labels != VOID_PIXEL)
