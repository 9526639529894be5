"""Columns: a layer by hand, nothing earlier changes, every adapter learns, any backbone, saved with the model."""

import pytest
import torch
from torch import nn

import hubtransfer as ht
from hubtransfer.patches import ColumnConfig
from tests.patches.backbones import backbone_of, inputs_of
from tests.tiny import SHAPE, tiny_backbone


def model_with(columns=2, kind="cnn", dtype=torch.float32, **options):
    model = ht.TransferModel(tiny_backbone(kind, dtype))
    torch.manual_seed(1)
    model.add_task("t0", ht.ClassificationHead(3))
    for k in range(1, columns + 1):
        hears = tuple(f"t{j}" for j in range(1, k))
        model.add_task(f"t{k}", ht.ClassificationHead(3), patch=ColumnConfig(columns=hears, seed=k, **options))
    return model.to(dtype).eval()


def images(n=4, dtype=torch.float32):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_two_layers_in_straight_lines():
    """The second column of a perceptron: each layer's output plus U relu(V [a0 h0; a1 h1])."""
    model = model_with(2, "mlp", torch.float64, scale=0.7)
    x, trunk = images(dtype=torch.float64), model.backbone.trunk
    state = {k: dict(model.patches[f"t{k}"].own.named_parameters()) for k in (1, 2)}

    def layer(k, name, h):
        if k == 0:
            return torch.tanh(getattr(trunk, name)(h))
        return torch.tanh(h @ state[k][f"{name}.weight"].T + state[k][f"{name}.bias"])

    def heard(k, act, maps):
        own = {name: state[k][f"{act}.lateral.{name}"] for name in ("scales", "down.weight", "down.bias", "up.weight")}
        last = torch.cat([a * h for a, h in zip(own["scales"], maps)], 1)
        return torch.relu(last @ own["down.weight"].T + own["down.bias"]) @ own["up.weight"].T

    columns = []
    for k in range(3):
        first = layer(k, "first", x.flatten(1))
        first = first + heard(k, "act1", [c[0] for c in columns]) if k else first
        second = layer(k, "second", first)
        second = second + heard(k, "act2", [c[1] for c in columns]) if k else second
        columns.append((first, second))
        expected = model.heads[f"t{k}"](second)
        torch.testing.assert_close(model(pixel_values=x, task=f"t{k}").logits, expected)
    assert state[2]["act1.lateral.scales"].tolist() == pytest.approx([0.7, 0.7])


def test_a_new_column_starts_apart_and_what_was_before_stays_bit_for_bit():
    model, x = model_with(1), images()
    before = {name: model(pixel_values=x, task=name).logits for name in ("t0", "t1")}
    model.add_task("t2", ht.ClassificationHead(3), patch=ColumnConfig(columns=("t1",), seed=9)).eval()
    first = model(pixel_values=x, task="t2").logits
    optimizer = torch.optim.SGD([p for g in model.trainable("patch", "t2") for p in g["params"]], lr=0.5)
    for _ in range(3):
        model(pixel_values=x, task="t2").logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(model(pixel_values=x, task="t2").logits, first)
    for name, logits in before.items():
        assert torch.equal(model(pixel_values=x, task=name).logits, logits)


def test_every_adapter_learns():
    """In the authors' code lateral connections have no gradient."""
    model = model_with(2)
    model(pixel_values=images(), task="t2").logits.square().sum().backward()
    for name, p in model.patches["t2"].named_parameters():
        if "lateral" in name:
            assert p.grad is not None and p.grad.abs().sum() > 0, name
    for name, p in model.patches["t2"].named_parameters():
        p.grad = None
        if name.endswith("lateral.up.weight"):
            p.data.zero_()
    alone = model(pixel_values=images(), task="t2").logits
    model.patches["t2"].own.act1.lateral.up.weight.data.fill_(1.0)
    assert not torch.allclose(model(pixel_values=images(), task="t2").logits, alone)


def test_random_columns_differ_by_seed_and_copies_equal_the_trunk():
    model = ht.TransferModel(tiny_backbone("cnn"))
    rng = torch.get_rng_state()
    for name, config in {
        "a": ColumnConfig(seed=1),
        "b": ColumnConfig(seed=1),
        "c": ColumnConfig(seed=2),
        "d": ColumnConfig(init="copy"),
    }.items():
        model.add_task(name, None, patch=config)
    assert torch.equal(torch.get_rng_state(), rng)
    weights = {name: model.patches[name].own.stem.weight for name in "abcd"}
    assert torch.equal(weights["a"], weights["b"]) and not torch.equal(weights["a"], weights["c"])
    assert torch.equal(weights["d"], model.backbone.trunk.stem.weight)
    assert not torch.equal(weights["a"], model.backbone.trunk.stem.weight)
    assert weights["a"].data_ptr() != weights["b"].data_ptr()


