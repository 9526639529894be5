"""The command line: quick help, one clear line for what a person can put right, and every command once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hubtransfer import cli, config

ROOT = Path(__file__).parents[1]
MODEL = {"backbone": "timm/test_efficientnet", "pretrained": False, "image_size": 32}
RECIPE = {
    "method": {"name": "fine_tune", "trains": "head"},
    "model": MODEL,
    "data": {"name": "digits", "limit": 24, "evaluation": {"limit": 16}},
    "training": {"steps": 2, "batch_size": 8, "progress": False, "plots": False},
}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in an empty folder that is the working directory."""
    monkeypatch.chdir(tmp_path)
    return config.dump_yaml(RECIPE, "tiny.yaml")


def outcome(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(w) for w in words])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    seconds = []  # of processor time: the wall clock would measure whatever else runs beside the tests
    for _ in range(3):
        start = os.times()
        done = subprocess.run(
            [sys.executable, "-c", "from hubtransfer.cli import main; main(['--help'])"],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        end = os.times()
        seconds.append(end.children_user + end.children_system - start.children_user - start.children_system)
    assert min(seconds) < 0.5
    for command in ("train", "evaluate", "methods", "patches", "inspect", "push", "card", "report", "quickstart"):
        assert f" {command} " in done.stdout
    code = "import sys, hubtransfer.cli; print([m for m in ('torch', 'transformers', 'timm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "tinny.yaml"], "error: there is no file tinny.yaml; did you mean tiny.yaml?"),
        (
            ["train", "tiny.yaml", "training.epochz=2"],
            "error: unknown key 'epochz' in training; did you mean 'epochs'?",
        ),
        (["train", "tiny.yaml", "epochs"], "error: expected key=value"),
        (["train", "tiny.yaml", "data.name=digitz"], "digits"),
        (["inspect", "timm/resnet_18"], "resnet18"),
        (["evaluate", "./nowhere", "--data", "digits"], "nowhere"),
        (["report", "nowhere"], "error: nowhere is neither a results file nor a folder"),
        (["card", "nowhere"], "nowhere"),
        (["push", "nowhere", "me/birds"], "nowhere"),
        (["quickstart", "sauce=x"], "error: unknown key 'sauce' in quickstart; did you mean 'source'?"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: list[str], message: str, written: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUBTRANSFER_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = outcome(capsys, *words)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in err


def test_debug_shows_the_error_itself(written: Path) -> None:
    with pytest.raises(ValueError, match="unknown key 'epochz'"):
        cli.main(["train", "tiny.yaml", "training.epochz=2", "--debug"])


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(words: list[str]) -> None:
        return [].missing  # type: ignore[attr-defined]

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(AttributeError):
        cli.main([])


def test_methods_and_patches_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "methods", "--json")
    rows = json.loads(out)
    assert code == 0
    assert {"fine_tune", "kd"} <= {row["name"] for row in rows}
    assert all(row["family"] and row["paper"] and row["scenario"] for row in rows)
    code, out, _ = outcome(capsys, "patches", "--json")
    assert {row["kind"] for row in json.loads(out)} >= {"scale_bias", "depthwise"}
    assert outcome(capsys, "methods")[0] == outcome(capsys, "patches")[0] == 0


def test_inspect_counts_the_parameters_of_patches(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = outcome(capsys, "inspect", "timm/mobilenetv2_100", "--json")
    facts = json.loads(out)
    counts = {row["kind"]: row["parameters"] for row in facts["patches"]}
    # Mudrakarta 2019, table 1 with timm's mobilenetv2_100: 34,112 scales and biases, 64,224 depthwise weights
    assert (counts["scale_bias"], counts["depthwise"]) == (34_112, 64_224)
    assert sum(group["parameters"] for group in facts["groups"]) == facts["parameters"] == 2_223_872
    code, out, _ = outcome(capsys, "inspect", "timm/test_vit")
    assert code == 0
    assert "none" in out  # no depthwise convolution in it


def test_train_evaluate_card_report(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "train", "tiny.yaml")
    assert code == 0
    assert "results: tiny.results.json" in out
    (cell,) = json.loads(Path("tiny.results.json").read_text())["cells"]
    (folder,) = Path("runs/tiny").glob("seed0-*")

    code, out, _ = outcome(
        capsys, "evaluate", folder / "model", "--data", "digits", "limit=16", "--json", "--split", "test"
    )
    assert code == 0
    assert json.loads(out)["metrics"]["accuracy"] == pytest.approx(cell["numbers"]["accuracy"])

    code, out, _ = outcome(capsys, "card", folder / "model")
    assert code == 0
    assert "library_name: hubtransfer" in out
    assert "fine_tune" in out or "Trains a task's loss" in out

    code, out, _ = outcome(capsys, "report", "tiny.results.json", "--json")
    assert json.loads(out)["tiny.results.json"][0]["metric"] == next(iter(cell["numbers"]))
    assert outcome(capsys, "report", folder)[0] == 0
    assert outcome(capsys, "inspect", folder / "model")[0] == 0


def test_train_runs_all_recipes_of_a_folder_or_a_pattern(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("all").mkdir()
    for name in ("b", "a", "other"):
        config.dump_yaml(RECIPE, f"all/{name}.yaml")
    code, out, _ = outcome(capsys, "train", "all/?.yaml")
    assert code == 0
    assert out.index("results: all/a.results.json") < out.index("results: all/b.results.json")
    assert not Path("all/other.results.json").exists()
    assert outcome(capsys, "train", "all")[0] == 0
    assert json.loads(Path("all/other.results.json").read_text())["cells"]

    assert "is 3 recipes" in outcome(capsys, "train", "all", "--results", "r.json")[2]
    assert "error: all has no recipe z*.yaml" in outcome(capsys, "train", "all/z*.yaml")[2]


def test_push_goes_to_the_hub(written: Path, hub: object, capsys: pytest.CaptureFixture[str]) -> None:
    from hubtransfer.models import TransferModel
    from hubtransfer.recipe import build

    build(RECIPE).method.model.save_pretrained("birds")
    code, out, _ = outcome(capsys, "push", "birds", "alice/birds")
    assert code == 0
    assert "alice/birds" in out
    assert "digits" in TransferModel.from_pretrained("alice/birds").tasks


def test_the_accelerate_script_is_the_same_command(written: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "train.py"), "--config", "tiny.yaml", "training.steps=1"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "results: runs/tiny/tiny.results.json" in done.stdout
