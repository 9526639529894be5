"""Uncertainty weighting: both forms by hand, the closed-form minimum, whole steps, losses of zero and below."""

import math

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import Mixing, MultiTask
from hubtransfer.methods.multitask.uncertainty import Uncertainty
from hubtransfer.training import Callback, Trainer
from tests.methods.multitask.tasks import batch_of, model_with, scenario, shared_data, two_headed
from tests.methods.steps import assert_same_parameters, batches, begin, changed, clone, run, settings, snapshot
from tests.tiny import tiny_data

KINDS = ("left", "size", "map")


def example(dtype=torch.float32, seed=0, n=24):
    return Uncertainty(model_with(KINDS, dtype, seed)), scenario(n, seed, dtype, KINDS)


def with_losses(losses, monkeypatch, **config):
    """The method with given losses in place of the model's."""
    method = Uncertainty(model_with(tuple(losses), torch.float64), **config).double()
    values = {task: torch.tensor(value, dtype=torch.float64) for task, value in losses.items()}
    monkeypatch.setattr("hubtransfer.methods.multitask.uncertainty.task_losses", lambda *args: values)
    return method, batch_of(shared_data(dtype=torch.float64))


def test_both_forms_by_hand(monkeypatch):
    method, batch = with_losses({"left": 3.0, "size": 3.0, "map": 3.0}, monkeypatch, initial=math.log(2))
    terms = method.loss(batch)
    # sigma^2 = 2. Classification: 3 / 2 + log(2) / 2; regression: 3 / 4 + log(2) / 2; a label a pixel: classification
    assert terms["left"].item() == pytest.approx(1.5 + math.log(2) / 2)
    assert terms["size"].item() == pytest.approx(0.75 + math.log(2) / 2)
    assert terms["map"].item() == pytest.approx(1.5 + math.log(2) / 2)


@pytest.mark.parametrize(("task", "factor"), [("left", 1.0), ("size", 0.5)])
def test_the_minimum_has_the_closed_form(task, factor, monkeypatch):
    """d/ds (c exp(-s) L + s / 2) = 0 at s = log(2 c L), where the weight is 1 / (2 L) and the term is (1 + s) / 2."""
    loss = 0.3
    method, batch = with_losses({task: loss}, monkeypatch)
    s = method.log_variance[task]
    optimizer = torch.optim.LBFGS([s], max_iter=100, tolerance_grad=1e-13, tolerance_change=1e-16)

    def term():
        optimizer.zero_grad()
        value = method.loss(batch)[task]
        value.backward()
        return value

    optimizer.step(term)
    assert s.item() == pytest.approx(math.log(2 * factor * loss), abs=1e-7)
    assert method.weight(task).item() == pytest.approx(1 / (2 * loss))
    lowest = term().item()
    assert lowest == pytest.approx((1 + s.item()) / 2)
    assert factor > 0.5 or lowest < 0.5  # the smaller the loss, the lower: below zero in the end


class Totals(Callback):
    """Keeps the total of every step."""

    def __init__(self):
        self.seen = []

    def on_log(self, trainer, row):
        self.seen.append(sum(row["losses"].values()))


def test_the_total_may_be_negative(tmp_path):
    """A perfect regression: L = 0 and stays so, the term is s / 2, and s falls by half the rate, 0.025, a step."""
    model = model_with(("size",), torch.float64)
    for parameter in model.heads["size"].parameters():
        parameter.data.zero_()
    data = {"pixel_values": shared_data(dtype=torch.float64)["pixel_values"], "size": torch.zeros(24).double()}
    totals = Totals()
    arguments = settings(output_dir=str(tmp_path), logging_steps=1)
    method = Uncertainty(model, initial=-3.0).double()
    Trainer(method, MultiTask(train=data, labels={"size": "size"}), arguments, callbacks=[totals]).train()
    assert totals.seen == pytest.approx([-1.5, -1.5125, -1.525])


def test_steps_equal_a_plain_loop():
    method, data = example(dtype=torch.float64)
    method.double()
    plain = clone(method.model)
    run(method, data, weight_decay=0.1)
    logs = {task: torch.zeros((), dtype=torch.float64, requires_grad=True) for task in KINDS}
    optimizer = torch.optim.SGD(
        [{"params": plain.parameters(), "weight_decay": 0.1}, {"params": logs.values(), "weight_decay": 0.0}], lr=0.05
    )
    for batch in batches(data.train_source):
        pixels = batch.inputs["pixel_values"]
        features = plain.backbone(pixels, ("act2",))
        left = F.cross_entropy(plain.heads["left"](features.pooled), batch.labels["left"])
        size = F.mse_loss(plain.heads["size"](features.pooled)[:, 0], batch.labels["size"])
        pixel = F.cross_entropy(plain.heads["map"](features.maps["act2"], (8, 8)), batch.labels["map"])
        total = (-logs["left"]).exp() * left + (-logs["size"]).exp() * size / 2 + (-logs["map"]).exp() * pixel
        optimizer.zero_grad()
        (total + sum(logs.values()) / 2).backward()
        optimizer.step()
    assert_same_parameters(method.model, plain, 1e-10)
    for task in KINDS:
        torch.testing.assert_close(method.log_variance[task], logs[task])


def stepper(method, batch, rate=0.05):
    """The trainer's step on the log variances alone."""
    runtime, stage = begin(method, scenario(), groups={"log_variance": {"lr": rate}})
    return lambda: stage.updates[0].apply(batch, runtime)


@pytest.mark.parametrize("loss", [0.0, -0.5])
def test_a_loss_of_zero_or_below_is_bounded(loss, monkeypatch):
    """It has no minimum in s: the log variance falls as far as it may, and the weight rises to exp(10)."""
    method, batch = with_losses({"left": loss, "right": 1.0}, monkeypatch)
    step = stepper(method, batch, rate=1.0)
    for _ in range(40):
        step()
    assert method.log_variance["left"].item() == -10
    assert method.weight("left").item() == pytest.approx(math.exp(10))
    assert method.loss(batch)["left"].item() == pytest.approx(loss * math.exp(10) - 5)


def test_a_task_that_gets_worse_again_loses_its_weight(monkeypatch):
    """From the lowest s, with a loss of 1: one step adds rate * (exp(10) - 1/2), here half of what s fell."""
    method, batch = with_losses({"left": 0.0, "right": 1.0}, monkeypatch)
    step = stepper(method, batch, rate=1.0)
    for _ in range(40):
        step()
    values = {"left": torch.tensor(1.0).double(), "right": torch.tensor(1.0).double()}
    monkeypatch.setattr("hubtransfer.methods.multitask.uncertainty.task_losses", lambda *args: values)
    stepper(method, batch, rate=5 / (math.exp(10) - 0.5))()
    assert method.log_variance["left"].item() == pytest.approx(-5)


@pytest.mark.parametrize("mixing", [None, Mixing(), Mixing(batches="mixed")])
def test_a_data_set_for_each_task_at_once_or_in_turns(mixing):
    data = {"left": tiny_data(24, 3), "right": tiny_data(16, 2, seed=1)}
    method = Uncertainty(two_headed())
    before = snapshot(method)
    run(method, MultiTask(datasets=data, mixing=mixing), steps=5)
    assert changed(before, method) == set(before)


def test_the_learning_rate_of_the_log_variances_is_their_own():
    method = Uncertainty(two_headed())
    run(method, scenario(), groups={"log_variance": {"lr": 1e-12}})
    assert all(abs(s.item()) < 1e-10 for s in method.log_variance.values())


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"lowest \(-10.0\), got -11"):
        Uncertainty(two_headed(), initial=-11)
