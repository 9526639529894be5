"""What one training step sees."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's examples, ready for the model.

    Attributes:
        inputs: the model's keyword arguments, each ``(batch, ...)``: ``pixel_values`` or ``input_ids`` and its masks.
        labels: ``(batch, ...)``, one such tensor a task, or None when the data have no labels.
        index: example numbers in the data set, int64 ``(batch,)``, always on the CPU; None for streamed data.
        task: the task these examples belong to.
        origin: key of the unchanging data set that ``index`` points into. None when the inputs were augmented anew or
            streamed: then the same number may mean other inputs next time and nothing may be cached.
        changing: why there is no ``origin``, for messages.
        size: number of examples of that data set, for caches that preallocate.
        share: in a step that mixes tasks, the part of its examples that are here: the weight of their mean loss. None
            for a batch that stands for itself.
        raw: gives the inputs before processing, such as uint8 pixels, for memories; None when they are gone, or were
            augmented since.
        memo: values shared by this step's updates, see :meth:`once`.
    """

    inputs: dict[str, Tensor]
    labels: Tensor | dict[str, Tensor] | None = None
    index: Tensor | None = None
    task: str | None = None
    origin: str | None = None
    size: int | None = None
    changing: str | None = None
    share: float | None = None
    raw: Callable[[], dict[str, Tensor]] | None = field(default=None, repr=False)
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def once(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """The value of ``compute()``, computed at the first call with this key and remembered for the step."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def replace(self, **changes: Any) -> Batch:
        """A copy with other fields; its memo starts empty, for what was computed came from the old fields.

        With other inputs, `raw` is gone unless it is given too.
        """
        if "inputs" in changes:
            changes.setdefault("raw", None)
        return replace(self, memo={}, **changes)

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """A copy with ``function`` applied to every input and label tensor (not to ``index``)."""
        labels = self.labels
        if isinstance(labels, dict):
            labels = {task: function(value) for task, value in labels.items()}
        elif labels is not None:
            labels = function(labels)
        return self.replace(inputs={name: function(value) for name, value in self.inputs.items()}, labels=labels)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The batch on another device (itself when it is there already)."""
        device = torch.device(device)
        labels = self.labels.values() if isinstance(self.labels, dict) else [self.labels]
        found = {value.device for value in [*self.inputs.values(), *labels] if value is not None}
        if all(one.type == device.type and device.index in (None, one.index) for one in found):
            return self
        return self.map(lambda value: value.to(device, non_blocking=non_blocking)).replace(raw=self.raw)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU overlap with its work."""
        return self.map(lambda value: value.pin_memory()).replace(raw=self.raw)

    def rows(self, keep: Tensor) -> Batch:
        """The examples that ``keep`` selects, by boolean mask ``(batch,)`` or positions ``(count,)``."""
        raw = self.raw
        return self.map(lambda value: value[keep.to(value.device)]).replace(
            index=None if self.index is None else self.index[keep.cpu()],
            raw=None if raw is None else lambda: {name: value[keep.cpu()] for name, value in raw().items()},
        )


def joined_inputs(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Inputs of several batches one after another; token numbers are padded with zeros to the longest.

    Args:
        parts: the same names in each, ``(batch, ...)``.
    """
    if len(parts) == 1:
        return dict(parts[0])
    found = {}
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        if first.ndim == 2 and not first.is_floating_point():
            longest = max(value.shape[1] for value in values)
            values = [torch.nn.functional.pad(value, (0, longest - value.shape[1])) for value in values]
        found[name] = torch.cat(values)
    return found


Streams = dict[str, Batch]
"""One step's batches of several data streams, by name."""
