"""GradNorm: whole steps against a plain double-backward loop, slow tasks rise, nothing leaks, the static mode."""

import math

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import MultiTask
from hubtransfer.methods.multitask.fixed_weights import FixedWeights
from hubtransfer.methods.multitask.grad_norm import GradNorm
from hubtransfer.models import MultiLabelHead
from tests.methods.multitask.tasks import batch_of, model_with, scenario, shared_data, two_headed
from tests.methods.steps import assert_same_parameters, batches, begin, changed, clone, run, snapshot

TASKS = ("left", "right", "size")


def example(dtype=torch.float32, seed=0, n=24):
    return GradNorm(two_headed(dtype, seed)), scenario(n, seed, dtype)


@pytest.mark.parametrize("layer", [None, "stem"])
def test_steps_equal_a_plain_double_backward_loop(layer):
    """The paper's algorithm as it stands: norms with their graph, L_grad differentiated by the weights alone."""
    method = GradNorm(model_with(TASKS, torch.float64), layer=layer, lr=0.1).double()
    data, plain = scenario(dtype=torch.float64, tasks=TASKS), clone(method.model)
    run(method, data, steps=4)
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=0.1)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.05)
    kernel = plain.backbone.trunk.get_parameter(f"{layer or 'block'}.weight")
    first = None
    for batch in batches(data.train_source, 4):
        z = plain.backbone.trunk(batch.inputs["pixel_values"])
        values = [F.cross_entropy(plain.heads[t](z), batch.labels[t]) for t in ("left", "right")]
        values = torch.stack([*values, F.mse_loss(plain.heads["size"](z)[:, 0], batch.labels["size"])])
        first = values.detach() if first is None else first
        norms = torch.stack(
            [torch.autograd.grad(w[k] * values[k], kernel, create_graph=True)[0].norm() for k in range(3)]
        )
        rates = values.detach() / first
        target = (norms.mean() * (rates / rates.mean()) ** 1.5).detach()
        (slope,) = torch.autograd.grad((norms - target).abs().sum(), w, retain_graph=True)
        network = torch.autograd.grad((w.detach() * values).sum(), list(plain.parameters()))
        for p, g in zip(plain.parameters(), network):
            p.grad = g
        w.grad = slope
        sgd.step()
        adam.step()
        w.data.clamp_(min=0)
        w.data.mul_(3 / w.data.sum())
    assert_same_parameters(method.model, plain, 1e-10)
    torch.testing.assert_close(method.weights, w)


def test_the_slow_tasks_weight_rises():
    """Task `right` cannot be learnt: its labels are noise. Its loss stays where it was, the others' fall."""
    data = shared_data(64)
    noise = torch.randint(2, (64,), generator=torch.Generator().manual_seed(0))
    data = {"pixel_values": data["pixel_values"], "left": data["left"], "right": noise}
    method = GradNorm(two_headed())
    both = MultiTask(train=data, labels={"left": "left", "right": "right"})
    run(method, both, steps=40, lr=0.2, batch_size=64)
    assert method.weights[1] > 1.2
    assert method.weights[0] < 0.8


def test_the_network_sees_the_weighted_sum_alone():
    """Two published implementations let L_grad reach the network. Here a step is that of fixed weights of the same."""
    method = GradNorm(model_with(TASKS, torch.float64)).double()
    with torch.no_grad():
        method.weights.copy_(torch.tensor([0.5, 1.75, 0.75]))
        method.initial.fill_(0.1)  # so that L_grad is far from its minimum
    fixed = FixedWeights(clone(method.model), weights={"left": 0.5, "right": 1.75, "size": 0.75}).double()
    data = scenario(dtype=torch.float64, tasks=TASKS)
    run(method, data, steps=1)
    run(fixed, data, steps=1)
    assert_same_parameters(method.model, fixed.model, 1e-12)
    assert not torch.allclose(method.weights, torch.tensor([0.5, 1.75, 0.75], dtype=torch.float64), atol=1e-3)


