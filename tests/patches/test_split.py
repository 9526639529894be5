"""Hard sharing: what lies behind the split is a task's own, what lies before is shared by all."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from hubtransfer.backbones import Backbone
from hubtransfer.data import Loader, MultiTask
from hubtransfer.methods.task_losses import task_losses
from hubtransfer.models import ClassificationHead, TransferModel
from hubtransfer.patches import SplitConfig, applied, build_patch, train_where_it_learns
from tests.patches.backbones import backbone_of, disturb, inputs_of
from tests.tiny import tiny_backbone, tiny_data


def owned(patch):
    return {name.rpartition(".")[0] for name in patch.tensors()}


def lenet():
    return Backbone.from_pretrained("plain:lenet", pretrained=False)


@pytest.mark.parametrize(
    ("make", "after", "modules"),
    [
        (lenet, "0", {"1.0", "3"}),
        (lenet, "1", {"3"}),
        (lenet, "0.0", {"1.0", "3"}),
        (lenet, 0, {"1.0", "3"}),
        (lenet, -1, {"3"}),
        (lenet, None, {"0.0", "1.0", "3"}),
        (tiny_backbone, "norm1", {"block", "norm2"}),
        (tiny_backbone, "stem", {"norm1", "block", "norm2"}),
    ],
)
def test_a_task_owns_what_runs_behind_the_split(make, after, modules):
    assert owned(build_patch(SplitConfig(after=after), make())) == modules


def test_of_a_transformer_what_runs_on_both_sides_is_shared():
    patch = build_patch(SplitConfig(after=-2), backbone_of("timm/test_vit"))
    names = set(patch.tensors())
    depth = len(backbone_of("timm/test_vit").layers)
    assert not {name for name in names if name.startswith(("cls_token", "pos_embed", "patch_embed"))}
    assert {name.split(".")[1] for name in names if name.startswith("blocks.")} == {str(depth - 1)}
    assert any(name.startswith(("norm.", "fc_norm.")) for name in names)


def test_tasks_share_the_front_and_nothing_behind_it():
    """A step of one task's loss moves the shared front and its own back, and leaves the other's as they are."""
    backbone = tiny_backbone()
    model = TransferModel(backbone)
    for task in ("a", "b"):
        model.add_task(task, ClassificationHead(3), patch=SplitConfig(after="act1"))
    data = tiny_data(6)
    loss = model(data["pixel_values"], labels=data["labels"], task="a").loss
    loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    front = {f"backbone.trunk.{name}" for name in ("stem.weight", "stem.bias", "norm1.weight", "norm1.bias")}
    back = {f"patches.a.own.{m}.{p}" for m in ("block", "norm2") for p in ("weight", "bias")}
    assert moved == front | back | {"heads.a.weight", "heads.a.bias"}


def test_losses_equal_a_network_with_two_branches():
    model = TransferModel(tiny_backbone(dtype=torch.float64))
    for task in ("a", "b"):
        model.add_task(task, ClassificationHead(3), patch=SplitConfig(after="act1"))
    model.double()
    disturb(model.patches["a"], seed=1)
    disturb(model.patches["b"], seed=2)
    data = tiny_data(6, dtype=torch.float64)
    columns = {"pixel_values": data["pixel_values"], "a": data["labels"], "b": data["labels"].flip(0)}
    (batch,) = Loader(MultiTask(train=columns, labels={"a": "a", "b": "b"}).train_source, batch_size=6).batches(0)
    found = task_losses(model, ("a", "b"), batch)
    trunk = model.backbone.trunk
    shared = torch.tanh(trunk.norm1(trunk.stem(batch.inputs["pixel_values"])))
    for task in ("a", "b"):
        own = model.patches[task].own
        h = F.conv2d(shared, own.block.weight, own.block.bias, stride=2, padding=1)
        h = torch.tanh(F.group_norm(h, 2, own.norm2.weight, own.norm2.bias)).mean((2, 3))
        expected = F.cross_entropy(model.heads[task](h), batch.labels[task])
        torch.testing.assert_close(found[task], expected)


def test_running_statistics_behind_the_split_are_the_tasks_own():
    backbone = backbone_of("timm/test_resnet")
    first, second = (build_patch(SplitConfig(after=-2), backbone) for _ in "ab")
    before = {name: value.clone() for name, value in (backbone.trunk.state_dict() | second.state_dict()).items()}
    with applied(first):
        train_where_it_learns(backbone)
        backbone(inputs_of(backbone, batch=4))
    own = {name for name in first.tensors() if name.endswith("running_mean")}
    assert own and all(not torch.equal(first.tensors()[n], before[n]) for n in own)
    now = backbone.trunk.state_dict() | second.state_dict()
    changed = {name for name in now if not torch.equal(now[name], before[name])}
    assert all("running_" in n or "num_batches" in n for n in changed)
    assert not {n.removeprefix("own.") for n in changed} & set(first.tensors())


def test_a_patch_goes_to_a_folder_and_back(tmp_path):
    model = TransferModel(tiny_backbone()).add_task("a", ClassificationHead(3), patch=SplitConfig(after="act1"))
    disturb(model.patches["a"])
    x = tiny_data(4)["pixel_values"]
    model.save_patch(tmp_path / "patch", "a")
    model.save_pretrained(tmp_path / "model")
    other = TransferModel(tiny_backbone())
    other.load_patch(tmp_path / "patch")
    again = TransferModel.from_pretrained(tmp_path / "model", backbone=tiny_backbone(seed=3))
    expected = model.eval()(x, task="a").logits
    assert torch.equal(other.eval()(x, task="a").logits, expected)
    assert torch.equal(again(x, task="a").logits, expected)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ("layer9", "does not exist.*layers: act1, act2"),
        ("act3", "did you mean 'act"),
        (5, "after=5, but the backbone has 2 layers: act1, act2"),
        ("act2", "everything would be shared"),
    ],
)
def test_mistakes_are_named(after, message):
    with pytest.raises(ValueError, match=message):
        build_patch(SplitConfig(after=after), tiny_backbone())
    with pytest.raises(ValueError, match="name or the number"):
        SplitConfig(after=True)


def test_without_a_trial_run_the_order_is_not_known():
    backbone = Backbone.from_module(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), dim=3)
    with pytest.raises(ValueError, match="sample="):
        build_patch(SplitConfig(after="0"), backbone)
    assert owned(build_patch(SplitConfig(), backbone)) == {"1"}
