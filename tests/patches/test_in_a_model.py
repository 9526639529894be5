"""Patches inside a `TransferModel`: saved and loaded, trained, merged."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import hubtransfer as ht
from tests.patches.backbones import backbone_of, disturb, inputs_of
from tests.patches.test_contract import CONFIGS


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "ln_tuning"])
def test_save_and_load_are_bit_equal(kind: str, tmp_path: Path) -> None:
    backbone = backbone_of("timm/mobilenetv2_035")
    x = inputs_of(backbone)["pixel_values"]
    model = ht.TransferModel(backbone)
    model.add_task("plain", ht.ClassificationHead(num_classes=2))
    model.add_task("task", ht.ClassificationHead(num_classes=3), patch=CONFIGS[kind])
    disturb(model.patches["task"])  # type: ignore[arg-type]
    model.eval()
    with torch.no_grad():
        plain, tuned = model(pixel_values=x, task="plain").logits, model(pixel_values=x, task="task").logits
        model.save_pretrained(str(tmp_path / "model"))
        loaded = ht.TransferModel.from_pretrained(str(tmp_path / "model")).eval()
        assert torch.equal(loaded(pixel_values=x, task="task").logits, tuned)
        assert torch.equal(loaded(pixel_values=x, task="plain").logits, plain)
        model.save_patch(str(tmp_path / "patch"), "task")
        model.load_patch(str(tmp_path / "patch"), task="again")
        assert torch.equal(model(pixel_values=x, task="again").logits, tuned)
        if kind == "column":
            with pytest.raises(ValueError, match="cannot be merged"):
                model.merge("task")
            return
        merged = model.merge("task")(pixel_values=x, task="task").logits
        assert torch.equal(merged, tuned)
        assert torch.equal(model.revert()(pixel_values=x, task="plain").logits, plain)


@pytest.mark.parametrize(
    "config", [ht.WidenConfig(units=4), ht.DeepenConfig(), peft.LoraConfig(r=2)], ids=lambda c: type(c).__name__
)
def test_new_layers_train_at_their_own_rate(config: Any) -> None:
    model = ht.TransferModel(backbone_of("timm/mobilenetv2_035"))
    model.add_task("task", ht.ClassificationHead(num_classes=3), patch=config)
    groups = model.trainable("patch")
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for group in model.patches["task"].param_groups():  # type: ignore[operator]
        assert {scales[id(p)] for p in group["params"]} == {group["lr_scale"]}
    model.train_only("patch").train()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    x = inputs_of(model.backbone, 4)["pixel_values"]
    optimizer = torch.optim.SGD([{"params": g["params"], "lr": 0.01 * g["lr_scale"]} for g in groups])
    for _ in range(2):
        loss = model(pixel_values=x, labels=torch.tensor([0, 1, 2, 0]), task="task").loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())
