"""Pictures of a run: learning curves, confusion, calibration, comparisons. Each function writes one PNG file.

Colours are Okabe and Ito's, which people with any kind of colour vision tell apart; lines also differ in their dashes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

from hubtransfer.evaluation.confidence import mean_interval
from hubtransfer.evaluation.metrics import calibration_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Path = str | PathLike[str]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
GREY = "#666666"
NAMES_AT_MOST = 30
"""Classes whose names still fit on an axis."""
COUNTS_AT_MOST = 15
"""Classes whose counts still fit into the cells."""

_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@contextmanager
def figure_at(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure that is written when the block ends; neither pyplot's state nor the display is touched."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'hubtransfer[plots]'") from error
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path)


def learning_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses, the watched metric of each evaluation set, and learning rates over the steps of a run.

    Args:
        rows: of ``log.jsonl``: ``total`` (steps so far) and ``stage``, with ``losses`` and ``lr``, or ``metrics``.
        path: PNG file to write.

    Raises:
        ValueError: the log has no rows.
    """
    if not rows:
        raise ValueError("the log has no rows to draw")
    rows = sorted(rows, key=lambda row: row["total"])
    panels = [
        ("Training loss", "mean loss since the last row", _series(rows, "losses")),
        ("Evaluation", "", _watched(_series(rows, "metrics"))),
        ("Learning rate", "learning rate", _series(rows, "lr")),
    ]
    panels = [panel for panel in panels if panel[2]]
    with figure_at(path, 4.6 * len(panels), 3.4) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, unit, series) in zip(axes, panels):
            _draw_series(axis, series)
            axis.set(xlabel="step", ylabel=unit or _metric_label(series))
            axis.set_title(title, pad=18 if mark_stages(axis, rows) else None)
            if title == "Training loss" and _spans_decades(series):
                axis.set_yscale("log")


def confusion_matrix(counts: Sequence[Sequence[int]], names: Sequence[str], path: Path) -> None:
    """What each class is taken for: shares of a true class as colours, counts as numbers where they fit.

    Args:
        counts: ``(classes, classes)``, row = true class, column = prediction.
        names: of the classes.
        path: PNG file to write.

    Raises:
        ValueError: the counts are no square of that size.
    """
    size = len(names)
    if len(counts) != size or any(len(row) != size for row in counts):
        raise ValueError(f"confusion needs {size} x {size} counts for {size} names")
    totals = [max(1, sum(row)) for row in counts]
    shares = [[value / total for value in row] for row, total in zip(counts, totals)]
    right, every = sum(counts[i][i] for i in range(size)), sum(map(sum, counts))
    side = min(12.0, max(3.6, 0.5 * size + 1.6)) if size <= NAMES_AT_MOST else 8.0
    with figure_at(path, side + 0.9, side) as figure:
        axis = figure.subplots()
        axis.grid(False)
        image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        share = 100 * right / max(1, every)
        axis.set(title=f"{share:.1f} % of {every:,} right", xlabel="predicted class", ylabel="true class")
        if size <= NAMES_AT_MOST:
            long = max(map(len, names)) > 2
            axis.set_xticks(range(size), names, rotation=45 if long else 0, ha="right" if long else "center")
            axis.set_yticks(range(size), names)
        if size <= COUNTS_AT_MOST:
            for i, row in enumerate(counts):
                for j, value in enumerate(row):
                    colour = "white" if shares[i][j] > 0.55 else GREY if value == 0 else "black"
                    axis.text(j, i, f"{value}", ha="center", va="center", color=colour, fontsize=8)
        for edge in axis.spines.values():
            edge.set_visible(False)
        figure.colorbar(image, ax=axis, label="share of the true class", fraction=0.046, pad=0.03)


