"""Pictures of a stream of tasks: the accuracy matrix, and what was retained of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hubtransfer.evaluation.plots import DASHES, GREY, Path, figure_at

CELLS_AT_MOST = 12
"""Tasks whose accuracies still fit into the cells of the matrix."""


def accuracy_matrix(stream: Mapping[str, Any], path: Path) -> None:
    """The accuracy on each task (column) after each task (row), in colours and, for few tasks, in numbers.

    Args:
        stream: what a record holds of a stream: ``tasks``, ``after`` and ``accuracy``, rows by columns in [0, 1].
        path: PNG file to write.

    Raises:
        ValueError: there are no rows.
    """
    values = _values(stream)
    rows, columns = values.shape
    side = 0.42 if columns <= CELLS_AT_MOST else 0.24
    with figure_at(path, max(3.6, side * columns + 2.2), max(2.6, side * rows + 1.4)) as figure:
        axis = figure.subplots()
        image = axis.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="equal")
        axis.grid(False)
        axis.set(title="Accuracy along the stream", xlabel="evaluated on", ylabel="after learning")
        axis.set_xticks(range(columns), stream["tasks"], rotation=90, fontsize=8 if columns <= CELLS_AT_MOST else 6)
        axis.set_yticks(range(rows), stream["after"], fontsize=8 if columns <= CELLS_AT_MOST else 6)
        if columns <= CELLS_AT_MOST:
            for (row, column), value in np.ndenumerate(values):
                shade = "white" if value < 0.6 else "black"
                axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=shade)
        figure.colorbar(image, ax=axis, fraction=0.05, pad=0.03)


def retention(stream: Mapping[str, Any], path: Path) -> None:
    """One line a task: its accuracy from when it was learned on; the mean over the tasks so far is thick.

    Args:
        stream: what a record holds of a stream: ``tasks``, ``after`` and ``accuracy``, rows by columns in [0, 1].
        path: PNG file to write.

    Raises:
        ValueError: there are no rows.
    """
    values = _values(stream)
    rows, columns = values.shape
    with figure_at(path, 6.4, 3.6) as figure:
        from matplotlib import colormaps

        axis = figure.subplots()
        shades = colormaps["viridis"](np.linspace(0, 0.92, columns))
        for task in range(min(rows, columns)):
            steps = np.arange(task, rows)
            dashes = DASHES[task % len(DASHES)] if columns <= CELLS_AT_MOST else "-"
            axis.plot(steps + 1, values[task:, task], dashes, color=shades[task], linewidth=1.2, marker=".")
            if columns <= CELLS_AT_MOST:
                axis.annotate(str(stream["tasks"][task]), (rows, values[-1, task]), (4, 0), fontsize=8,
                              textcoords="offset points", va="center", color=shades[task])  # fmt: skip
        means = [values[row, : row + 1].mean() for row in range(rows)]
        axis.plot(np.arange(rows) + 1, means, color=GREY, linewidth=3, label="mean of the tasks so far")
        axis.set(title="What is retained", xlabel="tasks learned", ylabel="accuracy", ylim=(0, 1.02))
        axis.locator_params(axis="x", integer=True)
        axis.legend(loc="lower left")


def _values(stream: Mapping[str, Any]) -> np.ndarray:
    values: Sequence[Sequence[float]] = stream["accuracy"]
    if not values:
        raise ValueError("the stream has no row to draw: nothing was evaluated after a task")
    return np.array(values, dtype=float)
