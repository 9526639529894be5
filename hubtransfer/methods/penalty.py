"""Continual-learning strategies that only add terms to a loss, and how they join one another and other methods."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hubtransfer.data import Batch, TaskStream
from hubtransfer.methods.aggregate import Combine, Gradients, Sum
from hubtransfer.methods.continual_method import ContinualMethod
from hubtransfer.methods.distil import Distillation, joint_watched, named, without_model
from hubtransfer.methods.method import Method
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.update import AnyBatch, Descend, Loss, Terms

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


class Penalty(ContinualMethod):
    r"""A strategy that adds terms to the loss of whatever learns the tasks, and measures something around a task.

    .. math:: L = L_{method} + \sum_k T_k

    Alone it fine-tunes task after task with its terms (`terms`). `er + ewc` gives the terms to another method of a
    stream of tasks, whose memory, stages and evaluation stay its own, and `ewc + lwf` is both on plain fine-tuning.
    Where the other method projects gradients (GEM), its rule sees its own terms alone and the penalties' gradient is
    added to the result.
    """

    @abstractmethod
    def terms(self, batch: Batch) -> Terms:
        """Returns named scalars, already weighted. While there is nothing to add the mapping is empty."""

    observe: Any = None
    """`observe(gradients)`, where a penalty needs it: called before each step with the gradient of everything but the
    penalties, by parameter, a mean over processes."""

    def stages_before(self, item: Any, number: int) -> Iterator[Stage]:
        """Stages between `before_task` and the steps on an item of the stream; none by default. Pure, as `stages`."""
        return iter(())

    def stages(self, scenario: TaskStream) -> Iterator[Stage]:
        """One stage an item, on the labels and the terms."""
        for number, item in enumerate(self.checked(scenario)):
            plain = Stage(item.name, item.train_source, [Descend(self.loss)])
            yield from with_penalties(self, [plain], [self], item, number)

    def __add__(self, other: Any) -> Any:
        """Returns both strategies as one."""
        if isinstance(other, Penalty):
            return MethodWithPenalties(None, [self, other])
        return other.__radd__(self) if hasattr(other, "__radd__") else self.__radd__(other)

    def __radd__(self, other: Any) -> Any:
        """Gives the terms to a method of another kind; a distillation method's terms join these."""
        if isinstance(other, Distillation):
            return other.__radd__(self)
        return MethodWithPenalties(other, [self]) if isinstance(other, Method) else NotImplemented


class MethodWithPenalties(Method):
    """A method of a stream of tasks whose loss is joined by penalties.

    Args:
        method: Each of its stages reads one stream of batches and makes one `Descend` on it; None for fine-tuning.
        parts: Penalties on the same model and task.

    Raises:
        ValueError: if they train other models or tasks; when training starts, if a stage is of another form.
    """

    def __init__(self, method: Method | None, parts: Sequence[Penalty]) -> None:
        everyone = [*([] if method is None else [method]), *parts]
        first = everyone[0]
        for part in everyone:
            if part.model is not first.model or part.task != first.task:
                raise ValueError(
                    f"{type(first).__name__} and {type(part).__name__} train different models or tasks; "
                    "give both the same model and task"
                )
        if not issubclass(first.scenario, TaskStream):
            raise ValueError(
                f"{type(parts[0]).__name__} measures what each task of a stream left behind, but "
                f"{type(first).__name__} trains on {first.scenario.__name__}, which has no tasks in a row"
            )
        super().__init__(first.model, None, task=first.task)
        self.method: Any = without_model(ContinualMethod(first.model, task=first.task) if method is None else method)
        self.parts: Any = nn.ModuleList(without_model(part) for part in parts)
        self.growth = self.method.growth
        facts = {
            "scenario": first.scenario,
            "name": " + ".join(each.name for each in everyone),
            "paper": " + ".join(dict.fromkeys(each.paper for each in everyone)),
            "source": first.source,
            "citation": "\n\n".join(dict.fromkeys(each.citation for each in everyone)),
        }
        self.__dict__.update(facts)
        self._alone = method is None

    def grow(self, operation: str, **kwargs: Any) -> None:
        """Grows the method."""
        self.method.grow(operation, **kwargs)

    def hyper_parameters(self) -> dict[str, Any]:
        """Returns the hyper-parameters of the method and of the penalties, under their names."""
        everyone = [*([] if self._alone else [self.method]), *self.parts]
        return {name: each.hyper_parameters() for name, each in named(everyone)}

    def watched(self) -> dict[str, Tensor | float]:
        """Returns what the method and the penalties watch."""
        return joint_watched([self.method, *self.parts])

    def predict(self, batch: Batch, task: str) -> Tensor:
        """Returns what the method predicts."""
        return self.method.predict(batch, task)

    def groups(self) -> Mapping[str, Any]:
        """The method's groups, and those that penalties need for stages of their own."""
        groups = dict(self.method.groups())
        for part in self.parts:
            groups = {**part.groups(), **groups}
        return groups

    def stages(self, scenario: TaskStream) -> Iterator[Stage]:
        """The method's stages, each with the penalties' terms in its loss."""
        items: list[Any] = list(scenario)
        of_item: dict[str, list[Stage]] = {item.name: [] for item in items}
        for stage in self.method.stages(scenario):
            of_item[_item_of(stage, items, self.method)].append(stage)
        for part in self.parts:
            part.checked(scenario)
        for number, item in enumerate(items):
            yield from with_penalties(self.method, of_item[item.name], self.parts, item, number)

    def __add__(self, other: Any) -> Any:
        """Adds further penalties; a method of another kind decides for itself."""
        if isinstance(other, Penalty):
            return MethodWithPenalties(None if self._alone else self.method, [*self.parts, other])
        if isinstance(other, MethodWithPenalties) and other._alone:
            return MethodWithPenalties(None if self._alone else self.method, [*self.parts, *other.parts])
        return other.__radd__(self) if hasattr(other, "__radd__") else NotImplemented

    def __radd__(self, other: Any) -> Any:
        """Gives the penalties to a method of another kind, if no method has them yet."""
        if isinstance(other, Distillation):
            return other.__radd__(self)
        return (
            MethodWithPenalties(other, list(self.parts))
            if self._alone and isinstance(other, Method)
            else NotImplemented
        )


