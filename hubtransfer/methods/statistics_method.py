"""Counting over a frozen trunk: what every continual method without gradients starts from."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hubtransfer.backbones import Features
from hubtransfer.data import Batch, Source, TaskStream
from hubtransfer.data.processes import everywhere, world
from hubtransfer.functional.missing import known_classes
from hubtransfer.methods.continual_method import ContinualMethod
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.update import Accumulate, Terms
from hubtransfer.models import ClassificationHead, OutputCache, TransferModel
from hubtransfer.models.statistic_heads import StatisticHead

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime

HELD_OUT = 0.2
"""Share of the examples on which hyper-parameters are chosen."""


class StatisticsMethod(ContinualMethod):
    """Shows each item of a stream once, without augmentation, to a head of statistics; nothing is trained.

    Features are computed once an example where the data allow it: evaluation after each task looks them up. Processes
    count the examples of all, so that each has the whole statistics.

    Attributes:
        cache: Features of evaluation data.
    """

    head: ClassVar[type[ClassificationHead]]
    """The head that the method fills."""

    def __init__(self, model: TransferModel, config: Any = None, *, task: str | None = None) -> None:
        super().__init__(model, config, task=task)
        self.cache = OutputCache()

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks the heads too."""
        items = super().checked(scenario)
        for task in dict.fromkeys(item.task or self.task for item in items):
            head = self.model.tasks[task].head
            if not isinstance(head, self.head):
                raise ValueError(
                    f"{type(self).__name__} fills a {self.head.__name__}, but task {task!r} has {head!r}; add it with "
                    f"model.add_task({task!r}, {self.head.__name__}(num_classes=...))"
                )
        return items

    def features(self, batch: Batch, task: str) -> Tensor:
        """Returns a batch's pooled features (batch, dim), from the cache where they are known."""
        patch = task if task in self.model.patches else ""

        def compute(inputs: dict[str, Tensor]) -> tuple[Tensor]:
            return (self.model.features(inputs, task=task).pooled,)

        with torch.no_grad():
            return self.cache.outputs(batch, compute, patch)[0]

    def predict(self, batch: Batch, task: str) -> Tensor:
        """Returns logits (batch, classes)."""
        return self.model.logits(Features(self.features(batch, task), {}), task)

    def count(self, batch: Batch) -> Terms:
        """Adds a batch to the head's statistics and returns the scalar `distance` (see the head's `add`)."""
        task = str(self.task_of(batch))
        head = self.model.heads[task]
        assert isinstance(head, StatisticHead)
        labels, features = (
            everywhere(self.labels(batch)),
            everywhere(self.model.features(batch.inputs, task=task).pooled),
        )
        known = known_classes(labels)
        return {"distance": self.add(head, features[known], labels[known].long(), self.held_out(batch)[known])}

    def add(self, head: StatisticHead, features: Tensor, labels: Tensor, held_out: Tensor) -> Tensor:
        """Gives examples to the head."""
        return head.add(features, labels, held_out)

    def held_out(self, batch: Batch) -> Tensor:
        """Says which examples of all processes' batches are held out, bool (batch,): a fifth, by their numbers."""
        device = next(iter(batch.inputs.values())).device
        if batch.index is None:  # streamed: by their numbers in this batch
            number = torch.arange(len(batch) * world(), device=device)
        else:
            number = everywhere(batch.index.to(device))
        return (number * 2654435761) % 2**32 < HELD_OUT * 2**32  # Knuth's hash: labels in some order do not matter

    def updates(self) -> list[Any]:
        """Counts."""
        return [Accumulate(self.count)]

    def stages(self, scenario: TaskStream) -> Iterator[Stage]:
        """One pass over each item."""
        for stage, item in zip(super().stages(scenario), scenario):
            yield replace(stage, data=self.plain(item), epochs=1)

    @staticmethod
    def plain(item: Any) -> Source:
        """Returns an item's training data without augmentation."""
        return replace(item.train_source, augment=None)

    def after_task(self, item: Any, runtime: "Runtime") -> None:
        """Makes what predicts."""
        head = self.model.heads[self.current]
        assert isinstance(head, StatisticHead)
        head.fit()
