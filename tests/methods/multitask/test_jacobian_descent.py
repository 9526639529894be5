"""Jacobian descent: UPGrad's projections for two tasks in closed form, a whole step, other aggregators, wrong names."""

import builtins
import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchjd import aggregation

from hubtransfer.data import MultiTask
from hubtransfer.methods.multitask.jacobian_descent import GramianRule, JacobianDescent, JacobianRule, make_aggregator
from tests.methods.multitask.tasks import batch_of, flat_gradient, model_with, scenario, shared_data, two_headed
from tests.methods.steps import assert_same_parameters, batches, begin, changed, clone, run, snapshot


def example(dtype=torch.float32, seed=0, n=24):
    return JacobianDescent(two_headed(dtype, seed)), scenario(n, seed, dtype)


def up_grad(g, h):
    """The mean of both gradients' projections on the cone that conflicts with neither; for two each has one line."""
    if g @ h >= 0:
        return (g + h) / 2
    return (g - (g @ h) / (h @ h) * h + h - (g @ h) / (g @ g) * g) / 2


@pytest.mark.parametrize(("g", "h"), [([1.0, 0.0], [-1.0, 2.0]), ([1.0, 1.0], [0.0, 2.0]), ([3.0, 0.1], [-2.0, 1.0])])
def test_up_grad_of_two_vectors(g, h):
    rows = torch.tensor([g, h], dtype=torch.float64)
    weights = GramianRule(make_aggregator("UPGrad", {})).weights(rows @ rows.T, torch.ones(2))
    torch.testing.assert_close(weights @ rows, up_grad(*rows), atol=1e-3, rtol=1e-3)


def test_a_step_equals_a_plain_one():
    method, data = example(dtype=torch.float64)
    plain = clone(method.model)
    run(method, data, steps=1)
    batch = batches(data.train_source, 1)[0]
    z = plain.backbone.trunk(batch.inputs["pixel_values"])
    losses = [F.cross_entropy(plain.heads[t](z), batch.labels[t]) for t in ("left", "right")]
    trunk, heads = list(plain.backbone.trunk.parameters()), list(plain.heads.parameters())
    direction = up_grad(*(flat_gradient(loss, trunk) for loss in losses))
    own = flat_gradient(losses[0] + losses[1], heads)
    with torch.no_grad():
        for params, gradient in ((trunk, direction), (heads, own)):
            for p, d in zip(params, gradient.split([p.numel() for p in params])):
                p.sub_(0.05 * d.view_as(p))
    assert_same_parameters(method.model, plain, 1e-4)


AGGREGATORS = {
    "AlignedMTL": ({}, GramianRule),
    "CAGrad": ({"c": 0.4}, GramianRule),
    "ConFIG": ({}, JacobianRule),
    "Constant": ({"weights": [1.0, 1.0, 1.0]}, JacobianRule),
    "DualProj": ({"pref_vector": [1.0, 2.0, 1.0]}, GramianRule),
    "ExcessMTL": ({}, JacobianRule),
    "FairGrad": ({"alpha": 1.0}, GramianRule),
    "GradDrop": ({}, JacobianRule),
    "GradVac": ({}, GramianRule),
    "IMTLG": ({}, GramianRule),
    "Krum": ({"n_byzantine": 0, "n_selected": 2}, GramianRule),
    "MGDA": ({}, GramianRule),
    "Mean": ({}, JacobianRule),
    "NashMTL": ({"n_tasks": 3}, JacobianRule),
    "PCD": ({}, GramianRule),
    "PCGrad": ({}, GramianRule),
    "Random": ({}, JacobianRule),
    "Sum": ({}, JacobianRule),
    "TrimmedMean": ({"trim_number": 1}, JacobianRule),
    "UPGrad": ({}, GramianRule),
}