def test_statistics_of_earlier_columns_do_not_move():
    backbone = ht.Backbone.from_pretrained("timm/test_resnet", pretrained=False, image_size=32)
    model = ht.TransferModel(backbone).add_task("t0", ht.ClassificationHead(3))
    model.add_task("t1", ht.ClassificationHead(3), patch=ColumnConfig())
    model.train_only("patch", "t1").train()
    x = torch.randn(4, 3, 32, 32)
    model(pixel_values=x, task="t1")  # the first column learned: its statistics moved
    model.add_task("t2", ht.ClassificationHead(3), patch=ColumnConfig(columns=("t1",)))
    model.train_only("patch", "t2").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        model(pixel_values=x, task="t2")
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith("patches.t2.") for name in moved)


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/mobilenetv2_035", "timm/test_vit", "bert"])
def test_any_backbone(name):
    model = ht.TransferModel(backbone_of(name))
    model.add_task("t0", ht.ClassificationHead(3)).add_task("t1", ht.ClassificationHead(3), patch=ColumnConfig())
    model.eval().requires_grad_(False)
    model.patches["t1"].requires_grad_(True)
    inputs = inputs_of(model.backbone)
    before = model(**inputs, task="t0").logits
    model(**inputs, task="t1").logits.square().sum().backward()
    laterals = {n: p for n, p in model.patches["t1"].named_parameters() if n.endswith("up.weight")}
    assert len(laterals) == len(model.backbone.layers)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in laterals.values())
    assert any(p.grad.abs().sum() > 0 for p in laterals.values())
    assert torch.equal(model(**inputs, task="t0").logits, before)


def test_saved_and_loaded_with_the_model(tmp_path):
    model, x = model_with(2), images()
    model.save_pretrained(tmp_path)
    again = ht.TransferModel.from_pretrained(tmp_path, backbone=tiny_backbone("cnn")).eval()
    for task in model.tasks:
        assert torch.equal(model(pixel_values=x, task=task).logits, again(pixel_values=x, task=task).logits)


def test_each_earlier_column_runs_once():
    model, runs = model_with(3, "mlp"), []
    model.backbone.trunk.register_forward_pre_hook(lambda *_: runs.append(1))
    model(pixel_values=images(), task="t3")
    assert len(runs) == 4


def test_a_batch_of_several_tasks():
    model, x = model_with(2), images()
    mixed = model(pixel_values=x, task=["t2", "t0", "t1", "t2"]).logits
    for row, name in enumerate(["t2", "t0", "t1", "t2"]):
        torch.testing.assert_close(mixed[row], model(pixel_values=x, task=name).logits[row])


def test_what_cannot_be_heard_is_named():
    model = model_with(2)
    model.remove_task("t1")
    with pytest.raises(ValueError, match="'t1'"):
        model(pixel_values=images(), task="t2")
    model = model_with(2)
    model.add_task("t3", None, patch=ColumnConfig(columns=("t2",)))
    with pytest.raises(ValueError, match="'t2' hears t1 .*same tasks before it"):
        model(pixel_values=images(), task="t3")
    with pytest.raises(ValueError, match="layer 'stm'.*'stem'|'stm'"):
        model.add_task("t4", None, patch=ColumnConfig(layers=("stm",)))
    bare = ht.Backbone.from_module(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), dim=4)
    with pytest.raises(ValueError, match="no layers to listen at"):
        ht.TransferModel(bare).add_task("t", None, patch=ColumnConfig())


@pytest.mark.parametrize("bad", [{"reduction": 0}, {"init": "zero"}, {"columns": ("a", "a")}])
def test_bad_values_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ColumnConfig(**bad)


def test_a_column_stands_alone():
    backbone = backbone_of("timm/mobilenetv2_035")
    with pytest.raises(ValueError, match="stands alone"):
        ht.TransferModel(backbone).add_task("task", patch=[ColumnConfig(), ht.DeepenConfig()])