class Beside(Combine):
    """The method's own rule on its own terms, plus the gradients of the penalties.

    Attributes:
        extra: Number of the last terms that are penalties'; set anew at each step.
    """

    def __init__(self, rule: Combine, parameters: Any, observers: Sequence[Any]) -> None:
        self.rule, self.parameters, self.observers = rule, parameters, observers
        self.extra = 0

    def weighing(self) -> Combine | None:
        """Returns what weighs the method's own terms."""
        return self.rule.weighing()

    def from_rows(self, rows: Sequence[Gradients], losses: Tensor) -> Gradients:
        """Combines the method's rows, shows the result to whoever observes it, and adds the penalties' rows."""
        own = len(rows) - self.extra
        combined = self.rule.from_rows(rows[:own], losses[:own])
        gradients = dict(zip(self.parameters(), combined))
        for observe in self.observers:
            observe(gradients)
        return [torch.stack(column).sum(0) for column in zip(combined, *rows[own:])]


def with_penalties(
    method: Any, stages: Sequence[Stage], parts: Iterable[Penalty], item: Any, number: int
) -> Iterator[Stage]:
    """Yields the stages in which a method learns one item, with penalties in all of them that train the model.

    Raises:
        ValueError: if a stage has no single place for the penalties' terms or may be skipped, or if none descends on a
            loss for the model.
    """
    parts = list(parts)
    where = f"{type(method).__name__}, task {item.name!r}: penalties cannot be added, because "
    for stage in stages:
        if stage.when is not None:  # with it what is done before or after the task would be skipped
            raise ValueError(f"{where}stage {stage.name!r} may be skipped; penalties need the same stages every time")
    if not any("model" in update.groups() for stage in stages for update in stage.updates):
        raise ValueError(f"{where}nothing is trained by gradients there")

    def enter(runtime: "Runtime") -> None:
        for part in parts:
            part.begin(item, runtime)

    own = [
        replace(stage, name=f"{item.name}/{stage.name}") for part in parts for stage in part.stages_before(item, number)
    ]
    first, *others = [_joined(method, stage, parts) for stage in stages]
    begin = _after(first.enter, enter)  # the method knows which task learns before the penalties do
    if own:
        own[0] = replace(own[0], enter=_after(begin, own[0].enter))
    both = [*own, replace(first, enter=None if own else begin), *others]
    for part in parts:
        both[-1] = replace(both[-1], exit=_after(both[-1].exit, part.ending(item)))
    yield from both


def _joined(method: Any, stage: Stage, parts: Sequence[Penalty]) -> Stage:
    trained = [update for update in stage.updates if "model" in update.groups()]
    if not trained:
        return stage
    where = f"{type(method).__name__}, stage {stage.name!r}: penalties cannot be added, because "
    if isinstance(stage.data, Mapping):
        raise ValueError(f"{where}it trains on several streams ({', '.join(stage.data)}); penalties need one batch")
    update = trained[0]
    if len(stage.updates) > 1 or not isinstance(update, Descend):
        raise ValueError(f"{where}it makes {stage.shape}; penalties join a single `Descend`")
    rule = update.rule("model")
    observers = [part.observe for part in parts if part.observe is not None]
    beside, combine = None, update.combine
    if observers or type(rule) is not Sum:
        beside = Beside(rule, partial(_parameters, method), observers)
        combine = {**{group: update.rule(group) for group in update.groups()}, "model": beside}

    def after(batch: AnyBatch) -> None:
        if update.after is not None:
            update.after(batch)
        for part in parts:
            part.after_step(batch)

    loss = _sum_of(update.loss, parts, beside)
    return replace(stage, updates=[replace(update, loss=loss, combine=combine, after=after)])


def _sum_of(loss: Loss, parts: Sequence[Penalty], beside: Beside | None) -> Loss:
    def joined(batch: AnyBatch) -> Terms:
        terms = loss(batch)
        added = {f"{name}/{key}": value for name, part in named(parts) for key, value in part.terms(batch).items()}
        if beside is not None:
            beside.extra = len(added)
        return {**terms, **added}

    return joined


def _parameters(method: Any) -> list[Tensor]:
    """The parameters of the group `model` in the order in which the optimiser has them."""
    given = method.groups()["model"]
    if isinstance(given, nn.Module):
        return list(given.parameters())
    listed = [p for one in given for p in (one["params"] if isinstance(one, Mapping) else [one])]
    return list(dict.fromkeys(listed))


def _item_of(stage: Stage, items: Sequence[Any], method: Any) -> str:
    for item in items:
        if stage.data is item.train_source or stage.name == item.name or stage.name.startswith(f"{item.name}/"):
            return item.name
    raise ValueError(
        f"{type(method).__name__}, stage {stage.name!r}: penalties cannot be added, because the stage belongs to no "
        f"task of the stream ({', '.join(item.name for item in items)})"
    )


def _after(first: Any, second: Any) -> Any:
    if first is None or second is None:
        return first or second

    def both(runtime: "Runtime") -> None:
        first(runtime)
        second(runtime)

    return both