def reliability_diagram(bins: Mapping[str, Sequence[float]], path: Path) -> None:
    """How often predictions are right, by how sure they are; below how many there are.

    Args:
        bins: ``count``, ``confidence`` and ``accuracy`` of bins of equal width over [0, 1], as
            :func:`~hubtransfer.evaluation.metrics.reliability` gives.
        path: PNG file to write.
    """
    number = len(bins["count"])
    centres = [(m + 0.5) / number for m in range(number)]
    filled = [m for m in range(number) if bins["count"][m]]
    error = calibration_error({name: list(values) for name, values in bins.items()})
    with figure_at(path, 4.6, 5.0) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        upper.bar(
            [centres[m] for m in filled],
            [bins["accuracy"][m] for m in filled],
            width=0.92 / number,
            color=COLOURS[5],
            label="share that is right",
        )
        upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.2, label="if confidence were exact")
        upper.scatter(
            [bins["confidence"][m] for m in filled],
            [bins["accuracy"][m] for m in filled],
            color=COLOURS[1],
            zorder=3,
            clip_on=False,
            s=18,
            label="at the bin's mean confidence",
        )
        upper.set(
            xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy", title=f"Expected calibration error {100 * error:.1f} %"
        )
        upper.legend(loc="upper left", fontsize=8)
        lower.bar(centres, bins["count"], width=0.92 / number, color=GREY)
        lower.set(xlabel="confidence of the prediction", ylabel="examples")


def pair_tables(watched: Mapping[str, float]) -> dict[str, dict[tuple[str, str], float]]:
    """Those of a log row's watched numbers whose names are ``what/a -> b``: what -> (a, b) -> number.

    >>> pair_tables({"weight/x -> y": 0.5, "rate/left": 0.1})
    {'weight': {('x', 'y'): 0.5}}
    """
    found: dict[str, dict[tuple[str, str], float]] = {}
    for name, value in watched.items():
        what, _, pair = name.partition("/")
        a, arrow, b = pair.partition(" -> ")
        if arrow:
            found.setdefault(what, {})[a, b] = value
    return found


def pair_table(
    cells: Mapping[tuple[str, str], float],
    path: Path,
    what: str = "weight",
    axes: tuple[str, str] = ("from the source's layer", "to the student's layer"),
) -> None:
    """Numbers of pairs as a heat map, such as how much each layer of a source counts for each layer of a student.

    Args:
        cells: (row, column) -> number; a pair that is missing is left blank.
        path: PNG file to write.
        what: the numbers are.
        axes: what rows and columns are.

    Raises:
        ValueError: there are no pairs.
    """
    if not cells:
        raise ValueError("no pairs to draw")
    names = [list(dict.fromkeys(pair[k] for pair in cells)) for k in (0, 1)]
    values = [[cells.get((row, column), math.nan) for column in names[1]] for row in names[0]]
    top = max(max(cells.values()), 1e-12)
    width, height = 1.0 * len(names[1]) + 2.6, 0.62 * len(names[0]) + 1.4
    with figure_at(path, max(width, 4.2), max(height, 2.4)) as figure:
        axis = figure.subplots()
        axis.grid(False)
        image = axis.imshow(values, cmap="Blues", vmin=min(0.0, *cells.values(), 0.0), vmax=top, aspect="auto")
        axis.set(xlabel=axes[1], ylabel=axes[0])
        axis.set_xticks(range(len(names[1])), names[1])
        axis.set_yticks(range(len(names[0])), names[0])
        for (row, column), value in cells.items():
            place = names[1].index(column), names[0].index(row)
            axis.text(*place, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 * top else "black")
        for edge in axis.spines.values():
            edge.set_visible(False)
        figure.colorbar(image, ax=axis, label=what, fraction=0.05, pad=0.03)


class Compared(NamedTuple):
    """One method's row in a comparison.

    Attributes:
        name: of the method.
        values: the metric, one a seed.
        changed: parameters that differ from the shared trunk.
    """

    name: str
    values: Sequence[float]
    changed: int


