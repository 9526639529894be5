"""One pass for examples of several tasks: each sort of layer by hand, whole networks against one example at a time."""

import pytest
import torch
from torch import nn

import hubtransfer as ht
from hubtransfer.backbones import Backbone
from hubtransfer.patches import (
    DepthwiseConfig,
    PatchConfig,
    ScaleBiasConfig,
    applied,
    build_patch,
    gathered,
    gathering_fails,
    packed,
)
from hubtransfer.patches.depthwise import DEPTHWISE
from hubtransfer.patches.gathered_norms import BATCH_NORM, GROUP_NORM, LAST_AXIS, gather_of_norm
from tests.patches.backbones import backbone_of, disturb, inputs_of, same_state, state_of

BOTH = [ScaleBiasConfig(), DepthwiseConfig()]
CASES = [
    ("timm/mobilenetv2_035", BOTH),  # batch norm with activation inside, depthwise
    ("timm/test_resnet", ScaleBiasConfig()),
    ("timm/test_vit", ScaleBiasConfig()),
    ("bert", ScaleBiasConfig()),
]


def disturbed(kinds: PatchConfig | list[PatchConfig], backbone: Backbone, count: int) -> list:
    return [disturb(build_patch(kinds, backbone), seed) for seed in range(1, count + 1)]


def together(backbone: Backbone, patches: list, inputs: dict) -> torch.Tensor:
    layers = {}
    for name, (gather, _) in patches[0].gathered().items():
        owners = [patch.gathered()[name].owner for patch in patches]
        layers[name] = (gather, gather.rows(backbone.trunk.get_submodule(name), owners))
    with gathered(backbone, layers):
        return backbone(inputs).pooled


def test_batch_norm_by_hand() -> None:
    norm = nn.BatchNorm1d(1, eps=0.0).eval()
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(4.0)
    own = nn.BatchNorm1d(1)
    with torch.no_grad():
        own.weight.fill_(6.0)
        own.bias.fill_(1.0)
        own.running_mean.fill_(2.0)
        own.running_var.fill_(9.0)
    rows = BATCH_NORM.rows(norm, [norm, own])
    # s = 1 / 2, t = -1 / 2;   s = 6 / 3, t = 1 - 2 * 2
    torch.testing.assert_close(rows, torch.tensor([[0.5, -0.5], [2.0, -3.0]]))
    out = BATCH_NORM.run(norm, rows, torch.tensor([[5.0], [5.0]]))
    torch.testing.assert_close(out, torch.tensor([[2.0], [7.0]]))  # (5 - 1) / 2;  6 (5 - 2) / 3 + 1
    assert norm.eps == 0.0 and norm.weight.shape == (1,)


@pytest.mark.parametrize("affine", [True, False])
def test_layer_and_group_norm_by_hand(affine: bool) -> None:
    x = torch.tensor([[1.0, 3.0], [2.0, -2.0]])  # normalised: (-1, 1) and (1, -1)
    layer, group = nn.LayerNorm(2, eps=0.0), nn.GroupNorm(1, 2, eps=0.0)
    rows = torch.tensor([[2.0, 3.0, 1.0, 0.0], [1.0, 1.0, 0.0, 5.0]])  # gamma, beta
    expected = torch.tensor([[-1.0, 3.0], [1.0, 4.0]])
    torch.testing.assert_close(GROUP_NORM.run(group, rows, x), expected)
    torch.testing.assert_close(LAST_AXIS.run(layer, rows, x), expected)
    tokens = torch.stack([x, x], 1)  # (batch, 2 tokens, 2): both tokens with their example's numbers
    torch.testing.assert_close(LAST_AXIS.run(layer, rows, tokens), torch.stack([expected, expected], 1))
    assert layer.weight.shape == (2,) and group.num_groups == 1


def test_depthwise_by_hand() -> None:
    conv = nn.Conv2d(2, 2, 1, groups=2)
    rows = torch.tensor([[2.0, 3.0, 0.0, 1.0], [-1.0, 1.0, 5.0, 0.0]])  # a filter of one number and a bias a channel
    out = DEPTHWISE.run(conv, rows, torch.tensor([[1.0, 2.0], [3.0, 4.0]])[:, :, None, None])
    torch.testing.assert_close(out.flatten(1), torch.tensor([[2.0, 7.0], [2.0, 4.0]]))
    assert conv.groups == 2


