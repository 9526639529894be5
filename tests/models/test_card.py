"""Cards: what stands in them, and that the Hub's own reader understands their head."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from torch import nn

from hubtransfer.models import card
from hubtransfer.models.heads import ClassificationHead, MultiLabelHead, RegressionHead
from hubtransfer.patches import ScaleBiasConfig
from tests.hub_server import HubServer

VIT = "google/vit-base-patch16-224"
SOURCE = {"library": "timm", "name": "timm/mobilenetv3_small_100", "pretrained": True, "kwargs": {}}


def model(source: dict[str, Any] = SOURCE, modality: str = "image", cfg: dict | None = None, **tasks: Any) -> Any:
    """As much of a `TransferModel` as a card looks at: 100 parameters in the trunk, 10 in each task."""
    trunk = nn.Linear(10, 10, bias=False)
    trunk.pretrained_cfg = cfg or {"hf_hub_id": "timm/mobilenetv3_small_100.lamb_in1k", "license": "apache-2.0"}
    specs = {name: SimpleNamespace(head=head, patch=patch) for name, (head, patch) in tasks.items()}
    backbone = SimpleNamespace(source=source, trunk=trunk, modality=modality)
    return SimpleNamespace(backbone=backbone, tasks=specs, changed_share=lambda task: 0.1)


def patched() -> Any:
    return model(birds=(ClassificationHead(3, labels=("owl", "wren", "kite")), ScaleBiasConfig()))


RUN = {
    "method": {
        "name": "fine_tune",
        "title": "Fine-tuning.",
        "paper": "Yosinski 2014",
        "citation": "@inproceedings{yosinski2014,\n}",
        "config": {"trains": "patch", "inner": {"rate": 0.1, "note": "a|b"}},
    },
    "training": {"epochs": 5, "batch_size": 64, "output_dir": "secret-folder", "steps": None},
    "data": {"digits": {"fingerprint": "ab12", "examples": 12345}, "train": {"fingerprint": None, "examples": None}},
    "results": [
        {
            "task": "birds",
            "dataset": "digits",
            "split": "test",
            "metric": "accuracy",
            "values": [0.8, 0.9, 1.0],
            "n": 360,
        },
        {"task": "birds", "dataset": "my own set", "split": "test", "metric": "auroc", "values": [0.75], "n": 10},
    ],
    "parameters": {"trunk": 2_000_000, "changed": 30_000, "changed_percent": 1.5},
    "versions": {"torch": "2.6.0"},
    "command": "hubtransfer train recipe.yaml",
    "seeds": [0, 1, 2],
    "plots": ["plots/curve.png", "missing.png", "../outside.png"],
}


def test_head(tmp_path: Path) -> None:
    data = ModelCard(card.write(tmp_path, patched(), RUN)).data
    assert data.library_name == "hubtransfer"
    assert data.base_model == "timm/mobilenetv3_small_100.lamb_in1k" and data.license == "apache-2.0"
    assert data.pipeline_tag == "image-classification"
    assert data.datasets == ["digits"]  # "train" is no data set's name and "my own set" cannot be a repository's
    assert data.metrics == ["accuracy", "auroc"]
    assert data.tags == ["transfer-learning", "fine_tune", "scale_bias"]


def test_results_read_back_as_the_hub_reads_them(tmp_path: Path) -> None:
    read = ModelCard(card.render(patched(), RUN, name="me/birds")).data
    assert read.model_name == "birds"
    name, results = model_index_to_eval_results(read.to_dict()["model-index"])
    assert name == "birds" and results == read.eval_results
    first, second = results
    assert (first.task_type, first.task_name, first.dataset_name, first.dataset_split) == (
        "image-classification",
        "birds",
        "digits",
        "test",
    )
    assert (first.metric_type, first.metric_value, first.metric_name) == ("accuracy", 0.9, "accuracy (mean of 3 seeds)")
    assert (second.metric_value, second.metric_name) == (0.75, "auroc")


def test_the_hub_accepts_it(hub: HubServer) -> None:
    for text in (card.render(patched(), RUN, name="birds"), card.render(model(), None, name="bare")):
        ModelCard(text).validate()
    assert hub.requests("POST", "/api/validate-yaml") == [200, 200]


def test_body(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "curve.png").write_bytes(b"")
    text = card.write(tmp_path, patched(), RUN, name="birds")
    assert text == (tmp_path / "README.md").read_text()
    # t(0.975, 2) = 4.30265 and s / sqrt(3) = 0.1 / 1.73205: 0.9 -+ 0.24841
    assert "| birds | digits | test | accuracy | 0.9000 | 0.6516 to 1.1484 | 3 | 360 |" in text
    assert "| birds | my own set | test | auroc | 0.7500 | one seed | 1 | 10 |" in text
    assert "A figure from one seed has no interval" in text and "Student's t over the seeds" in text
    assert "30,000 parameters were trained; the backbone has 2,000,000 (1.5 %)." in text
    assert "| `trains` | patch |" in text and "| `inner.rate` | 0.1 |" in text and r"| `inner.note` | a\|b |" in text
    assert "| `epochs` | 5 |" in text and "| digits | 12,345 | ab12 |" in text
    assert "output_dir" not in text and "secret-folder" not in text  # says something about a machine, not the model
    assert "Method: **Fine-tuning** (Yosinski 2014)." in text
    assert "![curve](plots/curve.png)" in text and "missing.png" not in text and "outside" not in text
    assert "hubtransfer train recipe.yaml" in text and "Seeds: 0, 1, 2." in text and "| torch | 2.6.0 |" in text
    assert "@inproceedings{yosinski2014," in text and "mudrakarta" in text  # the method's and the patch's
    assert "Labels of `birds`: owl, wren, kite." in text
    assert "| `birds` | ClassificationHead | 3 | ScaleBias |" in text
    assert "\n\n\n" not in text and text.endswith("\n") and "None" not in text and "/home" not in text
    for row in re.findall(r"\|[^\n]*\|\n\| --- [^\n]*\n(?:\|[^\n]*\n)+", text):  # tables: as many cells in every row
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in row.splitlines()}) == 1


def test_without_a_run_nothing_is_claimed() -> None:
    text = card.render(patched(), None, name="birds")
    assert "Nothing was measured: no run is recorded" in text and "model-index" not in text
    assert "- `birds`: 10 parameters, 10 % of the backbone's 100." in text
    assert "## How it was trained" not in text and "## Data" not in text
    assert "recorded no evaluation" in card.render(patched(), {**RUN, "results": []}, name="birds")


def test_results_without_a_number_are_shown_but_not_announced() -> None:
    row = {**RUN["results"][0], "values": [float("nan"), 1.0]}  # type: ignore[index]
    text = card.render(patched(), {"results": [row]}, name="birds")
    assert "| nan |" in text and "model-index" not in text
    with pytest.raises(ValueError, match="'accuracy' on 'digits' has no values"):
        card.render(patched(), {"results": [{**row, "values": []}]}, name="birds")


@pytest.mark.parametrize(
    ("task", "relation"), [(None, "finetune"), ("plain", "adapter"), ("patched", "adapter")]
)  # fully trained trunk and patches in one model: a fine-tune; a patch alone is an adapter
def test_relation_to_the_base_model(task: str | None, relation: str) -> None:
    both = model(plain=(ClassificationHead(2), None), patched=(ClassificationHead(2), [ScaleBiasConfig()]))
    text = card.render(both, None, task, name="birds")
    assert ModelCard(text).data.base_model_relation == relation
    assert ("`plain`" in text) == (task != "patched")
    assert ModelCard(card.render(patched(), None, name="birds")).data.base_model_relation == "adapter"


@pytest.mark.parametrize(
    ("modality", "head", "tag"),
    [
        ("image", MultiLabelHead(2), "image-classification"),
        ("image", RegressionHead(1), None),
        ("image", None, "image-feature-extraction"),
        ("text", ClassificationHead(2), "text-classification"),
        ("tensor", RegressionHead(1), "tabular-regression"),
    ],
)
def test_pipeline_tag(modality: str, head: Any, tag: str | None) -> None:
    assert ModelCard(card.render(model(modality=modality, t=(head, None)), None, name="m")).data.pipeline_tag == tag


@pytest.mark.parametrize(
    ("source", "cfg", "base"),
    [
        ({"library": "transformers", "name": VIT, "pretrained": True, "kwargs": {}}, {"x": 1}, VIT),
        ({**SOURCE, "pretrained": False}, None, None),  # random weights come from nobody
        ({"library": "timm", "name": "timm/resnet18", "kwargs": {}}, None, None),  # a module handed in: who knows
        ({"library": "module", "kwargs": {}}, None, None),
        ({**SOURCE, "name": "hf-hub:me/net"}, {"x": 1}, "me/net"),
        ({"library": "timm", "name": "local-dir:/models/x", "pretrained": True, "kwargs": {}}, {"x": 1}, None),
    ],
)
def test_base_model(source: dict, cfg: dict | None, base: str | None) -> None:
    made = model(source, cfg=cfg, t=(ClassificationHead(2), None))
    data = ModelCard(text := card.render(made, None, name="m")).data
    assert data.base_model == base and data.get("base_model_relation") == (base and "finetune")
    assert ("No licence was given" in text) == (data.license is None)
    assert ModelCard(card.render(made, {"license": "mit"}, name="m")).data.license == "mit"
    assert ModelCard(card.render(made, {"license": "mit"}, name="m", license="cc0-1.0")).data.license == "cc0-1.0"


def test_a_card_written_by_hand_is_never_replaced(tmp_path: Path) -> None:
    made = card.write(tmp_path, patched())
    assert card.is_generated(made)
    assert card.write(tmp_path, patched(), RUN) != made  # ours: written anew
    (tmp_path / "README.md").write_text(made.replace(card.MARKER.format(name=tmp_path.name), ""))
    kept = (tmp_path / "README.md").read_text()
    assert card.write(tmp_path, patched(), RUN) == kept == (tmp_path / "README.md").read_text()


def test_readdress() -> None:
    for task in (None, "birds"):
        text = card.render(patched(), RUN, task, name="runs/birds")
        assert card.readdress(text, "me/Birds-2") == card.render(patched(), RUN, task, name="me/Birds-2")
    assert card.readdress("# by hand", "me/x") == "# by hand"


def test_what_the_hub_has_no_task_for_is_other() -> None:
    row = {"task": "t", "dataset": "d", "split": "test", "metric": "mse", "values": [1.0], "n": 1}
    text = card.render(model(t=(RegressionHead(1), None)), {"results": [row]}, name="m")
    (result,) = ModelCard(text).data.eval_results
    assert (result.task_type, result.task_name) == ("other", "t")


def test_a_patch_card_shows_its_own_task_alone() -> None:
    both = model(birds=(ClassificationHead(2), None), fish=(ClassificationHead(2), None))
    rows = [
        {"task": t, "dataset": t, "split": "test", "metric": "accuracy", "values": [0.5], "n": 4} for t in both.tasks
    ]
    text = card.render(both, {"results": rows}, "fish", name="m")
    assert "| fish | fish |" in text and "birds" not in text


def test_a_stream_of_tasks_shows_its_matrix_and_what_each_task_cost() -> None:
    stream = {
        "tasks": ["zeros", "a|b"],
        "after": ["zeros", "a|b"],
        "accuracy": [[0.9, 0.25], [0.5, 0.8125]],
        "baseline": [0.5, 0.5],
        "seconds": [1.25, 2.0],
        "bytes": [0, 3 * 2**19],
    }
    text = card.render(patched(), RUN | {"stream": stream}, name="birds")
    assert "| after | zeros | a\\|b | seconds | MiB kept |" in text
    assert "| (before) | 50.0 | 50.0 |  |  |" in text
    assert "| zeros | 90.0 | 25.0 | 1.2 | 0.00 |" in text and "| a\\|b | 50.0 | 81.2 | 2.0 | 1.50 |" in text
    assert "Along the stream" not in card.render(patched(), RUN, name="birds")


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match=r"no task 'fish'.*\['birds'\]"):
        card.render(patched(), None, "fish", name="x")


def test_template_is_linked_from_model_cards() -> None:
    root = Path(__file__).parents[2]
    link = root / "model_cards" / "template.md"
    assert link.is_symlink() and not link.readlink().is_absolute()
    assert link.resolve() == root / "hubtransfer" / "models" / "card_template.md"