def test_weights_stay_on_the_simplex_under_a_huge_rate():
    method = GradNorm(model_with(TASKS), lr=5.0)
    runtime, stage = begin(method, scenario(tasks=TASKS))
    for batch in batches(stage.data, 10):
        stage.updates[0].apply(batch, runtime)
        assert (method.weights >= 0).all()
        assert method.weights.sum().item() == pytest.approx(3, abs=1e-5)


def test_first_losses_measured_or_of_guessing():
    measured = GradNorm(model_with(TASKS))
    runtime, stage = begin(measured, scenario(tasks=TASKS))
    terms = stage.updates[0].apply(batches(stage.data, 1)[0], runtime)
    torch.testing.assert_close(measured.initial, torch.stack(list(terms.values())))
    model = two_headed().add_task("flags", MultiLabelHead(4))
    chance = GradNorm(model_with(("left", "size", "map")), initial="chance").initial.tolist()
    assert chance == pytest.approx([math.log(3), 0, math.log(2)])  # a regression's first loss is measured all the same
    assert GradNorm(model, tasks=["flags"], initial="chance").initial.item() == pytest.approx(math.log(2))


def test_a_first_loss_of_zero_waits_for_a_positive_one():
    data = shared_data(8)
    data["size"] = torch.full((8,), float("nan"))
    method = GradNorm(model_with(("left", "size")))
    run(method, scenario(tasks=("left", "size")), steps=1)
    assert (method.initial > 0).all()
    method = GradNorm(model_with(("left", "size")))
    runtime, stage = begin(method, scenario(tasks=("left", "size")))
    stage.updates[0].apply(batch_of({k: data[k] for k in ("pixel_values", "left", "size")}), runtime)
    assert method.initial[0] > 0
    assert method.initial[1] == 0


def test_the_layer_is_the_last_that_all_tasks_depend_on():
    method = GradNorm(two_headed())
    run(method, scenario(), steps=1)
    assert method._measured == "block.weight"
    method = GradNorm(two_headed(), layer="stem")
    run(method, scenario(), steps=1)
    assert method._measured == "stem.weight"
    with pytest.raises(ValueError, match="no trainable weight in layer 'blok'"):
        run(GradNorm(two_headed(), layer="blok"), scenario(), steps=1)


def test_static_starts_again_with_the_average_weights():
    """Second stage: the same first parameters, and plain steps with the mean of the first stage's weights."""
    data = scenario(dtype=torch.float64, tasks=TASKS)
    method = GradNorm(model_with(TASKS, torch.float64), static=True).double()
    fresh = clone(method.model)
    learned = GradNorm(clone(method.model)).double()
    runtime, stage = begin(learned, data)
    seen = []
    for batch in batches(stage.data, 3):
        stage.updates[0].apply(batch, runtime)
        seen.append(learned.weights.detach().clone())
    run(method, data, steps=3)
    average = torch.stack(seen).mean(0)
    torch.testing.assert_close(method.average, average)
    torch.testing.assert_close(method.weights, average)
    fixed = FixedWeights(fresh, weights=dict(zip(TASKS, average.tolist()))).double()
    runtime, stage = begin(fixed, data)
    for batch in batches(stage.data, 3, stage=1):
        stage.updates[0].apply(batch, runtime)
    assert_same_parameters(method.model, fixed.model, 1e-7)  # the fixed weights were single precision


def test_the_weights_learning_rate_and_decay_are_their_own():
    method = GradNorm(two_headed())
    before = snapshot(method)
    run(method, scenario(), groups={"weights": {"lr": 1e-12}}, weight_decay=0.5)
    torch.testing.assert_close(method.weights, torch.ones(2))
    assert "model.backbone.trunk.block.weight" in changed(before, method)


def test_bad_values_are_named():
    for config, message in (({"alpha": -1}, "alpha"), ({"lr": 0.0}, "lr"), ({"initial": "zero"}, "'chance'")):
        with pytest.raises(ValueError, match=message):
            GradNorm(two_headed(), **config)
