"""``hubtransfer train``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hubtransfer import experiment
from hubtransfer.commands import report
from hubtransfer.commands.display import loud


def run(recipe: str, overrides: Sequence[str], *, results: str | None, fresh: bool) -> None:
    """Runs a recipe, or all those of a folder or of a pattern in order of their names, and prints tables of results.

    Raises:
        ValueError: the folder or the pattern has no recipe, or several recipes have one results file.
    """
    if experiment.is_main_process():
        loud()
    files = recipes(recipe)
    if results is not None and len(files) > 1:
        raise ValueError(f"--results names one file, but {recipe} is {len(files)} recipes: leave it out, or run one")
    for file in files:
        records = experiment.run(file, overrides, results=results, fresh=fresh)
        if experiment.is_main_process():
            report.show(experiment.summarise(records))


def recipes(given: str) -> list[str]:
    """Files that a name stands for: itself, a folder's, or those that fit a pattern such as ``recipes/*_mnist.yaml``.

    Raises:
        ValueError: the folder or the pattern has none.
    """
    path = Path(given)
    if path.is_file() or not (path.is_dir() or any(sign in path.name for sign in "*?[")):
        return [given]
    folder, pattern = (path, "*.yaml") if path.is_dir() else (path.parent, path.name)
    found = sorted(str(file) for file in folder.glob(pattern))
    if not found:
        raise ValueError(f"{folder} has no recipe {pattern}")
    return found
