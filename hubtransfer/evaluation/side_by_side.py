"""Recipes side by side over the values of one grid: what each reaches, paired differences, and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from os import PathLike
from typing import Any, NamedTuple

from hubtransfer.evaluation.confidence import Interval, mean_interval
from hubtransfer.evaluation.plots import COLOURS, DASHES, GREY, figure_at

LINE_FROM = 3
"""Columns that a row needs to be drawn as a line."""


class Row(NamedTuple):
    """What one recipe reached.

    Attributes:
        name: to be shown.
        recipe: file name without its ending.
        cells: column -> seed -> number.
        parameters: of its model, mean over seeds (methods may grow it), where that is known.
    """

    name: str
    recipe: str
    cells: dict[Any, dict[int, float]]
    parameters: int | None = None

    def mean(self, column: Any) -> float:
        """Mean over seeds; minus infinity where there are none."""
        values = self.cells.get(column)
        return math.fsum(values.values()) / len(values) if values else -math.inf

    def interval(self, column: Any, scale: float = 1.0) -> Interval:
        """Mean over seeds with its 95 % interval."""
        return mean_interval([scale * value for value in self.cells[column].values()])


def differences(one: Row, other: Row) -> dict[Any, list[float]]:
    """Column -> one minus other for each seed that both have: what a seed decides for both is not in its spread.

    >>> differences(Row("a", "a", {10: {0: 0.5, 1: 0.75}}), Row("b", "b", {10: {0: 0.25, 2: 1.0}}))
    {10: [0.25]}
    """
    both = {
        column: sorted(set(one.cells[column]) & set(other.cells[column]))
        for column in one.cells
        if column in other.cells
    }
    return {c: [one.cells[c][seed] - other.cells[c][seed] for seed in seeds] for c, seeds in both.items() if seeds}


def draw(
    rows: Sequence[Row],
    path: str | PathLike[str],
    metric: str,
    columns: str,
    scale: float = 1.0,
    shown: Sequence[Any] = (),
) -> None:
    """Draws rows of three columns or more as lines where columns are numbers, and means in some of the columns.

    Args:
        rows: the best first.
        path: PNG file to write.
        metric: name of the number.
        columns: what the columns are.
        scale: factor on the numbers; 100 shows per cent.
        shown: columns whose means are drawn (default: the two fullest).

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("no rows to draw")
    numbers = all(isinstance(column, (int, float)) for row in rows for column in row.cells)
    lines = [row for row in rows if len(row.cells) >= LINE_FROM and numbers]
    counts: dict[Any, int] = {}
    for row in rows:
        for column in row.cells:
            counts[column] = counts.get(column, 0) + 1
    shown = shown or sorted(sorted(counts, key=lambda c: (-counts[c], c))[:2])
    colours = {row.name: COLOURS[k % len(COLOURS)] for k, row in enumerate(lines)}
    unit = f"{metric.replace('_', ' ')}{' (%)' if scale == 100 else ''}"
    panels = len(shown) + bool(lines)
    with figure_at(path, 4.4 * panels, max(4.0, 1.2 + 0.24 * len(rows))) as figure:
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        if lines:
            _lines(axes.pop(0), lines, colours, unit, columns, scale)
        for axis, column in zip(axes, shown):
            _dots(axis, [row for row in rows if column in row.cells], column, colours, unit, scale)
            axis.set_title(f"{columns.rpartition('.')[2]} {column}")


def _lines(axis: Any, rows: Sequence[Row], colours: dict[str, str], unit: str, columns: str, scale: float) -> None:
    for k, row in enumerate(rows):
        places = sorted(row.cells)
        found = [row.interval(place, scale) for place in places]
        style = {"color": colours[row.name], "linestyle": DASHES[k % len(DASHES)]}
        axis.plot(places, [one.mean for one in found], marker="o", markersize=4, label=row.name, **style)
    every = sorted({place for row in rows for place in row.cells})
    widest = max(after - before for before, after in pairwise(every))
    if every[0] > 0 and every[-1] / every[0] >= 10 and widest > (every[-1] - every[0]) / 2:  # gaps grow with the values
        axis.set_xscale("log")
    axis.set_xticks(every, [str(place) for place in every])
    axis.minorticks_off()
    axis.set(xlabel=columns, ylabel=unit, title="Over all values")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)  # curves fill the axes


def _dots(axis: Any, rows: Sequence[Row], column: Any, colours: dict[str, str], unit: str, scale: float) -> None:
    ordered = sorted(rows, key=lambda row: row.mean(column))
    for place, row in enumerate(ordered):
        found, colour = row.interval(column, scale), colours.get(row.name, GREY)
        axis.plot([found.low, found.high], [place, place], color=colour, linewidth=1.2, alpha=0.6)
        axis.plot(found.mean, place, "o", color=colour, markersize=5)
    axis.set_yticks(range(len(ordered)), [row.name for row in ordered], fontsize=8)
    for label, row in zip(axis.get_yticklabels(), ordered):
        label.set_color(colours.get(row.name, "#000000"))
    axis.tick_params(axis="y", length=0)
    axis.set(ylim=(-0.7, len(ordered) - 0.3), xlabel=f"{unit}, 95 % interval")
