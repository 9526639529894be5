"""What every kind of patch passes, on every kind of backbone it fits."""

import copy
import json

import peft
import pytest
import torch

from hubtransfer.patches import (
    PATCHES,
    ColumnConfig,
    DeepenConfig,
    DepthwiseConfig,
    ScaleBiasConfig,
    SplitConfig,
    WidenConfig,
    applied,
    build_patch,
    patch_from_dict,
    patch_to_dict,
    patches,
    train_where_it_learns,
)
from tests.patches.backbones import backbone_of, disturb, inputs_of, same_state, state_of

CONFIGS = {
    "scale_bias": ScaleBiasConfig(),
    "depthwise": DepthwiseConfig(),
    "depthwise_insert": DepthwiseConfig(insert=True),
    "scale_bias+depthwise": [ScaleBiasConfig(), DepthwiseConfig()],
    "widen": WidenConfig(units=5),
    "widen_copy": WidenConfig(units=3, init="copy", normalise="new"),
    "deepen": DeepenConfig(units=6),
    "widen+deepen": [WidenConfig(units=5), DeepenConfig(units=6)],
    "column": ColumnConfig(),
    "split": SplitConfig(after=-2),
    "split_nothing_shared": SplitConfig(),
    "lora": peft.LoraConfig(r=2),
    "lora+scale_bias": [peft.LoraConfig(r=2), ScaleBiasConfig()],
    "ia3": peft.IA3Config(),
    "loha": peft.LoHaConfig(r=2),
    "ln_tuning": peft.LNTuningConfig(),
}
CASES = [("timm/mobilenetv2_035", kind) for kind in CONFIGS if kind not in ("ln_tuning",)] + [
    (name, kind)
    for name in ("timm/test_resnet", "timm/test_vit", "bert")
    for kind in CONFIGS
    if "depthwise" not in kind or (kind == "depthwise_insert" and name != "bert")
]
STARTS_UNCHANGED = {"split", "split_nothing_shared",
                    "scale_bias", "depthwise", "depthwise_insert", "scale_bias+depthwise", "lora", "lora+scale_bias",
                    "ia3", "loha", "ln_tuning"}  # fmt: skip


def test_every_kind_is_covered() -> None:
    tried = [config for each in CONFIGS.values() for config in (each if isinstance(each, list) else [each])]
    covered = {config.kind for config in tried if hasattr(config, "kind")}
    without_tensors = {"earlier_units"}  # nothing to train or load: tests/patches/test_earlier_units.py
    assert covered | without_tensors == set(PATCHES)
    rows = patches()
    assert [row["kind"] for row in rows] == sorted([*PATCHES, "peft"])
    assert all(row[key] for row in rows for key in ("class", "paper", "summary"))
    for config in PATCHES.values():
        assert config.citation.startswith("@")
        assert "Source:" in (config.__doc__ or "")
        assert "Differs from the paper" in (config.__doc__ or "")


