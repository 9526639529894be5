"""Batches of several tasks: one pass of the trunk where patches allow it, equal to one task at a time."""

import copy

import peft
import pytest
import torch
from torch import nn

from hubtransfer.backbones import Backbone
from hubtransfer.models import ClassificationHead, DenseHead, RegressionHead, TransferModel
from hubtransfer.patches import DeepenConfig, DepthwiseConfig, ScaleBiasConfig, WidenConfig
from tests.tiny import batch, tiny_model

X = batch(labels=None, n=6).inputs["pixel_values"]


def moved(model: TransferModel, seed: int = 1) -> TransferModel:
    """Every tensor of every patch and head away from where it starts, statistics too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for modules in (model.patches, model.heads):
            for module in modules.values():
                for tensor in (*module.parameters(), *module.buffers()):
                    if tensor.is_floating_point():
                        tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
    return model.eval()


def serving(name: str, patches: list, image_size: int = 64, pretrained: bool = False) -> TransferModel:
    torch.manual_seed(0)
    model = TransferModel(Backbone.from_pretrained(name, pretrained=pretrained, image_size=image_size))
    for number, patch in enumerate(patches):
        model.add_task(f"t{number}", ClassificationHead(3), patch=patch)
    return moved(model)


def one_by_one(model: TransferModel, x: torch.Tensor, tasks: list[str]) -> torch.Tensor:
    return torch.cat([model(x[k : k + 1], task=task).logits for k, task in enumerate(tasks)])


class Passes:
    """Counts the trunk's passes and the examples in each."""

    def __init__(self, model: TransferModel) -> None:
        self.sizes: list[int] = []
        model.backbone.trunk.register_forward_pre_hook(lambda module, args: self.sizes.append(len(args[0])))


BOTH = [ScaleBiasConfig(), DepthwiseConfig()]


@pytest.mark.parametrize(
    ("name", "pretrained", "patches"),
    [
        ("timm/mobilenetv2_100", False, [ScaleBiasConfig()] * 3),
        ("timm/mobilenetv2_100", False, [BOTH, ScaleBiasConfig(), DepthwiseConfig(), None]),
        ("timm/vit_tiny_patch16_224", False, [ScaleBiasConfig(), None, ScaleBiasConfig(layers=r"blocks\.1\..*")]),
        ("timm/tf_efficientnet_lite0", True, [ScaleBiasConfig(statistics="source"), BOTH, BOTH]),
    ],
)
@torch.no_grad()
def test_one_pass_equals_one_task_at_a_time(name, pretrained, patches):
    model = serving(name, patches, pretrained=pretrained)
    x = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    tasks = [f"t{k % len(patches)}" for k in (1, 0, 2, 1, 0, 3)]
    expected = one_by_one(model, x, tasks)
    model(x, task=tasks)  # the first time it is tried out
    passes = Passes(model)
    out = model(x, task=tasks)
    assert passes.sizes == [6]
    # logits of these random heads reach 10 and more: to 1e-5 of the largest
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))
    other = [tasks[-1], *tasks[:-1]]
    assert not torch.allclose(model(x, task=other).logits, expected, atol=1e-2)  # whose turn it is matters


