"""Streams of tasks made of one data set: permuted, rotated, noised, split by label or domain, with blurred boundaries.

Tasks are views: nothing is copied. One seed fixes the order of the tasks, permutations, angles and noise, whatever
random numbers are drawn elsewhere, so every method with the same seed sees the same tasks.

    >>> data = {"pixel_values": torch.zeros(6, 4, 4, dtype=torch.uint8), "labels": torch.arange(6) % 3}
    >>> [task.name for task in permuted_tasks(data, tasks=3)]
    ['permuted-1', 'permuted-2', 'permuted-3']
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hubtransfer.data.scenario import Columns, DataStream, SingleTask, TaskStream
from hubtransfer.data.seeds import seed_of
from hubtransfer.data.source import Source
from hubtransfer.data.table import Table
from hubtransfer.data.table_views import InARow, Noised, Rearranged, Rows, image_size

Kind = Literal["task", "class", "domain"]
Images = Sequence[tuple[Table, str]]
"""Tables with their column of images: training data, then evaluation data where there are any."""


def permuted_tasks(
    train: Any,
    evaluation: Any = None,
    *,
    tasks: int = 20,
    kind: Kind = "domain",
    seed: int = 0,
    columns: Columns = None,
    name: str = "",
) -> TaskStream:
    """Every task has the images' pixels in a random order of its own, the first task too.

    Source: https://arxiv.org/abs/1312.6211 (permuted MNIST); all tasks permuted as in https://arxiv.org/abs/2004.07211.

    Args:
        train: images of one size with labels.
        evaluation: the like.
        tasks: number of tasks.
        kind: ``"domain"``: one head for all; ``"task"``: every task has its own.
        seed: of the permutations.
        columns: renames, canonical name -> column.
        name: for messages and tables.

    Returns:
        A stream with tasks ``permuted-1`` ...

    Raises:
        ValueError: fewer than one task, kind ``"class"``, or inputs that are no images of one size.
    """
    orders = []
    for number in range(_positive(tasks)):
        generator = torch.Generator().manual_seed(seed_of("permutation", seed, number))
        orders.append(lambda size, generator=generator: torch.randperm(math.prod(size), generator=generator))
    return _rearranged(train, evaluation, orders, "permuted", kind, columns, name)


def rotated_tasks(
    train: Any,
    evaluation: Any = None,
    *,
    tasks: int = 20,
    max_angle: float = 180.0,
    kind: Kind = "domain",
    seed: int = 0,
    columns: Columns = None,
    name: str = "",
) -> TaskStream:
    """Every task has the images turned about their middle by an angle drawn uniformly from ``[0, max_angle)``.

    Counterclockwise, to the nearest pixel, black outside, as PIL does.

    Source: https://arxiv.org/abs/1706.08840 (rotated MNIST); uniform angles as in https://arxiv.org/abs/2004.07211.

    Args:
        train: images of one size with labels.
        evaluation: the like.
        tasks: number of tasks.
        max_angle: in degrees.
        kind: ``"domain"``: one head for all; ``"task"``: every task has its own.
        seed: of the angles.
        columns: renames, canonical name -> column.
        name: for messages and tables.

    Returns:
        A stream with tasks ``rotated-1`` ...

    Raises:
        ValueError: fewer than one task, an infinite angle, kind ``"class"``, or inputs that are no images of one size.
    """
    if not math.isfinite(max_angle):
        raise ValueError(f"max_angle must be a finite number of degrees, got {max_angle}")
    turns = []
    for number in range(_positive(tasks)):
        angle = angle_of(number, max_angle, seed)
        turns.append(lambda size, angle=angle: rotation(size[0], size[1], angle))
    return _rearranged(train, evaluation, turns, "rotated", kind, columns, name)


def angle_of(task: int, max_angle: float, seed: int) -> float:
    """The angle of a task of :func:`rotated_tasks`, in degrees."""
    return max_angle * float(np.random.default_rng(seed_of("angle", seed, task)).random())


def rotation(height: int, width: int, degrees: float) -> Tensor:
    """For each pixel of an image turned counterclockwise the number of the pixel it comes from, -1 for outside.

    With the centre of pixel (row i, column j) at (x, y) = (j + 1/2, i + 1/2) and y downwards:

    ``x' = cos(a) (x - w/2) - sin(a) (y - h/2) + w/2``, ``y' = sin(a) (x - w/2) + cos(a) (y - h/2) + h/2``

    Returns:
        int64 ``(height * width,)``.
    """
    angle = math.radians(degrees)
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) + 0.5 - height / 2,
        torch.arange(width, dtype=torch.float64) + 0.5 - width / 2,
        indexing="ij",
    )
    column = (math.cos(angle) * x - math.sin(angle) * y + width / 2).floor().long()
    row = (math.sin(angle) * x + math.cos(angle) * y + height / 2).floor().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return torch.where(inside, row * width + column, -1).flatten()


def noised_tasks(
    train: Any,
    evaluation: Any = None,
    *,
    tasks: int = 20,
    max_noise: float = 1.0,
    kind: Kind = "domain",
    seed: int = 0,
    columns: Columns = None,
    name: str = "",
) -> TaskStream:
    """Every task has the images before a noisy background, which is as bright as a share of white of its own.

    A pixel becomes ``max(x, a u)``, with u drawn for each pixel of each image uniformly from black to white, once and
    for all, and the share a for each task uniformly from ``[0, max_noise)``.

    Source: the random backgrounds of https://doi.org/10.1145/1273496.1273556 (there a = 1); digits with noise behind
    them as tasks in https://arxiv.org/abs/1708.01547, section 4.

    Args:
        train: images of one size with labels, bytes with white 255 or real numbers with white 1.
        evaluation: the like.
        tasks: number of tasks.
        max_noise: share of white.
        kind: ``"domain"``: one head for all; ``"task"``: every task has its own.
        seed: of the shares and the noise.
        columns: renames, canonical name -> column.
        name: for messages and tables.

    Returns:
        A stream with tasks ``noised-1`` ...

    Raises:
        ValueError: fewer than one task, a share outside 0 to 1, kind ``"class"``, or inputs that are no such images.
    """
    if not 0 <= max_noise <= 1:
        raise ValueError(f"max_noise is a share of white, between 0 and 1, not {max_noise}")

    def views(task: int, images: Images) -> list[Table]:
        share = noise_of(task, max_noise, seed)
        return [Noised(*one, share, seed_of("noise", seed, task, part)) for part, one in enumerate(images)]

    makers = [partial(views, task) for task in range(_positive(tasks))]
    return _seen(train, evaluation, makers, "noised", kind, columns, name)


def noise_of(task: int, max_noise: float, seed: int) -> float:
    """The share of white of a task of :func:`noised_tasks`."""
    return max_noise * float(np.random.default_rng(seed_of("share", seed, task)).random())


def split_tasks(
    train: Any,
    evaluation: Any = None,
    *,
    classes: int | Sequence[Sequence[int]] = 2,
    kind: Kind = "class",
    shuffle: bool = False,
    seed: int = 0,
    columns: Columns = None,
    name: str = "",
) -> TaskStream:
    """Every task has some of the classes; examples without a label (a negative one) are in none.

    Args:
        train: a data set with a label column.
        evaluation: the like.
        classes: how many each task has (the last may have fewer), or which.
        kind: ``"class"``: labels stay as they are, one head learns them all; ``"task"``: every task has its own head
            and numbers its classes from 0; ``"domain"``: numbered from 0 too, but one head for all.
        shuffle: whether classes come in a random order.
        seed: of that order.
        columns: renames, canonical name -> column.
        name: for messages and tables.

    Returns:
        A stream with tasks named after their classes, such as ``0-1``.

    Raises:
        ValueError: a class twice or one that the training data lack, or labels that are no class numbers.
    """
    data = Source.of(train, columns=columns, name=name or "train")
    column, labels = _labels(data)
    present = labels[labels >= 0].unique().tolist()
    if isinstance(classes, int):
        order = torch.tensor(present)
        if shuffle:
            generator = torch.Generator().manual_seed(seed_of("class order", seed))
            order = order[torch.randperm(len(order), generator=generator)]
        groups = [group.tolist() for group in order.split(_positive(classes))]
    else:
        groups = [list(group) for group in classes]
    named = [label for group in groups for label in group]
    wrong = [label for label in named if label not in present or named.count(label) > 1]
    if wrong:
        what = "in two tasks" if wrong[0] in present else f"not among the labels, which are {present}"
        raise ValueError(f"{data.where}: class {wrong[0]} is {what}")
    names = data.table.class_names(column)
    items = []
    for group in groups:
        title = "-".join(str(label) for label in group)
        views = [
            _classes(Source.of(one, columns=columns, name=name or what), group, kind, names)
            for one, what in ((train, "train"), (evaluation, "evaluation"))
            if one is not None
        ]
        items.append(SingleTask(views[0], views[1] if len(views) > 1 else None, columns=columns, name=title))
    return TaskStream(items, kind=kind, name=name or None)


def domain_tasks(
    train: Any,
    evaluation: Any = None,
    *,
    column: str,
    kind: Kind = "domain",
    shuffle: bool = False,
    seed: int = 0,
    columns: Columns = None,
    name: str = "",
) -> TaskStream:
    """Every task has the examples of one domain, which a column of the data names.

    Args:
        train: a data set with that column: texts or whole numbers.
        evaluation: the like.
        column: name of the domain.
        kind: of the stream.
        shuffle: whether domains come in a random order, not in the order of their names or numbers.
        seed: of that order.
        columns: renames, canonical name -> column.
        name: for messages and tables.

    Raises:
        ValueError: there is no such column, or a domain has no evaluation examples.
    """
    tables = [Table.of(one, name or "data set") for one in (train, evaluation) if one is not None]
    groups: list[dict[str, Tensor]] = []
    numbered = True
    for table in tables:
        table.require(column)
        values = table.column(column)
        if values is None:
            raise ValueError(f"column {column!r} cannot be read without computing every example")
        found: dict[str, list[int]] = {}
        for row, value in enumerate(values.tolist() if isinstance(values, Tensor) else values):
            found.setdefault(str(value), []).append(row)
            numbered &= type(value) is int
        groups.append({domain: torch.tensor(rows) for domain, rows in found.items()})
    domains = sorted(groups[0], key=int if numbered else None)
    if shuffle:
        generator = torch.Generator().manual_seed(seed_of("domain order", seed))
        domains = [domains[i] for i in torch.randperm(len(domains), generator=generator).tolist()]
    missing = [domain for domain in domains if domain not in groups[-1]]
    if missing:
        raise ValueError(f"domain {missing[0]!r} has no evaluation examples; there are those of {sorted(groups[-1])}")
    items = []
    for domain in domains:
        views = [Rows(table, group[domain]) for table, group in zip(tables, groups)]
        items.append(SingleTask(views[0], views[1] if len(views) > 1 else None, columns=columns, name=domain))
    return TaskStream(items, kind=kind, name=name or None)


def blurred_stream(tasks: TaskStream, *, blur: float = 0.0, seed: int = 0) -> DataStream:
    """The tasks' examples one after another, each seen once, with boundaries that nobody announces.

    Example i of the n_k of task k, in random order, is at place ``k + i / n_k + blur * e`` with e drawn from N(0, 1);
    the stream is in the order of places. Without blur tasks change abruptly.

    Args:
        tasks: of kind ``"domain"`` or ``"class"``: one head learns them all.
        blur: standard deviation of the places, in tasks.
        seed: of the order.

    Raises:
        ValueError: negative blur, or a stream of tasks with heads of their own.
    """
    if not 0 <= blur < math.inf:
        raise ValueError(f"blur must be finite and not negative, got {blur}")
    if tasks.kind == "task":
        raise ValueError("in a stream without boundaries no example knows its head: use kind 'class' or 'domain'")
    random = np.random.default_rng(seed_of("blur", seed))
    tables = [item.train_source.table for item in tasks]
    places = [
        number + random.permutation(len(table)) / len(table) + blur * random.standard_normal(len(table))
        for number, table in enumerate(tables)
    ]
    order = torch.from_numpy(np.concatenate(places).argsort(kind="stable"))
    first = tasks[0].train_source
    return DataStream(
        Rows(InARow(tables), order),
        evaluation={name: source for name, (source, _) in tasks.evaluations().items()} or None,
        columns=first.columns,
        task=first.task,
        augment=first.augment,
        name=tasks.name,
    )


def _rearranged(
    train: Any, evaluation: Any, makers: Sequence[Any], what: str, kind: Kind, columns: Columns, name: str
) -> TaskStream:
    def views(make: Any, images: Images) -> list[Table]:
        origin = make(image_size(*images[0]))
        return [Rearranged(table, column, origin) for table, column in images]

    return _seen(train, evaluation, [partial(views, make) for make in makers], what, kind, columns, name)


def _seen(
    train: Any,
    evaluation: Any,
    makers: Sequence[Callable[[Images], list[Table]]],
    what: str,
    kind: Kind,
    columns: Columns,
    name: str,
) -> TaskStream:
    """One task for each way to see the images."""
    if kind == "class":
        raise ValueError(f"{what} tasks have the same classes all along: their kind is 'domain' or 'task', not 'class'")
    sources = [Source.of(one, columns=columns, name=name or None) for one in (train, evaluation) if one is not None]
    for source in sources:
        if "pixel_values" not in source.fields.inputs:
            raise ValueError(f"{source.where}: only images can be {what}")
    images = [(source.table, source.fields.inputs["pixel_values"]) for source in sources]
    items = []
    for number, make in enumerate(makers, 1):
        views = make(images)
        second = views[1] if len(views) > 1 else None
        items.append(SingleTask(views[0], second, columns=columns, name=f"{what}-{number}"))
    return TaskStream(items, kind=kind, name=name or None)


def _labels(source: Source) -> tuple[str, Tensor]:
    column = source.fields.labels
    labels = source.table.labels(column) if isinstance(column, str) else None
    if not isinstance(column, str) or labels is None or labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"{source.where} has no column of class numbers by which it could be split")
    return column, labels


def _classes(source: Source, group: Sequence[int], kind: Kind, names: Sequence[str] | None) -> Rows:
    column, labels = _labels(source)
    rows = torch.isin(labels, torch.tensor(list(group))).nonzero().flatten()
    if not len(rows):
        raise ValueError(f"{source.where} has no example of the classes {', '.join(map(str, group))}")
    if kind == "class":
        return Rows(source.table, rows, column)
    numbers = torch.full((max(int(labels.max()), *group) + 1,), -1)  # evaluation data may lack the highest class
    numbers[torch.tensor(list(group))] = torch.arange(len(group))
    chosen = [names[label] for label in group] if names and kind == "task" else [str(i) for i in range(len(group))]
    return Rows(source.table, rows, column, numbers, chosen)


def _positive(count: int) -> int:
    if count < 1:
        raise ValueError(f"a stream needs at least one task of at least one class, got {count}")
    return count
