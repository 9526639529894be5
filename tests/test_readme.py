"""The README says what is true: its tables are current, its example runs, its commands exist."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from hubtransfer.commands import tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def between(name: str) -> str:
    """What stands between a pair of markers."""
    return tables.between(README, name)[1].strip()


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_tables_are_current() -> None:
    assert between("tables") == tables.readme_tables().strip(), (
        "the README's tables are out of date: run `hubtransfer methods --readme README.md`"
    )


def test_the_quickstarts_real_output_is_there() -> None:
    shown = between("quickstart")
    for way in ("last layer", "scale-and-bias patch", "full fine-tuning", "from scratch"):
        assert way in shown
    assert shown.count("bit for bit equal") == 2
    assert (ROOT / "recipes" / "quickstart.png").is_file()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), f"README.md links to {target}"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HUBTRANSFER_OFFLINE", "1")
    example = python_blocks()[0]
    quick = (
        example.replace("image_size=64", "image_size=32")
        .replace("limit=320", "limit=64")
        .replace("epochs=2", "steps=2")
    )
    quick = quick.replace("data.test)", "{k: v[:64] for k, v in data.test.items()})")
    assert sum(quick.count(new) for new in ("image_size=32", "limit=64", "steps=2", "v[:64]")) == 5
    exec(compile(quick, "README.md", "exec"), {})
    assert "animals" in str(list((tmp_path / "animals-patch").iterdir()))
    assert "Prediction(" in capsys.readouterr().out


def test_the_other_ways_to_learn_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HUBTRANSFER_OFFLINE", "1")
    quick = (
        python_blocks()[1]
        .replace("image_size=64", "image_size=32")
        .replace("epochs=2", "steps=2")
        .replace("limit=320", "limit=64")
    )
    for name in ("resnet18", "resnet10t"):
        quick = quick.replace(name, "test_resnet")
    for name in ("data", "pairs"):
        quick = quick.replace(f"{name}.test", f"{{k: v[::25] for k, v in {name}.test.items()}}")
    assert sum(quick.count(new) for new in ("image_size=32", "steps=2", "limit=64", "v[::25]", "test_resnet")) == 11
    exec(compile(quick, "README.md", "exec"), {})
    printed = re.findall(r"^([0-9.]+) (-?[0-9.]+)$", capsys.readouterr().out, flags=re.MULTILINE)
    ((average, forgetting),) = printed
    assert 0 <= float(average) <= 1 and -1 <= float(forgetting) <= 1


def test_the_example_is_short() -> None:
    assert len([line for line in python_blocks()[0].splitlines() if line.strip()]) <= 17


def test_the_method_of_the_readme_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    from hubtransfer.data import SingleTask
    from hubtransfer.methods import registry
    from hubtransfer.training import Trainer, TrainingArguments
    from tests.tiny import tiny_data, tiny_model

    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    exec(compile(python_blocks()[2], "README.md", "exec"), module.__dict__)
    arguments = TrainingArguments(steps=2, batch_size=8, save="no", progress=False, plots=False)
    result = Trainer(module.Confident(tiny_model(), beta=0.2), SingleTask(tiny_data()), arguments).train()
    assert result.steps == 2
