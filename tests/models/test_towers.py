"""A network for each task with cross-stitch units: by hand, as independent networks, saved and loaded, and mistakes."""

import copy
import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from hubtransfer.backbones import Backbone, Towers
from hubtransfer.functional.stitch import stitch, stitch_start
from hubtransfer.models import ClassificationHead, DenseHead, TransferModel, stitched_model
from hubtransfer.patches import ScaleBiasConfig
from tests.patches.backbones import OPTIONS
from tests.tiny import tiny_backbone, tiny_data, tiny_model

LAYERS = ("act1", "act2")


def images(n=4, dtype=torch.float32):
    return tiny_data(n, dtype=dtype)["pixel_values"]


def singles(tasks=("a", "b"), dtype=torch.float32, kind="cnn"):
    return {task: tiny_model(3, task, kind=kind, dtype=dtype, seed=k) for k, task in enumerate(tasks)}


def identity_(model):
    for unit in model.backbone.units:
        unit.restart(1.0, 0.0)
        assert torch.equal(unit.alpha[..., 0], torch.eye(len(unit.alpha)))
    return model


def timm_models(name="timm/test_resnet", tasks=("a", "b"), **changes):
    models = {}
    for k, task in enumerate(tasks):
        torch.manual_seed(k)
        backbone = Backbone.from_pretrained(name, pretrained=False, **OPTIONS[name])
        models[task] = TransferModel(backbone).add_task(task, ClassificationHead(3))
        for module in models[task].modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)  # timm starts residual branches at zero
    return models


def test_a_unit_by_hand():
    # channel 0: 0.9 * 1 + 0.1 * 10, and 0.2 * 1 + 0.8 * 10; channel 1 crosses over
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])
    alpha = torch.tensor([[[0.9, 0.0], [0.1, 1.0]], [[0.2, 1.0], [0.8, 0.0]]])
    one, two = stitch([a, b], alpha)
    torch.testing.assert_close(one, torch.tensor([[1.9, 20.0]]))
    torch.testing.assert_close(two, torch.tensor([[8.2, 2.0]]))
    # per channel on maps and on tokens
    maps = [x[..., None, None].expand(1, 2, 3, 3) for x in (a, b)]
    assert torch.equal(stitch(maps, alpha)[0][:, :, 1, 2], one)
    tokens = [x[:, None].expand(1, 5, 2) for x in (a, b)]
    assert torch.equal(stitch(tokens, alpha, axis=-1)[1][:, 4], two)


def test_the_paper_starts_near_the_tasks_own_network():
    assert stitch_start(2, 3, 0.9, 0.1)[..., 2].tolist() == [[0.9, 0.1], [0.1, 0.9]]
    torch.testing.assert_close(stitch_start(5, 1, 0.9, 0.1).sum(1), torch.ones(5, 1, dtype=torch.float64))


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_vit"])
@pytest.mark.parametrize("tasks", [("a", "b"), ("a", "b", "c")])
def test_with_the_identity_the_networks_are_independent_bit_for_bit(name, tasks):
    models = timm_models(name, tasks)
    model = identity_(stitched_model(models))
    x = torch.randn(4, *model.backbone._sample["pixel_values"][0][1:])
    for task, single in models.items():
        single.eval()
        assert torch.equal(model(x, task=task).logits, single(x, task=task).logits)
    model.train()
    loss = sum(model(x, task=task, labels=torch.arange(4) % 3).loss for task in tasks)
    loss.backward()
    for k, (task, single) in enumerate(models.items()):
        single.train()
        single(x, task=task, labels=torch.arange(4) % 3).loss.backward()
        own = dict(model.backbone.trunk.towers[k].named_parameters())
        for key, parameter in single.backbone.named_parameters():
            assert torch.equal(own[key].grad, parameter.grad), key


def test_a_stitched_pass_equals_one_written_out():
    models = singles(dtype=torch.float64)
    model = stitched_model(models, LAYERS)
    with torch.no_grad():
        for unit in model.backbone.units:
            unit.alpha.add_(0.3 * torch.randn_like(unit.alpha))
    x = images(dtype=torch.float64)
    nets = [one.backbone.trunk for one in models.values()]
    first, second = (unit.alpha for unit in model.backbone.units)
    h = [torch.tanh(net.norm1(net.stem(x))) for net in nets]
    h = [sum(first[i, j][:, None, None] * h[j] for j in range(2)) for i in range(2)]
    h = [torch.tanh(net.norm2(net.block(z))) for net, z in zip(nets, h)]
    h = [sum(second[i, j][:, None, None] * h[j] for j in range(2)) for i in range(2)]
    for i, task in enumerate(("a", "b")):
        expected = models[task].heads[task](h[i].mean((2, 3)))
        out = model(x, task=task, layers=["act2"])
        torch.testing.assert_close(out.logits, expected)
        torch.testing.assert_close(out.features.maps["act2"], h[i])  # maps are those that deeper layers read


