"""Runs a recipe's grid of cells (seeds times alternatives) and keeps what was measured, so that it can go on later.

Each cell is written to the results file as soon as it is finished, and a finished cell is not run again unless its
recipe changed. A run that was interrupted inside a cell resumes from that cell's last whole checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from hubtransfer.config import override, to_dict, to_yaml, write_whole
from hubtransfer.recipe import Recipe, build, read
from hubtransfer.recipe_methods import method_name

log = logging.getLogger(__name__)

_NOT_PART_OF_A_CELL = ("seeds", "grid", "headline", "about")
_NOT_PART_OF_THE_RESULT = ("output_dir", "progress", "plots", "tracker", "resume", "logging_steps", "keep", "workers")


@dataclass(frozen=True)
class Cell:
    """One run of a recipe.

    Attributes:
        recipe: with this cell's overrides in place.
        seed: of this run.
        overrides: what the grid sets, path -> value.
        key: hash of everything that the numbers depend on.
        name: what the grid calls this alternative, for tables.
    """

    recipe: Recipe
    seed: int
    overrides: Mapping[str, Any]
    key: str
    name: str | None = None

    @property
    def label(self) -> str:
        """Short text that names the cell within its grid."""
        changes = [self.name] if self.name else [f"{path}={_short(value)}" for path, value in self.overrides.items()]
        return " ".join([*changes, f"seed={self.seed}"])

    @property
    def folder_name(self) -> str:
        """Name of the cell's output folder: another version of the recipe never meets its checkpoints."""
        return f"seed{self.seed}-{self.key[:8]}"


def digest(plain: Any) -> str:
    """SHA-256 (hex) of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def cells(recipe: Recipe) -> list[Cell]:
    """Every cell of the recipe's grid, each strictly read.

    Raises:
        ValueError: the grid names a key that does not exist, or gives a wrong value.
    """
    plain = to_dict(recipe, defaults=False)
    found = []
    for changes in _alternatives(recipe.grid):
        name = changes.pop("label", None)
        changed = override(plain, [f"{path}={json.dumps(value)}" for path, value in changes.items()])
        changed.pop("grid", None)
        one = read(changed)
        # without defaults, so that an option that is added later does not make measured numbers look outdated
        identity = {k: v for k, v in to_dict(one, defaults=False).items() if k not in _NOT_PART_OF_A_CELL}
        training = identity.get("training", {})
        identity["training"] = {k: v for k, v in training.items() if k not in _NOT_PART_OF_THE_RESULT}
        found += [Cell(one, seed, changes, digest([identity, seed]), name) for seed in recipe.seeds]
    return found


def run(
    recipe: str | PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    results: str | PathLike[str] | None = None,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Runs every cell that is not finished yet and returns the finished ones' records.

    Args:
        recipe: file or mapping.
        overrides: ``key=value`` with dotted paths.
        results: results file. By default ``<recipe>.results.json`` beside the recipe; with overrides it lies in the
            output folder, so that a try-out never mixes with the recipe's own numbers.
        fresh: run finished cells again, from the start.
        say: where a line about each cell goes.

    Raises:
        ValueError: the recipe is not valid; raised before anything runs.
    """
    checked = read(recipe, overrides)
    name = "recipe" if isinstance(recipe, Mapping) else Path(recipe).stem
    root = Path(checked.training.get("output_dir", Path("runs") / name))
    path = Path(results) if results is not None else _default_results(recipe, overrides, root, name)
    todo = cells(checked)
    known = {cell["key"]: cell for cell in read_results(path)}
    finished = {} if fresh else {c.key: _named(known[c.key], c) for c in todo if c.key in known}
    others = [record for key, record in known.items() if key not in {cell.key for cell in todo}]
    if others and not overrides:  # the recipe's own file holds what the recipe says now; try-outs pile up
        log.warning("%s: %d cells of an earlier version of the recipe are dropped", path, len(others))
        others = []
    writes = is_main_process()
    for number, cell in enumerate(todo, 1):
        place = f"[{number}/{len(todo)}] {cell.label}"
        if cell.key in finished:
            if writes:
                say(f"{place}: finished earlier, {_numbers(finished[cell.key])}")
            continue
        folder = root / cell.folder_name
        if writes:
            say(f"{place}: running in {folder}")
        finished[cell.key] = _run_cell(cell, folder, fresh)
        if writes:
            ordered = others + [finished[c.key] for c in todo if c.key in finished]
            write_whole(path, json.dumps(_document(name, checked, ordered), indent=1) + "\n")
            say(f"{place}: {_numbers(finished[cell.key])}, {finished[cell.key]['seconds']:.0f} s")
    if writes and todo:
        if not overrides and path.is_file():  # what surrounds the cells (headline, summary) follows the recipe
            ordered = [finished[cell.key] for cell in todo]
            write_whole(path, json.dumps(_document(name, checked, ordered), indent=1) + "\n")
        say(f"results: {path}")
    return [finished[cell.key] for cell in todo]


