"""One task after another with one model: what every continual-learning method starts from."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hubtransfer.config import unknown_name
from hubtransfer.data import Batch, Replay, TaskStream
from hubtransfer.methods.method import Method
from hubtransfer.methods.stage import Hook, Stage
from hubtransfer.methods.update import Descend, Terms
from hubtransfer.models import TransferModel

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


class ContinualMethod(Method, scenario=TaskStream):
    """Learns the tasks of a stream in order: one stage a task, with a say before it, after each batch and after it.

    In a stream of kind "task" each item trains the trunk and the head of its own name; in the other kinds all items
    train the one head. Heads of other tasks are in no optimiser, so that neither momentum nor decay moves them.

    Attributes:
        begun: For each item of the stream so far, the number of its task in the model, int64 (items,): training state,
            since the parameters that an optimiser gets depend on it.
    """

    begun: Tensor

    def __init__(self, model: TransferModel, config: Any = None, *, task: str | None = None) -> None:
        super().__init__(model, config, task=task)
        self.register_buffer("begun", torch.empty(0, dtype=torch.int64))

    @property
    def number(self) -> int:
        """Number of the item that learns now, -1 before the first."""
        return len(self.begun) - 1

    @property
    def position(self) -> Tensor:
        """Number of the model's task that learns now, int64 scalar."""
        return self.begun[-1] if len(self.begun) else self.begun.new_tensor(list(self.model.tasks).index(self.task))

    @property
    def learned_tasks(self) -> list[str]:
        """Name of the model's task of each item so far, the current one last."""
        names = list(self.model.tasks)
        return [names[number] for number in self.begun.tolist()]

    @property
    def current(self) -> str:
        """Name of the task that learns now."""
        return list(self.model.tasks)[int(self.position)]

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """One group: the trunk and the current task's head, or the task's patch and head where it has a patch."""
        what: Literal["patch", "all"] = "patch" if self.current in self.model.patches else "all"
        return {"model": self.model.trainable(what, self.current)}

    def learned(self) -> dict[str, Tensor]:
        """Returns what the current task trains of the model, by its name in the model."""
        chosen = {id(p) for group in self.groups()["model"] for p in group["params"]}
        return {name: p for name, p in self.model.named_parameters() if id(p) in chosen}

    def task_of(self, batch: Batch) -> str | list[str]:
        """Returns the model's task whose head a batch's examples are for, or one for each where they differ.

        Examples out of a memory belong to the items in which they were added (`memory.add(batch, task=self.number)`).
        """
        if not isinstance(batch, Replay) or batch.tasks is None:
            return self.task if batch.task is None else batch.task
        names = self.learned_tasks
        if len(set(names)) == 1:
            return names[-1]
        found = [names[number] for number in batch.tasks.tolist()]
        return found[0] if len(set(found)) == 1 else found

    def label_loss(self, batch: Batch) -> Tensor:
        """Returns the loss of the examples' own heads, a scalar, from one forward."""
        return self.model(**batch.inputs, labels=self.labels(batch), task=self.task_of(batch)).loss

    def loss(self, batch: Batch) -> Terms:
        """Returns the scalar `labels`."""
        return {"labels": self.label_loss(batch)}

    def before_task(self, item: Any, runtime: "Runtime") -> None:
        """Called before the optimisers for an item of the stream are made: grow, copy, measure."""

    def after_step(self, batch: Batch) -> None:
        """Called once for each batch, after the last step on it (a method may take several): fill a memory, count."""

    def after_task(self, item: Any, runtime: "Runtime") -> None:
        """Called after the last step on an item of the stream."""

    def ending(self, item: Any) -> Hook | None:
        """Returns what the last stage on an item runs at its end.

        None where `after_task` does nothing: then what was measured at the last step still holds.
        """
        idle = getattr(self.after_task, "__func__", None) is ContinualMethod.after_task
        return None if idle else partial(self.after_task, item)

    def updates(self) -> list[Any]:
        """Returns what happens on each batch: by default one step on `loss`."""
        return [Descend(self.loss, after=self.after_step)]

    def stages(self, scenario: TaskStream) -> Iterator[Stage]:
        """One stage an item.

        Raises:
            ValueError: if an item belongs to a task that the model does not have.
        """
        for item in self.checked(scenario):
            begin, end = partial(self.begin, item), self.ending(item)
            yield Stage(item.name, item.train_source, self.updates(), enter=begin, exit=end)

    def begin(self, item: Any, runtime: "Runtime") -> None:
        """Makes an item's task the current one, then prepares for it."""
        number = list(self.model.tasks).index(item.task or self.task)
        self.begun = torch.cat([self.begun, self.begun.new_tensor([number])])
        self.before_task(item, runtime)

    def __add__(self, other: Any) -> Any:
        """Joins a strategy that adds terms to a loss; such a strategy decides how.

        Raises:
            TypeError: if the other adds no terms.
        """
        if hasattr(type(other), "__radd__"):
            return NotImplemented
        raise TypeError(
            f"{type(self).__name__} and {type(other).__name__} each decide what a step is, so they cannot be added; "
            "what can join a method of a stream of tasks are strategies that add terms to its loss"
        )

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Returns the stream's items, for each of which the model has a head.

        Raises:
            ValueError: naming the task that is missing and the nearest there is.
        """
        for item in scenario:
            if item.task is not None and item.task not in self.model.tasks:
                raise ValueError(
                    f"{unknown_name('task', item.task, self.model.tasks, 'the model')}; a stream of kind "
                    f"{scenario.kind!r} needs a head for each of its tasks: model.add_task({item.task!r}, head)"
                )
        return list(scenario)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}begun")
        if saved is not None:
            self.begun = self.begun.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
