import sys

import numpy as np
import pytest
from PIL import Image

from hubtransfer.evaluation import plots


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def rows():
    train = [
        {"stage": "a" if s < 5 else "b", "total": s, "losses": {"task": 1 / s, "kd": 0.1}, "lr": {"model": 0.01}}
        for s in range(1, 9)
    ]
    return [*train, {"stage": "b", "total": 8, "metrics": {"left/accuracy": 0.9, "left/nll": 1, "right/accuracy": 0.8}}]


@pytest.mark.parametrize("strip", [None, "metrics", "lr"])
def test_learning_curves(tmp_path, strip):
    given = [{k: v for k, v in row.items() if k != strip} for row in rows()]
    plots.learning_curves(given, tmp_path / "curves.png")
    assert pixels(tmp_path / "curves.png").shape[1] == 690 * (2 if strip else 3)


def test_only_the_watched_metric_of_each_set_is_drawn():
    assert list(plots._watched(plots._series(rows(), "metrics"))) == ["left/accuracy", "right/accuracy"]


def test_what_is_not_finite_is_left_out(tmp_path):
    given = [*rows(), {"stage": "b", "total": 9, "losses": {"task": float("nan"), "kd": float("inf")}}]
    plots.learning_curves(given, tmp_path / "curves.png")
    assert plots._series(given, "losses")["task"][0] == list(range(1, 9))


def test_an_empty_log_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        plots.learning_curves([], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("classes", [3, 50])
def test_confusion_shows_where_the_counts_are(tmp_path, classes):
    counts = np.zeros((classes, classes), int)
    counts[0, classes // 2] = 5  # one dark cell, in the first row: the true class
    path = tmp_path / "confusion.png"
    plots.confusion_matrix(counts.tolist(), [str(i) for i in range(classes)], path)
    image = pixels(path).astype(int)
    dark = np.abs(image[:, : int(0.75 * image.shape[1])] - [8, 48, 107]).sum(2) < 30  # without the colour bar
    down, across = np.nonzero(dark)
    assert down.mean() < 0.3 * image.shape[0]
    assert 0.3 < across.mean() / image.shape[1] < 0.6


def test_confusion_checks_its_sizes(tmp_path):
    with pytest.raises(ValueError, match="3 x 3 counts for 3 names"):
        plots.confusion_matrix([[1, 2], [3, 4]], ["a", "b", "c"], tmp_path / "confusion.png")


def test_reliability_and_comparison(tmp_path):
    bins = {"count": [0, 2, 4], "confidence": [0.0, 0.5, 0.9], "accuracy": [0.0, 0.5, 1.0]}
    plots.reliability_diagram(bins, tmp_path / "reliability.png")
    many = [plots.Compared("patch", [0.9, 0.92], 34_000), plots.Compared("full", [0.95], 2_500_000)]
    plots.comparison(many, tmp_path / "comparison.png")
    plots.comparison([plots.Compared("none", [3.2], 0)], tmp_path / "one.png", metric="rmse", percent=False)
    assert all(pixels(path).std() > 5 for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="no runs"):
        plots.comparison([], tmp_path / "none.png")


def test_counts_are_shortened():
    assert [plots._short(n) for n in (0, 950, 34_112, 2_542_856)] == ["0", "950", "34.1 k", "2.54 M"]


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"hubtransfer\[plots\]"):
        plots.learning_curves(rows(), tmp_path / "curves.png")


def test_pyplot_is_left_alone(tmp_path):
    sys.modules.pop("matplotlib.pyplot", None)
    plots.learning_curves(rows(), tmp_path / "curves.png")
    assert "matplotlib.pyplot" not in sys.modules


def test_a_table_of_pairs_is_dark_where_the_number_is_large(tmp_path):
    cells = {(a, b): 0.1 for a in ("one", "two", "three") for b in ("x", "y")} | {("one", "y"): 3.0}
    del cells["three", "x"]
    plots.pair_table(cells, tmp_path / "pairs.png", "pair weight")
    image = pixels(tmp_path / "pairs.png").astype(int)
    dark = np.abs(image[:, : int(0.78 * image.shape[1])] - [8, 48, 107]).sum(2) < 30  # without the colour bar
    down, across = np.nonzero(dark)
    assert down.mean() < 0.4 * image.shape[0]  # the first row
    assert across.mean() > 0.5 * image.shape[1]  # the second column
    with pytest.raises(ValueError, match="no pairs"):
        plots.pair_table({}, tmp_path / "none.png")


def test_which_watched_numbers_are_tables():
    watched = {"pair weight/0:a -> b": 1.0, "pair weight/1:a -> b": 2.0, "rate/left": 0.5, "loss -> more": 1.0}
    assert plots.pair_tables(watched) == {"pair weight": {("0:a", "b"): 1.0, ("1:a", "b"): 2.0}}
