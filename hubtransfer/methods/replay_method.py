"""Learning beside a memory: what every rehearsal method starts from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hubtransfer.data import Batch, MemoryConfig, Replay, Reservoir, Ring, TaskStream
from hubtransfer.data.batch import joined_inputs
from hubtransfer.methods.continual_method import ContinualMethod
from hubtransfer.models import TransferModel
from hubtransfer.models.output import TransferModelOutput

MEMORY = Reservoir(200)
"""What rehearsal methods remember unless they are told otherwise."""


@dataclass(frozen=True)
class Part:
    """Examples that one head answers for.

    Attributes:
        task: The head's task.
        logits: (examples, classes).
        labels: (examples,).
        kept: What the memory kept beside them, (examples, ...) each.
    """

    task: str
    logits: Tensor
    labels: Tensor
    kept: dict[str, Tensor]


def check_replay(memory: MemoryConfig, replay_batch: int | None) -> None:
    """Checks the hyper-parameters that all rehearsal methods have.

    Raises:
        ValueError: naming the field and what it may be.
    """
    if not isinstance(memory, MemoryConfig):
        raise ValueError(f"memory must be a kind of memory such as Reservoir(200), got {memory!r}")
    if replay_batch is not None and replay_batch < 1:
        raise ValueError(f"replay_batch must be at least 1, got {replay_batch}")


def need_shares(method: Any, items: list[Any]) -> list[Any]:
    """Returns the items of a stream if the method's memory, where it is divided among tasks, has room for each.

    Raises:
        ValueError: saying what to change.
    """
    config, count = method.memory.config, len(items)
    if isinstance(config, Ring) and config.per == "task":
        who = f"{type(method).__name__}: memory {config}"
        if config.groups is not None and config.groups < count:
            raise ValueError(
                f"{who} was made for {config.groups} tasks, but the stream has {count}; give it groups={count}, or no "
                "groups: then the share of each shrinks as more come"
            )
        if config.size < count:
            raise ValueError(
                f"{who} cannot keep an example of each of {count} tasks; give it a size of at least {count}"
            )
    return items


class ReplayMethod(ContinualMethod):
    """Learns each batch beside examples of a memory, through one concatenated forward.

    The config of a subclass has `memory` and `replay_batch` (None: as many as the batch has).

    Attributes:
        memory: The memory; examples are added under the number of their item in the stream.
    """

    def __init__(self, model: TransferModel, config: Any, *, task: str | None = None) -> None:
        super().__init__(model, config, task=task)
        self.memory = config.memory.build(model.processor)

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks that the memory has room for each task too."""
        return need_shares(self, super().checked(scenario))

    def draw(self, batch: Batch) -> Replay | None:
        """Returns examples of the memory for a step on a batch, or `None` while it has none."""
        return self.memory.draw(self.config.replay_batch or len(batch))

    def draws(self, batch: Batch, times: int) -> list[Replay] | list[None]:
        """Returns several independent draws."""
        return self.memory.draws(self.config.replay_batch or len(batch), times)

    def remember(self, batch: Batch, **kept: Tensor) -> None:
        """Offers the examples of a batch to the memory."""
        self.memory.add(batch, task=self.number, labels=self.labels(batch), **kept)

    def run(self, *batches: Batch | None) -> list[list[Part]]:
        """Runs batches through the trunk together, each example through its own head.

        Returns:
            The parts of each batch: one, or one a head where heads differ; none for `None`.
        """
        given = [batch for batch in batches if batch is not None]
        tasks = [self.task_of(batch) for batch in given]
        every = _each_name(tasks, given) if _differ(tasks) else tasks[0]
        logits = self.model(**joined_inputs([batch.inputs for batch in given]), task=every).logits
        parts: list[list[Part]] = []
        start = 0
        for batch in batches:
            if batch is None:
                parts.append([])
                continue
            stop = start + len(batch)
            parts.append(self._parts(batch, logits[start:stop], every if isinstance(every, str) else every[start:stop]))
            start = stop
        return parts

    def loss_together(self, batch: Batch, replay: Replay | None) -> Tensor:
        """Returns the mean loss over the examples of a batch and of a replay."""
        loss = self.output_together(batch, replay).loss
        assert loss is not None
        return loss

    def output_together(self, batch: Batch, replay: Replay | None) -> TransferModelOutput:
        """Returns the model's output, with the mean loss, for the examples of a batch and then of a replay."""
        given = [batch] if replay is None else [batch, replay]
        tasks = [self.task_of(one) for one in given]
        every = _each_name(tasks, given) if _differ(tasks) else tasks[0]
        labels = torch.cat([self.labels(one) for one in given])
        return self.model(**joined_inputs([one.inputs for one in given]), labels=labels, task=every)

    def loss_of(self, parts: Sequence[Part]) -> Tensor:
        """Returns the mean over the parts' examples of their heads' losses."""
        return mean(parts, lambda part: self.model.loss(part.logits, part.labels, part.task))

    def _parts(self, batch: Batch, logits: Tensor | list[Tensor], tasks: str | list[str]) -> list[Part]:
        labels, kept = self.labels(batch), batch.kept if isinstance(batch, Replay) else {}
        if isinstance(tasks, str):
            assert isinstance(logits, Tensor)
            return [Part(tasks, logits, labels, kept)]
        parts = []
        for task in dict.fromkeys(tasks):
            rows = [row for row, name in enumerate(tasks) if name == task]
            own = torch.stack([logits[row] for row in rows])
            parts.append(Part(task, own, labels[rows], {name: value[rows] for name, value in kept.items()}))
        return parts


def _differ(tasks: Sequence[str | list[str]]) -> bool:
    return any(not isinstance(task, str) or task != tasks[0] for task in tasks)


def _each_name(tasks: Sequence[str | list[str]], batches: Sequence[Batch]) -> list[str]:
    each = ([task] * len(batch) if isinstance(task, str) else task for task, batch in zip(tasks, batches))
    return [name for names in each for name in names]


def mean(parts: Sequence[Part], function: Callable[[Part], Tensor]) -> Tensor:
    """Returns the mean over examples of what `function` gives as a mean over a part's."""
    if len(parts) == 1:
        return function(parts[0])
    total = sum(len(part.logits) for part in parts)
    return torch.stack([function(part) * (len(part.logits) / total) for part in parts]).sum()


def widest(model: TransferModel, logits: Tensor) -> Tensor:
    """Returns logits (examples, classes) with zeros behind, as wide as the model's widest head, to be kept together."""
    width = max((spec.head.width for spec in model.tasks.values() if spec.head is not None), default=logits.shape[1])
    missing = width - logits.shape[1]
    return torch.nn.functional.pad(logits, (0, missing)) if missing > 0 else logits
