"""Which classes an item of a stream has."""

from typing import Any

import torch
from torch import Tensor


def classes_of(item: Any, width: int, who: str) -> Tensor:
    """Returns which classes an item's training set has, bool (width,).

    Args:
        item: An item of a stream of tasks.
        width: Outputs of the head.
        who: The method that asks, for messages.

    Raises:
        ValueError: if the labels cannot be read without computing every example.
    """
    source = item.train_source
    labels = None if source.iterable else source.table.labels(source.fields.labels)
    if labels is None:
        raise ValueError(
            f"{who} needs to know which classes {source.where} has, but its labels cannot be read beforehand"
        )
    present = torch.zeros(width, dtype=torch.bool)
    present[labels[labels >= 0].unique().long()] = True
    return present
