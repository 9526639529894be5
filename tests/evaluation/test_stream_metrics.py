"""Metrics of the accuracy matrix, by hand; pictures and tables of it."""

import json

import pytest
from PIL import Image

from hubtransfer.commands import report as report_command
from hubtransfer.evaluation.report import Run, sections
from hubtransfer.evaluation.stream_metrics import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    stream_metrics,
    transfer_score,
    transfer_scores,
)
from hubtransfer.evaluation.stream_plots import accuracy_matrix, retention

R = [[0.9, 0.2, 0.3], [0.95, 0.8, 0.4], [0.6, 0.7, 0.8]]


def test_metrics_by_hand():
    assert average_accuracy(R) == pytest.approx((0.6 + 0.7 + 0.8) / 3)
    assert backward_transfer(R) == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2)
    assert forward_transfer(R, [0.1, 0.15, 0.05]) == pytest.approx(((0.2 - 0.15) + (0.4 - 0.05)) / 2)
    assert forgetting(R) == pytest.approx(((0.95 - 0.6) + (0.8 - 0.7)) / 2), "the best of the first task was row 2"


def test_while_the_stream_is_under_way_only_tasks_so_far_count():
    assert average_accuracy(R[:2]) == pytest.approx((0.95 + 0.8) / 2)
    assert backward_transfer(R[:2]) == pytest.approx(0.05)
    assert stream_metrics(R[:1]) == {"average_accuracy": pytest.approx(0.9)}
    assert list(stream_metrics(R, [0, 0, 0])) == [
        "average_accuracy", "backward_transfer", "forward_transfer", "forgetting",
    ]  # fmt: skip


def test_forgetting_is_negative_where_the_last_task_helped():
    assert forgetting([[0.5, 0.1], [0.8, 0.9]]) == pytest.approx(-0.3)


def test_transfer_score_is_a_ratio_of_areas():
    # areas by trapezoids: (0 + 1)/2 + (1 + 1)/2 = 1.5 and (0 + 0.5)/2 + (0.5 + 1)/2 = 1
    assert transfer_score([0, 1, 1], [0, 0.5, 1]) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="curves of 2 and 3 points"):
        transfer_score([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="a ratio to it says nothing"):
        transfer_score([0, 1], [0, 0])


def curve(*values):
    return [[20 * step, value] for step, value in enumerate(values)]


def test_transfer_scores_of_streams_relative_to_those_that_begin_with_the_task():
    streams = [
        {"tasks": ["a", "b"], "curves": [curve(0, 0.5, 1), curve(0, 1, 1)]},
        {"tasks": ["b", "a"], "curves": [curve(0, 0.5, 1), curve(0, 0.25, 0.5)]},
        {"tasks": ["b", "c"], "curves": [curve(0, 0.25, 0.5), curve(0, 1, 1)]},
        {"tasks": ["a", "b"], "after": ["a", "b"]},  # nobody looked while it learned
    ]
    # b alone: mean of the areas 1 and 1/2 (in steps of one look); b after a: 3/2; a alone: 1, after b: 1/2
    assert transfer_scores(streams) == [{"b": pytest.approx(2)}, {"a": pytest.approx(0.5)}, {}, {}]


def test_a_results_file_is_reported_with_its_transfer_scores(tmp_path, capsys):
    cells = [
        {"key": "1", "seed": 0, "overrides": {"x": 1}, "name": "a then b", "numbers": {"average_accuracy": 0.5},
         "stream": {"tasks": ["a", "b"], "curves": [curve(0, 0.5, 1), curve(0, 1, 1)]}},
        {"key": "2", "seed": 0, "overrides": {"x": 2}, "name": "b then a", "numbers": {"average_accuracy": 0.5},
         "stream": {"tasks": ["b", "a"], "curves": [curve(0, 0.5, 1), curve(0, 0.5, 1)]}},
    ]  # fmt: skip
    file = tmp_path / "pairs.results.json"
    file.write_text(json.dumps({"cells": cells}))
    report_command.run(str(file), as_json=True)
    rows = json.loads(capsys.readouterr().out)[str(file)]
    found = {(row["name"], row["metric"]): row["mean"] for row in rows if row["metric"].startswith("transfer")}
    assert found == {("a then b", "transfer_score/b"): 1.5, ("b then a", "transfer_score/a"): 1.0}


def test_too_few_tasks_are_named():
    for function in (backward_transfer, forgetting, lambda matrix: forward_transfer(matrix, [0, 0])):
        with pytest.raises(ValueError, match="at least two learned tasks, got 1"):
            function(R[:1])
    with pytest.raises(ValueError, match="3 rows, but one has only 2 columns"):
        forgetting([row[:2] for row in R])


def record(tasks=3):
    names = [f"t{k}" for k in range(tasks)]
    rows = [[0.9 - 0.02 * abs(i - t) for i in range(tasks)] for t in range(tasks)]
    return {"tasks": names, "after": names, "accuracy": rows, "baseline": [0.1] * tasks,
            "seconds": [1.0] * tasks, "bytes": [2**20] * tasks}  # fmt: skip


@pytest.mark.parametrize("tasks", [3, 20])
@pytest.mark.parametrize("draw", [accuracy_matrix, retention])
def test_pictures_are_drawn(draw, tasks, tmp_path):
    draw(record(tasks), tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        assert min(image.size) > 200
        assert len(image.getcolors(1 << 24)) > 20
    with pytest.raises(ValueError, match="no row to draw"):
        draw(record(tasks) | {"accuracy": []}, tmp_path / "picture.png")


def test_the_report_shows_the_matrix(tmp_path):
    (table,) = [s for s in sections(Run(tmp_path, {"stream": record()}, [])) if "Accuracy" in s.title]
    assert table.columns == ("after", "t0", "t1", "t2", "seconds", "MiB kept")
    assert table.rows[0] == ("(before)", "10.0", "10.0", "10.0", "", "")
    assert table.rows[1] == ("t0", "90.0", "88.0", "86.0", "1.0", "1.00")
