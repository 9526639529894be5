"""``hubtransfer card``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hubtransfer.backbones import Backbone
from hubtransfer.commands.report import draw_pareto, single_numbers, single_task
from hubtransfer.evaluation import report
from hubtransfer.evaluation.multitask import first_metrics, relative_gain
from hubtransfer.models import TransferModel, card

PARETO = "pareto.png"


def run(path: str, repo: str | None, write: bool, baselines: Sequence[str] = ()) -> None:
    """Prints the generated card of a saved model or patch, or writes it as README.md.

    Args:
        path: Folder of the model or patch.
        repo: Repository it will be pushed to.
        write: Whether to write README.md.
        baselines: Single-task runs or results files: the card then has a row with the gain over them and, where there
            are two tasks and it is written, a picture of one task against the other.

    Raises:
        FileNotFoundError: the folder holds neither.
        ValueError: README.md was written by a person; it is never replaced. Or nothing was measured to be compared.
    """
    folder = Path(path)
    model, task = _load(folder)
    record = _record(folder)
    measured = report.numbers(record) if record else {}
    if baselines:
        record = _with_gain(record, folder, baselines)
    target = folder / "README.md"
    if not write:
        print(card.render(model, record, task, name=repo or folder.name))
        return
    if target.exists() and not card.is_generated(target.read_text(encoding="utf-8")):
        raise ValueError(f"{target} was written by a person and stays; move it away to have one generated")
    if baselines and record:
        record = _with_picture(record, measured, folder, baselines)
    card.write(folder, model, record, task, name=repo)
    print(target)


def _with_gain(record: dict[str, Any] | None, folder: Path, baselines: Sequence[str]) -> dict[str, Any]:
    """The record with one more result: the relative gain over single-task training, averaged over tasks."""
    if not record or not record.get("results"):
        raise ValueError(
            f"nothing was measured for {folder}, so there is no gain over {', '.join(baselines)} to tell of"
        )
    single = single_numbers(single_task(baselines, ()))
    first = record["results"][0]
    gain = {
        "task": "all tasks",
        "dataset": first["dataset"],
        "split": "relative to single-task networks",
        "metric": "relative_gain",
        "values": [relative_gain(report.numbers(record), single)],
        "n": None,
    }
    return {**record, "results": [*record["results"], gain]}


def _with_picture(
    record: dict[str, Any], measured: dict[str, float], folder: Path, baselines: Sequence[str]
) -> dict[str, Any]:
    """The record with a plot of the model beside single-task training, drawn into the folder."""
    if len(first_metrics(measured)) != 2:
        return record
    numbers = {"this model": measured, "single task": single_numbers(single_task(baselines, ()))}
    draw_pareto([{"overrides": {}, "name": name, "numbers": of} for name, of in numbers.items()], folder / PARETO)
    return {**record, "plots": [*record.get("plots", ()), PARETO]}


def _load(folder: Path) -> tuple[TransferModel, str | None]:
    """The model, and the task when the folder holds a patch alone (its trunk has random weights then)."""
    if not (folder / "patch.json").is_file():
        return TransferModel.from_pretrained(folder), None
    source = json.loads((folder / "patch.json").read_text(encoding="utf-8"))["source"]
    model = TransferModel(Backbone.from_source(source))
    return model, model.load_patch(folder, strict=False)


def _record(folder: Path) -> dict[str, Any] | None:
    """What the trainer recorded, in the folder or beside it."""
    for file in (folder / "run.json", folder.parent / "results.json"):
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    return None