def test_the_gradient_of_alpha_against_finite_differences():
    model = stitched_model(singles(("a", "b", "c"), dtype=torch.float64), LAYERS)
    x, y = images(dtype=torch.float64), torch.tensor([0, 1, 2, 1])

    def loss():
        features = model.features({"pixel_values": x}, task="a")
        return sum(F.cross_entropy(model.logits(features, task), y) for task in ("a", "b", "c"))

    loss().backward()
    for unit in model.backbone.units:
        for i, j, c in itertools.product(range(3), range(3), (0, 5)):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    unit.alpha[i, j, c] += step
                    values.append(loss())
                    unit.alpha[i, j, c] -= step
            numeric = (values[0] - values[1]) / 2e-5
            torch.testing.assert_close(unit.alpha.grad[i, j, c], numeric, rtol=1e-6, atol=1e-9)


def test_one_pass_gives_every_tasks_features():
    model = stitched_model(singles(), LAYERS)
    seen = []
    for tower in model.backbone.trunk.towers:
        tower.trunk.register_forward_pre_hook(lambda m, args: seen.append(1))
    features = model.features(images(), task="a")
    assert len(seen) == 2
    assert torch.equal(features.pooled, features.by_task["a"].pooled)
    for task in ("a", "b"):
        assert torch.equal(model.logits(features, task), model(images(), task=task).logits)
    assert torch.equal(features.rows(slice(1, 3)).by_task["b"].pooled, features.by_task["b"].pooled[1:3])


def test_networks_of_unlike_depth_with_equal_stages_are_stitched():
    torch.manual_seed(0)
    models = {}
    for task, name in (("a", "timm/resnet10t"), ("b", "timm/resnet18")):
        backbone = Backbone.from_pretrained(name, pretrained=False, image_size=32)
        models[task] = TransferModel(backbone).add_task(task, ClassificationHead(3))
    with pytest.raises(ValueError, match="no layer 'layer1.1'"):  # which the shallower one lacks
        stitched_model(models, ["layer1.1"])
    model = identity_(stitched_model(models, ["layer1", "layer3"]))
    x = torch.randn(2, 3, 32, 32)
    for task, single in models.items():
        assert torch.equal(model(x, task=task).logits, single.eval()(x, task=task).logits)


@pytest.mark.parametrize("source", ["timm", "module"])
def test_a_saved_model_is_bit_equal(source, tmp_path):
    models = timm_models() if source == "timm" else singles()
    model = stitched_model(models, None if source == "timm" else LAYERS)
    with torch.no_grad():
        for unit in model.backbone.units:
            unit.alpha.add_(0.1 * torch.randn_like(unit.alpha))
    model.save_pretrained(tmp_path / "model")
    given = {} if source == "timm" else {"backbone": tiny_backbone(seed=9)}
    again = TransferModel.from_pretrained(tmp_path / "model", **given)
    x = torch.randn(2, *model.backbone._sample["pixel_values"][0][1:])
    for task in ("a", "b"):
        assert torch.equal(again(x, task=task).logits, model(x, task=task).logits)
    assert again.backbone.stitched == model.backbone.stitched


def test_a_saved_model_of_unlike_networks_is_bit_equal(tmp_path):
    models = {}
    for task, name in (("a", "timm/resnet10t"), ("b", "timm/resnet18")):
        backbone = Backbone.from_pretrained(name, pretrained=False, image_size=32)
        models[task] = TransferModel(backbone).add_task(task, ClassificationHead(3))
    model = stitched_model(models, ["layer2"])
    model.save_pretrained(tmp_path / "model")
    again = TransferModel.from_pretrained(tmp_path / "model")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x, task="b").logits, model(x, task="b").logits)


def test_several_networks_a_task_give_their_features_one_after_the_other():
    model = TransferModel(tiny_backbone())
    model.add_task("a", ClassificationHead(3)).add_task("b", ClassificationHead(2))
    before = model.backbone(images()).pooled
    model.grow("towers", tasks=["a", "b"], members=2)
    assert model.backbone.dim == 32 and model.heads["a"].in_features == 32
    pooled = model(images(), task="a").features.pooled
    assert torch.equal(pooled, torch.cat([before, before], 1))


