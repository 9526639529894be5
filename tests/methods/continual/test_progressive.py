"""Progressive networks: earlier outputs stay bit for bit, columns grow and hear, whole runs re-derived."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import hubtransfer as ht
from hubtransfer.data import TaskStream
from hubtransfer.methods.continual.progressive import Progressive
from hubtransfer.patches import ColumnPatch
from tests.methods.continual.streams import domain_stream, model_for, task_stream
from tests.methods.steps import assert_same_parameters, batches_of, clone, descend, run


def example(dtype=torch.float32, seed=0, n=24):
    stream = task_stream(2, n=n, seed=seed, dtype=dtype)
    return Progressive(model_for(stream, dtype=dtype, seed=seed), seed=seed), stream


def test_nothing_is_forgotten():
    stream = task_stream(3)
    method = Progressive(model_for(stream, kind="cnn"))
    outputs = []
    grow = method.before_task

    def spy(item, runtime):
        pixels = [i.train["pixel_values"] for i in stream[: method.number]]
        with torch.no_grad():
            method.model.eval()
            names = [i.name for i in stream[: method.number]]
            outputs.append([method.model(pixel_values=x, task=t).logits for x, t in zip(pixels, names)])
        grow(item, runtime)

    method.before_task = spy
    run(method, stream)
    method.model.eval()
    for earlier in outputs:
        for item, logits in zip(stream, earlier):
            assert torch.equal(method.model(pixel_values=item.train["pixel_values"], task=item.name).logits, logits)


def test_a_column_a_task_that_hears_all_before():
    stream = task_stream(3)
    method = Progressive(model_for(stream))
    run(method, stream)
    assert list(method.model.patches) == ["t1", "t2"]
    assert [patch.hears for patch in method.model.patches.values()] == [(), ("t1",)]
    assert all(isinstance(patch, ColumnPatch) for patch in method.model.patches.values())
    assert [operation for operation, _ in method.growth] == ["add_column", "add_column"]


def test_two_tasks_equal_a_plain_loop():
    stream = task_stream(2, dtype=torch.float64)
    method = Progressive(model_for(stream, dtype=torch.float64))
    plain = clone(method.model)
    run(method, stream)
    Progressive(plain).add_column("t1", [])
    plain.double()
    parts = [[*plain.backbone.trunk.parameters(), *plain.heads["t0"].parameters()]]
    parts.append([*plain.patches["t1"].parameters(), *plain.heads["t1"].parameters()])
    for item, parameters in zip(stream, parts):
        for each in batches_of(stream, item):
            loss = F.cross_entropy(plain(**each.inputs, task=item.name).logits, each.labels)
            descend(parameters, loss)
    assert_same_parameters(method.model, plain, 1e-12)


def test_a_saved_model_has_its_columns(tmp_path):
    method, stream = example()
    run(method, stream)
    method.model.save_pretrained(tmp_path)
    fresh = model_for(stream, seed=4)
    again = ht.TransferModel.from_pretrained(tmp_path, backbone=fresh.backbone).eval()
    x = stream[1].train["pixel_values"]
    assert torch.equal(again(pixel_values=x, task="t1").logits, method.model.eval()(pixel_values=x, task="t1").logits)


def test_a_task_that_comes_again_is_refused():
    first, second = task_stream()
    stream = TaskStream([first, second, replace(first, name="t0 again", task="t0")], kind="task")
    method = Progressive(model_for(TaskStream([first, second], kind="task")))
    with pytest.raises(ValueError, match="'t0' comes again"):
        method.checked(stream)


def test_other_kinds_of_streams_are_refused_with_the_reason():
    stream = domain_stream()
    with pytest.raises(ValueError, match="has to know the task at test time.*'domain'"):
        run(Progressive(model_for(stream)), stream)


@pytest.mark.parametrize("bad", [{"reduction": 0}, {"init": "zero"}])
def test_bad_hyper_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Progressive(model_for(task_stream()), **bad)
