"""What every method passes. The cases come from the registry: a new method file is tested by being there."""

import ast
import copy
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch

from hubtransfer import config as configs
from hubtransfer.data import Source
from hubtransfer.models import TransferModel
from hubtransfer.training import Checkpoints, Runtime, Trainer, TrainingArguments
from hubtransfer.training.progress import NotFiniteError
from tests.contract.methods import NAMES, cls_of, example, settings
from tests.methods.steps import assert_resumes_anywhere, changed, snapshot

ROOT = Path(__file__).parents[2]
every_method = pytest.mark.parametrize("name", NAMES)


def test_there_are_methods():
    assert len(NAMES) >= 5


def arguments(name, folder, **changes):
    return TrainingArguments(**settings(name, folder, **changes))


def assert_same(one, two, what=""):
    assert one.keys() == two.keys()
    different = [k for k in one if not torch.equal(one[k], two[k])]
    assert not different, f"{what}: {different}"


def begun(method, scenario, folder):
    """Yields each stage that is not skipped as it has begun, with the runtime and the batches, then ends it."""
    trainer = Trainer(method, scenario, arguments(method.name, folder))
    runtime: Runtime = trainer.runtime
    for stage in method.stages(scenario):
        if stage.when is not None and not stage.when():
            continue
        if stage.enter is not None:
            stage.enter(runtime)
        runtime.begin(stage, 4)
        runtime.set_step(0)
        yield stage, runtime, trainer._loader(stage).batches(0)
        runtime.end()
        if stage.exit is not None:
            stage.exit(runtime)


@every_method
def test_config_survives_yaml(name, tmp_path):
    cls = cls_of(name)
    if cls.config_class is None:
        return
    method, _ = example(name)
    file = configs.dump_yaml(method.config, tmp_path / "config.yaml")
    assert configs.from_dict(cls.config_class, configs.load_yaml(file)) == method.config
    assert is_dataclass(method.config)
    with pytest.raises(Exception, match="frozen|cannot assign"):
        setattr(method.config, fields(method.config)[0].name, None)


@every_method
def test_stages_is_pure(name):
    method, scenario = example(name)
    before, flags = snapshot(method), {n: p.requires_grad for n, p in method.named_parameters()}
    modes = {n: m.training for n, m in method.named_modules()}
    rng = torch.get_rng_state()
    first = [(stage.name, stage.trains()) for stage in method.stages(scenario)]
    assert first == [(stage.name, stage.trains()) for stage in method.stages(scenario)]
    assert first, "a method without a stage does nothing"
    assert len({stage for stage, _ in first}) == len(first), "stage names are not unique"
    assert_same(before, snapshot(method), "stages() changed the state")
    assert flags == {n: p.requires_grad for n, p in method.named_parameters()}
    assert modes == {n: m.training for n, m in method.named_modules()}
    assert torch.equal(rng, torch.get_rng_state())


@every_method
def test_each_update_changes_only_its_group(name, tmp_path):
    method, scenario = example(name)
    for stage, runtime, batches in begun(method, scenario, tmp_path):
        for update in stage.updates:
            batch = next(batches)
            allowed = {id(p) for group in update.groups() for p in runtime.params(group)}
            before, state = {n: p.detach().clone() for n, p in method.named_parameters()}, snapshot(method)
            update.apply(batch, runtime)
            moved = {n for n, p in method.named_parameters() if not torch.equal(before[n], p)}
            strangers = [n for n, p in method.named_parameters() if n in moved and id(p) not in allowed]
            assert not strangers, f"{stage.name}: an update of {update.groups()} changed {strangers}"
            if not update.groups():  # it only counts
                moved = changed(state, method)
            when = getattr(update, "when", None)
            assert moved or when is not None, f"{stage.name}: an update of {update.groups()} changed nothing"
            assert all(p.grad is None for p in method.parameters())


@every_method
def test_saved_and_loaded_outputs_are_bit_equal(name, tmp_path):
    method, scenario = example(name)
    Trainer(method, scenario, arguments(name, tmp_path)).train()
    method.model.save_pretrained(tmp_path / "model")
    fresh, _ = example(name, seed=1)
    again = TransferModel.from_pretrained(tmp_path / "model", backbone=fresh.model.backbone)
    source = next(iter(scenario.sources().values()))
    pixels = source.table.gather(torch.arange(4))[source.fields.inputs["pixel_values"]]
    method.eval()
    for task in method.model.tasks:
        one = method.model(pixel_values=pixels, task=task).logits
        assert torch.equal(one, again.eval()(pixel_values=pixels, task=task).logits)


@every_method
def test_cut_at_any_step_and_resumed_it_ends_with_the_same_bits(name, tmp_path):
    assert_resumes_anywhere(lambda: example(name), tmp_path, arguments(name, tmp_path, steps=2))


@every_method
def test_bf16_is_finite_and_keeps_fp32_weights(name, tmp_path):
    method, scenario = example(name)
    Trainer(method, scenario, arguments(name, tmp_path, precision="bf16", steps=2)).train()
    for parameter, value in method.state_dict().items():
        if value.is_floating_point():
            assert value.dtype == torch.float32, parameter
            assert value.isfinite().all(), parameter


