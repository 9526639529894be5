"""Hidden units come and go: outputs stay, doubles read doubles, saved and loaded, what is refused."""

import pytest
import torch

from hubtransfer.models import ClassificationHead, TransferModel, linear_chain
from tests.tiny import tiny_backbone, tiny_model


def model_and_inputs():
    model = tiny_model(kind="mlp", dtype=torch.float64).double()
    return model, torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def all_of(model, **more):
    return {name: [*range(16), *more.get(name, [])] for name in linear_chain(model.backbone)}


def test_new_units_are_read_by_nothing_old():
    model, x = model_and_inputs()
    before = model(pixel_values=x).logits
    model.grow("units", sources=all_of(model, first=[-1, -1], second=[-1]), seed=3)
    first, second = model.backbone.trunk.first, model.backbone.trunk.second
    assert (first.weight.shape, second.weight.shape, model.heads["task"].weight.shape) == ((18, 192), (17, 18), (3, 17))
    torch.testing.assert_close(model(pixel_values=x).logits, before, atol=1e-14, rtol=0)
    assert (second.weight[:16, 16:] == 0).all()
    assert (second.weight[16] != 0).all()
    assert model.backbone.dim == 17


def test_units_go():
    model, x = model_and_inputs()
    with torch.no_grad():
        model.backbone.trunk.second.weight[:, 4] = 0
        model.heads["task"].weight[:, 0] = 0
    before = model(pixel_values=x).logits
    stay = [k for k in range(16) if k != 4]
    model.grow("units", sources={"first": stay, "second": list(range(1, 16))})
    torch.testing.assert_close(model(pixel_values=x).logits, before, atol=1e-14, rtol=0)
    assert model.backbone.trunk.second.weight.shape == (15, 15)


def test_a_double_reads_doubles():
    model, x = model_and_inputs()
    old = model.backbone.trunk.second.weight.detach().clone()
    before = model(pixel_values=x).logits
    model.grow("units", sources=all_of(model, first=[2], second=[5]))
    weight = model.backbone.trunk.second.weight
    assert torch.equal(weight[:16, :16], old)
    assert (weight[:16, 16] == 0).all()
    assert weight[16, 2] == 0 and weight[16, 16] == old[5, 2]
    assert torch.equal(weight[16, [0, 1, 3, 15]], old[5, [0, 1, 3, 15]])
    features = model.features(x).pooled
    torch.testing.assert_close(features[:, 16], features[:, 5])
    torch.testing.assert_close(model(pixel_values=x).logits, before, atol=1e-14, rtol=0)


def test_saved_and_loaded_it_grows_again(tmp_path):
    model = tiny_model(kind="mlp").grow("units", sources={"first": [-1, 3, 3], "second": [0, -1]}, seed=1)
    model.add_task("later", ClassificationHead(2))
    model.save_pretrained(tmp_path)
    again = TransferModel.from_pretrained(tmp_path, backbone=tiny_backbone("mlp", seed=5))
    x = torch.randn(4, 3, 8, 8)
    for task in ("task", "later"):
        one, two = (each.eval()(pixel_values=x, task=task).logits for each in (model, again))
        assert torch.equal(one, two)


def test_other_trunks_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="linear layers in a row, such as plain:mlp.*'stem.weight'"):
        linear_chain(tiny_backbone("cnn"))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"first": [0]}, "sources must name the layers first, second, got first"),
        ({"first": [16], "second": [0]}, "layer 'first' has units 0 to 15"),
        ({"first": [0], "second": []}, "layer 'second' has units 0 to 15"),
    ],
)
def test_wrong_sources_are_named_and_nothing_changes(sources, message):
    model = tiny_model(kind="mlp")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        model.grow("units", sources=sources)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert model.growth == []
