"""Model patches: a step by hand, tasks that do not meet, statistics of their own, and mistakes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hubtransfer.backbones import Backbone
from hubtransfer.data import Mixing, MultiTask, SingleTask
from hubtransfer.methods.finetuning.fine_tune import FineTune
from hubtransfer.methods.multitask.model_patches import ModelPatches
from hubtransfer.models import ClassificationHead, TransferModel
from hubtransfer.patches import DepthwiseConfig, ScaleBiasConfig
from tests.methods.multitask.tasks import model_with, scenario, streams, two_headed
from tests.methods.steps import assert_same_parameters, batches, begin, changed, clone, run, snapshot
from tests.tiny import SHAPE, tiny_data

PATCHES = {"left": ScaleBiasConfig(), "right": ScaleBiasConfig()}


def example(dtype=torch.float32, seed=0, n=24):
    return ModelPatches(two_headed(dtype, seed, **PATCHES), mode="simultaneous"), scenario(n, seed, dtype)


def in_turns(dtype=torch.float32):
    data = {"left": tiny_data(24, 3, dtype=dtype), "right": tiny_data(16, 2, seed=1, dtype=dtype)}
    return MultiTask(datasets=data, mixing=Mixing())


def batch_norm_model(**patches):
    """A trunk with one batch normalisation and two tasks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6), nn.Tanh())
    model = TransferModel(Backbone.from_module(net, sample=torch.zeros(2, *SHAPE)))
    for task, classes in (("left", 3), ("right", 2)):
        model.add_task(task, ClassificationHead(classes), patch=patches.get(task))
    return model


def patched(trunk, patch, z):
    """The network with the patch's scale and bias written out in the places of the trunk's."""
    for name, module in trunk.named_children():
        if isinstance(module, nn.GroupNorm):
            own = getattr(patch.own, name)
            z = F.group_norm(z, module.num_groups, own.weight, own.bias, module.eps)
        else:
            z = module(z)
    return z


@pytest.mark.parametrize("mode", ["transfer", "simultaneous"])
def test_steps_in_turns_equal_a_plain_loop(mode):
    method = ModelPatches(two_headed(torch.float64, **PATCHES), mode=mode)
    data, plain = in_turns(torch.float64), clone(method.model)
    run(method, data, steps=4)
    seen = []
    for streams_of_step in batches(data.train_sources, 4):
        ((task, batch),) = streams_of_step.items()
        seen.append(task)
        patch, head, trunk = plain.patches[task], plain.heads[task], plain.backbone.trunk
        z = patched(trunk, patch, batch.inputs["pixel_values"])
        learning = [*patch.parameters(), *head.parameters()]
        if mode == "simultaneous":
            learning += [p for n, p in trunk.named_parameters() if "norm" not in n]
        gradients = torch.autograd.grad(F.cross_entropy(head(z), batch.labels), learning)
        with torch.no_grad():
            for p, g in zip(learning, gradients):
                p.sub_(0.05 * g)
    assert set(seen) == {"left", "right"}
    assert_same_parameters(method.model, plain, 1e-10)


@pytest.mark.parametrize("mode", ["transfer", "simultaneous"])
def test_steps_of_three_tasks_equal_a_plain_loop(mode):
    """K = 3 on the same inputs: the trunk follows the sum of the losses, each through its own patch."""
    tasks = ("left", "right", "size")
    model = model_with(tasks, torch.float64, left=ScaleBiasConfig(), right=ScaleBiasConfig(), size=ScaleBiasConfig())
    method, data, plain = ModelPatches(model, mode=mode), scenario(24, 0, torch.float64, tasks), clone(model)
    run(method, data, steps=2)
    learning = [p for task in tasks for m in (plain.patches, plain.heads) for p in m[task].parameters()]
    if mode == "simultaneous":
        learning += [p for n, p in plain.backbone.trunk.named_parameters() if "norm" not in n]
    for batch in batches(data.train_source, 2):
        out = {
            task: plain.heads[task](patched(plain.backbone.trunk, plain.patches[task], batch.inputs["pixel_values"]))
            for task in tasks
        }
        loss = F.cross_entropy(out["left"], batch.labels["left"]) + F.cross_entropy(out["right"], batch.labels["right"])
        loss = loss + F.mse_loss(out["size"][:, 0], batch.labels["size"])
        gradients = torch.autograd.grad(loss, learning)
        with torch.no_grad():
            for p, g in zip(learning, gradients):
                p.sub_(0.05 * g)
    assert_same_parameters(method.model, plain, 1e-10)