@pytest.mark.parametrize(("name", "kinds"), CASES, ids=[name for name, _ in CASES])
def test_a_batch_of_tasks_equals_its_examples_one_by_one(name: str, kinds: PatchConfig | list[PatchConfig]) -> None:
    backbone = backbone_of(name)
    patches = disturbed(kinds, backbone, 3)
    inputs = inputs_of(backbone, batch=3)
    state = state_of(backbone)
    with torch.no_grad():
        assert gathering_fails(backbone, {n: own.gather for n, own in patches[0].gathered().items()}) is None
        out = together(backbone, patches, inputs)
        for k, patch in enumerate(patches):
            with applied(patch):
                alone = backbone({key: value[k : k + 1] for key, value in inputs.items()}).pooled
            torch.testing.assert_close(out[k], alone[0], rtol=1e-5, atol=1e-5)
        with applied(patches[1]):
            assert not torch.allclose(backbone(inputs).pooled[0], out[0], atol=1e-3)  # it is not one task for all
    assert same_state(backbone, state)
    assert not any("forward" in module.__dict__ for module in backbone.modules())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm/test_convnext", {"image_size": 32}),  # LayerNorm2d: channels are moved to the end and back
        ("timm/test_efficientnet_gn", {"image_size": 32}),  # group norm with activation inside
        ("llama", {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                   "num_key_value_heads": 2, "vocab_size": 50}),  # RMS norm that multiplies by its weight itself
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_other_normalisations(name: str, options: dict) -> None:
    backbone = Backbone.from_pretrained(name, pretrained=False, **options).eval()
    patches = disturbed(ScaleBiasConfig(), backbone, 2)
    inputs = inputs_of(backbone)
    with torch.no_grad():
        out = together(backbone, patches, inputs)
        for k, patch in enumerate(patches):
            with applied(patch):
                torch.testing.assert_close(out[k], backbone(inputs).pooled[k], rtol=1e-5, atol=1e-5)


def test_gradients_reach_each_tasks_own_tensors() -> None:
    """d loss_k / d patch_k is what it is for the task alone, and nothing reaches another task's patch."""
    backbone = backbone_of("timm/test_resnet")
    patches = disturbed(ScaleBiasConfig(), backbone, 2)
    inputs = inputs_of(backbone)
    weights = torch.linspace(-1, 1, backbone.dim)
    loss = (together(backbone, patches, inputs)[0] * weights).sum()
    first, second = (list(patch.parameters()) for patch in patches)
    found = torch.autograd.grad(loss, [*first, *second], allow_unused=True)
    with applied(patches[0]):
        alone = torch.autograd.grad((backbone(inputs).pooled[0] * weights).sum(), first)
    for one, other in zip(found, alone):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert all(g is None or not g.any() for g in found[len(first) :])


def test_a_row_holds_scale_and_shift_alone() -> None:
    backbone = backbone_of("timm/mobilenetv2_035")
    patch = build_patch(ScaleBiasConfig(), backbone)
    layout, row = packed(backbone, patch.gathered())
    assert len(row) == patch.num_parameters()  # gamma and beta became s and t; the statistics are in them
    assert list(layout) == list(patch.gathered()) and not row.requires_grad
    last = list(layout)[-1]
    assert layout[last][1].stop == len(row)
    expected = BATCH_NORM.rows(backbone.trunk.get_submodule(last), [patch.gathered()[last].owner])[0]
    assert torch.equal(row[layout[last][1]], expected.detach())


class Folding(nn.Module):
    """Normalises tokens (batch, 2, 4) after they were brought into another order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.order == "tokens as rows":
            return self.norm(x.flatten(0, 1)).view(x.shape).mean(1)
        if self.order == "tokens as rows, the first tokens first":
            return self.norm(x.transpose(0, 1).flatten(0, 1)).view(2, -1, 4).mean(0)
        if self.order == "one vector for all":
            return x.mean(1) * self.norm(x.new_ones(3, 4)).sum()
        return self.norm(x.transpose(0, 1)).mean(0)


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("tokens as rows", None),
        ("tokens as rows, the first tokens first", "outputs differ"),
        ("one vector for all", "got 3 rows for a batch of 2"),
        ("tokens first", "outputs differ"),
    ],
)
def test_networks_that_mix_rows_are_found_out(order: str, reason: str | None) -> None:
    """Where shapes fit by chance the numbers would be wrong without a word."""
    backbone = Backbone.from_module(Folding(order), sample=torch.zeros(1, 2, 4))
    state = state_of(backbone)
    patch = build_patch(ScaleBiasConfig(), backbone)
    found = gathering_fails(backbone, {n: own.gather for n, own in patch.gathered().items()})
    assert found is None if reason is None else reason in str(found)
    assert same_state(backbone, state)


def test_what_cannot_be_gathered() -> None:
    assert gather_of_norm(nn.BatchNorm2d(2, track_running_stats=False)) is None
    assert gather_of_norm(nn.InstanceNorm2d(2, affine=True)) is None
    backbone = backbone_of("timm/mobilenetv2_035")
    for config in (ht.WidenConfig(units=3), DepthwiseConfig(insert=True), [ScaleBiasConfig(), ht.DeepenConfig()]):
        assert build_patch(config, backbone).gathered() is None
    plain = Backbone.from_module(nn.Sequential(nn.LayerNorm(2)), dim=2)
    patch = build_patch(ScaleBiasConfig(), plain)
    assert "no sample" in (gathering_fails(plain, {n: own.gather for n, own in patch.gathered().items()}) or "")


def test_half_precision() -> None:
    backbone = backbone_of("timm/mobilenetv2_035")
    patches = disturbed(BOTH, backbone, 2)
    inputs = inputs_of(backbone)
    with torch.no_grad():
        expected = together(backbone, patches, inputs)
        backbone.bfloat16()
        for patch in patches:
            patch.bfloat16()
        out = together(backbone, patches, {key: value.bfloat16() for key, value in inputs.items()})
        assert gathering_fails(backbone, {n: own.gather for n, own in patches[0].gathered().items()}) is None
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))