@pytest.mark.parametrize("name", ["timm/mobilenetv2_100", "timm/vit_tiny_patch16_224"])
@torch.no_grad()
def test_thirty_two_tasks_in_one_batch(name):
    """32 examples, each of a task of its own, and of four tasks in turn: 1e-5 of the largest logit, a call a head."""
    model = serving(name, [ScaleBiasConfig()] * 32, 32)
    x = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3)).tolist()
    calls, passes = {task: [] for task in model.heads}, Passes(model)
    for task, head in model.heads.items():
        head.register_forward_pre_hook(lambda module, args, task=task: calls[task].append(len(args[0])))
    for many in (32, 4):
        tasks = [f"t{k % many}" for k in order]
        expected = one_by_one(model, x, tasks)
        model(x, task=tasks)  # the first time it is tried out
        passes.sizes.clear()
        for sizes in calls.values():
            sizes.clear()
        logits = model(x, task=tasks).logits
        assert passes.sizes == [32]
        assert calls == {task: [32 // many] if int(task[1:]) < many else [] for task in calls}
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_in_training_and_for_other_kinds_each_patch_has_its_pass():
    model = tiny_model(3, "norms", patch=ScaleBiasConfig())
    for name, patch in (("more", ScaleBiasConfig()), ("lora", peft.LoraConfig(r=2, target_modules="block")),
                        ("wide", DeepenConfig(units=4)), ("plain", None)):  # fmt: skip
        model.add_task(name, ClassificationHead(3), patch=patch)
    moved(model)
    tasks = ["lora", "norms", "wide", "more", "plain", "norms"]
    expected = one_by_one(model, X, tasks)
    model(X, task=tasks)
    passes = Passes(model)
    torch.testing.assert_close(model(X, task=tasks).logits, expected)
    assert sorted(passes.sizes) == [1, 1, 4]  # norms, more and plain together
    passes.sizes.clear()
    torch.testing.assert_close(model.train()(X, task=tasks).logits, expected)  # no dropout, no batch statistics
    assert sorted(passes.sizes) == [1, 1, 1, 1, 2]


def test_statistics_of_training_go_to_their_own_task():
    model = serving("timm/test_efficientnet", [ScaleBiasConfig(), ScaleBiasConfig()], 32)
    model.train_only("patch", "t0").train()
    before = {task: {n: t.clone() for n, t in model.patches[task].named_buffers()} for task in ("t0", "t1")}
    x = torch.randn(4, 3, 32, 32)
    model(x, task=["t0", "t0", "t0", "t0"])
    same = [all(torch.equal(t, before[k][n]) for n, t in model.patches[k].named_buffers()) for k in ("t0", "t1")]
    assert same == [False, True]


def test_gradients_are_those_of_each_task_alone():
    """In evaluation mode a mixed batch can be learned from too: the mean of the tasks' losses, weighted by examples."""
    model = tiny_model(3, "a", patch=ScaleBiasConfig())
    moved(model.add_task("b", ClassificationHead(2), patch=ScaleBiasConfig()))
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    model(X, task=["a", "b", "a", "a", "b", "a"], labels=labels).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rows = {"a": [0, 2, 3, 5], "b": [1, 4]}
    sum(model(X[r], task=t, labels=labels[r]).loss * len(r) / 6 for t, r in rows.items()).backward()
    alone = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # in one pass a trunk's tensor that patches replace takes part nowhere; applied, it does not either
    assert found.keys() == alone.keys() and any(name.startswith("patches.b") for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, alone[name], msg=lambda m, n=name: f"{n}: {m}")


class FirstTokensFirst(nn.Module):
    """Normalises (tokens, batch, d): with as many tokens as examples the shapes fit and the axes are others."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(x.transpose(0, 1)).mean(0)


def test_a_trunk_that_mixes_rows_gets_a_pass_for_each_patch(caplog):
    backbone = Backbone.from_module(FirstTokensFirst(), sample=torch.zeros(1, 2, 4))
    model = TransferModel(backbone).add_task("a", ClassificationHead(2), patch=ScaleBiasConfig())
    moved(model.add_task("b", ClassificationHead(2), patch=ScaleBiasConfig()))
    x = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    expected = one_by_one(model, x, ["a", "b"])
    for _ in range(2):
        torch.testing.assert_close(model(x, task=["a", "b"]).logits, expected)
    assert caplog.text.count("a pass of the trunk for each patch") == 1


def test_checkpointed_trunks_are_not_gathered_where_they_recompute():
    model = serving("timm/test_vit", [ScaleBiasConfig(), ScaleBiasConfig()], 160)
    model.backbone.trunk.set_grad_checkpointing(True)
    x = torch.randn(2, 3, 160, 160)
    with pytest.raises(RuntimeError, match="checkpointing"):
        model(x, task=["t0", "t1"])
    with torch.no_grad():
        model(x, task=["t0", "t1"])


@pytest.mark.parametrize("patch", [ScaleBiasConfig(), WidenConfig(units=2)])
def test_heads_of_every_kind(patch):
    model = tiny_model(3, "class", patch=ScaleBiasConfig())
    model.add_task("pixels", DenseHead(2), patch=ScaleBiasConfig())
    model.add_task("size", RegressionHead(), patch=patch).add_task("bare", patch=ScaleBiasConfig())
    moved(model)
    tasks = ["pixels", "class", "size", "bare", "pixels", "class"]
    out = model(X, task=tasks, layers=["act1"])
    for row, task in enumerate(tasks):
        alone = model(X[row : row + 1], task=task, layers=["act1"])
        torch.testing.assert_close(out.logits[row], alone.logits[0])
        torch.testing.assert_close(out.features.maps["act1"][row], alone.features.maps["act1"][0])


def test_while_a_task_is_merged_no_other_runs():
    model = tiny_model(3, "a", patch=ScaleBiasConfig()).add_task("b", ClassificationHead(3), patch=ScaleBiasConfig())
    moved(model).merge("a")
    expected = model(X, task="a").logits
    torch.testing.assert_close(model(X, task=["a"] * 6).logits, expected)
    with pytest.raises(ValueError, match="'a' is merged"):
        model(X, task=["a", "b"] * 3)


def test_predictions_for_tasks_of_their_own():
    from hubtransfer.backbones.processor import ImageProcessor
    from tests.tiny import SHAPE, tiny_network

    processor = ImageProcessor(size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    backbone = Backbone.from_module(tiny_network(), sample=torch.zeros(1, *SHAPE), processor=processor)
    model = TransferModel(backbone).add_task("a", ClassificationHead(2, labels=("cat", "dog")), patch=ScaleBiasConfig())
    moved(model.add_task("size", RegressionHead(), patch=ScaleBiasConfig()))
    raw = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tasks = ["a", "size", "size", "a", "a"]
    for size in (2, 64):
        answers = model.predict(raw, task=tasks, batch_size=size)
        for k, task in enumerate(tasks):
            torch.testing.assert_close(answers[k].scores, model.predict(raw[k : k + 1], task=task)[0].scores)
        assert answers[0].name in ("cat", "dog") and isinstance(answers[1].label, float)
    with pytest.raises(ValueError, match="2 tasks for 5 examples"):
        model.predict(raw, task=["a", "size"])
    assert model.predict([], task="a") == []


def test_a_copy_is_tried_out_by_itself():
    model = tiny_model(3, "a", patch=ScaleBiasConfig()).add_task("b", ClassificationHead(3), patch=ScaleBiasConfig())
    moved(model)
    tasks = ["a", "b"] * 3
    expected = model(X, task=tasks).logits
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(clone(X, task=tasks).logits, expected)