def summarise(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and 95 % confidence interval over seeds (Student's t), one row for each alternative and number."""
    from hubtransfer.evaluation import mean_interval

    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(json.dumps(record["overrides"], sort_keys=True), []).append(record)
    rows = []
    for group in groups.values():
        for metric in group[0]["numbers"]:
            values = [r["numbers"][metric] for r in group if metric in r["numbers"]]
            found = mean_interval(values)
            rows.append(
                {
                    **({"name": group[0]["name"]} if "name" in group[0] else {}),
                    "overrides": dict(group[0]["overrides"]),
                    "metric": metric,
                    "mean": found.mean,
                    "interval": None if found.half is None else [found.low, found.high],
                    "n": found.n,
                }
            )
    return rows


def summarise_teachers(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same for the teachers, each counted once however many students it had; none where none is known."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        several = len(record.get("teachers", ())) > 1
        for number, teacher in enumerate(record.get("teachers", ())):
            one = {"overrides": {"teacher": number} if several else {}, "numbers": teacher["numbers"]}
            found.setdefault(json.dumps(one, sort_keys=True), one)
    return summarise(found.values())


def _teachers_of(method: Any) -> list[dict[str, Any]]:
    """Size and measured numbers of those of a method's teachers that a run of this library trained."""
    from hubtransfer.models import Teacher
    from hubtransfer.models.record import record_of

    found = []
    for teacher in (module for module in method.modules() if isinstance(module, Teacher)):
        record = record_of(teacher.model, teacher.task)
        if record is not None:
            mine = [r for r in record["results"] if r["task"] == teacher.task]
            numbers = {r["metric"].rpartition("/")[2]: r["values"][0] for r in mine}
            found.append({"parameters": sum(p.numel() for p in teacher.model.parameters()), "numbers": numbers})
    return found


def _run_cell(cell: Cell, folder: Path, fresh: bool) -> dict[str, Any]:
    from hubtransfer.training import Trainer

    training = {**cell.recipe.training, "output_dir": str(folder)}
    if is_main_process():
        if fresh:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        write_whole(folder / "recipe.yaml", to_yaml(to_dict(replace(cell.recipe, seeds=(cell.seed,)), defaults=False)))
    start = time.monotonic()
    built = build(replace(cell.recipe, training=training), cell.seed)
    teachers = _teachers_of(built.method)
    result = Trainer(*built).train(resume=None if fresh else training.get("resume", "auto"))
    record = result.record
    found = {
        "key": cell.key,
        "seed": cell.seed,
        "overrides": dict(cell.overrides),
        "numbers": dict(result.metrics),
        "steps": result.steps,
        "seconds": round(time.monotonic() - start, 2),
        "parameters": record.get("parameters"),
        **({"stream": record["stream"]} if "stream" in record else {}),
        **({"teachers": teachers} if teachers else {}),
        "data": record.get("data"),
        "processes": record.get("processes", 1),
        "versions": record.get("versions"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    return _named(found, cell)


def _named(record: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    """A cell's record under the name and with the overrides that the grid gives it now; its numbers are the same."""
    plain = {key: value for key, value in record.items() if key != "name"} | {"overrides": dict(cell.overrides)}
    return plain if cell.name is None else plain | {"name": cell.name}


def _alternatives(grid: Mapping[str, list[Any]] | Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    if not grid:
        return [{}]
    if isinstance(grid, Mapping):
        return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    return [dict(one) for one in grid]


def _default_results(
    recipe: str | PathLike[str] | Mapping[str, Any], overrides: Sequence[str], root: Path, name: str
) -> Path:
    beside = not isinstance(recipe, Mapping) and not overrides
    return (Path(recipe).parent if beside else root) / f"{name}.results.json"  # type: ignore[arg-type]


def read_results(path: Path) -> list[dict[str, Any]]:
    """The cells of a results file; none when there is no file.

    Raises:
        ValueError: it is something else.
    """
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no results file ({error!r}); move it away or name another one") from error


def _document(name: str, recipe: Recipe, records: list[dict[str, Any]]) -> dict[str, Any]:
    headline = None if recipe.headline is None else to_dict(recipe.headline, defaults=False)
    head: dict[str, Any] = {"recipe": name, "method": method_name(recipe), "headline": headline}
    teachers = summarise_teachers(records)
    head |= {"teachers": teachers} if teachers else {}
    return {**head, "summary": summarise(records), "cells": records}


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def _numbers(record: Mapping[str, Any]) -> str:
    shown = list(record["numbers"].items())[:3]
    return ", ".join(f"{name} {value:.4g}" for name, value in shown) or "no evaluation set"


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
