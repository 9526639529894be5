"""Patches alone in folders: kilobytes, strict about the backbone, and fast."""

import json
import time

import peft
import pytest
import timm
import torch

from hubtransfer.backbones import Backbone
from hubtransfer.models import ClassificationHead, DenseHead, TransferModel
from hubtransfer.patches import DeepenConfig, DepthwiseConfig, ScaleBiasConfig, WidenConfig
from tests.tiny import batch, tiny_backbone, tiny_model

X = batch(labels=None, n=4).inputs["pixel_values"]
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def moved(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for task in model.patches:
            for parameter in (*model.patches[task].parameters(), *model.heads[task].parameters()):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def timm_backbone(name="test_resnet", seed=0):
    torch.manual_seed(seed)
    return Backbone.from_pretrained(f"timm/{name}", pretrained=False)


PATCHES = {
    "scale_bias": ScaleBiasConfig(),
    "composed": [ScaleBiasConfig(), DepthwiseConfig(insert=True)],
    "lora": peft.LoraConfig(r=2),
    "none": None,
}


@pytest.mark.parametrize("case", PATCHES)
def test_outputs_are_bit_equal_on_another_copy_of_the_backbone(case, tmp_path):
    model = TransferModel(timm_backbone()).add_task("birds", ClassificationHead(4), patch=PATCHES[case])
    moved(model).train()(IMAGES)  # running statistics of a patch travel too
    model.eval().save_patch(tmp_path / "p", "birds")
    trunk = {n: t.clone() for n, t in model.backbone.state_dict().items()}

    backbone = timm_backbone()
    backbone.load_state_dict(trunk)
    other = TransferModel(backbone).add_task("dogs", ClassificationHead(2)).eval()
    before = other(IMAGES).logits
    assert other.load_patch(tmp_path / "p") == "birds" == other.active_task
    assert torch.equal(other(IMAGES).logits, model(IMAGES).logits)
    assert torch.equal(other(IMAGES, task="dogs").logits, before)
    assert all(torch.equal(t, trunk[n]) for n, t in other.backbone.state_dict().items())
    assert other.tasks["birds"].head == ClassificationHead(4)
    assert other.load_patch(tmp_path / "p", "again") == "again"
    with pytest.raises(ValueError, match="task 'birds' already.*choose another name"):
        other.load_patch(tmp_path / "p")


def test_a_trunk_that_learned_with_its_patch_is_another_trunk(tmp_path):
    model = tiny_model(patch=ScaleBiasConfig())
    with torch.no_grad():
        model.backbone.trunk.stem.weight.mul_(2)
    model.save_patch(tmp_path / "p")
    with pytest.raises(ValueError, match="other weights"):
        TransferModel(tiny_backbone()).load_patch(tmp_path / "p")


def test_other_weights_are_refused_unless_asked_for(tmp_path, caplog):
    model = tiny_model(3, "birds", patch=ScaleBiasConfig())
    moved(model).save_patch(tmp_path / "p")
    other = tiny_model(2, "dogs", seed=7)
    state = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(ValueError, match="other weights.*strict=False"):
        other.load_patch(tmp_path / "p")
    assert list(other.tasks) == ["dogs"] and other.active_task == "dogs"
    assert other.state_dict().keys() == state.keys()
    assert other.load_patch(tmp_path / "p", strict=False) == "birds"
    assert "other weights" in caplog.text
    for name, tensor in model.patches["birds"].tensors().items():
        assert torch.equal(other.patches["birds"].tensors()[name], tensor)


def test_another_backbone_is_refused_with_its_shapes(tmp_path):
    TransferModel(timm_backbone()).add_task("birds", ClassificationHead(3), patch=ScaleBiasConfig()).save_patch(
        tmp_path / "p"
    )
    other = TransferModel(timm_backbone("test_efficientnet"))
    with pytest.raises(ValueError, match=r"made for .*test_resnet.* does not fit .*test_efficientnet.*\(\d+,\)"):
        other.load_patch(tmp_path / "p")
    assert not other.tasks and not len(other.patches)
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"test_vit"):
            TransferModel(timm_backbone("test_vit")).load_patch(tmp_path / "p", strict=strict)


def test_same_trunk_but_another_width_of_head(tmp_path):
    model = TransferModel(timm_backbone()).add_task("birds", ClassificationHead(3))
    model.save_patch(tmp_path / "p")
    assert not (tmp_path / "p" / "patch.safetensors").exists()
    with pytest.raises(ValueError, match=r"weight \(saved \(3, \d+\), needed \(3, 16\)\)"):
        tiny_model().load_patch(tmp_path / "p")


@pytest.mark.parametrize("name", ["patch.safetensors", "head.safetensors"])
def test_damage_is_noticed(tmp_path, name):
    model = tiny_model(3, "birds", patch=ScaleBiasConfig())
    model.save_patch(tmp_path / "p")
    path = tmp_path / "p" / name
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"{name}.*damaged, cut short"):
        tiny_model().load_patch(tmp_path / "p")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}.*missing"):
        tiny_model().load_patch(tmp_path / "p")


