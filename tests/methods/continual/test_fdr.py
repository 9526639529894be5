"""FDR: the distance by hand, whole tasks re-derived with its own step, functions are held, heads of other widths."""

import math

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import Batch, Replay, Ring, SingleTask, TaskStream
from hubtransfer.methods.continual import fdr
from hubtransfer.methods.continual.fdr import FDR
from hubtransfer.methods.continual.si import SI
from hubtransfer.models import ClassificationHead, RegressionHead, TransferModel
from tests.methods.continual.streams import domain_stream, model_for, task_stream
from tests.methods.continual.test_er import logits_of
from tests.methods.steps import assert_same_parameters, batches, batches_of, clone, descend, run, watch_draws
from tests.tiny import linear_model, tiny_backbone, tiny_data


def example(dtype=torch.float32, seed=0, n=24):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    return FDR(model_for(stream, dtype=dtype, seed=seed), alpha=0.7, memory=Ring(12)), stream


def test_two_examples_by_hand():
    """p = (1/4, 3/4) now, kept (1/4, 3/4) and (1, 0): distances 0 and 3/4 * sqrt 2, mean 3/8 sqrt 2, times alpha 2."""
    method = FDR(linear_model([0.0, math.log(3)]), alpha=2.0)
    pixels, kept = torch.zeros(2, 3, 8, 8), torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    labels = torch.zeros(2, dtype=torch.long)
    method.draw = lambda batch: Replay(inputs={"pixel_values": pixels}, labels=labels, kept={"probabilities": kept})
    found = method.distance(Batch(inputs={"pixel_values": pixels}, labels=labels))
    assert found["distance"].item() == pytest.approx(0.75 * math.sqrt(2))


def test_whole_tasks_equal_a_plain_loop():
    """Two steps a batch; which slots are drawn, and what was put in, is asked of the memory."""
    stream = domain_stream(3, dtype=torch.float64)
    method = FDR(model_for(stream, dtype=torch.float64), alpha=0.7, memory=Ring(12), replay_batch=5)
    plain, slots, contents = clone(method.model), watch_draws(method.memory), []
    begin = method.before_task

    def before_task(item, runtime):
        begin(item, runtime)
        contents.append(method.memory.everything())

    method.before_task = before_task
    run(method, stream)
    assert contents[0] is None
    assert [len(content.labels) for content in contents[1:]] == [12, 12]
    probabilities = {}
    for t, item in enumerate(stream):
        if t:
            kept = contents[t]
            for pixels, task in zip(kept.inputs["pixel_values"], kept.tasks.tolist()):
                key = pixels.numpy().tobytes()
                if key not in probabilities:
                    assert task == t - 1
                    probabilities[key] = logits_of(plain, pixels[None]).softmax(1)[0].detach()
        for each in batches_of(stream, item):
            descend(plain.parameters(), F.cross_entropy(logits_of(plain, each.inputs["pixel_values"]), each.labels))
            if t:
                pixels = kept.inputs["pixel_values"][slots.pop(0)]
                old = torch.stack([probabilities[one.numpy().tobytes()] for one in pixels])
                distance = (logits_of(plain, pixels).softmax(1) - old).square().sum(1).sqrt().mean()
                descend(plain.parameters(), 0.7 * distance)
    assert not slots
    assert_same_parameters(method.model, plain, 1e-10)


def test_a_larger_alpha_holds_the_function_better():
    """The second task gives the same images other labels: their probabilities move less the larger alpha is."""
    first = tiny_data(24)
    sets = [first, first | {"labels": (first["labels"] + 1) % 3}]
    stream = TaskStream([SingleTask(data, name=f"t{k}") for k, data in enumerate(sets)], kind="domain")
    moved = {alpha: distance_moved(stream, alpha) for alpha in (0.0, 1.0, 5.0)}
    assert moved[0.0] > 1.2 * moved[1.0]
    assert moved[1.0] > 1.2 * moved[5.0]


def distance_moved(stream, alpha):
    method, contents = FDR(model_for(stream), alpha=alpha, memory=Ring(24)), []
    method.before_task = lambda item, runtime: contents.append(method.memory.everything())
    run(method, stream, steps=20, lr=0.1)
    with torch.no_grad():
        now = logits_of(method.model, contents[1].inputs["pixel_values"]).softmax(1)
    return (now - contents[1].kept["probabilities"]).norm(dim=1).mean().item()


def test_the_memory_holds_shares_of_finished_tasks_in_evaluation_mode():
    stream = domain_stream(3)
    method = FDR(model_for(stream), memory=Ring(12))
    method.model.backbone.trunk.act1 = torch.nn.Dropout(0.9)
    run(method, stream, lr=0.0)
    kept = method.memory.everything()
    assert kept.tasks.bincount().tolist() == [4, 4, 4]
    method.eval()
    with torch.no_grad():
        now = logits_of(method.model, kept.inputs["pixel_values"]).softmax(1)
    torch.testing.assert_close(kept.kept["probabilities"], now)


def test_heads_of_other_widths_keep_their_own_probabilities():
    sets = {"two": tiny_data(16, 2), "four": tiny_data(16, 4, seed=1)}
    stream = TaskStream([SingleTask(data, name=name) for name, data in sets.items()], kind="task")
    model = TransferModel(tiny_backbone("mlp"))
    for name, classes in (("two", 2), ("four", 4)):
        model.add_task(name, ClassificationHead(classes))
    method = FDR(model, alpha=0.6, memory=Ring(8))
    run(method, stream)
    everything = method.memory.everything()
    pixels, kept = everything.inputs["pixel_values"], everything.kept["probabilities"]
    assert kept.shape == (8, 4)
    torch.testing.assert_close(kept.sum(1), torch.ones(8))
    assert (kept[:4, 2:] == 0).all()
    (each,) = batches(stream[1].train_source, steps=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    method.draw = lambda batch: everything.rows(torch.tensor([0, 5, 1]))
    expected = []
    for row in (0, 5, 1):
        name, width = ("two", 2) if row < 4 else ("four", 4)
        now = logits_of(model, pixels[row : row + 1], name).softmax(1)[0]
        expected.append((now - kept[row, :width]).square().sum().sqrt())
    assert min(expected) > 1e-4
    torch.testing.assert_close(method.distance(each)["distance"], 0.6 * torch.stack(expected).mean())


def test_what_cannot_be():
    stream = domain_stream()
    model = model_for(stream)
    with pytest.raises(ValueError, match="alpha must not be negative"):
        FDR(model, alpha=-1.0)
    with pytest.raises(ValueError, match="makes 2 updates a batch; penalties join a single"):
        list((FDR(model) + SI(model)).stages(stream))
    numbers = TransferModel(tiny_backbone("mlp")).add_task("task", RegressionHead(1))
    with pytest.raises(ValueError, match="FDR: a distance of probabilities needs class probabilities"):
        list(FDR(numbers).stages(stream))
    with pytest.raises(ValueError, match="task 't1'"):
        list(FDR(model_for(task_stream(2)).remove_task("t1")).stages(task_stream(2)))


def test_a_large_memory_is_looked_at_in_parts(monkeypatch):
    kept = []
    for size in (512, 5):
        monkeypatch.setattr(fdr, "TOGETHER", size)
        method, stream = example(torch.float64)
        run(method, stream)
        kept.append(method.memory.everything())
    assert torch.equal(kept[0].labels, kept[1].labels)
    torch.testing.assert_close(kept[0].kept["probabilities"], kept[1].kept["probabilities"], rtol=0, atol=1e-12)
