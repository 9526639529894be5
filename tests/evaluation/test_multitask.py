"""Gains over single-task training by hand, the Pareto front, and the pictures."""

import numpy as np
import pytest
from PIL import Image

from hubtransfer.evaluation import metrics, multitask_views
from hubtransfer.evaluation.multitask import (
    GREATER_IS_BETTER,
    SMALLER_IS_BETTER,
    first_metrics,
    is_better_when_greater,
    pareto_front,
    relative_gain,
)


def test_the_gain_by_hand():
    single = {"left/accuracy": 0.8, "right/accuracy": 0.5, "ink/rmse": 0.2}
    # + 10 %, - 20 %, and an error that fell by 25 %: (0.1 - 0.2 + 0.25) / 3
    together = {"left/accuracy": 0.88, "left/nll": 9.0, "right/accuracy": 0.4, "ink/rmse": 0.15}
    assert relative_gain(together, single) == pytest.approx(0.05)
    assert relative_gain(single, single) == 0.0
    # R2 rose from -0.5 to 0.25: better, by 0.75 / 0.5
    assert relative_gain({"a/r2": 0.25}, {"a/r2": -0.5}) == pytest.approx(1.5)
    assert relative_gain({"accuracy": 0.9}, {"accuracy": 0.6}) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("numbers", "single", "message"),
    [
        ({}, {"a/accuracy": 1.0}, "no tasks"),
        ({"a/accuracy": 1.0}, {"b/accuracy": 1.0}, "have no 'a/accuracy'; they have b/accuracy"),
        ({"a/accuracy": 1.0}, {"a/accuracy": 0.0}, "is zero"),
        ({"a/acuracy": 1.0}, {"a/acuracy": 0.5}, "did you mean 'accuracy'"),
    ],
)
def test_what_cannot_be_compared_is_named(numbers, single, message):
    with pytest.raises(ValueError) as error:
        relative_gain(numbers, single)
    assert message in str(error.value)


def test_every_metric_has_a_direction():
    """The directions are those of all metrics that evaluations give."""
    import torch

    classes = torch.arange(12) % 6
    given = {
        "classification": (torch.eye(6)[classes], classes),
        "multi_label": (torch.randn(12, 3), (torch.arange(36).reshape(12, 3) % 2).float()),
        "regression": (torch.randn(12, 2), torch.randn(12, 2)),
        "dense": (torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4).long()),
    }
    found = {name for kind, pair in given.items() for name in metrics.evaluate_outputs(kind, *pair).metrics}
    assert found == {*GREATER_IS_BETTER, *SMALLER_IS_BETTER}
    assert is_better_when_greater("mean_iou") and not is_better_when_greater("rmse")


def test_the_front():
    assert pareto_front([(1, 1)]) == [0]
    assert pareto_front([(1, 3), (2, 2), (3, 1), (1, 2), (2, 1)]) == [0, 1, 2]
    assert pareto_front([(1, 1), (1, 1)]) == [0, 1]
    assert first_metrics({"a/accuracy": 1.0, "a/nll": 2.0}) == {"a": ("accuracy", 1.0)}


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def rows(steps=6):
    return [
        {"stage": "train", "total": s, "watched": {"weight/left": 1 + s / 10, "weight/right": 1 - s / 10, "own/a": 0.9}}
        for s in range(1, steps + 1)
    ]


def test_numbers_over_time(tmp_path):
    log = [*rows(), {"stage": "train", "total": 9, "losses": {"left": 1.0}}]
    groups = multitask_views.watched_groups(log)
    assert groups["weight"]["left"] == ([1, 2, 3, 4, 5, 6], pytest.approx([1.1, 1.2, 1.3, 1.4, 1.5, 1.6]))
    assert set(groups) == {"weight", "own"}
    multitask_views.over_time(log, tmp_path / "weights.png")
    assert pixels(tmp_path / "weights.png").std() > 5
    assert multitask_views.watched_groups(rows(1)) == {}
    with pytest.raises(ValueError, match="no course of 'rate' to draw; it has weight, own"):
        multitask_views.over_time(log, tmp_path / "rates.png", "rate")


def test_task_against_task(tmp_path):
    points = {"single": [(0.9, 0.5), (0.91, 0.52)], "shared": [(0.88, 0.7), (0.87, 0.72)], "worse": [(0.8, 0.4)]}
    multitask_views.pareto(points, tmp_path / "pareto.png", ("left/accuracy", "right/accuracy"))
    assert pixels(tmp_path / "pareto.png").std() > 5
    multitask_views.pareto({"a": [(1.0, 0.2)]}, tmp_path / "mixed.png", ("x/accuracy", "y/rmse"), percent=False)
    with pytest.raises(ValueError, match="no methods"):
        multitask_views.pareto({}, tmp_path / "none.png", ("a/accuracy", "b/accuracy"))
