"""Tasks in a row, in the ``data`` section of a recipe: data sets, one seen in many ways, or a list of both.

.. code-block:: yaml

    data: {stream: [{name: mnist}, {name: animals}], kind: task}
    data: {stream: {permuted: {name: mnist, tasks: 20}}}
    data: {stream: {rotated: {name: mnist, tasks: 20, max_angle: 180}}}
    data: {stream: {noised: {name: mnist, tasks: 20, max_noise: 1}}}
    data: {stream: [{name: mnist}, {noised: {name: mnist, tasks: 1}}, {name: fashion}], kind: task}
    data: {stream: {split: {name: mnist, classes: 2}}, kind: class}
    data: {stream: {domains: {name: org/photos, column: place}}}
    data: {stream: {split: {name: mnist}}, blur: 0.1}                   # boundaries that nobody announces

What is drawn (permutations, angles, orders) follows ``seed`` beside ``tasks``; without one, the seed of the run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_type_hints

from hubtransfer.config import convert, unknown_name
from hubtransfer.data import (
    DataStream,
    SingleTask,
    TaskStream,
    blurred_stream,
    domain_tasks,
    noised_tasks,
    permuted_tasks,
    rotated_tasks,
    split_tasks,
)

WAYS: dict[str, Callable[..., TaskStream]] = {
    "permuted": permuted_tasks,
    "rotated": rotated_tasks,
    "noised": noised_tasks,
    "split": split_tasks,
    "domains": domain_tasks,
}
"""How one data set becomes many tasks."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Tasks in a row.

    Attributes:
        stream: one way to see a data set and its options; or a list of data sets and such ways.
        kind: of the stream; by default "task" for a list, else what the way makes.
        blur: makes one stream without boundaries of them, see ``blurred_stream``.
        name: for messages and tables.
    """

    stream: tuple[Mapping[str, Any] | str, ...] | Mapping[str, Any]
    kind: Literal["task", "class", "domain"] | None = None
    blur: float | None = None
    name: str | None = None


def build_row(row: Row, read: Callable[[Any, str], Any], seed: int) -> TaskStream | DataStream:
    """The scenario of a row of tasks.

    Args:
        row: the section.
        read: makes a data set of a section and its place.
        seed: of what is drawn, where the section has none of its own.

    Raises:
        ValueError: an unknown way, or an option that it does not have.
    """
    if isinstance(row.stream, Mapping):
        tasks = _seen(row.stream, row.kind, row.name, read, seed, "data.stream")
    else:
        tasks = _listed(row, read, seed)
    return tasks if row.blur is None else blurred_stream(tasks, blur=row.blur, seed=seed)


def _listed(row: Row, read: Callable[[Any, str], Any], seed: int) -> TaskStream:
    kind = row.kind or "task"
    tasks: list[Any] = []
    for i, entry in enumerate(row.stream):
        where = f"data.stream[{i}]"
        if isinstance(entry, Mapping) and len(entry) == 1 and next(iter(entry)) in WAYS:
            tasks += [replace(task, task=None) for task in _seen(entry, kind, None, read, seed, where)]
        else:
            tasks.append(_single(read(entry, where)))
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):  # the same set in several versions: number them
        tasks = [replace(task, name=f"{i}-{task.name}") for i, task in enumerate(tasks, 1)]
    return TaskStream(tasks, kind=kind, name=row.name)  # in one of kind "task" a task of the model is named as here


def _single(one: Any) -> SingleTask:
    return SingleTask(
        one.load(),
        evaluation=one.load_evaluation(),
        columns=one.columns,
        task=one.task,
        augment=one.augmentations(),
        name=one.name,
    )


def _seen(
    stream: Mapping[str, Any], kind: Any, name: str | None, read: Callable[[Any, str], Any], seed: int, where: str
) -> TaskStream:
    """The tasks that one data set becomes by a way to see it."""
    if len(stream) != 1:
        raise ValueError(f"{where}: give one of {', '.join(WAYS)}, or a list; got {', '.join(stream) or None}")
    ((way, section),) = stream.items()
    if way not in WAYS:
        raise ValueError(unknown_name("key", way, WAYS, where))
    make, where = WAYS[way], f"{where}.{way}"
    section = {"name": section} if isinstance(section, str) else dict(section)
    hints, known = get_type_hints(make), inspect.signature(make).parameters
    own = [key for key in known if key not in ("train", "evaluation", "columns", "name", "kind")]
    options = {key: convert(hints[key], section.pop(key), f"{where}.{key}") for key in own if key in section}
    if "kind" in known and kind is not None:
        options["kind"] = kind
    data = read(section, where)
    tasks = make(
        data.load(),
        data.load_evaluation(),
        **{"seed": seed, **options},
        columns=data.columns,
        name=name or data.name,
    )
    if kind not in (None, tasks.kind):
        raise ValueError(f"data.kind: {way} tasks are of kind {tasks.kind!r}, not {kind!r}")
    if data.augmentations() is None:
        return tasks
    return replace(tasks, items=[replace(task, augment=data.augmentations()) for task in tasks])
