"""Counting over a frozen trunk: what every continual method without gradients starts from."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hubtransfer.backbones import Features
from hubtransfer.data import Batch, TaskStream
from hubtransfer.data.processes import everywhere
from hubtransfer.functional.missing import known_classes
from hubtransfer.methods.continual_method import ContinualMethod
from hubtransfer.methods.evaluating import evaluating
from hubtransfer.methods.item_batches import item_loader
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
    count the examples of all, so that each has the whole statistics, every example once. Of a stream of unknown length
    the run's `steps` say how many batches count, and its last few examples, fewer than processes, go to none.

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

    def count(self, batch: Batch, gather: Callable[[Tensor], Tensor] = everywhere) -> Terms:
        """Adds a batch to the head's statistics and returns the scalar `distance` (see the head's `add`).

        Args:
            batch: This process's examples.
            gather: Makes one tensor of those of all processes.
        """
        task = str(self.task_of(batch))
        head = self.model.heads[task]
        assert isinstance(head, StatisticHead)
        labels, features = gather(self.labels(batch)), gather(self.model.features(batch.inputs, task=task).pooled)
        # A streamed example is known by its number in this batch
        numbers = torch.arange(len(labels)) if batch.index is None else gather(batch.index.to(labels.device))
        known, held_out = known_classes(labels), self.held_out(numbers.to(labels.device))
        if not known.any():
            return {"distance": features.new_zeros(())}
        return {"distance": self.add(head, features[known], labels[known].long(), held_out[known])}

    def count_rest(self, item: Any, runtime: "Runtime") -> None:
        """Counts the last examples of an item, which are fewer than the processes, so that no step has them."""
        size = 0 if item.train_source.iterable else len(item.train_source.table)
        if rest := size % runtime.world:
            rows = torch.arange(size - rest, size)
            batch = next(iter(item_loader(self.model, item, runtime, rows=rows, batch_size=rest).batches(0)))
            with torch.no_grad(), evaluating(self.model):
                runtime.call(partial(self.count, gather=lambda own: own), batch.replace(index=rows))

    def add(self, head: StatisticHead, features: Tensor, labels: Tensor, held_out: Tensor) -> Tensor:
        """Gives examples to the head."""
        return head.add(features, labels, held_out)

    @staticmethod
    def held_out(numbers: Tensor) -> Tensor:
        """Says which examples are held out, bool (examples,): a fifth, by their numbers, int64 (examples,)."""
        return (numbers * 2654435761) % 2**32 < HELD_OUT * 2**32  # Knuth's hash: labels in some order do not matter

    def updates(self) -> list[Any]:
        """Counts."""
        return [Accumulate(self.count)]

    def stages(self, scenario: TaskStream) -> Iterator[Stage]:
        """One pass over each item."""
        for stage, item in zip(super().stages(scenario), scenario):
            yield self.one_pass(stage, item)

    @staticmethod
    def one_pass(stage: Stage, item: Any) -> Stage:
        """Returns a stage that reads an item once, without augmentation and in order: what no step has are the last."""
        source = replace(item.train_source, augment=None, shuffle=False)
        return replace(stage, data=source, epochs=None if source.iterable else 1)

    def after_task(self, item: Any, runtime: "Runtime") -> None:
        """Makes what predicts, of all examples."""
        self.count_rest(item, runtime)
        head = self.model.heads[self.current]
        assert isinstance(head, StatisticHead)
        head.fit()