@every_method
def test_the_wrong_scenario_is_named(name, tmp_path):
    method, _ = example(name)
    with pytest.raises(TypeError, match=f"{type(method).__name__} trains on {cls_of(name).scenario.__name__}"):
        Trainer(method, object(), arguments(name, tmp_path))


@every_method
def test_a_nan_loss_names_stage_step_and_term_and_leaves_the_checkpoint(name, tmp_path):
    method, scenario = example(name)
    Trainer(method, scenario, arguments(name, tmp_path, save=1, keep=100, steps=1)).train()
    store = Checkpoints(tmp_path / "checkpoints")
    kept = {folder.name for folder in store.all()}
    method, scenario = example(name)
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match=rf"{type(method).__name__}, stage '.+': loss term '.+' is nan at step 1"):
        Trainer(method, scenario, arguments(name, tmp_path, save=1, keep=100, steps=1)).train()
    assert {folder.name for folder in store.all()} == kept
    assert store.newest_whole() is not None


def _with_first_labelled(scenario, spoil):
    """The scenario with its first data set that has labels, a dictionary of tensors, changed by `spoil`."""
    if hasattr(scenario, "items"):
        first, *others = scenario.items
        return replace(scenario, items=[_with_first_labelled(first, spoil), *others])
    for field in fields(scenario):
        data = getattr(scenario, field.name)
        if isinstance(data, dict) and any(k.startswith("label") or k in ("left", "right") for k in data):
            return replace(scenario, **{field.name: spoil(data)})
        if isinstance(data, dict):
            for key, inner in data.items():
                if isinstance(inner, dict) and "labels" in inner:
                    return replace(scenario, **{field.name: data | {key: spoil(inner)}})
    raise AssertionError("the example has no labelled dictionary of tensors")


@every_method
def test_labels_outside_the_head_are_named_before_work_starts(name, tmp_path):
    method, scenario = example(name)

    def spoil(columns):
        spoiled = {k: v.clone() for k, v in columns.items()}
        for value in spoiled.values():
            if not value.is_floating_point():
                value[0] = 99
        return spoiled

    before = snapshot(method)
    with pytest.raises(ValueError, match="99"):
        Trainer(method, _with_first_labelled(scenario, spoil), arguments(name, tmp_path)).train()
    assert_same(before, snapshot(method), "training had started")


@every_method
def test_inputs_of_the_wrong_shape_are_named_before_work_starts(name, tmp_path):
    method, scenario = example(name)

    def spoil(columns):
        return {k: v[:, :2, :3, :3] if v.ndim == 4 else v for k, v in columns.items()}

    bad = _with_first_labelled(scenario, spoil)
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 3\)|channels|shape"):
        Trainer(method, bad, arguments(name, tmp_path)).train()


@every_method
def test_the_docstring_reads_like_a_paper(name):
    text = cls_of(name).__doc__ or ""
    assert ".. math::" in text, "no equation"
    assert "Differs from the paper" in text
    assert re.search(r"Source: https?://", text), "no source"
    cls = cls_of(name)
    assert cls.paper and cls.source.startswith("http") and cls.citation.lstrip().startswith("@")
    assert cls.__module__.rsplit(".", 1)[1] == name, "the file's name is the registered name"


@every_method
def test_the_teacher_and_other_frozen_networks_are_never_in_training_mode(name, tmp_path):
    method, scenario = example(name)

    def check(when):
        for path, module in method.named_modules():
            own = [p.requires_grad for p in module.parameters(recurse=False)]
            assert not (own and not any(own) and module.training), f"{when}: {path} is frozen and trains"

    for stage, runtime, batches in begun(method, scenario, tmp_path):
        check(f"as {stage.name} begins")
        for update in stage.updates:
            update.apply(next(batches), runtime)
        check(f"in {stage.name}")


def test_no_file_outside_methods_names_a_method():
    """Neither a class's name nor a registered name stands in code there, but for the face and the example program."""
    classes = {cls_of(name).__name__ for name in NAMES}
    package = ROOT / "hubtransfer"
    users = {package / "__init__.py", package / "quickstart.py"}
    for file in package.rglob("*.py"):
        if (package / "methods") in file.parents or file in users:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            named = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
            text = node.value if isinstance(node, ast.Constant) else None
            assert named not in classes, f"{file.relative_to(ROOT)}:{node.lineno} names {named}"
            assert text not in NAMES, f"{file.relative_to(ROOT)}:{node.lineno} names {text!r}"


def test_a_copy_is_independent():
    method, _ = example(NAMES[0])
    clone = copy.deepcopy(method.model)
    assert not {p.data_ptr() for p in clone.parameters()} & {p.data_ptr() for p in method.model.parameters()}
    assert Source.of({"pixel_values": torch.zeros(2, 3), "labels": torch.zeros(2)}).check()
