"""Metrics from outputs and labels, one entry a kind of head.

All functions take plain tensors on any device and give exact values: counts are integers, averages float64.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hubtransfer.functional.missing import known_classes, known_flags, known_pixels, known_values

LARGEST_CONFUSION = 256
"""Confusion matrices of more classes are not put into tables."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one evaluation set says.

    Attributes:
        metrics: name -> number; the first is the one to watch, and greater is better for it.
        tables: JSON-ready lists: ``per_class``, ``confusion`` with ``names``, ``reliability``.
    """

    metrics: dict[str, float]
    tables: dict[str, Any] = field(default_factory=dict)


Evaluator = Callable[[Tensor, Tensor, Sequence[str] | None], Evaluation]
_EVALUATORS: dict[str, Evaluator] = {}


def evaluates(kind: str) -> Callable[[Evaluator], Evaluator]:
    """Register the evaluation of a kind of head."""

    def register(function: Evaluator) -> Evaluator:
        if kind in _EVALUATORS:
            raise ValueError(f"an evaluation for heads of kind {kind!r} exists already")
        _EVALUATORS[kind] = function
        return function

    return register


def evaluate_outputs(kind: str, logits: Tensor, labels: Tensor, names: Sequence[str] | None = None) -> Evaluation:
    """Metrics and tables of a whole evaluation set; labels that are missing count nowhere.

    Args:
        kind: the head's kind: ``classification``, ``multi_label``, ``regression`` or ``dense``.
        logits: the head's outputs, ``(examples, ...)``.
        labels: what they should be.
        names: names of the classes.

    Raises:
        ValueError: unknown kind, no examples, no known label, or shapes that do not fit.
    """
    if kind not in _EVALUATORS:
        near = difflib.get_close_matches(str(kind), _EVALUATORS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no evaluation for heads of kind {kind!r}; there are: {', '.join(_EVALUATORS)}{hint}")
    if len(logits) == 0 or len(logits) != len(labels):
        raise ValueError(f"{kind}: {len(logits)} outputs and {len(labels)} labels; need as many, at least one")
    return _EVALUATORS[kind](logits.detach(), labels.detach(), names)


def first_metric(kind: str, logits: Tensor, labels: Tensor, names: Sequence[str] | None = None) -> Evaluation:
    """The first metric of :func:`evaluate_outputs` alone, quick where it can be: for matrices of many tasks."""
    if kind == "classification" and logits.ndim == 2 and len(logits) == len(labels) > 0:
        labels = _class_numbers(labels, logits)
        known = _some(known_classes(labels), "classification: no example has a label")
        return Evaluation({"accuracy": accuracy(logits[known], labels[known])})
    name, value = next(iter(evaluate_outputs(kind, logits, labels, names).metrics.items()))
    return Evaluation({name: value})


# ------------------------------------------------------------------------------------------------ classification


@evaluates("classification")
def classification(logits: Tensor, labels: Tensor, names: Sequence[str] | None = None) -> Evaluation:
    """One class an example.

    Args:
        logits: ``(examples, classes)``.
        labels: ``(examples,)`` class numbers, -100 or -1 where missing, or ``(examples, classes)`` shares, of which
            the largest counts.
        names: of the classes.
    """
    if logits.ndim != 2:
        raise ValueError(f"classification: outputs must be (examples, classes), not {tuple(logits.shape)}")
    classes = logits.shape[1]
    labels = _class_numbers(labels, logits)
    known = _some(known_classes(labels), "classification: no example has a label")
    logits, labels = logits[known], labels[known]
    _check_range(labels, classes, "classification")
    counts = confusion_matrix(logits.argmax(1), labels, classes)
    bins = reliability(logits.double().softmax(1), labels)
    metrics = {"accuracy": accuracy(logits, labels)}
    if classes > 5:
        metrics["top5_accuracy"] = top_k_accuracy(logits, labels, 5)
    metrics |= {
        "macro_f1": macro_f1(counts),
        "nll": cross_entropy(logits.double(), labels).item(),
        "ece": calibration_error(bins),
    }
    return Evaluation(metrics, _class_tables(counts, names) | {"reliability": bins})


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of examples whose largest logit ``(examples, classes)`` is at the label ``(examples,)``."""
    return (logits.argmax(1) == labels).double().mean().item()


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share of examples whose label ``(examples,)`` is among the ``k`` largest logits ``(examples, classes)``."""
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k must be 1 to {logits.shape[1]} for that many classes, not {k}")
    return (logits.topk(k, dim=1).indices == labels[:, None]).any(1).double().mean().item()


def confusion_matrix(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts ``(classes, classes)``, int64: row = label, column = prediction, from class numbers of any one shape."""
    pairs = labels.reshape(-1).long() * classes + predictions.reshape(-1).long()
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def precision_recall_f1(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and F1 of each class ``(classes,)`` from a confusion matrix; 0 where nothing was counted.

    ``P = TP / (TP + FP)``, ``R = TP / (TP + FN)``, ``F1 = 2 TP / (2 TP + FP + FN)``.
    """
    hits, predicted, actual = counts.diagonal().double(), counts.sum(0).double(), counts.sum(1).double()
    return hits / predicted.clamp(min=1), hits / actual.clamp(min=1), 2 * hits / (predicted + actual).clamp(min=1)


def macro_f1(counts: Tensor) -> float:
    """Mean F1 over the classes that occur among labels or predictions."""
    _, _, f1 = precision_recall_f1(counts)
    return f1[(counts.sum(0) + counts.sum(1)) > 0].mean().item()


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> dict[str, list[float]]:
    """How often the prediction is right, by how sure it is.

    Args:
        probabilities: ``(examples, classes)``.
        labels: ``(examples,)`` class numbers.
        bins: number of bins ``((m - 1) / bins, m / bins]`` of confidence, the largest probability.

    Returns:
        ``count``, mean ``confidence`` and ``accuracy`` of each bin (0 in empty ones).
    """
    confidence, predicted = probabilities.double().max(1)
    right = (predicted == labels).double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    place = torch.bucketize(confidence, edges[1:-1])  # right=False: an edge belongs to the bin below it
    count = torch.bincount(place, minlength=bins)
    whole = count.clamp(min=1)
    return {
        "count": count.tolist(),
        "confidence": (torch.bincount(place, confidence, minlength=bins) / whole).tolist(),
        "accuracy": (torch.bincount(place, right, minlength=bins) / whole).tolist(),
    }


def calibration_error(bins: dict[str, list[float]]) -> float:
    """Expected calibration error ``sum_m |B_m| / n * |accuracy(B_m) - confidence(B_m)|``.

    Source: https://arxiv.org/abs/1706.04599, equation 3, with the 15 equal-width bins of its experiments.
    """
    gaps = [c * abs(a - p) for c, a, p in zip(bins["count"], bins["accuracy"], bins["confidence"])]
    return sum(gaps) / sum(bins["count"])


# ---------------------------------------------------------------------------------------------------- multi-label


@evaluates("multi_label")
def multi_label(logits: Tensor, labels: Tensor, names: Sequence[str] | None = None) -> Evaluation:
    """Any number of labels an example; a label is predicted where its logit is above 0.

    Args:
        logits: ``(examples, labels)``.
        labels: ``(examples, labels)`` of 0 and 1, NaN or -1 where missing. An example is matched exactly when all of
            its known labels are.
        names: of the labels.
    """
    if logits.ndim != 2 or logits.shape != labels.shape:
        raise ValueError(f"multi_label: outputs {tuple(logits.shape)} and labels {tuple(labels.shape)} differ in shape")
    known = _some(known_flags(labels), "multi_label: no example has a label")
    truth, predicted = labels > 0.5, (logits > 0) & known
    hits = (truth & predicted).sum(0).double()
    chosen, actual = predicted.sum(0).double(), truth.sum(0).double()
    f1 = 2 * hits / (chosen + actual).clamp(min=1)
    one_by_one = [
        average_precision(logits[k, j, None], truth[k, j, None]) if k.any() else actual.new_zeros(1)
        for j, k in enumerate(known.T)
    ]
    precision = average_precision(logits, truth) if known.all() else torch.cat(one_by_one)
    present = actual > 0
    metrics = {
        "mean_average_precision": precision[present].mean().item() if present.any() else 0.0,
        "micro_f1": (2 * hits.sum() / (chosen + actual).sum().clamp(min=1)).item(),
        "macro_f1": f1.mean().item(),
        "exact_match": (truth == predicted).all(1)[known.any(1)].double().mean().item(),
    }
    columns = {
        "precision": hits / chosen.clamp(min=1),
        "recall": hits / actual.clamp(min=1),
        "f1": f1,
        "average_precision": precision,
    }
    return Evaluation(metrics, {"per_class": _rows(columns, actual, names)})


def average_precision(scores: Tensor, truth: Tensor) -> Tensor:
    """Area under each label's precision-recall steps, ``AP = sum_n (R_n - R_{n-1}) P_n`` over distinct thresholds.

    Args:
        scores: ``(examples, labels)``.
        truth: bool ``(examples, labels)``.

    Returns:
        ``(labels,)``, float64; 0 for a label that no example has.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    ranked, hit = scores.gather(0, order), truth.gather(0, order).double()
    hits = hit.cumsum(0)
    rank = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)[:, None]
    # Equal scores share one threshold: only its last example counts as a point of the curve
    last = torch.ones_like(truth)
    last[:-1] = ranked[1:] != ranked[:-1]
    reached = torch.where(last, hits, 0.0).cummax(0).values
    before = torch.cat([torch.zeros_like(reached[:1]), reached[:-1]])
    gained = torch.where(last, hits - before, 0.0)
    return (gained * hits / rank).sum(0) / hits[-1].clamp(min=1)


