"""Tasks in a row, in the ``data`` section of a recipe: a list of data sets, or one data set seen in many ways.

.. code-block:: yaml

    data: {stream: [{name: mnist}, {name: animals}], kind: task}
    data: {stream: {permuted: {name: mnist, tasks: 20}}}
    data: {stream: {rotated: {name: mnist, tasks: 20, max_angle: 180}}}
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
    permuted_tasks,
    rotated_tasks,
    split_tasks,
)

WAYS: dict[str, Callable[..., TaskStream]] = {
    "permuted": permuted_tasks,
    "rotated": rotated_tasks,
    "split": split_tasks,
    "domains": domain_tasks,
}
"""How one data set becomes many tasks."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Tasks in a row.

    Attributes:
        stream: data sets, or one way to see a data set and its options.
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
    tasks = _seen(row, read, seed) if isinstance(row.stream, Mapping) else _listed(row, read)
    return tasks if row.blur is None else blurred_stream(tasks, blur=row.blur, seed=seed)


def _listed(row: Row, read: Callable[[Any, str], Any]) -> TaskStream:
    sets = [read(data, f"data.stream[{i}]") for i, data in enumerate(row.stream)]
    names = [one.name for one in sets]
    tasks = [
        SingleTask(
            one.load(),
            evaluation=one.load_evaluation(),
            columns=one.columns,
            task=one.task,
            augment=one.augmentations(),
            name=one.name,
        )
        for one in sets
    ]
    if len(set(names)) < len(names):  # the same set in several versions: number them
        tasks = [replace(task, name=f"{i}-{task.name}") for i, task in enumerate(tasks, 1)]
    return TaskStream(tasks, kind=row.kind or "task", name=row.name)


def _seen(row: Row, read: Callable[[Any, str], Any], seed: int) -> TaskStream:
    assert isinstance(row.stream, Mapping)
    if len(row.stream) != 1:
        raise ValueError(f"data.stream: give one of {', '.join(WAYS)}, or a list; got {', '.join(row.stream) or None}")
    ((way, section),) = row.stream.items()
    if way not in WAYS:
        raise ValueError(unknown_name("key", way, WAYS, "data.stream"))
    make, where = WAYS[way], f"data.stream.{way}"
    section = {"name": section} if isinstance(section, str) else dict(section)
    hints, known = get_type_hints(make), inspect.signature(make).parameters
    own = [name for name in known if name not in ("train", "evaluation", "columns", "name", "kind")]
    options = {key: convert(hints[key], section.pop(key), f"{where}.{key}") for key in own if key in section}
    if "kind" in known and row.kind is not None:
        options["kind"] = row.kind
    data = read(section, where)
    tasks = make(
        data.load(),
        data.load_evaluation(),
        **{"seed": seed, **options},
        columns=data.columns,
        name=row.name or data.name,
    )
    if row.kind not in (None, tasks.kind):
        raise ValueError(f"data.kind: {way} tasks are of kind {tasks.kind!r}, not {row.kind!r}")
    if data.augmentations() is None:
        return tasks
    return replace(tasks, items=[replace(task, augment=data.augmentations()) for task in tasks])
