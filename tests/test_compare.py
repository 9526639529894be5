"""Results of several recipes side by side: the table by hand, paired differences, and the repository's documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hubtransfer import cli
from hubtransfer.commands import compare

ROOT = Path(__file__).parents[1]
DOCUMENTS = [p for p in sorted((ROOT / "recipes").rglob("*.md")) if "<!-- compare:begin" in p.read_text("utf-8")]
MARKS = "Words before.\n<!-- compare:begin {} -->\nstale\n<!-- compare:end -->\nWords after.\n"


def write_results(folder: Path, name: str, accuracy: dict[int, list[float]], **more: Any) -> None:
    """Seeds 0, 1, ... of each value of data.limit."""
    cells = [
        {"seed": seed, "overrides": {"data.limit": limit}, "numbers": {"accuracy": value}}
        for limit, values in accuracy.items()
        for seed, value in enumerate(values)
    ]
    (folder / f"{name}.results.json").write_text(json.dumps({"recipe": name, "cells": cells, **more}))


@pytest.fixture
def document(tmp_path: Path) -> Path:
    write_results(tmp_path, "kd_few", {10: [0.60, 0.70], 20: [0.80, 0.80]}, headline={"label": "KD"})
    teacher = {"metric": "accuracy", "mean": 0.9, "interval": [0.89, 0.91], "n": 2}
    write_results(tmp_path, "at_few", {10: [0.50, 0.62]}, teachers=[teacher])
    write_results(tmp_path, "other", {10: [1.0]})
    path = tmp_path / "few.md"
    path.write_text(MARKS.format("{recipes: '*_few', columns: data.limit, differences: [[KD, at_few]]}"))
    return path


def test_a_table_by_hand(document: Path) -> None:
    # two seeds: t(0.975, 1) = 12.7062, so half = 12.7062 s / sqrt 2 = 12.7062 |a - b| / 2.
    # KD at 10: 65.0 and 12.7062 * 10 / 2 = 63.5; AT: 56.0 and 76.2; the paired differences are 10 and 8: 9.0 and 12.7
    cli_run(document)
    text = document.read_text()
    assert text.startswith("Words before.\n<!-- compare:begin {recipes: '*_few'") and text.endswith("Words after.\n")
    assert "stale" not in text
    assert "| recipe | 10 | 20 |" in text
    assert "| [KD](kd_few.yaml) | **65.0 ± 63.5** | **80.0 ± 0.0** |" in text
    assert "| [at_few](at_few.yaml) | 56.0 ± 76.2 |  |" in text
    assert text.index("[KD]") < text.index("[at_few]")  # the best first
    assert "| KD minus at_few | +9.0 ± 12.7 |" in text
    assert "Teacher: 90.0 ± 1.0 (2 seeds)." in text
    assert "other" not in text
    assert document.with_suffix(".png").stat().st_size > 5_000
    again = compare.render(document)
    assert again == text  # nothing is written twice


def test_tasks_as_columns_may_differ_in_metric(tmp_path: Path) -> None:
    def cell(name: str, overrides: dict[str, Any], numbers: dict[str, float]) -> dict[str, Any]:
        return {"seed": 0, "name": name, "overrides": overrides, "numbers": numbers}

    both = {"a/accuracy": 0.5, "a/nll": 9.0, "ink/r2": 0.25, "ink/mae": 3.0}
    cells = [
        cell("together", {"data.labels": {"a": "x", "ink": "y"}}, both),
        cell("alone", {"data.labels": {"a": "x"}}, {"accuracy": 0.75, "nll": 1.0}),
        cell("alone", {"data.labels": {"ink": "y"}}, {"r2": 0.5, "mae": 2.0}),
    ]
    (tmp_path / "two.results.json").write_text(json.dumps({"recipe": "two", "cells": cells}))
    path = tmp_path / "two.md"
    path.write_text(MARKS.format("{recipes: two, also: {ink: r2}, picture: false}"))
    text = compare.render(path)
    assert "| recipe | a | ink (r2) |" in text
    assert "| [together](two.yaml) | 50.0 | 25.0 |" in text
    assert "| [alone](two.yaml) | **75.0** | **50.0** |" in text


def test_what_is_retained_by_tasks_learned(tmp_path: Path) -> None:
    def stream(*rows: list[float]) -> dict[str, Any]:
        return {"cells": [{"seed": 0, "overrides": {}, "numbers": {}, "stream": {"accuracy": list(rows)}}]}

    forgets = stream([0.9, 0.1, 0.1], [0.5, 0.9, 0.2], [0.3, 0.3, 0.9])
    (tmp_path / "a.results.json").write_text(json.dumps({"recipe": "a", **forgets}))
    (tmp_path / "b.results.json").write_text(json.dumps({"recipe": "b", **stream([0.8, 0.8, 0.8])}))  # all at once
    path = tmp_path / "both.md"
    path.write_text(MARKS.format("{recipes: '[ab]', learned: [1, 2, 3]}"))
    text = compare.render(path)
    assert "by `tasks learned`" in text and "| recipe | 1 | 2 | 3 |" in text
    assert "| [a](a.yaml) | **90.0** | **70.0** | 50.0 |" in text  # 0.9; (0.5 + 0.9) / 2; (0.3 + 0.3 + 0.9) / 3
    assert text.index("| [b](b.yaml) |  |  | **80.0** |") < text.index("[a](a.yaml)")  # the best at the end first
    cli_run(path)
    assert path.with_suffix(".png").stat().st_size > 5_000
    path.write_text(MARKS.format("{recipes: a b a, learned: [1, 2, 3], first: 2}"))
    text = compare.render(path)
    assert "Accuracy in % on the first 2 tasks, mean" in text
    assert "| [a](a.yaml) | **90.0** | **70.0** | 30.0 |" in text and "| [b](b.yaml) |  |  | **80.0** |" in text
    path.write_text(MARKS.format("{recipes: a c, learned: [1]}"))
    with pytest.raises(ValueError, match=r"no results files c\.results\.json: run those recipes first"):
        compare.render(path)
    for wrong in ("{recipes: a, learned: [1], first: 0}", "{recipes: a, first: 1}"):
        path.write_text(MARKS.format(wrong))
        with pytest.raises(ValueError, match="first must be at least 1 and stand beside learned"):
            compare.render(path)


def test_a_document_may_hold_several_tables_and_one_picture(document: Path) -> None:
    first = document.read_text()
    document.write_text(first + MARKS.format("{recipes: other, columns: data.limit, picture: false}"))
    cli_run(document)
    text = document.read_text()
    assert text.count("Words before.") == text.count("Words after.") == 2 and "stale" not in text
    assert text.index("[KD](kd_few.yaml)") < text.index("| [other](other.yaml) | **100.0** |")
    assert text.count("](few.png)") == 1
    document.write_text(first + MARKS.format("{recipes: other, columns: data.limit}"))
    with pytest.raises(ValueError, match="one picture: give all tables but one `picture: false`"):
        compare.run(str(document))


def test_transfer_scores_are_relative_to_the_task_learned_first_with_the_same_seed(tmp_path: Path) -> None:
    def cell(seed: int, name: str, tasks: str, *curves: list[float]) -> dict[str, Any]:
        numbered = [list(enumerate(curve)) for curve in curves]
        return {
            "seed": seed,
            "name": name,
            "overrides": {},
            "numbers": {},
            "stream": {"tasks": tasks, "curves": numbered},
        }

    cells = [
        cell(0, "after a", "ab", [0, 1], [0.5, 1]),  # b: 0.75; alone, with the same seed, 0.5
        cell(0, "after b", "ba", [0, 1], [0, 1]),
        cell(1, "after a", "ab", [0, 1], [0, 1]),  # b: 0.5 relative to 1
        cell(1, "after b", "ba", [1, 1], [1, 1]),
    ]
    (tmp_path / "x.results.json").write_text(json.dumps({"recipe": "x", "cells": cells}))
    path = tmp_path / "x.md"
    path.write_text(MARKS.format("{recipes: x, metric: transfer_score, percent: false, picture: false}"))
    text = compare.render(path)
    assert "Transfer score, mean over 2 seeds" in text and "| recipe | a | b |" in text
    # a after b: 1 and 2; b after a: 1.5 and 0.5. Half of the interval of two: 12.7062 |x - y| / 2
    assert "| [after a](x.yaml) |  | **1.000 ± 6.353** |" in text
    assert "| [after b](x.yaml) | **1.500 ± 6.353** |  |" in text


def cli_run(document: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", str(document)])
    assert not stop.value.code


def test_a_difference_that_is_sure_is_bold(tmp_path: Path) -> None:
    write_results(tmp_path, "a", {1: [0.60, 0.70]})
    write_results(tmp_path, "b", {1: [0.50, 0.60]})
    path = tmp_path / "c.md"
    path.write_text(MARKS.format("{recipes: '*', columns: data.limit, differences: [[b, a]], picture: false}"))
    cli_run(path)
    assert "| b minus a | **-10.0 ± 0.0** |" in path.read_text()
    assert not path.with_suffix(".png").exists()


def test_what_a_grid_changes_besides_the_columns_makes_rows(tmp_path: Path) -> None:
    cells = [
        {"seed": 0, "overrides": {"data.limit": 5, "method.beta": beta}, "numbers": {"accuracy": 0.5}}
        for beta in (0.0, 1.0)
    ]
    (tmp_path / "x.results.json").write_text(json.dumps({"recipe": "x", "cells": cells}))
    path = tmp_path / "x.md"
    path.write_text(MARKS.format("{recipes: x, columns: data.limit, picture: false}"))
    cli_run(path)
    assert "[x beta=0.0](x.yaml)" in path.read_text() and "[x beta=1.0](x.yaml)" in path.read_text()


def test_tasks_as_columns_with_the_size_of_each_model(tmp_path: Path) -> None:
    cells = [
        {"seed": seed, "name": name, "overrides": {"method.mode": name}, "parameters": {"total": size + seed * 100},
         "numbers": {"birds/accuracy": value, "cars/accuracy": value / 2, "birds/nll": 3.0}}
        for name, size, values in (("plain", 1000, (0.5, 0.5)), ("large", 2_000_000, (0.75, 0.75)))
        for seed, value in enumerate(values)
    ]  # fmt: skip
    (tmp_path / "x.results.json").write_text(json.dumps({"recipe": "x", "cells": cells}))
    path = tmp_path / "x.md"
    path.write_text(MARKS.format("{recipes: x, parameters: true, picture: false, differences: [[large, plain]]}"))
    cli_run(path)
    text = path.read_text()
    assert "| recipe | birds | cars | parameters |\n|---|---:|---:|---:|" in text
    assert "| [plain](x.yaml) | 50.0 ± 0.0 | 25.0 ± 0.0 | 1,050 |" in text  # the grid's order
    assert "| [large](x.yaml) | **75.0 ± 0.0** | **37.5 ± 0.0** | 2,000,050 |" in text
    assert "| large minus plain | **+25.0 ± 0.0** | **+12.5 ± 0.0** |" in text


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("{recipes: 'no_*', columns: data.limit}", "run those recipes first"),
        ("{recipes: '*_few', columns: data.size}", "no results of"),
        ("{recipes: '*_few', columns: data.limit, metric: acuracy}", "no results of"),
        ("{recipes: '*_few'}", "no results of .* have 'accuracy' for task"),
        ("{recipes: '*_few', column: data.limit}", "unknown key 'column'"),
        ("{recipes: '*_few', columns: data.limit, differences: [[KD, AT]]}", "unknown recipe 'AT'"),
    ],
)
def test_errors_say_what_is_wrong(document: Path, inside: str, message: str) -> None:
    document.write_text(MARKS.format(inside))
    with pytest.raises(ValueError, match=message):
        compare.run(str(document))
    document.write_text("no marks")
    with pytest.raises(ValueError, match="has no comments"):
        compare.run(str(document))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_document_is_current(path: Path) -> None:
    assert compare.render(path) == path.read_text("utf-8"), f"out of date: run `hubtransfer compare {path}`"
    picture = path.with_suffix(".png")
    assert picture.is_file() or picture.name not in path.read_text("utf-8")
