"""What was learned, kept and lost along a stream of tasks, from one matrix.

R[t][i] is the accuracy on task i after learning task t; b[i] that on task i before learning anything. Rows may be fewer
than columns while a stream is under way.

    >>> R = [[0.9, 0.2, 0.3], [0.7, 0.8, 0.4], [0.6, 0.9, 0.8]]
    >>> {name: round(value, 6) for name, value in stream_metrics(R, [0.1, 0.1, 0.2]).items()}
    {'average_accuracy': 0.766667, 'backward_transfer': -0.1, 'forward_transfer': 0.15, 'forgetting': 0.1}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Matrix = Sequence[Sequence[float]]


def average_accuracy(matrix: Matrix) -> float:
    r"""Mean over tasks after the last one that was learned, `ACC = 1/T \sum_i R_{T,i}`; tasks to come are left out.

    Source: https://arxiv.org/abs/1706.08840, equation 2.
    """
    return float(np.mean(matrix[-1][: len(matrix)]))


def backward_transfer(matrix: Matrix) -> float:
    r"""What later tasks did to earlier ones, `BWT = 1/(T-1) \sum_{i<T} (R_{T,i} - R_{i,i})`.

    Source: https://arxiv.org/abs/1706.08840, equation 3.

    Raises:
        ValueError: fewer than two tasks were learned.
    """
    last = _several(matrix)
    return float(np.mean([matrix[last][i] - matrix[i][i] for i in range(last)]))


def forward_transfer(matrix: Matrix, baseline: Sequence[float]) -> float:
    r"""What earlier tasks did to one not yet learned, `FWT = 1/(T-1) \sum_{i \ge 2} (R_{i-1,i} - b_i)`.

    Source: https://arxiv.org/abs/1706.08840, equation 4.

    Args:
        matrix: R.
        baseline: b, of the network before it learned anything.

    Raises:
        ValueError: fewer than two tasks were learned.
    """
    last = _several(matrix)
    return float(np.mean([matrix[i - 1][i] - baseline[i] for i in range(1, last + 1)]))


def forgetting(matrix: Matrix) -> float:
    r"""How far tasks fell below their best, `F = 1/(T-1) \sum_{i<T} (\max_{i \le t < T} R_{t,i} - R_{T,i})`.

    Source: https://arxiv.org/abs/1801.10112, section 3.2. Negative where the last task made earlier ones better than
    they had ever been.

    Raises:
        ValueError: fewer than two tasks were learned.
    """
    last = _several(matrix)
    return float(np.mean([max(matrix[t][i] for t in range(i, last)) - matrix[last][i] for i in range(last)]))


def transfer_score(curve: Sequence[float], reference: Sequence[float]) -> float:
    """Area under a task's learning curve relative to that of a network which learned nothing before.

    Source: https://arxiv.org/abs/1606.04671, section 4.

    Args:
        curve: accuracy (or reward) at equal distances of training.
        reference: the same of a single column, at the same points.

    Raises:
        ValueError: the curves differ in length, have fewer than two points, or the reference's area is not positive.
    """
    if len(curve) != len(reference) or len(curve) < 2:
        raise ValueError(f"curves of {len(curve)} and {len(reference)} points; need as many, at least two")
    area, base = (float(np.trapezoid(values)) for values in (curve, reference))
    if base <= 0:
        raise ValueError(f"the reference's area is {base}; a ratio to it says nothing")
    return area / base


def transfer_scores(streams: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Returns for each stream the transfer scores of the tasks that came after another one, by task.

    The reference is the mean learning curve of the streams that begin with the task; tasks with none are left out, and
    so are curves of another length.

    Args:
        streams: What records hold of streams: ``tasks`` and ``curves``, pairs of step and accuracy.
    """
    alone: dict[str, list[list[float]]] = {}
    for stream in streams:
        if stream.get("curves"):
            alone.setdefault(stream["tasks"][0], []).append([value for _, value in stream["curves"][0]])
    found = []
    for stream in streams:
        scores = {}
        for task, curve in list(zip(stream["tasks"], stream.get("curves", ())))[1:]:
            values = [value for _, value in curve]
            references = [other for other in alone.get(task, ()) if len(other) == len(values)]
            if references and len(values) > 1:
                scores[task] = transfer_score(values, np.mean(references, 0).tolist())
        found.append(scores)
    return found


def transfer_scores_by_seed(records: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Returns the transfer scores of each of some records, relative to records of the same seed; none without curves.

    Args:
        records: with a ``seed`` and, where a stream was learned, a ``stream``, as `transfer_scores` takes them.
    """
    found: list[dict[str, float]] = [{} for _ in records]
    for seed in dict.fromkeys(record["seed"] for record in records):
        mine = [i for i, one in enumerate(records) if one["seed"] == seed and one.get("stream", {}).get("curves")]
        for i, scores in zip(mine, transfer_scores([records[i]["stream"] for i in mine])):
            found[i] = scores
    return found


def stream_metrics(matrix: Matrix, baseline: Sequence[float] | None = None) -> dict[str, float]:
    """Everything the rows so far can tell, the average accuracy first."""
    found = {"average_accuracy": average_accuracy(matrix)}
    if len(matrix) > 1:
        found["backward_transfer"] = backward_transfer(matrix)
        if baseline is not None:
            found["forward_transfer"] = forward_transfer(matrix, baseline)
        found["forgetting"] = forgetting(matrix)
    return found


def accuracy_table(stream: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns heads and rows of R in per cent, with what each task cost; b, where it was measured, comes first.

    Args:
        stream: What a record holds of one: ``tasks``, ``after``, ``accuracy``, ``seconds``, ``bytes`` and ``baseline``.
    """
    rows = [
        (str(after), *_per_cent(values), f"{seconds:.1f}", f"{kept / 2**20:.2f}")
        for after, values, seconds, kept in zip(
            stream["after"], stream["accuracy"], stream["seconds"], stream["bytes"], strict=True
        )
    ]
    if stream.get("baseline"):
        rows.insert(0, ("(before)", *_per_cent(stream["baseline"]), "", ""))
    return ("after", *map(str, stream["tasks"]), "seconds", "MiB kept"), rows


def _per_cent(values: Sequence[float]) -> tuple[str, ...]:
    return tuple(f"{100 * value:.1f}" for value in values)


def _several(matrix: Matrix) -> int:
    """Position of the last row, at least the second."""
    if len(matrix) < 2:
        raise ValueError(f"transfer and forgetting need at least two learned tasks, got {len(matrix)}")
    if any(len(row) < len(matrix) for row in matrix):
        raise ValueError(f"{len(matrix)} rows, but one has only {min(map(len, matrix))} columns")
    return len(matrix) - 1
