"""A finished run as tables, for the terminal or for a Markdown file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from hubtransfer.evaluation.confidence import mean_interval
from hubtransfer.evaluation.stream_metrics import accuracy_table

SHARES = ("accuracy", "f1", "precision", "recall", "iou", "match", "ece")
"""Endings of metrics that are shown as percentages."""


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        title: what it shows.
        columns: headings.
        rows: cells, text.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class Run:
    """What a run's folder holds.

    Attributes:
        folder: of the run.
        record: ``results.json``.
        log: rows of ``log.jsonl``; empty when there is none.
    """

    folder: Path
    record: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]


def read_run(folder: str | PathLike[str]) -> Run:
    """Read a run's folder.

    Raises:
        ValueError: no results there, or no valid JSON in them.
    """
    place = Path(folder)
    results = place / "results.json"
    if not results.is_file():
        inside = sorted(entry.parent.name for entry in place.glob("*/results.json"))
        hint = f"; runs inside it: {', '.join(inside)}" if inside else ""
        raise ValueError(f"{fspath(folder)} holds no results.json, which a run writes when it ends{hint}")
    try:
        record = json.loads(results.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{results} is no JSON: {error}") from error
    log = place / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else []
    return Run(
        place, record, [json.loads(line) for line in lines if line.endswith("\n")]
    )  # not a half-written last one


def sections(run: Run) -> list[Section]:
    """The tables of a run: results, parameters, what ran, how the losses and the numbers to watch went."""
    course = [_course(run.log, "losses", "Losses", "term"), _course(run.log, "watched", "Watched", "number")]
    record = run.record
    found = [_results(record), _stream(record), _parameters(record), _facts(record), *course]
    return [section for section in found if section is not None and section.rows]


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The results of a run as ``task/metric`` -> value, the mean where there are several seeds."""
    found: dict[str, float] = {}
    for result in record.get("results", ()):
        values = [float(value) for value in result.get("values", ())]
        if values:
            found.setdefault(f"{result.get('task') or ''}/{result['metric']}".lstrip("/"), sum(values) / len(values))
    return found


def mean_numbers(many: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each number over those runs that have it."""
    names = dict.fromkeys(name for one in many for name in one)
    return {n: sum(one[n] for one in many if n in one) / sum(n in one for one in many) for n in names}


def to_markdown(run: Run) -> str:
    """The tables and pictures as Markdown, for a file in the run's folder."""
    parts = [f"# {run.record.get('method', {}).get('title') or run.folder.name}"]
    for section in sections(run):
        head = "| " + " | ".join(section.columns) + " |"
        rule = "|" + "---|" * len(section.columns)
        rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in section.rows]
        parts.append("\n".join([f"## {section.title}", "", head, rule, *rows]))
    pictures = sorted(file.name for file in run.folder.glob("*.png"))
    if pictures:
        shown = [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures]
        parts.append("\n\n".join(["## Pictures", *shown]))
    return "\n\n".join(parts) + "\n"


def to_console(run: Run, console: Any = None) -> None:
    """Print the tables.

    Args:
        run: what to show.
        console: a ``rich`` console; None: the standard output.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    for section in sections(run):
        table = Table(title=escape(section.title), title_justify="left", title_style="bold")
        for number, name in enumerate(section.columns):
            numeric = number and all(row[number][:1] in "-0123456789" for row in section.rows)
            table.add_column(escape(name), justify="right" if numeric else "left")
        for row in section.rows:
            table.add_row(*map(escape, row))
        console.print(table)


def _results(record: Mapping[str, Any]) -> Section | None:
    rows = []
    for result in record.get("results", ()):
        values = [float(value) for value in result.get("values", ())]
        if not values:
            continue
        share = str(result.get("metric", "")).endswith(SHARES)
        found = mean_interval(values)
        shown = found.text(100, 2) if share else found.text(1, 4)
        unit = "%" if share else ""
        rows.append(
            (
                str(result.get("task") or ""),
                str(result.get("split") or result.get("dataset") or ""),
                f"{result.get('metric', '')} {unit}".strip(),
                shown.replace(" (n=1)", ""),
                str(result.get("n") or ""),
            )
        )
    columns = ("task", "evaluated on", "metric", "mean ± 95 % interval (seeds)", "examples")
    return Section("Results", columns, tuple(rows))


def _stream(record: Mapping[str, Any]) -> Section | None:
    """The accuracy matrix of a stream of tasks, with what each task cost."""
    stream = record.get("stream")
    if not stream:
        return None
    columns, rows = accuracy_table(stream)
    return Section("Accuracy (%) on each task after each task", columns, tuple(rows))


def _parameters(record: Mapping[str, Any]) -> Section | None:
    facts = record.get("parameters")
    if not facts:
        return None
    rows = (
        ("shared trunk", f"{facts['trunk']:,}"),
        ("changed by this run", f"{facts['changed']:,} ({facts['changed_percent']:.2f} % of the trunk)"),
    )
    return Section("Parameters", ("part", "count"), rows)


def _facts(record: Mapping[str, Any]) -> Section | None:
    method = record.get("method", {})
    known = {
        "method": method.get("name"),
        "paper": method.get("paper"),
        "steps": record.get("steps"),
        "seconds": record.get("seconds"),
        "processes": record.get("processes"),
        "seeds": ", ".join(map(str, record.get("seeds", ()))),
        "command": record.get("command"),
    }
    known |= {f"data {name}": _examples(facts) for name, facts in record.get("data", {}).items()}
    known |= {f"{name}": version for name, version in record.get("versions", {}).items()}
    return Section("What ran", ("fact", "value"), tuple((k, str(v)) for k, v in known.items() if v not in (None, "")))


def _examples(facts: Mapping[str, Any]) -> str:
    if facts.get("examples") is None:
        return "a stream"
    return f"{facts['examples']:,} examples, sha256 {str(facts.get('fingerprint'))[:12]}"


def _course(log: Sequence[Mapping[str, Any]], group: str, title: str, what: str) -> Section | None:
    """First and last value of every name in a group of the log's rows, by stage."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in log:
        for name, value in (row.get(group) or {}).items():
            found.setdefault((str(row.get("stage", "")), name), []).append((row["total"], value))
    rows = []
    for (stage, name), values in found.items():
        (_, first), (step, last) = values[0], values[-1]
        rows.append((stage, name, f"{first:.4g}", f"{last:.4g}", f"{step:,}"))
    return Section(title, ("stage", what, "first", "last", "at step"), tuple(rows))