# ----------------------------------------------------------------------------------------------------- regression


@evaluates("regression")
def regression(outputs: Tensor, labels: Tensor, names: Sequence[str] | None = None) -> Evaluation:
    """Real numbers, averaged over outputs: R2, mean absolute error and root mean squared error in the label's unit.

    ``R2 = 1 - sum (y - f)^2 / sum (y - mean y)^2``; of a constant label it is 1 if all is exact, else 0.

    Args:
        outputs: ``(examples,)`` or ``(examples, outputs)``.
        labels: the same number of values, NaN where missing.
        names: of the outputs.
    """
    if outputs.numel() != labels.numel():
        raise ValueError(f"regression: outputs {tuple(outputs.shape)} and labels {tuple(labels.shape)} do not fit")
    predicted, wanted = outputs.double().reshape(len(outputs), -1), labels.double().reshape(len(labels), -1)
    known = _some(known_values(wanted), "regression: no example has a label")
    count, wanted = known.sum(0).clamp(min=1), wanted.masked_fill(~known, 0)
    error, around = (predicted - wanted) * known, (wanted - wanted.sum(0) / count) * known
    rest, spread = error.square().sum(0), around.square().sum(0)
    r2 = torch.where(spread > 0, 1 - rest / spread.clamp(min=1e-300), (rest == 0).double())
    columns = {"r2": r2, "mae": error.abs().sum(0) / count, "rmse": (rest / count).sqrt()}
    metrics = {name: value[known.any(0)].mean().item() for name, value in columns.items()}
    if wanted.shape[1] == 1:
        return Evaluation(metrics)
    return Evaluation(metrics, {"per_class": _rows(columns, known.sum(0), names)})


