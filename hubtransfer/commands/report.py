"""``hubtransfer report``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hubtransfer import experiment
from hubtransfer.commands import display
from hubtransfer.evaluation import report
from hubtransfer.evaluation.multitask import first_metrics, relative_gain
from hubtransfer.evaluation.stream_metrics import transfer_scores_by_seed


def run(path: str, as_json: bool, baselines: Sequence[str] = (), plots: str | None = None) -> None:
    """Shows a recipe's results file, or every run under a folder.

    Args:
        path: Results file, or folder of runs.
        as_json: Print JSON in place of tables.
        baselines: Single-task runs (folders or results files), or `key=value`: which rows of the results file itself
            are the single-task ones. Shown is then the relative gain over them.
        plots: Folder for pictures of what two tasks reach.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: a file is no results file, or there is no such baseline.
    """
    place = Path(path)
    grids = [place] if place.is_file() else sorted(place.rglob("*.results.json"))
    runs = sorted(file.parent for file in place.rglob("results.json"))
    if not grids and not runs:
        raise FileNotFoundError(f"{path} is neither a results file nor a folder of a finished run (with results.json)")
    cells = {str(file): experiment.read_results(file) for file in grids}
    tables = {name: experiment.summarise(records) for name, records in cells.items()}
    for name, records in cells.items() if baselines else ():
        tables[name] += gains(records, single_task(baselines, records))
    for name, records in cells.items():
        tables[name] += scores(records)
    alone = {str(folder): report.read_run(folder) for folder in runs}
    gained = {
        name: relative_gain(report.numbers(found.record), report.mean_numbers(single_task(baselines, ())))
        for name, found in (alone.items() if baselines else ())
    }
    if plots is not None:
        for name, records in cells.items():
            picture = Path(plots) / f"{Path(name).name.removesuffix('.results.json')}_pareto.png"
            print(f"plot: {draw_pareto(records, picture)}")
    if as_json:
        extra = {name: {"relative_gain": value} for name, value in gained.items()}
        display.as_json(tables | {name: {**found.record, **extra.get(name, {})} for name, found in alone.items()})
        return
    for name, rows in tables.items():
        show(rows, title=name)
    for name, found in alone.items():
        print(f"\n{name}")
        report.to_console(found)
        if name in gained:
            print(f"relative gain over single-task training: {100 * gained[name]:+.2f} %")
        for plot in sorted(found.folder.glob("*.png")):
            print(f"plot: {plot}")


def single_task(baselines: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The numbers of single-task runs, one mapping a seed or run.

    Raises:
        FileNotFoundError: there is no such run or file.
        ValueError: no row of the results file is meant.
    """
    found: list[dict[str, float]] = []
    for baseline in baselines:
        key, equals, value = baseline.partition("=")
        place = Path(baseline)
        if place.is_dir():
            found.append(report.numbers(report.read_run(place).record))
        elif place.is_file():
            found += [{**cell["numbers"], "seed": cell["seed"]} for cell in experiment.read_results(place)]
        elif equals:
            meant = [c for c in records if str(c["overrides"].get(key)) == value]
            if not meant:
                known = sorted({f"{k}={v}" for c in records for k, v in c["overrides"].items()})
                raise ValueError(f"no row has {baseline}; there are: {', '.join(known) or 'no alternatives'}")
            found += [{**cell["numbers"], "seed": cell["seed"]} for cell in meant]
        else:
            raise FileNotFoundError(f"{baseline} is neither a finished run, a results file nor key=value")
    return found


def gains(records: Sequence[Mapping[str, Any]], single: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Rows of the relative gain over single-task numbers: of the same seed where there are such, else their mean."""
    by_seed = {numbers["seed"]: numbers for numbers in single if "seed" in numbers}
    mean = report.mean_numbers(single)
    measured = [
        {**cell, "numbers": {"relative_gain": relative_gain(cell["numbers"], by_seed.get(cell["seed"], mean))}}
        for cell in records
    ]
    return experiment.summarise(measured)


def scores(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the transfer scores of streams, relative to streams of the same seed that begin with the task."""
    measured = [
        {**cell, "numbers": {f"transfer_score/{task}": value for task, value in found.items()}}
        for cell, found in zip(records, transfer_scores_by_seed(records))
        if found
    ]
    return experiment.summarise(measured)


def draw_pareto(records: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draws what the rows of a results file reach at two tasks.

    Raises:
        ValueError: it has not two tasks.
    """
    from hubtransfer.evaluation.multitask_views import pareto

    tasks = first_metrics(records[0]["numbers"]) if records else {}
    if len(tasks) != 2:
        raise ValueError(f"a picture of task against task needs two tasks, not {len(tasks)}: {', '.join(tasks)}")
    axes = [f"{task}/{metric}" for task, (metric, _) in tasks.items()]
    points: dict[str, list[tuple[float, float]]] = {}
    for cell in records:
        if all(axis in cell["numbers"] for axis in axes):
            points.setdefault(cell.get("name") or _label(cell["overrides"]), []).append(
                tuple(cell["numbers"][axis] for axis in axes)
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    share = all(axis.endswith(report.SHARES) for axis in axes)
    pareto(points, path, (axes[0], axes[1]), percent=share)
    return path


def _label(overrides: Mapping[str, Any]) -> str:
    return ", ".join(display.short(key, value) for key, value in overrides.items()) or "the recipe"


def show(rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Prints rows of ``experiment.summarise``."""
    cells = [
        (
            row.get("name") or _label(row["overrides"]),
            row["metric"],
            f"{row['mean']:.4f}",
            "" if row["interval"] is None else f"{row['interval'][0]:.4f} to {row['interval'][1]:.4f}",
            row["n"],
        )
        for row in rows
    ]
    columns = ["cell", "metric", "mean", "95 % interval", "seeds"]
    display.table(title, columns, cells, right=["mean", "seeds"])
