"""MGDA: directions by hand, no task in conflict, heads unscaled, a whole step re-derived, both kinds of data."""

import math

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import MultiTask
from hubtransfer.methods.multitask.mgda import MGDA, MinNorm
from hubtransfer.patches import ScaleBiasConfig
from tests.methods.multitask.tasks import scenario, shared_data, streams, two_headed
from tests.methods.steps import assert_same_parameters, batches, changed, clone, run, snapshot


def example(dtype=torch.float32, seed=0, n=24):
    return MGDA(two_headed(dtype, seed)), scenario(n, seed, dtype)


def combine(rows, losses=None, normalization="none"):
    gradients = [[torch.tensor(r, dtype=torch.float64)] for r in rows]
    losses = torch.ones(len(rows), dtype=torch.float64) if losses is None else torch.tensor(losses, dtype=torch.float64)
    return MinNorm(normalization).from_rows(gradients, losses)[0].tolist()


def test_directions_by_hand():
    # lengths 1 and 2 at a right angle: weights 4/5 and 1/5
    assert combine([[1.0, 0.0], [0.0, 2.0]]) == pytest.approx([0.8, 0.4])
    assert combine([[1.0, 0.0], [3.0, 0.0]]) == pytest.approx([1.0, 0.0])  # dominated
    assert combine([[1.0, 1.0], [1.0, 1.0]]) == pytest.approx([1.0, 1.0])  # duplicate
    assert combine([[0.0, 0.0], [1.0, 1.0]]) == pytest.approx([0.0, 0.0])  # one task is satisfied: Pareto-stationary
    assert combine([[-1.0], [2.0]]) == pytest.approx([0.0])  # opposite


def test_normalisations_by_hand():
    # l2: unit vectors at a right angle, alpha = (1/2, 1/2), weights prop. to (1/1, 1/2) / 2 -> (2/3, 1/3)
    assert combine([[1.0, 0.0], [0.0, 2.0]], normalization="l2") == pytest.approx([2 / 3, 2 / 3])
    # loss (1, 4): lengths 1 and 1/2, alpha = (1/5, 4/5), weights prop. to (1/5, 1/5) -> (1/2, 1/2)
    assert combine([[1.0, 0.0], [0.0, 2.0]], [1.0, 4.0], "loss") == pytest.approx([0.5, 1.0])
    # loss+ (1, 4): n = (1, 8), lengths 1 and 1/4, alpha = (1/17, 16/17), weights prop. to (1, 2) -> (1/3, 2/3)
    assert combine([[1.0, 0.0], [0.0, 2.0]], [1.0, 4.0], "loss+") == pytest.approx([1 / 3, 4 / 3])


@pytest.mark.parametrize("normalization", ["none", "l2", "loss", "loss+"])
def test_no_task_is_in_conflict(normalization):
    """The property that defines the method: to first order no loss rises along the step."""
    generator = torch.Generator().manual_seed(0)
    for terms in (2, 3, 8):
        rows = torch.randn(terms, 20, generator=generator, dtype=torch.float64) * torch.logspace(0, 2, terms)[:, None]
        losses = torch.rand(terms, generator=generator, dtype=torch.float64) + 0.1
        direction = torch.tensor(combine(rows.tolist(), losses.tolist(), normalization))
        assert (rows.float() @ direction).min() >= -1e-4 * direction.square().sum()


def test_a_task_without_gradient_or_loss_gives_no_nan():
    for normalization in ("none", "l2", "loss", "loss+"):
        found = combine([[0.0, 0.0], [1.0, 2.0]], [0.0, 1.0], normalization)
        assert all(math.isfinite(x) for x in found)


def test_losses_below_zero_count_by_their_size():
    """Normalisation by loss: (-1, 4) weighs as (1, 4) does, 1/2 each (see above); none of it turns a gradient round."""
    assert combine([[1.0, 0.0], [0.0, 2.0]], [-1.0, 4.0], "loss") == pytest.approx([0.5, 1.0])
    assert combine([[1.0, 0.0], [0.0, 2.0]], [-1.0, -4.0], "loss+") == pytest.approx([1 / 3, 4 / 3])


def test_steps_equal_a_plain_loop():
    method, data = example(dtype=torch.float64)
    plain = clone(method.model)
    run(method, data)
    trunk = list(plain.backbone.trunk.parameters())
    for batch in batches(data.train_source):
        z = plain.backbone.trunk(batch.inputs["pixel_values"])
        losses = [F.cross_entropy(plain.heads[t](z), batch.labels[t]) for t in ("left", "right")]
        g, h = (
            torch.cat([x.flatten() for x in torch.autograd.grad(loss, trunk, retain_graph=True)]) for loss in losses
        )
        # closed form for two tasks (the paper's algorithm 1)
        share = ((h - g) @ h / (g - h).square().sum()).clamp(0, 1)
        direction = share * g + (1 - share) * h
        heads = [torch.autograd.grad(loss, list(plain.heads[t].parameters()), retain_graph=True)
                 for t, loss in zip(("left", "right"), losses)]  # fmt: skip
        with torch.no_grad():
            for p, d in zip(trunk, direction.split([p.numel() for p in trunk])):
                p.sub_(0.05 * d.view_as(p))
            for task, gradients in zip(("left", "right"), heads):
                for p, each in zip(plain.heads[task].parameters(), gradients):
                    p.sub_(0.05 * each)
    assert_same_parameters(method.model, plain, 1e-10)


def test_a_batch_for_each_task():
    method = MGDA(two_headed())
    before = snapshot(method.model)
    run(method, streams())
    assert changed(before, method.model) == set(before)


def test_patches_belong_to_their_task():
    """With a patch each the tasks share the rest of the trunk; a patch follows its own task's gradient alone."""
    model = two_headed(left=ScaleBiasConfig(), right=ScaleBiasConfig())
    method = MGDA(model)
    own = {id(p) for p in method.groups()["heads"]}
    assert all(id(p) in own for patch in model.patches.values() for p in patch.parameters())
    before = snapshot(model)
    run(method, scenario())
    assert any(n.startswith("patches.left") for n in changed(before, model))
    assert any(n.startswith("patches.right") for n in changed(before, model))


def test_errors_name_the_task():
    with pytest.raises(ValueError, match="normalization"):
        MGDA(two_headed(), normalization="max")
    with pytest.raises(ValueError, match="MGDA.*'middle'"):
        MGDA(two_headed(), tasks=["left", "middle"])
    with pytest.raises(ValueError, match="twice"):
        MGDA(two_headed(), tasks=["left", "left"])
    only_left = MultiTask(train=shared_data(), labels={"left": "left"})
    with pytest.raises(ValueError, match="'right', for which the scenario has no data"):
        run(MGDA(two_headed()), only_left)
    run(MGDA(two_headed(), tasks=["left"]), only_left, steps=1)
