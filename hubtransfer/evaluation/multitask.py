"""What learning tasks together gives over learning each alone."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

GREATER_IS_BETTER = (
    "accuracy",
    "top5_accuracy",
    "macro_f1",
    "micro_f1",
    "mean_average_precision",
    "exact_match",
    "r2",
    "mean_iou",
    "pixel_accuracy",
)
SMALLER_IS_BETTER = ("nll", "ece", "mae", "rmse")


def first_metrics(numbers: Mapping[str, float]) -> dict[str, tuple[str, float]]:
    """The metric to watch of each task, from numbers named ``task/metric``: task -> (metric, value).

    >>> first_metrics({"left/accuracy": 0.9, "left/nll": 0.3, "depth/rmse": 2.0})
    {'left': ('accuracy', 0.9), 'depth': ('rmse', 2.0)}
    """
    found: dict[str, tuple[str, float]] = {}
    for name, value in numbers.items():
        task, _, metric = name.rpartition("/")
        found.setdefault(task, (metric, value))
    return found


def is_better_when_greater(metric: str) -> bool:
    """Says in which direction a metric improves.

    Raises:
        ValueError: an unknown metric, naming the nearest.
    """
    known = (*GREATER_IS_BETTER, *SMALLER_IS_BETTER)
    if metric not in known:
        near = difflib.get_close_matches(metric, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
        raise ValueError(f"nobody said whether {metric!r} is better when greater or smaller{hint}")
    return metric in GREATER_IS_BETTER


def relative_gain(numbers: Mapping[str, float], single: Mapping[str, float]) -> float:
    r"""How much better tasks are on average than their single-task networks, as a share (negative: worse).

    .. math:: \Delta_m = \frac{1}{T} \sum_t (-1)^{l_t} \frac{M_t - B_t}{B_t}

    with M_t the first metric of task t, B_t the same of its single-task network, and l_t = 1 if smaller is better.

    Source: https://arxiv.org/abs/1904.08918, section 4 (the average per-task drop).

    Differs from the paper: B_t stands in the denominator by its absolute value, for metrics that may be negative (R2).

    Args:
        numbers: ``task/metric`` -> value.
        single: the same, of single-task networks; those of other tasks or metrics do not count.

    Raises:
        ValueError: no tasks, a task that ``single`` lacks, or a single-task value of zero.

    >>> round(relative_gain({"a/accuracy": 0.88, "b/rmse": 0.9}, {"a/accuracy": 0.8, "b/rmse": 1.0}), 6)
    0.1
    """
    chosen = first_metrics(numbers)
    if not chosen:
        raise ValueError("there are no tasks to compare with single-task networks")
    gains = []
    for task, (metric, value) in chosen.items():
        key = f"{task}/{metric}" if task else metric
        if key not in single:
            raise ValueError(f"the single-task runs have no {key!r}; they have {', '.join(single) or 'nothing'}")
        base = single[key]
        if base == 0:
            raise ValueError(f"the single-task value of {key!r} is zero: a gain relative to it does not exist")
        gains.append((1 if is_better_when_greater(metric) else -1) * (value - base) / abs(base))
    return sum(gains) / len(gains)


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Numbers of the points that no other one dominates: none is at least as great in all tasks and greater in one.

    >>> pareto_front([(0.9, 0.8), (0.8, 0.9), (0.8, 0.8), (0.9, 0.8)])
    [0, 1, 3]
    """

    def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
        pairs = list(zip(one, other, strict=True))
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return [k for k, point in enumerate(points) if not any(dominates(other, point) for other in points)]
