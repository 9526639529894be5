"""What it costs to serve many tasks: a batch of 32 tasks beside one of a single task, memory of 1,000 patches.

    python benchmarks/serving.py --out benchmarks/serving.json

Seconds are of processor time. Every round runs each case once, in random order, so that a busy machine slows all of
them; given are medians over the rounds, of seconds and of the ratio to the same round's batch of one task. One thread,
evaluation mode, random weights.
"""

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import timm
import torch
from torch import Tensor

import hubtransfer as ht
from hubtransfer.patches import build_patch

BACKBONES = ("timm/mobilenetv2_100", "timm/vit_tiny_patch16_224")
BATCH = 32
TASKS = (1, 10, 32, 100, 1000)
RANK = 8
PATCHES = {"scale_bias": ht.ScaleBiasConfig(), "scale_bias_depthwise": [ht.ScaleBiasConfig(), ht.DepthwiseConfig()]}


def resident_bytes() -> int:
    """Memory of this process that is in use, as the kernel sees it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def moved(model: ht.TransferModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.patches.parameters(), *model.heads.parameters()):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


def names_in_a_batch(tasks: int) -> list[str]:
    """32 of the tasks; all different where there are as many."""
    generator = torch.Generator().manual_seed(tasks)
    order = torch.randperm(tasks, generator=generator).tolist()
    return [f"t{order[k % tasks]}" for k in range(BATCH)]


def served(name: str, config: Any, folder: Path, image: Tensor) -> tuple[ht.TransferModel, dict[str, Any]]:
    """A model with one task of its own, `own`, and 1,000 from a store (eight different patches on disk)."""
    model = ht.TransferModel(ht.Backbone.from_pretrained(name, pretrained=False))
    for number in range(8):
        model.add_task(str(number), ht.ClassificationHead(10), patch=config)
        moved(model, number)
        model.save_patch(folder / str(number), str(number))
        model.remove_task(str(number))
    model.add_task("own", ht.ClassificationHead(10), patch=config)
    moved(model, 99)
    model.eval()
    store = model.serve({f"t{k}": folder / str(k % 8) for k in range(1000)}, capacity=1000)
    store.get("t0")
    with torch.no_grad():
        model(image[:2], task=["t0", "own"])
    gc.collect()
    before, start = resident_bytes(), time.process_time()
    for k in range(1000):
        store.get(f"t{k}")
    seconds = time.process_time() - start
    gc.collect()
    trunk = sum(t.numel() * t.element_size() for t in model.backbone.state_dict().values())
    facts = {
        "trunk_bytes": trunk,
        "patches_bytes": store.nbytes,
        "process_grew_by_bytes": resident_bytes() - before,
        "process_growth_over_patches": (resident_bytes() - before) / (store.nbytes * 999 / 1000),
        "load_seconds_a_patch": seconds / 999,
        "disk_bytes_a_patch": sum(file.stat().st_size for file in (folder / "0").glob("*.safetensors")),
    }
    with torch.no_grad():
        x = torch.randn(4, *image.shape[1:], generator=torch.Generator().manual_seed(0))
        names = ["t1", "t2", "own", "t5"]
        together = model(x, task=names).logits
        alone = torch.cat([model(x[k : k + 1], task=task).logits for k, task in enumerate(names)])
        applied = ht.TransferModel(model.backbone)
        applied.load_patch(folder / "1", "t1")
        facts["largest_difference_to_one_by_one"] = float((together - alone).abs().max())
        facts["largest_difference_to_the_applied_patch"] = float(
            (applied.eval()(x[:1], task="t1").logits - together[:1]).abs().max()
        )
        facts["largest_logit"] = float(together.abs().max())
    return model, facts


def stock(name: str, tasks: int, limit: float) -> tuple[Any, int, float]:
    """PEFT's model with as many LoRA adapters as can be added within the limit of seconds."""
    backbone = ht.Backbone.from_pretrained(name, pretrained=False)
    targets = build_patch(peft.LoraConfig(r=RANK), backbone).config.target_modules
    config = peft.LoraConfig(r=RANK, target_modules=targets)
    start = time.process_time()
    model = peft.get_peft_model(backbone.trunk, config, adapter_name="t0")
    count = 1
    while count < tasks and time.process_time() - start < limit:
        model.add_adapter(f"t{count}", config)
        count += 1
    return model.eval(), count, (time.process_time() - start) / count


def one_backbone(name: str, rounds: int, folder: Path, limit: float, kinds: list[str]) -> dict[str, Any]:
    size = ht.Backbone.from_pretrained(name, pretrained=False).processor.size
    side = size if isinstance(size, int) else size[0]
    image = torch.randn(BATCH, 3, side, side, generator=torch.Generator().manual_seed(1))
    jobs: dict[str, Callable[[], Any]] = {}
    found: dict[str, Any] = {"image_size": side, "batch": BATCH}
    for kind in kinds:
        model, found[kind] = served(name, PATCHES[kind], folder / kind, image)
        jobs[f"{kind}/one task"] = lambda model=model: model(image, task="own")
        for tasks in TASKS:
            names = names_in_a_batch(tasks)
            jobs[f"{kind}/{tasks}"] = lambda model=model, names=names: model(image, task=names)
    adapters, count, seconds = stock(name, 1000, limit)
    found["peft_lora"] = {"rank": RANK, "adapters": count, "add_seconds_an_adapter": seconds}
    jobs["peft_lora/one task"] = lambda: adapters(image)
    for tasks in [tasks for tasks in TASKS if tasks <= count]:
        names = names_in_a_batch(tasks)
        jobs[f"peft_lora/{tasks}"] = lambda names=names: adapters(image, adapter_names=names)
    adapters.set_adapter("t0")

    times: dict[str, list[float]] = {job: [] for job in jobs}
    gc.collect()
    with torch.inference_mode():
        for round_ in range(rounds + 1):
            order = list(jobs)
            random.shuffle(order)
            for job in order:
                start = time.process_time()
                jobs[job]()
                if round_:  # the first pays for caches
                    times[job].append(time.process_time() - start)
    for job, values in times.items():
        kind, _, tasks = job.partition("/")
        base = times[f"{kind}/one task"]
        found[kind].setdefault("tasks", {})[tasks] = {
            "seconds": statistics.median(values),
            "images_a_second": BATCH / statistics.median(values),
            "ratio_to_one_task": statistics.median(a / b for a, b in zip(values, base)),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: printed)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for adding adapters to PEFT's model")
    parser.add_argument("--backbone", action="append", help=f"instead of {', '.join(BACKBONES)}")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="peft")
    torch.set_num_threads(1)
    versions = {"torch": torch.__version__, "timm": timm.__version__, "peft": peft.__version__}
    results: dict[str, Any] = {"versions": versions, "rounds": arguments.rounds, "threads": 1}
    for name in arguments.backbone or BACKBONES:
        depthwise = "mobilenet" in name
        with tempfile.TemporaryDirectory() as folder:
            kinds = list(PATCHES) if depthwise else ["scale_bias"]
            results[name] = one_backbone(name, arguments.rounds, Path(folder), arguments.limit, kinds)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
