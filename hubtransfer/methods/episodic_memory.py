"""Methods that remember a few examples of each finished task and compare gradients with theirs."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hubtransfer.data import Batch, MemoryConfig, TaskStream
from hubtransfer.methods.continual_method import ContinualMethod
from hubtransfer.methods.item_batches import item_loader, need_ends
from hubtransfer.methods.replay_method import need_shares
from hubtransfer.models import TransferModel

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


class EpisodicMemory(ContinualMethod):
    """Learns tasks in order and, when one is finished, puts a random sample of its examples into a memory.

    The parameters that train are the trunk and the heads of all tasks so far: a step may have to move an old head too.

    Attributes:
        memory: Of finished tasks only, so that it stands still while a task is learned.
    """

    def __init__(self, model: TransferModel, config: Any, memory: MemoryConfig, *, task: str | None = None) -> None:
        super().__init__(model, config, task=task)
        self.memory = memory.build(model.processor)

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """One group: what the current task trains, and the heads of the tasks before."""
        heads = [self.model.heads[name] for name in dict.fromkeys(self.learned_tasks[:-1]) if name != self.current]
        own = super().groups()["model"]
        old: list[nn.Parameter] = [p for head in heads for p in head.parameters()]
        return {"model": [*own, *([{"params": old}] if old else [])]}

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks that a random sample of each task can be drawn, and kept."""
        return need_shares(self, need_ends(self, super().checked(scenario)))

    @torch.no_grad()
    def after_task(self, item: Any, runtime: "Runtime") -> None:
        """Offers the memory as many random examples of the task as it has room for, the same on all processes."""
        batch = random_examples(self, item, runtime, self.memory.size)
        self.memory.add(batch, task=self.number, labels=self.labels(batch), same=True)


def random_examples(method: ContinualMethod, item: Any, runtime: "Runtime", count: int) -> Batch:
    """Returns random examples of an item of a stream, not augmented, the same on all processes.

    Args:
        method: Whose model reads them.
        item: The item; of data without an end it would be the first ones (see `need_ends`).
        runtime: Where it runs.
        count: How many; all of a smaller training set.
    """
    # One batch of a random order: `batch_size` is all that decides which examples these are.
    how: dict[str, Any] = {"batch_size": count, "shuffle": True, "stage": method.number}  # other rows of each item
    batch = next(iter(item_loader(method.model, item, runtime, **how).batches(0)))
    assert isinstance(batch, Batch)
    return batch