def test_no_aggregator_is_left_out():
    found = {n for n, c in vars(aggregation).items() if inspect.isclass(c) and issubclass(c, aggregation.Aggregator)}
    assert found - set(AGGREGATORS) == {"Aggregator", "WeightedAggregator", "GramianWeightedAggregator"}
    assert set(AGGREGATORS) <= found


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_aggregator_trains(name):
    tasks, (options, kind) = ("left", "right", "size"), AGGREGATORS[name]
    method = JacobianDescent(model_with(tasks), aggregator=name, options=options)
    assert isinstance(method.rule, kind)
    before = snapshot(method.model)
    run(method, scenario(tasks=tasks), steps=2)
    assert {n for n in before if "block" in n} <= changed(before, method.model)
    assert ("weight/left" in method.watched()) == (kind is GramianRule)


@pytest.mark.parametrize("terms", [3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_up_grad_equals_projections_by_a_quadratic_program(terms, seed):
    """The mean of the rows' projections on {v: J v >= 0}: argmin |v - g_t|^2 / 2 under J v >= 0, one after another."""
    quadprog = pytest.importorskip("quadprog", reason="the quadratic-programming solver is not installed")
    rows = torch.randn(terms, terms + 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).numpy()
    rows[0] = -rows[1] + 0.3 * rows[0]  # a conflict
    identity, nothing = np.eye(rows.shape[1]), np.zeros(terms)
    expected = np.mean([quadprog.solve_qp(identity, row, rows.T, nothing)[0] for row in rows], axis=0)
    gram = torch.from_numpy(rows @ rows.T)
    weights = GramianRule(make_aggregator("UPGrad", {})).weights(gram, torch.ones(terms)).numpy()
    np.testing.assert_allclose(weights @ rows, expected, rtol=0, atol=5e-3 * np.linalg.norm(rows, axis=1).max())
    assert not np.allclose(weights, 1 / terms, atol=0.05)  # it is not the plain mean


@pytest.mark.parametrize(
    ("name", "options"), [("DualProj", {"pref_vector": [1.0, 2.0]}), ("TrimmedMean", {"trim_number": 1})]
)
def test_an_aggregator_that_needs_all_tasks_names_the_one_without_a_label(name, options):
    tasks = ("left", "right") if name == "DualProj" else ("left", "right", "size")
    data = shared_data(8)
    data = {"pixel_values": data["pixel_values"], **{task: data[task] for task in tasks}}
    method = JacobianDescent(model_with(tasks), aggregator=name, options=options)
    runtime, stage = begin(method, MultiTask(train=data, labels={task: task for task in tasks}))
    stage.updates[0].apply(batch_of(data), runtime)
    data["right"] = torch.full((8,), -100)
    with pytest.raises(ValueError, match=f"'right' has no label in this batch, and aggregator '{name}' with"):
        stage.updates[0].apply(batch_of(data), runtime)


def test_the_mean_is_equal_weighting():
    tasks = ("left", "right", "size")
    model = model_with(tasks, torch.float64)
    data, plain = scenario(dtype=torch.float64, tasks=tasks), clone(model)
    run(JacobianDescent(model, aggregator="Mean"), data, steps=1)
    batch = batches(data.train_source, 1)[0]
    losses = [plain(**batch.inputs, labels=batch.labels[t], task=t).loss for t in tasks]
    (sum(losses) / 3).backward()
    for name, parameter in plain.backbone.named_parameters():
        torch.testing.assert_close(model.backbone.get_parameter(name), parameter - 0.05 * parameter.grad)


def test_wrong_names_and_options_are_named():
    with pytest.raises(ValueError, match="'UpGrad'.*UPGrad"):
        JacobianDescent(two_headed(), aggregator="UpGrad")
    with pytest.raises(ValueError, match="'Weighting'"):
        JacobianDescent(two_headed(), aggregator="Weighting")
    with pytest.raises(ValueError, match="'trim'.*trim_number"):
        JacobianDescent(two_headed(), aggregator="TrimmedMean", options={"trim": 1})
    with pytest.raises(ValueError, match="'TrimmedMean' takes the options trim_number"):
        JacobianDescent(two_headed(), aggregator="TrimmedMean")


def test_without_torchjd_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **keywords):
        if name == "torchjd":
            raise ImportError(name)
        return real(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"hubtransfer\[multitask\]"):
        JacobianDescent(two_headed())
