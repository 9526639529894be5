"""The papers' small networks: sizes from the papers, and what every backbone keeps."""

import pytest
import torch

import hubtransfer as ht


def made(name, **options):
    torch.manual_seed(0)
    return ht.Backbone.from_pretrained(f"plain:{name}", pretrained=False, **options)


def count(backbone):
    return sum(p.numel() for p in backbone.trunk.parameters())


def test_sizes_by_hand():
    # 784 * 1200 + 1200 + 1200 * 1200 + 1200 (Hinton's teacher without its head)
    assert count(made("mlp", widths=[1200, 1200])) == 2_383_200
    # (25 * 1 + 1) * 10 + (25 * 10 + 1) * 20 + (20 * 4 * 4 + 1) * 50
    assert count(made("lenet")) == 260 + 5_020 + 16_050
    # WRN-10-1: stem 144; group 1: 2 * 9 * 16 * 16 and two norms of 16; group 2: 9 * 16 * 32 + 9 * 32 * 32, shortcut
    # 16 * 32, norms 16 + 32; group 3: 9 * 32 * 64 + 9 * 64 * 64, shortcut 32 * 64, norms 32 + 64; last norm 64
    group1, group2 = 4_608 + 64, 4_608 + 9_216 + 512 + 96
    group3 = 18_432 + 36_864 + 2_048 + 192
    assert count(made("wide_resnet", depth=10)) == 144 + group1 + group2 + group3 + 128


@pytest.mark.parametrize(
    ("name", "options", "dim"),
    [("mlp", {"widths": [30, 20]}, 20), ("lenet", {}, 50), ("wide_resnet", {"depth": 16, "width": 2}, 128)],
)
def test_images_become_features_and_a_saved_model_is_equal(name, options, dim, tmp_path):
    backbone = made(name, **options)
    assert backbone.dim == dim
    model = ht.TransferModel(backbone).add_task("digits", ht.ClassificationHead(10)).eval()
    images = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    inputs = model.processor(images)
    assert inputs["pixel_values"].shape == (3, 1, 28, 28) and inputs["pixel_values"].max() <= 1
    torch.testing.assert_close(inputs["pixel_values"][:, 0], images / 255)
    model.save_pretrained(tmp_path / "m")
    again = ht.TransferModel.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_groups_halve_the_map():
    layers = made("wide_resnet", depth=10, width=2).layers
    assert [(i.name, i.channels, i.reduction) for i in layers] == [
        ("group1", 32, 1),
        ("group2", 64, 2),
        ("group3", 128, 4),
    ]
    cheap = made("wide_resnet", depth=10, stride=2)
    assert [(i.name, i.reduction) for i in cheap.layers] == [("group1", 2), ("group2", 4), ("group3", 7)]  # 4 of 28
    maps = cheap(torch.zeros(2, 1, 28, 28), ["group1", "group3"]).maps
    assert [tuple(m.shape[1:]) for m in maps.values()] == [(16, 14, 14), (64, 4, 4)]
    maps = made("lenet")(torch.zeros(2, 1, 28, 28), ["0", "1"]).maps
    assert [tuple(m.shape[1:]) for m in maps.values()] == [(10, 12, 12), (20, 4, 4)]


def test_a_block_is_the_identity_beside_its_branch():
    block = made("wide_resnet", depth=16).trunk.group1[1].eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(block(x), x)


def test_xavier_has_zero_biases_and_its_bound():
    linear = made("mlp", widths=[100], init="xavier").trunk[1]
    assert not linear.bias.any()
    bound = (6 / (784 + 100)) ** 0.5
    assert 0.95 * bound < linear.weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlpp", {}, "Nearest valid: mlp"),
        ("mlp", {"width": [3]}, "widths"),
        ("mlp", {"widths": []}, "at least one hidden layer"),
        ("mlp", {"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ("wide_resnet", {"depth": 17}, "the nearest is 16"),
        ("wide_resnet", {"stride": 0}, "stride must be at least 1"),
        ("lenet", {"image_size": 9}, "too small"),
    ],
)
def test_what_does_not_exist_is_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        made(name, **options)


def test_there_are_no_published_weights():
    with pytest.raises(ValueError, match="pretrained=False"):
        ht.Backbone.from_pretrained("plain:mlp")