# ---------------------------------------------------------------------------------------------------------- dense


@evaluates("dense")
def dense(logits: Tensor, labels: Tensor, names: Sequence[str] | None = None) -> Evaluation:
    """One class a pixel; pixels labelled 255, -100 or -1 are left out.

    ``IoU = TP / (TP + FP + FN)``, averaged over the classes that occur among labels or predictions.

    Args:
        logits: ``(examples, classes, height, width)``, or class numbers ``(examples, height, width)``, which large
            sets should be reduced to batch by batch.
        labels: ``(examples, height, width)`` class numbers.
        names: of the classes.
    """
    maps = logits.ndim == labels.ndim and not logits.is_floating_point()
    predicted = logits if maps else logits.argmax(1)
    if predicted.shape != labels.shape:
        raise ValueError(f"dense: outputs {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit")
    seen = _some(known_pixels(labels), "dense: no pixel has a label")
    predicted, wanted = predicted[seen], labels[seen].long()
    classes = len(names) if names else int(max(predicted.max(), wanted.max())) + 1 if maps else logits.shape[1]
    _check_range(wanted, classes, "dense")
    counts = confusion_matrix(predicted, wanted, classes)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    iou = counts.diagonal().double() / union.clamp(min=1)
    metrics = {
        "mean_iou": iou[union > 0].mean().item(),
        "pixel_accuracy": (counts.diagonal().sum() / counts.sum().double()).item(),
    }
    tables = _class_tables(counts, names)
    for row, value in zip(tables["per_class"], iou.tolist()):
        row["iou"] = value
    return Evaluation(metrics, tables)


# --------------------------------------------------------------------------------------------------------- tables


def _class_numbers(labels: Tensor, logits: Tensor) -> Tensor:
    if labels.shape == logits.shape and logits.ndim == 2:
        labels = labels.argmax(1)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise ValueError(f"classification: labels must be (examples,), not {tuple(labels.shape)}")
    return labels.long()


def _some(known: Tensor, message: str) -> Tensor:
    if not known.any():
        raise ValueError(message)
    return known


def _check_range(labels: Tensor, classes: int, kind: str) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"{kind}: labels run from {low} to {high}, but there are {classes} classes")


def _class_tables(counts: Tensor, names: Sequence[str] | None) -> dict[str, Any]:
    precision, recall, f1 = precision_recall_f1(counts)
    rows = _rows({"precision": precision, "recall": recall, "f1": f1}, counts.sum(1), names)
    tables: dict[str, Any] = {"names": [row["name"] for row in rows], "per_class": rows}
    if len(counts) <= LARGEST_CONFUSION:
        tables["confusion"] = counts.tolist()
    return tables


def _rows(columns: dict[str, Tensor], support: Tensor, names: Sequence[str] | None) -> list[dict[str, Any]]:
    if names is not None and len(names) != len(support):
        raise ValueError(f"{len(names)} names for {len(support)} classes")
    values = {name: column.tolist() for name, column in columns.items()}
    return [
        {
            "name": str(names[i]) if names else str(i),
            **{name: column[i] for name, column in values.items()},
            "support": int(support[i]),
        }
        for i in range(len(support))
    ]