@pytest.mark.parametrize("kind", CONFIGS)
def test_config_to_json_and_back_is_the_identity(kind: str) -> None:
    config = CONFIGS[kind]
    assert patch_from_dict(json.loads(json.dumps(patch_to_dict(config)))) == config


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_apply_then_revert_is_exact(name: str, kind: str) -> None:
    backbone_of(name)  # made once, by a seed of its own
    torch.manual_seed(1)  # which units are copied: half of them are never active, and then nothing differs
    backbone = backbone_of(name)
    backbone.trunk.requires_grad_(False)
    backbone.trunk.get_submodule("").training = False
    inputs, state = inputs_of(backbone), state_of(backbone)
    modules = [(n, id(m), m.training) for n, m in backbone.named_modules()]
    flags = [p.requires_grad for p in backbone.parameters()]
    with torch.no_grad():
        before = backbone(inputs).pooled
        patch = build_patch(CONFIGS[kind], backbone).eval()
        assert same_state(backbone, state)  # building changes nothing
        assert [(n, id(m), m.training) for n, m in backbone.named_modules()] == modules
        assert [p.requires_grad for p in backbone.parameters()] == flags
        assert not {id(p) for p in patch.state_dict(keep_vars=True).values()} & {
            identity for identity, _ in state.values()
        }
        with applied(patch):
            first = backbone(inputs).pooled
        assert first.shape == (2, patch.dim) == (2, backbone.dim + patch.extra_dim)
        if kind in STARTS_UNCHANGED:
            torch.testing.assert_close(first, before, rtol=0, atol=1e-6)
        disturb(patch)
        with applied(patch):
            other = backbone(inputs).pooled
            again = backbone(inputs).pooled
        after = backbone(inputs).pooled
    assert other.shape != before.shape or not torch.allclose(other, before)
    assert torch.equal(other, again)
    assert torch.equal(after, before)
    assert same_state(backbone, state)
    assert [(n, id(m), m.training) for n, m in backbone.named_modules()] == modules


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_tensors_load_into_an_equal_patch_with_bit_equal_outputs(name: str, kind: str) -> None:
    backbone = backbone_of(name)
    inputs = inputs_of(backbone)
    patch = disturb(build_patch(CONFIGS[kind], backbone))
    fresh = build_patch(CONFIGS[kind], backbone).eval()
    fresh.load_tensors({name: tensor.clone() for name, tensor in patch.tensors().items()})
    assert list(fresh.tensors()) == list(patch.tensors())
    for key, tensor in patch.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], tensor), key
    with torch.no_grad():
        with applied(patch):
            expected = backbone(inputs).pooled
        with applied(fresh):
            assert torch.equal(backbone(inputs).pooled, expected)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_training_changes_nobody_else(name: str, kind: str) -> None:
    backbone = backbone_of(name)
    backbone.trunk.requires_grad_(False)
    inputs = inputs_of(backbone, batch=4)
    patch, other = build_patch(CONFIGS[kind], backbone), disturb(build_patch(CONFIGS[kind], backbone))
    state, others = state_of(backbone), state_of(other)
    with torch.no_grad():
        before = backbone(inputs).pooled
        with applied(other):
            other_before = backbone(inputs).pooled
    groups = patch.param_groups()
    assert sum(p.numel() for group in groups for p in group["params"]) == patch.num_parameters()
    assert all(group["lr_scale"] in (1.0, 10.0) for group in groups)
    optimizer = torch.optim.SGD([p for group in groups for p in group["params"]], lr=0.1)
    values = {name: tensor.clone() for name, tensor in patch.tensors().items()}
    train_where_it_learns(patch)
    for _ in range(2):
        with applied(patch):
            train_where_it_learns(backbone)
            pooled = backbone(inputs).pooled
            loss = (pooled * torch.linspace(-1, 1, pooled.shape[1])).sum()  # .sum() alone is constant after LayerNorm
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    backbone.eval()
    assert any(not torch.equal(tensor, values[key]) for key, tensor in patch.tensors().items())
    assert same_state(backbone, state)
    assert same_state(other, others)
    assert all(parameter.grad is None for parameter in backbone.parameters())
    with torch.no_grad():
        assert torch.equal(backbone(inputs).pooled, before)
        with applied(other):
            assert torch.equal(backbone(inputs).pooled, other_before)


@pytest.mark.parametrize("kind", CONFIGS)
def test_copies_belong_to_their_own_trunk(kind: str) -> None:
    name = "timm/mobilenetv2_035" if kind != "ln_tuning" else "timm/test_vit"
    backbone = backbone_of(name)
    inputs = inputs_of(backbone)
    patch = disturb(build_patch(CONFIGS[kind], backbone))
    with torch.no_grad():
        with applied(patch):
            expected = backbone(inputs).pooled
        both = torch.nn.ModuleDict({"backbone": backbone, "patch": patch})
        clone = copy.deepcopy(both)
        alone = copy.deepcopy(patch)  # keeps the trunk it has
        for tensor in (*backbone.state_dict().values(), *patch.state_dict().values()):
            tensor.zero_()
        with applied(clone["patch"]):
            assert torch.equal(clone["backbone"](inputs).pooled, expected)
        backbone.load_state_dict(clone["backbone"].state_dict())
        with applied(alone):
            assert torch.equal(backbone(inputs).pooled, expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_patch_for_another_backbone_is_refused_with_both_shapes(kind: str) -> None:
    name = "timm/mobilenetv2_035" if kind != "ln_tuning" else "timm/test_vit"
    backbone = backbone_of(name)
    patch = build_patch(CONFIGS[kind], backbone)
    given = {key: tensor.clone() for key, tensor in patch.tensors().items()}
    key = next(iter(given))
    before = {name: tensor.clone() for name, tensor in patch.tensors().items()}
    wrong = {name: torch.zeros((*tensor.shape, 3)) for name, tensor in given.items()}
    shape = tuple(given[key].shape)
    with pytest.raises(ValueError, match="do not fit") as error:
        patch.load_tensors(wrong)
    assert key in str(error.value)
    assert str((*shape, 3)) in str(error.value) and str(shape) in str(error.value)
    with pytest.raises(ValueError, match="missing"):
        patch.load_tensors({name: tensor for name, tensor in given.items() if name != key})
    with pytest.raises(ValueError, match=r"nobody.weight: \(2,\) given"):
        patch.load_tensors({**given, "nobody.weight": torch.zeros(2)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in patch.tensors().items())