def comparison(runs: Sequence[Compared], path: Path, metric: str = "accuracy", percent: bool = True) -> None:
    """What methods reach and how many parameters they change for it, the best on top.

    Args:
        runs: one a method; shown is the mean over seeds with its 95 % interval.
        path: PNG file to write.
        metric: its name.
        percent: show shares as percentages.

    Raises:
        ValueError: nothing to compare.
    """
    if not runs:
        raise ValueError("no runs to compare")
    scale = 100 if percent else 1
    ordered = sorted(runs, key=lambda run: math.fsum(run.values) / len(run.values))
    found = [mean_interval(run.values) for run in ordered]
    places = range(len(ordered))
    with figure_at(path, 9.0, 1.3 + 0.42 * len(ordered)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for place, one in zip(places, found):
            left.plot([scale * one.low, scale * one.high], [place, place], color=COLOURS[0], linewidth=2.2)
            left.plot(scale * one.mean, place, "o", color=COLOURS[0], markersize=8)
            words = one.text(scale).split(" (")[0]
            left.annotate(words, (scale * one.high, place), xytext=(8, -3), textcoords="offset points", fontsize=8)
        low, high = scale * min(one.low for one in found), scale * max(one.high for one in found)
        room = (high - low) or 0.1 * abs(high) or 1.0
        left.set(xlim=(low - 0.15 * room, high + 0.5 * room), ylim=(-0.6, len(ordered) - 0.4))
        if percent:
            left.set_xticks([tick for tick in left.get_xticks() if left.get_xlim()[0] <= tick <= 100])
        left.set_yticks(list(places), [run.name for run in ordered])
        seeds = sorted({one.n for one in found})
        many = "1 seed" if seeds == [1] else f"95 % interval, {'-'.join(map(str, sorted({seeds[0], seeds[-1]})))} seeds"
        left.set(xlabel=f"{metric}{' (%)' if percent else ''}, {many}", title=metric.replace("_", " ").capitalize())
        counts = [max(1, run.changed) for run in ordered]
        right.set_xscale("log")
        right.set(xlim=(10 ** math.floor(math.log10(min(counts)) - 0.2), max(counts) * 8))
        right.hlines(list(places), right.get_xlim()[0], counts, color=COLOURS[1], linewidth=2.2)
        right.plot(counts, list(places), "o", color=COLOURS[1], markersize=8)
        for place, run in zip(places, ordered):
            at = (max(1, run.changed), place)
            right.annotate(_short(run.changed), at, xytext=(8, -3), textcoords="offset points", fontsize=8)
        right.set(xlabel="parameters, logarithmic", title="Parameters changed")
        for axis in (left, right):
            axis.tick_params(axis="y", length=0)


# -------------------------------------------------------------------------------------------------------- helpers

Series = dict[str, tuple[list[int], list[float]]]


def _series(rows: Sequence[Mapping[str, Any]], group: str) -> Series:
    """Steps and values of each name in a group of the log's rows; what is not finite is left out."""
    found: Series = {}
    for row in rows:
        for name, value in (row.get(group) or {}).items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["total"])
                values.append(value)
    return found


def _watched(series: Series) -> Series:
    """The first metric of each evaluation set: names are ``metric`` or ``set/metric``."""
    first: dict[str, str] = {}
    for name in series:
        first.setdefault(name.rpartition("/")[0], name)
    return {name: series[name] for name in first.values()}


def _metric_label(series: Series) -> str:
    names = {name.rpartition("/")[2] for name in series}
    return names.pop().replace("_", " ") if len(names) == 1 else "metric"


def _draw_series(axis: Axes, series: Series) -> None:
    for number, (name, (steps, values)) in enumerate(series.items()):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        few = "o" if len(steps) <= 25 else None
        axis.plot(steps, values, color=colour, linestyle=dash, marker=few, markersize=3.5, label=name)
    if len(series) > 1:
        axis.legend(fontsize=8, ncols=1 + (len(series) > 8))


def _spans_decades(series: Series) -> bool:
    values = [value for _, many in series.values() for value in many]
    return min(values) > 0 and max(values) / min(values) > 100


def mark_stages(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> bool:
    """A thin line where one stage ends and the next begins, with names above; False when there is but one."""
    ends: dict[str, int] = {}
    for row in rows:
        ends[row.get("stage", "")] = row["total"]
    if len(ends) < 2:
        return False
    start = 0
    for number, (name, end) in enumerate(ends.items()):
        if number:
            axis.axvline(start, color=GREY, linewidth=0.8, linestyle=":")
        axis.annotate(
            name,
            ((start + end) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
            color=GREY,
        )
        start = end
    return True


def _short(count: int) -> str:
    """A count in three digits: 950, 34.1 k, 2.54 M."""
    for size, unit in ((1_000_000_000, " G"), (1_000_000, " M"), (1_000, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
