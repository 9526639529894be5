"""HAL: whole tasks re-derived, the gradient through the look-ahead, anchors are uphill, steps leave their outputs."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import Reservoir, Ring, SingleTask, TaskStream
from hubtransfer.methods.continual.hal import HAL
from hubtransfer.methods.continual.si import SI
from hubtransfer.methods.hindsight import after_rehearsal, ascend
from tests.methods.continual.streams import class_stream, domain_stream, model_for, task_stream
from tests.methods.continual.test_er import logits_of
from tests.methods.steps import assert_same_parameters, batches, batches_of, begin, clone, descend, run, watch_draws
from tests.tiny import tiny_data, tiny_model


def example(dtype=torch.float32, seed=0, n=24):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    method = HAL(model_for(stream, dtype=dtype, seed=seed), strength=5.0, anchor_steps=3, memory=Ring(12))
    return method, stream


def test_whole_tasks_equal_a_plain_loop():
    """The step at theta on L and on what theta - eta grad L would move; anchors and drawn slots are the method's."""
    stream = domain_stream(3, dtype=torch.float64)
    model = model_for(stream, dtype=torch.float64)
    method = HAL(model, strength=20.0, anchor_steps=2, memory=Reservoir(100), replay_batch=5)
    plain, slots = clone(model), watch_draws(method.memory)
    run(method, stream, lr=0.3)
    kept = method.memory.everything()
    parameters, moved = dict(plain.named_parameters()), 0.0
    for t, item in enumerate(stream):
        for each in batches_of(stream, item):
            x, y, drawn = each.inputs["pixel_values"], each.labels, slots.pop(0)
            if drawn is not None:
                x, y = torch.cat([x, kept.inputs["pixel_values"][drawn]]), torch.cat([y, kept.labels[drawn]])
            loss = F.cross_entropy(logits_of(plain, x), y)
            if t:
                anchors = torch.cat([method.anchors.tensors()[str(k)] for k in range(t)])
                own = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
                ahead = {name: p - 0.3 * g for (name, p), g in zip(parameters.items(), own)}
                then = torch.func.functional_call(plain, ahead, kwargs={"pixel_values": anchors}).logits
                distance = (logits_of(plain, anchors) - then).square().sum() / (3 * t * 3)
                moved += distance.item()
                loss = loss + 20.0 * distance
            descend(parameters.values(), loss, lr=0.3)
    assert moved > 1e-3
    assert_same_parameters(method.model, plain, 1e-9)


def test_the_gradient_goes_through_the_look_ahead():
    """Against finite differences of the whole objective; held fixed, the look-ahead would give another gradient."""
    stream = domain_stream(2, dtype=torch.float64)
    method = HAL(model_for(stream, dtype=torch.float64), strength=50.0, anchor_steps=1, memory=Ring(6))
    run(method, TaskStream(stream.items[:1], kind="domain"))
    runtime, stage = begin(method, stream, stage=1, lr=0.4)
    (batch,) = batches(stage.data, steps=1)
    replay = method.draw(batch)
    method.draw = lambda batch: replay
    weight = method.model.heads["task"].weight
    anchors = method.anchors.tensors()["0"]

    def objective():
        parameters = dict(method.model.named_parameters())
        loss = method.loss(batch)["labels"]
        own = torch.autograd.grad(loss, list(parameters.values()))
        ahead = {name: p - 0.4 * g for (name, p), g in zip(parameters.items(), own)}
        then = torch.func.functional_call(method.model, ahead, kwargs={"pixel_values": anchors}).logits
        return loss.item() + 50.0 * (logits_of(method.model, anchors) - then).square().mean().item()

    def differences(function, size=1e-5):
        found = []
        for column in range(4):
            with torch.no_grad():
                weight[0, column] += size
            up = function()
            with torch.no_grad():
                weight[0, column] -= 2 * size
            down = function()
            with torch.no_grad():
                weight[0, column] += size
            found.append((up - down) / (2 * size))
        return torch.tensor(found, dtype=torch.float64)

    expected = differences(objective)
    without = differences(lambda: method.loss(batch)["labels"].item())
    before = weight.detach().clone()
    terms = stage.updates[0].apply(batch, runtime)
    runtime.end()
    taken = ((before - weight) / 0.4)[0, :4].detach()
    torch.testing.assert_close(taken, expected, rtol=1e-5, atol=1e-7)
    assert (expected - without).abs().max() > 1e-2
    assert set(terms) == {"labels", "moved"}


