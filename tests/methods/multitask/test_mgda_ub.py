"""MGDA-UB: weights by hand, equal to MGDA where the trunk is orthogonal, the batch counts, a whole step re-derived."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hubtransfer.backbones import Backbone
from hubtransfer.data import MultiTask
from hubtransfer.methods.multitask.mgda import MGDA
from hubtransfer.methods.multitask.mgda_ub import MGDAUB
from hubtransfer.models import RegressionHead, TransferModel
from tests.methods.multitask.tasks import flat_gradient, scenario, streams, two_headed
from tests.methods.steps import assert_same_parameters, batches, begin, clone, run


def example(dtype=torch.float32, seed=0, n=24):
    return MGDAUB(two_headed(dtype, seed)), scenario(n, seed, dtype)


def linear_model(trunk, heads):
    """A linear trunk on flat inputs, and regression heads without bias."""
    layer = nn.Linear(*reversed(trunk.shape), bias=False).to(trunk)
    layer.weight.data.copy_(trunk)
    backbone = Backbone.from_module(layer, dim=len(trunk), sample=torch.zeros(2, trunk.shape[1]).to(trunk))
    model = TransferModel(backbone)
    for task, weight in heads.items():
        model.add_task(task, RegressionHead(1))
        model.heads[task].weight.data.copy_(weight)
        model.heads[task].bias.data.zero_()
    return model


def first_weights(cls, model, data, **config):
    """The weights of the first step on all examples."""
    method = cls(model, **config).double()
    runtime, stage = begin(method, data, batch_size=100)
    stage.updates[0].apply(batches(data.train_source, 1, batch_size=100)[0], runtime)
    return method.weights


def data_of(x, **targets):
    return MultiTask(train={"pixel_values": x, **targets}, labels={task: task for task in targets})


def test_weights_by_hand():
    """Identity trunk, heads e1 and 2 e2, targets 0, x = e1 and e2: dL_1/dZ has one entry 1, dL_2/dZ one of 4.

    L_1 = mean((x_i1)^2), so dL_1/dz_i = 2 z_i1 e1 / 2 = (1, 0) at example 1 and 0 at example 2. L_2 = mean((2 x_i2)^2),
    so dL_2/dz_i = 4 (2 z_i2) e2 / 2 = (0, 4) at example 2. Orthogonal, lengths 1 and 4: weights 16/17 and 1/17.
    """
    eye = torch.eye(2, dtype=torch.float64)
    model = linear_model(eye, {"a": eye[:1], "b": 2 * eye[1:]})
    weights = first_weights(MGDAUB, model, data_of(eye, a=torch.zeros(2).double(), b=torch.zeros(2).double()))
    assert weights.tolist() == pytest.approx([16 / 17, 1 / 17])


def test_gradients_are_compared_example_by_example():
    """Summed over the batch first, the two tasks' gradients would be equal; example by example they are orthogonal.

    One feature, x = (1, 1); task a is right on example 2 and wrong by 1 on example 1, task b the other way round.
    dL_a/dZ = (1, 0), dL_b/dZ = (0, 3) with targets 0 and -2 where wrong: weights 9/10 and 1/10. Both sums over the
    batch point along +1: there the shorter one alone would have weight 1.
    """
    one = torch.ones(1, 1, dtype=torch.float64)
    model = linear_model(one, {"a": one, "b": one})
    x = torch.ones(2, 1, dtype=torch.float64)
    a, b = torch.tensor([0.0, 1.0]).double(), torch.tensor([1.0, -2.0]).double()
    assert first_weights(MGDAUB, model, data_of(x, a=a, b=b)).tolist() == pytest.approx([0.9, 0.1])


@pytest.mark.parametrize("normalization", ["none", "l2", "loss", "loss+"])
def test_equals_mgda_where_the_trunk_is_orthogonal(normalization):
    """Z = X W^T, so dL/dW = (dL/dZ)^T X; with X^T X a multiple of the identity all inner products agree up to it.

    <dL_s/dW, dL_t/dW> = tr(G_s^T X X^T G_t). With as many examples as inputs and X orthogonal, X X^T = I too, so the
    two Gram matrices, and with them the weights and the whole step, are the same.
    """
    torch.manual_seed(0)
    x = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    trunk = torch.randn(4, 6, dtype=torch.float64)
    heads = {task: torch.randn(1, 4, dtype=torch.float64) for task in ("a", "b", "c")}
    targets = {task: torch.randn(6, dtype=torch.float64) for task in heads}
    found = []
    for cls in (MGDA, MGDAUB):
        model = linear_model(trunk, heads)
        weights = first_weights(cls, model, data_of(x, **targets), normalization=normalization)
        found.append((weights, model.backbone.trunk.weight.detach()))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-9, rtol=0)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-9, rtol=0)


def test_steps_equal_a_plain_loop():
    method, data = example(dtype=torch.float64)
    plain = clone(method.model)
    run(method, data)
    trunk = list(plain.backbone.trunk.parameters())
    for batch in batches(data.train_source):
        z = plain.backbone.trunk(batch.inputs["pixel_values"])
        losses = [F.cross_entropy(plain.heads[t](z), batch.labels[t]) for t in ("left", "right")]
        g, h = (flat_gradient(loss, [z]) for loss in losses)
        share = ((h - g) @ h / (g - h).square().sum()).clamp(0, 1)  # the paper's closed form for two tasks
        direction = share * flat_gradient(losses[0], trunk) + (1 - share) * flat_gradient(losses[1], trunk)
        own = {t: torch.autograd.grad(loss, list(plain.heads[t].parameters()), retain_graph=True)
               for t, loss in zip(("left", "right"), losses)}  # fmt: skip
        with torch.no_grad():
            for p, d in zip(trunk, direction.split([p.numel() for p in trunk])):
                p.sub_(0.05 * d.view_as(p))
            for task, gradients in own.items():
                for p, each in zip(plain.heads[task].parameters(), gradients):
                    p.sub_(0.05 * each)
    assert_same_parameters(method.model, plain, 1e-10)


def test_tasks_with_data_of_their_own_take_the_very_steps_of_mgda():
    methods = [cls(two_headed()) for cls in (MGDA, MGDAUB)]
    before = clone(methods[0].model)
    for method in methods:
        run(method, streams())
    one, two = (method.state_dict() for method in methods)
    assert one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name], two[name])]
    assert not torch.equal(before.heads["left"].weight, methods[0].model.heads["left"].weight)
