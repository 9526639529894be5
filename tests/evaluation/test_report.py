import json

import pytest

from hubtransfer.evaluation.report import read_run, to_console, to_markdown

RECORD = {
    "method": {"name": "kd", "title": "Knowledge distillation", "paper": "Hinton 2015"},
    "results": [
        {"task": "birds", "split": "evaluation", "metric": "accuracy", "values": [0.9, 0.92, 0.94], "n": 1000},
        {"task": "birds", "split": "evaluation", "metric": "nll", "values": [0.25], "n": 1000},
    ],
    "parameters": {"trunk": 2_000_000, "changed": 34_000, "changed_percent": 1.7},
    "data": {"train": {"fingerprint": "ab" * 32, "examples": 4000}, "stream": {"fingerprint": None, "examples": None}},
    "steps": 120,
    "seconds": 31.5,
    "seeds": [0, 1, 2],
    "versions": {"torch": "2.14"},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RECORD))
    rows = [{"stage": "distil", "total": s, "losses": {"kd": 2.0 / s}, "watched": {"w/x": 0.5 * s}} for s in (1, 10)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "di')
    return tmp_path


def test_markdown(folder):
    text = to_markdown(read_run(folder))
    assert text.startswith("# Knowledge distillation\n")
    # s = 0.02, t_{0.975, 2} = 4.302653: half = 4.302653 * 0.02 / sqrt(3) = 0.04968
    assert "| birds | evaluation | accuracy % | 92.00 ± 4.97 (n=3) | 1000 |" in text
    assert "| birds | evaluation | nll | 0.2500 | 1000 |" in text
    assert "34,000 (1.70 % of the trunk)" in text
    assert "| data train | 4,000 examples, sha256 abababababab |" in text
    assert "| data stream | a stream |" in text
    assert "| distil | kd | 2 | 0.2 | 10 |" in text
    assert "| distil | w/x | 0.5 | 5 | 10 |" in text


def test_console(folder):
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    to_console(read_run(folder), console)
    text = console.export_text()
    for words in ("Results", "92.00 ± 4.97", "Parameters", "Losses", "Hinton 2015"):
        assert words in text


def test_little_is_enough(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    assert to_markdown(read_run(tmp_path)).startswith(f"# {tmp_path.name}")


def test_what_is_missing_is_named(tmp_path, folder):
    with pytest.raises(ValueError, match=r"holds no results\.json"):
        read_run(tmp_path / "nothing")
    inner = tmp_path / "seed0"
    inner.mkdir()
    (folder / "results.json").rename(inner / "results.json")
    with pytest.raises(ValueError, match="runs inside it: seed0"):
        read_run(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        read_run(tmp_path)
