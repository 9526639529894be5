"""The ``data`` section of a recipe: its form says which scenario is meant.

====================================================  ==================================================
keys                                                  scenario
====================================================  ==================================================
``name`` (and options of ``load_data``)               ``SingleTask``, or ``DataStream`` for methods of streams
``source``, ``target``                                ``DomainPair``
``tasks: {task: data set}`` (and ``mixing``), or      ``MultiTask``
``labels: {task: column}`` (and ``labelled``)
``stream: [data set, ...]``, ``kind``                 ``TaskStream``, see ``recipe_streams``; with ``blur`` one
                                                      ``DataStream``
====================================================  ==================================================
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hubtransfer.config import convert, from_dict, unknown_name
from hubtransfer.data import (
    Augment,
    DataStream,
    DomainPair,
    Mixing,
    MixUp,
    MultiTask,
    SingleTask,
    Source,
    TaskStream,
    load_data,
)
from hubtransfer.data.draws import keep_labels
from hubtransfer.data.sources import Columns
from hubtransfer.recipe_streams import Row, build_row


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One data set of a recipe.

    Attributes:
        name: what ``load_data`` calls it.
        split: split to train on.
        limit: number of training examples.
        evaluation: what differs for the evaluation set (by default only the split), or false for none.
        columns: renames, canonical name -> column.
        task: task of the model it belongs to.
        augment: options of ``Augment``, for training batches.
        mixup: strength of MixUp, for training batches.
        options: further keywords of ``load_data``.
    """

    name: str
    split: str = "train"
    limit: int | None = None
    evaluation: bool | Mapping[str, Any] = True
    columns: Mapping[str, str | None] | None = None
    task: str | None = None
    augment: Augment | None = None
    mixup: float | None = None
    options: Mapping[str, Any]

    @classmethod
    def read(cls, section: Mapping[str, Any] | str, where: str) -> DataSet:
        """Reads a section; keys that are not its own must be keywords of ``load_data``."""
        section = {"name": section} if isinstance(section, str) else dict(section)
        own = [name for name in cls.__dataclass_fields__ if name != "options"]
        keywords = [name for name in inspect.signature(load_data).parameters if name not in own]
        options = {key: section.pop(key) for key in list(section) if key in keywords}
        for key in section:
            if key not in own:
                raise ValueError(unknown_name("key", key, [*own, *keywords], where))
        return from_dict(cls, {**section, "options": options}, where)

    def load(self) -> Any:
        """The training set."""
        return load_data(self.name, split=self.split, limit=self.limit, **self.options)

    def load_evaluation(self) -> Any:
        """The evaluation set, or None."""
        if self.evaluation is False:
            return None
        changes = {"name": self.name, "split": "test", **self.options}
        changes |= self.evaluation if isinstance(self.evaluation, Mapping) else {}
        return load_data(changes.pop("name"), **changes)

    def augmentations(self) -> list[Any] | None:
        """What happens to training batches."""
        found: list[Any] = [] if self.augment is None else [self.augment]
        if self.mixup:
            found.append(MixUp(alpha=self.mixup))
        return found or None


def build_scenario(
    section: Mapping[str, Any], wanted: type | tuple[type, ...], task: str | None = None, seed: int = 0
) -> Any:
    """The scenario that a recipe's data section describes.

    Args:
        section: the recipe's ``data``.
        wanted: scenario class, or classes, of the method.
        task: task of the model, where the section names none.
        seed: of what a stream of tasks draws, where the section has none.

    Raises:
        ValueError: an unknown key, or a form that the method does not train on.
    """
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    made = _build(dict(section), wanted, task, seed)
    if isinstance(made, DataStream) and DataStream not in wanted and TaskStream in wanted:
        made = TaskStream([replace(made, name=made.name or "stream")], kind="domain", name=made.name)
    if not isinstance(made, wanted):
        forms = " or ".join(FORMS.get(w.__name__, w.__name__) for w in wanted)
        raise ValueError(f"data describes a {type(made).__name__}, but the method needs {forms}")
    return made


