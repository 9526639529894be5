"""Time of a training epoch with a cached teacher over one of the student alone, and with a teacher that is not cached.

`python benchmarks/cached_teacher.py --out FILE.json [--only WORD]`. The three kinds of run take turns; a cached run's
first epoch, in which the teacher answers, stands by itself. Times are CPU seconds of the process on one thread, which a
busy machine lengthens less than seconds by the clock; figures are medians over rounds of the ratio within a round.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hubtransfer as ht
from hubtransfer.methods.method import Method
from hubtransfer.training import Callback
from hubtransfer.training.record import versions

EPOCHS = 4
Models = tuple[ht.TransferModel, ht.TransferModel]


def images(examples: int, channels: int, side: int) -> dict[str, torch.Tensor]:
    """Returns random images of ten classes."""
    return {"pixel_values": torch.randn(examples, channels, side, side), "labels": torch.arange(examples) % 10}


def mlp(width: int) -> ht.TransferModel:
    """Returns a network of two hidden layers."""
    layers = [nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    body = ht.Backbone.from_module(nn.Sequential(*layers), dim=width, sample=torch.zeros(1, 1, 28, 28))
    return ht.TransferModel(body).add_task("task", ht.ClassificationHead(10))


def cnn(name: str) -> ht.TransferModel:
    """Returns a timm network for images of 64 pixels."""
    body = ht.Backbone.from_pretrained(f"timm/{name}", pretrained=False, image_size=64)
    return ht.TransferModel(body).add_task("task", ht.ClassificationHead(10))


def logits(model: ht.TransferModel, teacher: ht.Teacher) -> Method:
    """Returns distillation of logits."""
    return ht.distillation.KD(model, teacher)


def logits_and_attention(model: ht.TransferModel, teacher: ht.Teacher) -> Method:
    """Returns distillation of logits and attention maps."""
    return ht.distillation.KD(model, teacher) + ht.distillation.AttentionTransfer(model, teacher)


LITE = "tf_efficientnet_lite0 to mobilenetv3_small_050, 64 px, batch 64"
CASES: dict[str, tuple[Callable[[], Models], Callable[[], Any], Callable[..., Method], int, int]] = {
    # name: (teacher and student, data, method, batch, rounds)
    f"{LITE}, logits": (
        lambda: (cnn("tf_efficientnet_lite0"), cnn("mobilenetv3_small_050")),
        lambda: images(512, 3, 64), logits, 64, 3,
    ),
    f"{LITE}, logits and attention": (
        lambda: (cnn("tf_efficientnet_lite0"), cnn("mobilenetv3_small_050")),
        lambda: images(512, 3, 64), logits_and_attention, 64, 3,
    ),
    "mlp 1200x2 to 800x2, batch 128, logits": (
        lambda: (mlp(1200), mlp(800)), lambda: images(6400, 1, 28), logits, 128, 5,
    ),
}  # fmt: skip


class Clock(Callback):
    """CPU seconds of each epoch."""

    def on_stage_begin(self, trainer, stage, steps):
        self.marks = [time.process_time()]

    def on_log(self, trainer, row):
        self.marks.append(time.process_time())


def epochs(method: Method, data: dict[str, torch.Tensor], batch: int, count: int) -> list[float]:
    """Returns the seconds of each epoch of one run."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = ht.TrainingArguments(
            output_dir=folder, epochs=count, batch_size=batch, logging_steps=len(data["labels"]) // batch,
            save="no", evaluate="no", progress=False, plots=False,
        )  # fmt: skip
        ht.Trainer(method, ht.SingleTask(data), arguments, [clock]).train()
    return [b - a for a, b in zip(clock.marks, clock.marks[1:])]


def measure(case: str) -> dict[str, Any]:
    """Runs the three kinds in turn."""
    make, data_of, method_of, batch, rounds = CASES[case]
    torch.manual_seed(0)
    (teacher, student), data = make(), data_of()

    def alone() -> list[float]:
        return epochs(ht.FineTune(copy.deepcopy(student), trains="all"), data, batch, EPOCHS)

    def taught(cache: bool, count: int) -> list[float]:
        asked = ht.Teacher(copy.deepcopy(teacher), cache=cache)
        return epochs(method_of(copy.deepcopy(student), asked), data, batch, count)

    found: dict[str, list[float]] = {"alone": [], "cached": [], "cached_first": [], "not_cached": []}
    for number in range(rounds + 1):
        kinds = [("alone", alone), ("cached", lambda: taught(True, EPOCHS)), ("not_cached", lambda: taught(False, 2))]
        for kind, run in kinds[:: 1 if number % 2 else -1]:
            times = run()
            if not number:  # the first round warms up
                continue
            found[kind].append(statistics.median(times[1:]))
            if kind == "cached":
                found["cached_first"].append(times[0])
    ratios = {k: [a / b for a, b in zip(v, found["alone"])] for k, v in found.items() if k != "alone"}
    return {
        "case": case,
        "cached_over_alone": round(statistics.median(ratios["cached"]), 3),
        "cached_over_alone_range": [round(min(ratios["cached"]), 3), round(max(ratios["cached"]), 3)],
        "asked": 1.1,
        "first_cached_over_alone": round(statistics.median(ratios["cached_first"]), 3),
        "not_cached_over_alone": round(statistics.median(ratios["not_cached"]), 3),
        "epoch_cpu_s": {kind: round(statistics.median(values), 4) for kind, values in found.items()},
        "rounds": rounds,
    }


def main() -> None:
    """Measures every case and writes the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        if options.only in case:
            rows.append(measure(case))
            print(json.dumps(rows[-1]), flush=True)
    if options.out:
        command = f"python benchmarks/cached_teacher.py --out {options.out.name}"
        report = {"benchmark": "cached_teacher", "command": command, "threads": 1, "versions": versions(), "rows": rows}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
