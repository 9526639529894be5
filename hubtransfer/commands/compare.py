"""``hubtransfer compare``: the results of several recipes side by side, within a document that says which.

A document may hold several such tables, one of them with a picture.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubtransfer.config import from_dict, unknown_name, write_whole
from hubtransfer.evaluation.confidence import mean_interval
from hubtransfer.evaluation.side_by_side import Row, differences, draw
from hubtransfer.evaluation.stream_metrics import transfer_scores_by_seed
from hubtransfer.experiment import read_results
from hubtransfer.yaml_text import parse_yaml

_PLACE = re.compile(r"<!-- compare:begin (.*?) -->\n(.*?)<!-- compare:end -->", flags=re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a table of a document compares.

    Attributes:
        recipes: patterns of recipes' names, spaces between; their results files lie in the document's folder.
        columns: path of the grid whose values are the columns; none: the tasks are.
        learned: the columns are these numbers of tasks that a stream has taught by then, and the number is the mean
            accuracy on them: what is retained. In place of `columns`.
        first: the mean is that of this many first tasks alone, of those `learned`; none: of all.
        metric: which number; "transfer_score" is that of a task learned after another (`transfer_scores`), by task.
        also: metrics of tasks that do not have that one, by task; only where the tasks are the columns.
        parameters: whether a column shows how many parameters the model has, all tasks together, mean over seeds.
        percent: show 100 times the number.
        differences: pairs (label, label) of recipes whose difference is shown, paired by seed.
        picture: whether a PNG of the document's name is drawn beside it.
    """

    recipes: str
    columns: str | None = None
    learned: tuple[int, ...] = ()
    first: int | None = None
    metric: str = "accuracy"
    also: Mapping[str, str] = field(default_factory=dict)
    parameters: bool = False
    percent: bool = True
    differences: tuple[tuple[str, str], ...] = ()
    picture: bool = True

    def __post_init__(self) -> None:
        """Checks the first tasks.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.first is not None and (self.first < 1 or not self.learned):
            raise ValueError(f"first must be at least 1 and stand beside learned, got {self.first}")

    @property
    def across(self) -> str:
        """What the columns are, in words."""
        return "tasks learned" if self.learned else self.columns or "task"


def run(path: str) -> None:
    """Writes tables and picture of a document anew.

    Raises:
        FileNotFoundError: there is no such document.
        ValueError: it does not say what to compare, or there is nothing to compare.
    """
    document = Path(path)
    text = document.read_text(encoding="utf-8")
    pictured = [wanted for wanted in _wanted(text, document.name) if wanted.picture]
    write_whole(document, render(document))
    for wanted in pictured:
        draw(
            _rows(document.parent, wanted),
            document.with_suffix(".png"),
            wanted.metric,
            wanted.across,
            _scale(wanted),
            sorted({wanted.learned[len(wanted.learned) // 2], wanted.learned[-1]}) if wanted.learned else (),
        )


def render(document: Path) -> str:
    """The document's text with its tables made anew from the results files beside it.

    Raises:
        ValueError: it does not say what to compare, or there is nothing to compare.
    """
    text = document.read_text(encoding="utf-8")
    made = iter([_comparison(document, wanted) for wanted in _wanted(text, document.name)])
    return _PLACE.sub(
        lambda found: f"<!-- compare:begin {found[1]} -->\n{next(made)}\n<!-- compare:end -->",
        text,
    )


def _comparison(document: Path, wanted: Comparison) -> str:
    """What goes between two comments."""
    rows = _rows(document.parent, wanted)
    body = [_table(rows, wanted), *_teachers(document.parent, wanted)]
    if wanted.picture:
        body.append(f"![{wanted.metric} by {wanted.across}]({document.with_suffix('.png').name})")
    if wanted.differences:
        body.append(_difference_table(rows, wanted))
    return "\n\n".join(body)


def _wanted(text: str, where: str) -> list[Comparison]:
    found = [from_dict(Comparison, parse_yaml(inside, where), where) for inside, _ in _PLACE.findall(text)]
    if not found:
        raise ValueError(
            f"{where} has no comments <!-- compare:begin {{recipes: '*_few', columns: data.limit}} --> and "
            "<!-- compare:end --> between which the table goes"
        )
    if sum(wanted.picture for wanted in found) > 1:
        raise ValueError(f"{where} has one picture: give all tables but one `picture: false`")
    return found


def _documents(folder: Path, wanted: Comparison) -> list[dict[str, Any]]:
    files = []
    for pattern in wanted.recipes.split():
        found = sorted(folder.glob(f"{pattern}.results.json"))
        if not found:
            raise ValueError(f"{folder} has no results files {pattern}.results.json: run those recipes first")
        files += [file for file in found if file not in files]
    return [{**json.loads(file.read_text(encoding="utf-8")), "cells": _cells(file)} for file in files]


def _cells(file: Path) -> list[dict[str, Any]]:
    """The cells of a results file, the transfer scores among their numbers."""
    cells = read_results(file)
    scored = zip(cells, transfer_scores_by_seed(cells))
    return [
        {**cell, "numbers": cell["numbers"] | {f"{task}/transfer_score": value for task, value in found.items()}}
        for cell, found in scored
    ]


def _rows(folder: Path, wanted: Comparison) -> list[Row]:
    """One row a recipe, or one for each alternative of what its grid changes besides the columns."""
    found: dict[str, Row] = {}
    sizes: dict[str, dict[int, int]] = {}
    for document in _documents(folder, wanted):
        label = (document.get("headline") or {}).get("label") or document["recipe"]
        for cell in document["cells"]:
            changes = dict(cell["overrides"])
            numbers = _retained(cell, wanted) if wanted.learned else _columns(changes, cell["numbers"], wanted)
            if not numbers:
                continue
            changed = (f"{k.rpartition('.')[2]}={v}" for k, v in changes.items())
            name = cell["name"] if "name" in cell else " ".join([label, *changed])
            row = found.setdefault(name, Row(name, document["recipe"], {}))
            if (size := (cell.get("parameters") or {}).get("total")) is not None:
                sizes.setdefault(name, {}).setdefault(cell["seed"], size)
            for column, number in numbers.items():
                row.cells.setdefault(column, {})[cell["seed"]] = number
    if not found:
        what = f"values of {wanted.columns!r}" if wanted.columns else wanted.across
        raise ValueError(f"no results of {wanted.recipes} have {wanted.metric!r} for {what}")
    for name, size in sizes.items():
        found[name] = found[name]._replace(parameters=round(math.fsum(size.values()) / len(size)))
    if wanted.columns is None and not wanted.learned:
        return list(found.values())
    leading = (max if wanted.learned else min)(column for row in found.values() for column in row.cells)
    return sorted(found.values(), key=lambda row: -row.mean(leading))


def _retained(cell: Mapping[str, Any], wanted: Comparison) -> dict[Any, float]:
    """Mean accuracy on the tasks so far, or the first of them, by how many they are; of joint training, on all."""
    rows = (cell.get("stream") or {}).get("accuracy", [])
    after = {len(rows[0]): rows[0]} if len(rows) == 1 else dict(enumerate(rows, start=1))
    asked = {count: after[count][: min(count, wanted.first or count)] for count in wanted.learned if count in after}
    return {count: math.fsum(values) / len(values) for count, values in asked.items()}


def _columns(changes: dict[str, Any], numbers: Mapping[str, float], wanted: Comparison) -> dict[Any, float]:
    """A cell's numbers by column: its tasks', or the one of its place in the grid, which is no longer in changes.

    A cell of one task alone does not name it with its numbers: the grid does, in ``data.labels``.
    """
    if wanted.columns is None:
        alone = next(iter(changes.get("data.labels", ())), "")
        split = {name: name.rpartition("/") for name in numbers}
        found = {(task or alone, metric): numbers[name] for name, (task, _, metric) in split.items()}
        named = {task: wanted.also.get(task, wanted.metric) for task, _ in found if task}
        columns = {task: task if metric == wanted.metric else f"{task} ({metric})" for task, metric in named.items()}
        return {columns[task]: found[task, metric] for task, metric in named.items() if (task, metric) in found}
    if wanted.columns not in changes or wanted.metric not in numbers:
        return {}
    return {changes.pop(wanted.columns): numbers[wanted.metric]}


def _table(rows: list[Row], wanted: Comparison) -> str:
    columns = sorted({column for row in rows for column in row.cells})
    best = {c: max(row.mean(c) for row in rows) for c in columns}
    seeds = sorted({len(values) for row in rows for values in row.cells.values()})
    many = "-".join(map(str, sorted({seeds[0], seeds[-1]})))
    what = wanted.metric.replace("_", " ").capitalize() + (" in %" if wanted.percent else "")
    if wanted.first is not None:
        what += " on the first task" if wanted.first == 1 else f" on the first {wanted.first} tasks"
    lines = [
        f"{what}, mean over {many} seeds ± half of the 95 % "
        f"interval, by `{wanted.across}`; the best of a column is bold.",
        "",
        f"| recipe | {' | '.join([*map(str, columns), *(['parameters'] if wanted.parameters else [])])} |",
        "|---|" + "---:|" * (len(columns) + wanted.parameters),
    ]
    for row in rows:
        cells = [_cell(row.cells.get(c), wanted, bold=row.mean(c) == best[c]) for c in columns]
        cells += [f"{row.parameters:,}" if row.parameters else ""] if wanted.parameters else []
        lines.append(f"| [{row.name}]({row.recipe}.yaml) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _teachers(folder: Path, wanted: Comparison) -> list[str]:
    summaries = [document.get("teachers", []) for document in _documents(folder, wanted)]
    chosen = [row for rows in summaries for row in rows if row["metric"] == wanted.metric]
    found = {
        _cell_of(row["mean"], row["interval"] and (row["interval"][1] - row["interval"][0]) / 2, wanted): row["n"]
        for row in chosen
    }
    return (
        ["Teacher: " + "; ".join(f"{cell} ({n} {'seed' if n == 1 else 'seeds'})" for cell, n in found.items()) + "."]
        if found
        else []
    )


def _difference_table(rows: list[Row], wanted: Comparison) -> str:
    named = {row.name: row for row in rows}
    for name in (name for pair in wanted.differences for name in pair):
        if name not in named:
            raise ValueError(unknown_name("recipe", name, named, "differences"))
    found = [(a, b, differences(named[a], named[b])) for a, b in wanted.differences]
    columns = sorted({column for _, _, values in found for column in values})
    lines = [
        f"Differences{' in percentage points' if wanted.percent else ''}, paired by seed; bold where the 95 % interval "
        "does not hold 0.",
        "",
        f"| difference | {' | '.join(map(str, columns))} |",
        "|---|" + "---:|" * len(columns),
    ]
    for a, b, values in found:
        cells = [_difference(values.get(column), wanted) for column in columns]
        lines.append(f"| {a} minus {b} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Mapping[int, float] | None, wanted: Comparison, bold: bool) -> str:
    if not values:
        return ""
    found = mean_interval(list(values.values()))
    text = _cell_of(found.mean, found.half, wanted)
    return f"**{text}**" if bold else text


def _cell_of(mean: float, half: float | None, wanted: Comparison) -> str:
    scale, digits = _scale(wanted), 1 if wanted.percent else 3
    return f"{scale * mean:.{digits}f}" + ("" if half is None else f" ± {scale * half:.{digits}f}")


def _difference(values: list[float] | None, wanted: Comparison) -> str:
    if not values:
        return ""
    found = mean_interval(values)
    text = ("+" if found.mean >= 0 else "") + _cell_of(found.mean, found.half, wanted)
    return f"**{text}**" if found.half is not None and (found.low > 0 or found.high < 0) else text


def _scale(wanted: Comparison) -> float:
    return 100.0 if wanted.percent else 1.0