def test_heads_of_pixels_patches_copies_and_layer_groups():
    model = TransferModel(tiny_backbone()).add_task("pixels", DenseHead(2)).add_task("a", ClassificationHead(3))
    model.grow("towers", tasks=["pixels", "a"], layers=list(LAYERS))
    assert model(images(), task="pixels").logits.shape == (4, 2, 8, 8)
    names = [name for group in model.backbone.layer_groups() for name in group]
    covered = [id(p) for name in names for p in model.backbone.trunk.get_submodule(name).parameters()]
    assert sorted(covered) == sorted(id(p) for p in model.backbone.trunk.parameters())
    assert model.trainable({"from_group": 0}, "a")
    clone = copy.deepcopy(model)
    assert torch.equal(clone(images(), task="a").logits, model(images(), task="a").logits)
    model.add_patch("a", ScaleBiasConfig())
    assert torch.equal(clone(images(), task="a").logits, model(images(), task="a").logits)


def test_a_network_that_fails_leaves_nothing_behind():
    model = stitched_model(singles(), LAYERS)
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 5, 8, 8), task="a")
    hooks = [m._forward_hooks for m in model.modules()]
    assert not any(hooks)
    model.backbone.trunk.towers[1].trunk.block.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(images(), task="a")
    assert not any(m._forward_hooks for m in model.modules())


def test_mistakes_are_named():
    wide = tiny_model(3, "b")
    wide.backbone = Backbone.from_module(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 16)),
        sample=torch.zeros(1, 3, 8, 8),
    )
    cnn, other = singles().values()
    with pytest.raises(ValueError, match="no layer 'act1'"):
        stitched_model({"a": cnn, "b": wide}, ["act1"])
    narrow = Backbone.from_module(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3)), sample=torch.zeros(1, 3, 8, 8), layers=["0"]
    )
    thin = Backbone.from_module(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 16, 3)), sample=torch.zeros(1, 3, 8, 8), layers=["0"]
    )
    pair = {t: TransferModel(b).add_task(t, ClassificationHead(2)) for t, b in (("a", narrow), ("b", thin))}
    with pytest.raises(ValueError, match=r"layer '0' cannot be stitched.*\('map', 8, 8, 6, 6\).*'a'.*6.*task 'b'"):
        stitched_model(pair, ["0"])
    with pytest.raises(ValueError, match="two networks or more"):
        stitched_model({"a": cnn})
    with pytest.raises(ValueError, match="'c'"):
        stitched_model({"c": cnn, "b": other}, LAYERS)
    with pytest.raises(ValueError, match="twice"):
        stitched_model({"a": cnn, "b": other}, ["act1", "act1"])
    model = stitched_model({"a": cnn, "b": other}, LAYERS)
    model.add_task("late", ClassificationHead(2))
    with pytest.raises(ValueError, match="task 'late' has no network: the trunk was grown for the tasks a, b"):
        model(images(), task="late")
    with pytest.raises(ValueError, match="the trunk has towers"):
        model.grow("towers", tasks=["a", "c"], layers=list(LAYERS))
    patched = tiny_model(3, "b", patch=ScaleBiasConfig())
    with pytest.raises(ValueError, match="has a patch"):
        stitched_model({"a": cnn, "b": patched}, LAYERS)


def test_activation_checkpointing_is_refused():
    model = stitched_model(timm_models("timm/test_vit"), ["blocks.1"])
    model.backbone.trunk.towers[0].trunk.set_grad_checkpointing(True)
    with pytest.raises(RuntimeError, match="checkpoint"):
        model.train()(torch.zeros(1, *model.backbone._sample["pixel_values"][0][1:]), task="a")


def test_it_is_a_backbone_of_towers():
    model = stitched_model(singles(), LAYERS)
    assert isinstance(model.backbone, Towers)
    assert "stitched=('act1', 'act2')" in repr(model.backbone)


def test_a_batch_of_several_tasks_takes_each_tasks_own_network():
    model = stitched_model(singles(), layers=LAYERS).eval()
    x, tasks = images(4), ["b", "a", "a", "b"]
    logits = model(x, task=tasks, layers=["act1"])
    for row, task in enumerate(tasks):
        alone = model(x[row : row + 1], task=task, layers=["act1"])
        torch.testing.assert_close(logits.logits[row], alone.logits[0])
        torch.testing.assert_close(logits.features.pooled[row], alone.features.pooled[0])
        torch.testing.assert_close(logits.features.maps["act1"][row], alone.features.maps["act1"][0])