FORMS = {
    "SingleTask": "one data set (data: {name: ...})",
    "DataStream": "one data set (data: {name: ...})",
    "DomainPair": "two domains (data: {source: {...}, target: {...}})",
    "MultiTask": "several tasks (data: {tasks: {left: {...}, right: {...}}})",
    "TaskStream": "tasks in a row (data: {stream: [{...}, {...}], kind: task}, or {stream: {permuted: {...}}})",
}


@dataclass(frozen=True, kw_only=True)
class _Pair:
    source: Mapping[str, Any] | str
    target: Mapping[str, Any] | str
    target_labels: bool = False
    task: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Many:
    tasks: Mapping[str, Mapping[str, Any] | str]
    name: str | None = None
    mixing: Mixing | None = None


def _build(section: dict[str, Any], wanted: Sequence[type], task: str | None, seed: int) -> Any:
    if "source" in section or "target" in section:
        return _pair(from_dict(_Pair, section, "data"), task)
    if "tasks" in section:
        return _many(from_dict(_Many, section, "data"))
    if "stream" in section:
        return build_row(from_dict(Row, section, "data"), DataSet.read, seed)
    if "labels" in section:
        labels, labelled = section.pop("labels"), section.pop("labelled", {})
        if not isinstance(labels, Mapping):
            raise ValueError(f"data.labels must map tasks to columns, got {labels!r} (one column: columns.labels)")
        one = DataSet.read(section, "data")
        return MultiTask(
            train=_labelled(one.load(), labels, labelled, one.options.get("seed", 0)),
            labels=labels,
            evaluation=one.load_evaluation(),
            columns=one.columns,
            augment=one.augmentations(),
            name=one.name,
        )
    one = DataSet.read(section, "data")
    cls = DataStream if DataStream in wanted and SingleTask not in wanted else SingleTask
    return _single(one, cls, task)


def _labelled(data: Any, labels: Mapping[str, str], labelled: Any, seed: int) -> Any:
    """The data with the labels of some tasks hidden, so that a task is learned from few examples."""
    for task, count in convert(Mapping[str, int], labelled, "data.labelled").items():
        if task not in labels:
            raise ValueError(unknown_name("task", task, labels, "data.labelled"))
        if not isinstance(data, Columns) or labels[task] not in data:
            raise ValueError(
                f"data.labelled hides labels of data in memory; there is no column {labels[task]!r} to hide"
            )
        try:
            hidden = keep_labels(data[labels[task]], count, seed)
        except ValueError as error:
            raise ValueError(f"data.labelled.{task}: {error}") from None
        data = data.replaced({labels[task]: hidden})
    return data


def _single(one: DataSet, cls: type, task: str | None) -> Any:
    return cls(
        one.load(),
        evaluation=one.load_evaluation(),
        columns=one.columns,
        task=one.task or task,
        augment=one.augmentations(),
        name=one.name,
    )


def _pair(pair: _Pair, task: str | None) -> DomainPair:
    source, target = DataSet.read(pair.source, "data.source"), DataSet.read(pair.target, "data.target")
    sets = {"target": target.load_evaluation(), "source": source.load_evaluation()}
    if source.augmentations() != target.augmentations():
        raise ValueError("data.source and data.target must have the same augment and mixup: both domains share them")
    return DomainPair(
        source.load(),
        target.load(),
        evaluation={name: data for name, data in sets.items() if data is not None} or None,
        columns=source.columns,
        target_columns=target.columns,
        target_labels=pair.target_labels,
        task=pair.task or task,
        augment=source.augmentations(),
        name=f"{source.name} to {target.name}",
    )


def _many(many: _Many) -> MultiTask:
    sets = {task: DataSet.read(data, f"data.tasks.{task}") for task, data in many.tasks.items()}
    evaluation = {task: one.load_evaluation() for task, one in sets.items()}
    return MultiTask(
        {t: Source(dataset=one.load(), columns=one.columns, augment=one.augmentations()) for t, one in sets.items()},
        evaluation={
            task: Source(dataset=data, columns=sets[task].columns)
            for task, data in evaluation.items()
            if data is not None
        }
        or None,
        name=many.name,
        mixing=many.mixing,
    )
