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
        baselines: Single-task runs (folders or results files, one for each task or of all), or `key=value`: which
            rows of the results file itself are the single-task ones. Shown is then the relative gain over them.
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
        name: relative_gain(report.numbers(found.record), single_numbers(single_task(baselines, ())))
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


Baselines = dict[int | None, dict[str, float]]
"""Numbers of single-task training by seed; under None the means of runs, whose seed is not known."""


def single_task(baselines: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Baselines:
    """The numbers of single-task training: each task's from one results file, or from one or more runs.

    Raises:
        FileNotFoundError: there is no such run or file.
        ValueError: no row of the results file is meant, or several rows of one seed tell of the same task.
    """
    found: Baselines = {}
    folders = [baseline for baseline in baselines if Path(baseline).is_dir()]
    if folders:
        found[None] = report.mean_numbers([report.numbers(report.read_run(folder).record) for folder in folders])
    told = dict.fromkeys(found.get(None, {}), ", ".join(folders))
    for baseline in (baseline for baseline in baselines if baseline not in folders):
        for cell in _rows(baseline, records):
            own = found.setdefault(cell["seed"], {})
            for name, number in cell["numbers"].items():
                other = told.setdefault(name, baseline)
                if other != baseline or name in own:
                    who = "tells more than once" if other == baseline else f"and {other} both tell"
                    raise ValueError(
                        f"{baseline} {who} of {name!r}; give one baseline a task, with one row a seed (or folders of "
                        "runs, which name their task even where a results file does not)"
                    )
                own[name] = number
    return found


def _rows(baseline: str, records: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The rows of a results file, or those of `records` that `key=value` means."""
    key, equals, value = baseline.partition("=")
    if Path(baseline).is_file():
        return experiment.read_results(Path(baseline))
    if not equals:
        raise FileNotFoundError(f"{baseline} is neither a finished run, a results file nor key=value")
    meant = [c for c in records if str(c["overrides"].get(key)) == value]
    if not meant:
        known = sorted({f"{k}={v}" for c in records for k, v in c["overrides"].items()})
        raise ValueError(f"no row has {baseline}; there are: {', '.join(known) or 'no alternatives'}")
    return meant


def single_numbers(single: Baselines, seed: int | None = None) -> dict[str, float]:
    """The single-task numbers to compare with: each of the same seed where there is such, else the mean."""
    return {**report.mean_numbers(list(single.values())), **single.get(seed, {})}


def gains(records: Sequence[Mapping[str, Any]], single: Baselines) -> list[dict[str, Any]]:
    """Rows of the relative gain over single-task numbers: of the same seed where there are such, else their mean."""
    measured = [
        {**cell, "numbers": {"relative_gain": relative_gain(cell["numbers"], single_numbers(single, cell["seed"]))}}
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