def test_transfer_is_each_task_alone():
    """The trunk is frozen, so a task learns what it would learn without the others, bit for bit."""
    method = ModelPatches(two_headed(**PATCHES))
    data, alone = in_turns(), clone(method.model)
    before = snapshot(method.model.backbone)
    run(method, data, steps=5)
    assert not changed(before, method.model.backbone)
    turns = [next(iter(step.items())) for step in batches(data.train_sources, 5)]
    for task in ("left", "right"):
        single = FineTune(alone, task=task, trains="patch")
        runtime, stage = begin(single, SingleTask(tiny_data(24, 3)))
        for name, batch in turns:
            if name == task:
                stage.updates[0].apply(batch, runtime)
        runtime.end()
    for name, parameter in method.model.named_parameters():
        assert torch.equal(parameter, dict(alone.named_parameters())[name]), name


@pytest.mark.parametrize("mode", ["transfer", "simultaneous"])
def test_statistics_are_each_tasks_own(mode):
    """Left's patch has seen left's batches alone; the trunk's own statistics are nobody's and stay."""
    method = ModelPatches(batch_norm_model(left=ScaleBiasConfig(), right=ScaleBiasConfig()), mode=mode)
    data = in_turns()
    trunk, first = method.model.backbone.trunk, clone(method.model.backbone.trunk)
    run(method, data, steps=5, lr=0.0)  # the trunk's weights stay, so its activations are known
    assert torch.equal(trunk[2].running_mean, torch.zeros(6)) and trunk[2].num_batches_tracked == 0
    expected = {task: (torch.zeros(6), torch.ones(6), 0) for task in ("left", "right")}
    for step in batches(data.train_sources, 5):
        ((task, batch),) = step.items()
        z = first[1](first[0](batch.inputs["pixel_values"])).detach()
        mean, variance, count = expected[task]
        expected[task] = (0.9 * mean + 0.1 * z.mean(0), 0.9 * variance + 0.1 * z.var(0), count + 1)
    for task, (mean, variance, count) in expected.items():
        own = method.model.patches[task].own._modules["2"]
        torch.testing.assert_close(own.running_mean, mean)
        torch.testing.assert_close(own.running_var, variance)
        assert own.num_batches_tracked == count > 0


def test_a_task_alone_changes_nothing_of_another():
    model = batch_norm_model(left=ScaleBiasConfig(), right=ScaleBiasConfig()).eval()
    x = tiny_data(4)["pixel_values"]
    before = model(x, task="right").logits
    run(ModelPatches(model, tasks=["left"]), in_turns(), steps=4)
    assert torch.equal(model.eval()(x, task="right").logits, before)


def test_a_task_without_a_patch_differs_in_its_head_alone():
    method = ModelPatches(two_headed(left=[ScaleBiasConfig(), DepthwiseConfig(insert=True)]))
    before = snapshot(method.model)
    run(method, streams())
    names = changed(before, method.model)
    assert {name.rpartition(".")[0] for name in names if name.startswith("heads")} == {"heads.left", "heads.right"}
    assert all(name.startswith(("heads.", "patches.left.")) for name in names) and len(names) > 4


def test_simultaneous_training_moves_the_trunk_with_every_task():
    method = ModelPatches(two_headed(**PATCHES), mode="simultaneous")
    before = snapshot(method.model)
    run(method, in_turns(), steps=5)
    replaced = {"backbone.trunk.norm1.weight", "backbone.trunk.norm1.bias",
                "backbone.trunk.norm2.weight", "backbone.trunk.norm2.bias"}  # fmt: skip
    assert changed(before, method.model) == set(before) - replaced  # every task has its own in their places


def test_patches_of_new_layers_learn_at_their_own_rate():
    from hubtransfer.patches import DeepenConfig

    method = ModelPatches(two_headed(left=DeepenConfig(units=4)))
    assert {group["lr_scale"] for group in method.groups()["own"]} == {1.0, 10.0}


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="mode.*'simultanous'.*did you mean 'simultaneous'"):
        ModelPatches(two_headed(**PATCHES), mode="simultanous")
    with pytest.raises(ValueError, match="'middle'"):
        ModelPatches(two_headed(**PATCHES), tasks=["left", "middle"])
    only_left = MultiTask(datasets={"left": tiny_data(24, 3)})
    with pytest.raises(ValueError, match="'right', for which the scenario has no data"):
        run(ModelPatches(two_headed(**PATCHES)), only_left)
    frozen = two_headed(**PATCHES)
    frozen.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="'shared' has no parameter"):
        run(ModelPatches(frozen, mode="simultaneous"), in_turns())
