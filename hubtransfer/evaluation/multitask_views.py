"""Pictures of several tasks that learn together: who is better at which, and numbers of a method over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hubtransfer.evaluation.confidence import mean_interval
from hubtransfer.evaluation.multitask import is_better_when_greater, pareto_front
from hubtransfer.evaluation.plots import COLOURS, DASHES, GREY, Path, figure_at, mark_stages

MARKERS = "osD^vP*Xh<>"


def watched_groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """What a method watched in the course of a run, by what it is: what -> name -> (steps, values).

    Numbers are named ``what/name``; those of pairs (``a -> b``) have a table of their own and are left out, and so are
    groups of which there is but one row.

    Args:
        rows: of ``log.jsonl``.

    >>> rows = [{"total": t, "watched": {"weight/left": t / 2, "weight/x -> y": 1.0}} for t in (2, 4)]
    >>> watched_groups(rows)
    {'weight': {'left': ([2, 4], [1.0, 2.0])}}
    """
    found: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for row in sorted(rows, key=lambda row: row["total"]):
        for key, value in (row.get("watched") or {}).items():
            what, slash, name = key.partition("/")
            if not slash or " -> " in name or not math.isfinite(value):
                continue
            steps, values = found.setdefault(what, {}).setdefault(name, ([], []))
            steps.append(row["total"])
            values.append(value)
    return {what: series for what, series in found.items() if any(len(steps) > 1 for steps, _ in series.values())}


def over_time(rows: Sequence[Mapping[str, Any]], path: Path, what: str = "weight") -> None:
    """A method's numbers over the steps of a run, such as the weight of each task.

    Args:
        rows: of ``log.jsonl``, with ``watched`` numbers named ``what/name``.
        path: PNG file to write.
        what: which of them.

    Raises:
        ValueError: the log has none of that name, or just one row of them.
    """
    groups = watched_groups(rows)
    if what not in groups:
        raise ValueError(f"the log has no course of {what!r} to draw; it has {', '.join(groups) or 'none'}")
    with figure_at(path, 5.6, 3.4) as figure:
        axis = figure.subplots()
        for number, (name, (steps, values)) in enumerate(groups[what].items()):
            colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
            few = "o" if len(steps) <= 25 else None
            axis.plot(steps, values, color=colour, linestyle=dash, marker=few, markersize=3.5, label=name)
        axis.set(xlabel="step", ylabel=what)
        drawn = [row for row in rows if row.get("watched")]
        title = f"{what[:1].upper()}{what[1:]} over time"
        axis.set_title(title, pad=18 if mark_stages(axis, drawn) else None)
        axis.legend(fontsize=8)


def pareto(
    points: Mapping[str, Sequence[Sequence[float]]], path: Path, axes: tuple[str, str], percent: bool = True
) -> None:
    """Two tasks against one another: a method is a point, its 95 % intervals a cross; the front is joined.

    A method on the front is better at one task than every method that is as good at the other.

    Args:
        points: method -> (first task, second task), one pair a seed.
        path: PNG file to write.
        axes: the tasks' metrics, ``task/metric``; where smaller is better the axis runs the other way.
        percent: show shares as percentages.

    Raises:
        ValueError: there is nothing to draw, or a metric is unknown.
    """
    if not points or any(not pairs for pairs in points.values()):
        raise ValueError("no methods to compare, or one without values")
    scale = 100 if percent else 1
    greater = [is_better_when_greater(name.rpartition("/")[2]) for name in axes]
    found = {
        name: [mean_interval([scale * pair[k] for pair in pairs]) for k in (0, 1)] for name, pairs in points.items()
    }
    good = [[(1 if up else -1) * one.mean for up, one in zip(greater, both)] for both in found.values()]
    front = sorted(pareto_front(good), key=lambda k: good[k][0])
    means = [[one.mean for one in both] for both in found.values()]
    with figure_at(path, 6.4, 4.2) as figure:
        axis = figure.subplots()
        axis.plot(
            [means[k][0] for k in front],
            [means[k][1] for k in front],
            color=GREY,
            linewidth=1.0,
            linestyle="--",
            zorder=1,
        )
        for number, (name, (first, second)) in enumerate(found.items()):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axis.errorbar(
                first.mean,
                second.mean,
                xerr=first.half or 0.0,
                yerr=second.half or 0.0,
                fmt=marker,
                color=colour,
                markersize=7 if number in front else 5,
                elinewidth=0.8,
                alpha=1.0 if number in front else 0.7,
                label=name,
            )
        unit = " (%)" if percent else ""
        axis.set(xlabel=f"{axes[0]}{unit}", ylabel=f"{axes[1]}{unit}", title="Task against task")
        for up, invert in zip(greater, (axis.invert_xaxis, axis.invert_yaxis)):
            if not up:
                invert()
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