def test_steps_are_sought_that_leave_the_outputs_on_anchors():
    """What a plain step on the batch would move shrinks more in ten steps with the penalty than without it."""
    first = tiny_data(24, dtype=torch.float64)
    sets = [first, first | {"labels": (first["labels"] + 1) % 3}]
    stream = TaskStream([SingleTask(data, name=f"t{k}") for k, data in enumerate(sets)], kind="domain")
    moved = []
    for strength in (1e-9, 30.0):
        method = HAL(model_for(stream, dtype=torch.float64), strength=strength, anchor_steps=5, memory=Ring(24))
        run(method, TaskStream(stream.items[:1], kind="domain"), steps=10, lr=0.1)
        runtime, stage = begin(method, stream, stage=1, lr=0.1)
        (batch,) = batches(stage.data, steps=1)
        moved.append([stage.updates[0].apply(batch, runtime)["moved"].item() / strength for _ in range(10)])
        runtime.end()
    assert moved[0][0] == pytest.approx(moved[1][0], rel=1e-6)
    assert moved[1][-1] < 0.8 * moved[0][-1]


def test_anchors_by_hand():
    """One step from 0 with rate 0.1: uphill on L(later) - L(now) - 0.1 |f - phi|^2, each anchor on its own."""
    now, later = tiny_model(3, dtype=torch.float64).eval(), tiny_model(3, dtype=torch.float64, seed=5).eval()
    start, near = torch.zeros(2, 3, 8, 8, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    labels = torch.tensor([2, 0])
    found = ascend(now, later, "task", start, labels, near, gamma=0.1, lr=0.1, steps=1)
    for row, label in enumerate(labels):
        image = start[row : row + 1].clone().requires_grad_()
        features = now.backbone.trunk(image)
        height = F.cross_entropy(later.heads["task"](later.backbone.trunk(image)), label[None])
        height = (
            height - F.cross_entropy(now.heads["task"](features), label[None]) - 0.1 * ((features - near) ** 2).sum()
        )
        torch.testing.assert_close(found[row], 0.1 * torch.autograd.grad(height, image)[0][0])


@pytest.mark.parametrize("make", [domain_stream, task_stream, class_stream])
def test_a_task_leaves_an_anchor_for_each_of_its_classes(make):
    stream = make(2)
    method = HAL(model_for(stream), anchor_steps=20, anchor_lr=0.5, gamma=0.0, memory=Ring(12))
    run(method, stream, steps=6)
    classes = 2 if make is class_stream else 3
    assert [len(own) for own in method.anchors.tensors().values()] == [classes, classes]
    labels = torch.arange(classes) + (2 if make is class_stream else 0)
    assert method.present.nonzero().flatten().tolist() == labels.tolist()
    later = after_rehearsal(method, list(method.learned()), 0.05, 8)

    def forgotten(inputs):
        losses = [m.eval()(pixel_values=inputs, labels=labels, task=method.current).loss for m in (later, method.model)]
        return (losses[0] - losses[1]).item()

    images = method.memory.everything().inputs["pixel_values"]
    noise = torch.rand((classes, 3, 8, 8), generator=method.memory.random("anchors", 1))
    start = images.min() + (images.max() - images.min()) * noise
    assert forgotten(method.anchors.tensors()["1"]) > forgotten(start)


def test_rehearsal_is_one_pass_over_the_memory():
    """Once with all of it in one batch, by hand; the method's model stays."""
    method, stream = example(torch.float64)
    run(method, stream)
    plain, kept = clone(method.model), method.memory.everything()
    later = after_rehearsal(method, list(method.learned()), 0.05, 100)
    assert_same_parameters(method.model, plain, 0.0)
    descend(plain.parameters(), F.cross_entropy(logits_of(plain, kept.inputs["pixel_values"]), kept.labels))
    assert_same_parameters(later, plain, 1e-12)


def test_the_mean_of_features_by_hand():
    """beta = 1/4 and batches whose mean features are m1, m2: phi = 3/4 (1/4 m1 + m2)."""
    stream = TaskStream(domain_stream(1, dtype=torch.float64).items, kind="domain")
    method = HAL(model_for(stream, dtype=torch.float64), decay=0.25, anchor_steps=0, memory=Ring(6))
    run(method, stream, steps=2, lr=0.0)
    one, two = (
        method.model.backbone.trunk(b.inputs["pixel_values"]).mean(0) for b in batches(stream[0].train_source, 2)
    )
    torch.testing.assert_close(method.phi, 0.75 * (0.25 * one + two))


def test_what_cannot_be():
    stream = domain_stream()
    model = model_for(stream)
    for bad in ({"strength": -1.0}, {"gamma": -1.0}, {"anchor_steps": -1}, {"decay": 1.0}, {"replay_batch": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            HAL(model, **bad)
    with pytest.raises(ValueError, match="penalties join a single `Descend`"):
        list((HAL(model) + SI(model)).stages(stream))
    texts = {"input_ids": torch.ones(4, 3, dtype=torch.long), "labels": torch.zeros(4).long()}
    with pytest.raises(ValueError, match="HAL moves inputs along gradients, but those of 't' are tokens"):
        list(HAL(model).stages(TaskStream([SingleTask(texts, name="t")], kind="domain")))
