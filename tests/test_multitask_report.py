"""Reports and cards of several tasks: the gain over single-task training, and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hubtransfer import cli, config
from hubtransfer.commands.report import gains, single_task
from hubtransfer.experiment import read_results

RECIPE = {
    "method": {"name": "ensemble"},
    "model": {"backbone": "plain:lenet", "pretrained": False},
    "data": {
        "name": "multimnist",
        "limit": 40,
        "labels": {"left": "left", "right": "right"},
        "evaluation": {"limit": 30},
        "labelled": {"right": 20},
    },
    "training": {"steps": 4, "batch_size": 8, "progress": False, "logging_steps": 2},
    "grid": [
        {"method.members": 1},
        {"method.name": "cross_stitch", "method.layers": ["0"], "method.single_task_epochs": 0.4},
        {"method.name": "grad_norm"},
    ],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a results file of two alternatives and the folders of their runs."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config.dump_yaml(RECIPE, "two.yaml")
        assert run(["train", "two.yaml"]) == 0
    return folder


def run(words: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    return int(stop.value.code or 0)


def test_a_results_file_tells_the_gain(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = trained / "two.results.json"
    assert (
        run(["report", str(file), "--baseline", "method.members=1", "--plots", str(trained / "plots"), "--json"]) == 0
    )
    out = capsys.readouterr().out
    rows = [r for r in json.loads(out[out.index("{") :])[str(file)] if r["metric"] == "relative_gain"]
    cells = {json.dumps(c["overrides"]): c["numbers"] for c in json.loads(file.read_text())["cells"]}
    single = next(iter(cells.values()))
    expected = [
        sum((found[k] - single[k]) / single[k] for k in ("left/accuracy", "right/accuracy")) / 2
        for found in cells.values()
    ]
    assert [row["mean"] for row in rows] == pytest.approx(expected) and expected[0] == 0
    assert (trained / "plots" / "two_pareto.png").stat().st_size > 5000


def results_file(path: Path, cells: list[tuple[int, dict[str, float]]]) -> Path:
    rows = [{"seed": seed, "overrides": {}, "numbers": numbers} for seed, numbers in cells]
    path.write_text(json.dumps({"cells": rows}))
    return path


def gained(path: Path, *baselines: Path) -> list[float]:
    return [row["mean"] for row in gains(read_results(path), single_task([str(b) for b in baselines], ()))]


def test_each_task_may_have_a_baseline_of_its_own(tmp_path: Path) -> None:
    """Seed 1: (0.9/0.6 - 1 + 0.6/0.5 - 1) / 2 = 0.35; seed 2: (0.9/0.9 - 1 + 0.6/0.4 - 1) / 2 = 0.25."""
    both = results_file(tmp_path / "both.json", [(s, {"left/accuracy": 0.9, "right/accuracy": 0.6}) for s in (1, 2)])
    left = results_file(tmp_path / "left.json", [(1, {"left/accuracy": 0.6}), (2, {"left/accuracy": 0.9})])
    right = results_file(tmp_path / "right.json", [(1, {"right/accuracy": 0.5}), (2, {"right/accuracy": 0.4})])
    assert gained(both, left, right) == gained(both, right, left) == [pytest.approx((0.35 + 0.25) / 2)]
    other = results_file(tmp_path / "other.json", [(7, {"right/accuracy": 0.4}), (8, {"right/accuracy": 0.8})])
    one = (0.9 / 0.6 + 0.6 / 0.6) / 2 - 1, (0.9 / 0.9 + 0.6 / 0.6) / 2 - 1  # of seeds that are not there the mean
    assert gained(both, left, other) == [pytest.approx(sum(one) / 2)]
    with pytest.raises(ValueError, match=r"both.json and .*left.json both tell of 'left/accuracy'; give one"):
        gained(both, left, both)
    twice = results_file(tmp_path / "twice.json", [(1, {"left/accuracy": 0.6}), (1, {"left/accuracy": 0.7})])
    with pytest.raises(ValueError, match=r"twice.json tells more than once of 'left/accuracy'"):
        gained(both, twice)
    with pytest.raises(ValueError, match=r"have no 'right/accuracy'; they have left/accuracy$"):
        gained(both, left)


def test_runs_and_cards_tell_the_gain(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single, stitched, balanced = sorted((trained / "runs" / "two").glob("seed0-*"), key=lambda f: f.stat().st_ctime)
    assert run(["report", str(stitched), "--baseline", str(single)]) == 0
    assert "relative gain over single-task training:" in capsys.readouterr().out
    assert run(["card", str(stitched / "model"), "--baseline", str(single)]) == 0
    out = capsys.readouterr().out
    assert "| all tasks |" in out and "relative_gain" in out
    assert "own_over_time.png" in out  # how much of itself each network kept
    assert (stitched / "own_over_time.png").is_file()
    assert run(["card", str(balanced / "model"), "--baseline", str(single), "--write"]) == 0
    text = (balanced / "model" / "README.md").read_text()
    assert "weight_over_time.png" in text and (balanced / "weight_over_time.png").is_file()
    assert "pareto.png" in text and (balanced / "model" / "pareto.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--baseline", "method.members=9"], "no row has method.members=9; there are: method.layers"),
        (["--baseline", "nowhere"], "nowhere is neither a finished run, a results file nor key=value"),
    ],
)
def test_mistakes_are_named(trained: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(trained / "two.results.json"), *words]) == 2
    assert message in capsys.readouterr().err