def test_the_wrong_kind_of_folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match=r"no patch.*TransferModel\.from_pretrained"):
        tiny_model().load_patch(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        tiny_model().load_patch(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a patch nor a head"):
        tiny_model().add_task("embed").save_patch(tmp_path / "x")
    with pytest.raises(ValueError, match="did you mean 'task'"):
        tiny_model().save_patch(tmp_path / "x", "tasks")


def test_a_merged_patch_is_saved_with_the_trunks_own_fingerprint(tmp_path):
    model = moved(tiny_model(3, "birds", patch=ScaleBiasConfig()))
    model.merge("birds").save_patch(tmp_path / "p")
    other = TransferModel(tiny_backbone())
    other.load_patch(tmp_path / "p")
    assert torch.equal(other(X).logits, model(X).logits)


def test_what_is_in_the_folder_and_how_large_it_is(tmp_path):
    """mobilenetv2_100: 34,112 parameters and as many statistics in 4-byte floats are 272,896 bytes."""
    model = TransferModel(timm_backbone("mobilenetv2_100")).add_task(
        "birds", ClassificationHead(10), patch=ScaleBiasConfig()
    )
    model.save_patch(tmp_path / "p", "birds")
    folder = tmp_path / "p"
    assert {p.name for p in folder.iterdir()} == {"patch.json", "patch.safetensors", "head.safetensors", "README.md"}
    assert 2 * 4 * 34_112 < (folder / "patch.safetensors").stat().st_size < 300_000
    manifest = json.loads((folder / "patch.json").read_text())
    assert manifest["task"] == "birds" and manifest["source"]["library"] == "timm"
    assert manifest["fingerprint"] == model.backbone.fingerprint()


def test_loading_is_fast(tmp_path):
    """At most a tenth of a second of processor time (PEFT takes 18 ms for the like on an idle machine)."""
    model = TransferModel(timm_backbone("mobilenetv2_100")).add_task(
        "birds", ClassificationHead(10), patch=ScaleBiasConfig()
    )
    model.save_patch(tmp_path / "p", "birds")
    model.remove_task("birds")
    times = []
    for k in range(5):
        start = time.process_time()
        model.load_patch(tmp_path / "p", f"t{k}")
        times.append(time.process_time() - start)
    assert min(times) < 0.1


def test_stock_peft_loads_an_exported_patch(tmp_path):
    model = TransferModel(timm_backbone()).add_task("birds", ClassificationHead(3), patch=ScaleBiasConfig())
    moved(model).export_peft(tmp_path / "peft", "birds")
    plain = timm.create_model("test_resnet", num_classes=0)
    plain.load_state_dict(model.backbone.trunk.state_dict())
    adapted = peft.PeftModel.from_pretrained(plain, str(tmp_path / "peft")).eval()
    with torch.no_grad():
        assert torch.equal(adapted(IMAGES), model(IMAGES).features.pooled)
    with pytest.raises(ValueError, match="'dogs' has no patch to export; those with one: birds"):
        model.add_task("dogs", ClassificationHead(2)).export_peft(tmp_path / "x", "dogs")


@pytest.mark.parametrize("patch", [WidenConfig(), DeepenConfig(), [WidenConfig(), DeepenConfig()]])
def test_patches_that_change_what_the_head_reads(patch, tmp_path):
    """A head made before the new units in front of it keeps its weights and reads the new ones with weight 0."""
    model = tiny_model(3, "birds", kind="mlp").add_task("plain", ClassificationHead(3))
    old, plain = model.heads["birds"].weight.clone(), model(X, task="plain").logits
    model.add_patch("birds", patch)
    pooled = model.features(X, task="birds").pooled
    dim = pooled.shape[1]
    assert dim >= 16 and model.heads["birds"].weight.shape == (3, dim)
    assert torch.equal(model.heads["birds"].weight[:, :16], old) and not model.heads["birds"].weight[:, 16:].any()
    moved(model)
    assert torch.equal(model(X, task="plain").logits, plain)
    model.save_patch(tmp_path / "p", "birds")
    other = TransferModel(tiny_backbone("mlp"))
    other.load_patch(tmp_path / "p")
    assert torch.equal(other.eval()(X).logits, model(X, task="birds").logits)
    model.save_pretrained(tmp_path / "m")
    again = TransferModel.from_pretrained(tmp_path / "m", backbone=tiny_backbone("mlp", seed=3))
    assert torch.equal(again(X, task="birds").logits, model(X, task="birds").logits)
    assert torch.equal(again(X, task="plain").logits, plain)


def test_a_dense_head_cannot_take_a_patch_that_widens_the_pooled_features():
    model = tiny_model().add_task("pixels", DenseHead(2))
    with pytest.raises(ValueError, match="'pixels'.*widens the pooled features"):
        model.add_patch("pixels", WidenConfig())
    assert "pixels" not in model.patches
