"""A task's view of a trunk that has grown: the answers of its time, no tensors, reverted, saved and loaded."""

import copy

import pytest
import torch

from hubtransfer.models import TransferModel
from hubtransfer.patches import EarlierUnitsConfig, applied, patch_from_dict, patch_to_dict
from tests.tiny import tiny_backbone, tiny_model

X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def grown():
    """A trunk of 16-16 units that has got 2 and 1 more, which old ones read."""
    model = tiny_model(kind="mlp")
    before = model(pixel_values=X).logits.detach()
    more = {"first": [*range(16), -1, -1], "second": [*range(16), -1]}
    model.grow("units", sources=more)
    with torch.no_grad():
        model.backbone.trunk.second.weight[:16, 16:] = 1.0
    return model, before


def test_it_answers_as_then():
    model, before = grown()
    now = model(pixel_values=X).logits.detach()
    assert not torch.allclose(now, before, atol=1e-3)
    model.add_patch("task", EarlierUnitsConfig(inputs={"second": 16}))
    torch.testing.assert_close(model(pixel_values=X).logits, before, atol=1e-6, rtol=0)
    assert model.patches["task"].num_parameters() == 0
    assert not model.patches["task"].tensors()
    del model.patches["task"]
    assert torch.equal(model(pixel_values=X).logits, now)


def test_applied_and_reverted_the_trunk_is_as_it_was_and_copies_have_their_own():
    model, _ = grown()
    modules = [(name, id(module)) for name, module in model.backbone.named_modules()]
    patch = EarlierUnitsConfig(inputs={"second": 16}).build(model.backbone)
    clone = copy.deepcopy(torch.nn.ModuleDict({"backbone": model.backbone, "patch": patch}))
    with torch.no_grad(), applied(patch):
        expected = model.backbone(X).pooled
    assert [(name, id(module)) for name, module in model.backbone.named_modules()] == modules
    with torch.no_grad():
        model.backbone.trunk.second.weight.zero_()
        with applied(clone["patch"]):
            assert torch.equal(clone["backbone"](X).pooled, expected)


def test_saved_and_loaded(tmp_path):
    model, _ = grown()
    model.add_patch("task", EarlierUnitsConfig(inputs={"second": 16}))
    model.save_pretrained(tmp_path)
    again = TransferModel.from_pretrained(tmp_path, backbone=tiny_backbone("mlp", seed=3)).eval()
    assert torch.equal(again(pixel_values=X).logits, model.eval()(pixel_values=X).logits)
    config = EarlierUnitsConfig(inputs={"second": 16})
    assert patch_from_dict(patch_to_dict(config)) == config


@pytest.mark.parametrize(
    ("inputs", "message"),
    [({}, "names no layer"), ({"secnd": 3}, "did you mean 'second'|second"), ({"second": 17}, "has 16 inputs")],
)
def test_wrong_layers_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(kind="mlp").add_patch("task", EarlierUnitsConfig(inputs=inputs))
