"""Step time and peak memory of multi-task balancing over equal weighting, and the time of the min-norm solver.

One step of every candidate in turn, on the same batch, one thread, CPU time of the process; the figure is the median
over rounds of a candidate's time over that of equal weighting in the same round (candidates with a backward pass a task
take part in every fourth round). The library's methods are compared with its own equal weighting, and that and other
packages with a hand-written loop.
`python benchmarks/balancing.py --out FILE.json`; other packages are left out where they are not installed.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import hubtransfer as ht
from hubtransfer.data import Batch
from hubtransfer.functional.min_norm import min_norm_weights
from hubtransfer.training import Runtime, TrainingArguments
from hubtransfer.training.record import versions

CASES = {
    # name: (backbone, input shape, tasks, batch, rounds)
    "lenet, 2 tasks, batch 256": ("plain:lenet", (1, 28, 28), 2, 256, 240),
    "resnet10t, 64 px, 2 tasks, batch 32": ("timm/resnet10t", (3, 64, 64), 2, 32, 40),
    "resnet10t, 64 px, 8 tasks, batch 32": ("timm/resnet10t", (3, 64, 64), 8, 32, 40),
}
EQUAL, BY_HAND = "fixed_weights", "by hand: equal"
LAST_CONVOLUTION = "layer4.0.conv2"  # of resnet10t, whose last layer by order of definition is the shortcut
OURS = (EQUAL, "grad_norm", "mgda_ub", "mgda", "jacobian_descent")
EVERY_ROUND = (BY_HAND, *OURS[:3])


def make(case):
    """A model with a ten-class head a task, and one batch."""
    backbone, shape, tasks, size, _ = CASES[case]
    torch.manual_seed(0)
    plain = backbone.startswith("plain:")
    options = {"input_shape": list(shape)} if plain else {"image_size": shape[-1]}
    model = ht.TransferModel(ht.Backbone.from_pretrained(backbone, pretrained=False, **options))
    names = [f"task{number}" for number in range(tasks)]
    for name in names:
        model.add_task(name, ht.ClassificationHead(10))
    labels = {name: torch.randint(0, 10, (size,)) for name in names}
    return model, Batch(inputs={"pixel_values": torch.randn(size, *shape)}, labels=labels)


def library(name, model, batch):
    """A step of one of the library's methods, as the Trainer makes it."""
    residual = name == "grad_norm" and "layer4" in dict(model.backbone.trunk.named_children())
    method = ht.methods.find(name)(model, **({"layer": LAST_CONVOLUTION} if residual else {}))
    columns = {"pixel_values": batch.inputs["pixel_values"], **batch.labels}
    stage = next(iter(method.stages(ht.MultiTask(train=columns, labels={t: t for t in batch.labels}))))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(output_dir=folder, optimizer="sgd", lr=0.01, schedule="constant")
        runtime = Runtime(method, arguments)
    runtime.begin(stage, 1_000_000)
    runtime.set_step(0)
    return lambda: stage.updates[0].apply(batch, runtime)


class Plain(nn.Module):
    """The same trunk and heads without the library."""

    def __init__(self, model):
        super().__init__()
        self.trunk = copy.deepcopy(model.backbone.trunk)
        self.heads = nn.ModuleDict({task: copy.deepcopy(head) for task, head in model.heads.items()})
        self.requires_grad_(True).train()

    def features(self, batch):
        return self.trunk(batch.inputs["pixel_values"])

    def losses(self, z, batch):
        return [F.cross_entropy(head(z), batch.labels[task]) for task, head in self.heads.items()]


def optimizer_of(module):
    return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, fused=True)


def by_hand(model, batch):
    """The equally weighted sum, as one would write it."""
    plain = Plain(model)
    optimizer = optimizer_of(plain)

    def step():
        sum(plain.losses(plain.features(batch), batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def torchjd_step(aggregator, model, batch):
    """TorchJD's multi-task backward pass."""
    from torchjd.autojac import jac_to_grad, mtl_backward

    plain = Plain(model)
    optimizer = optimizer_of(plain)
    trunk = list(plain.trunk.parameters())
    heads = [list(head.parameters()) for head in plain.heads.values()]

    def step():
        z = plain.features(batch)
        mtl_backward(plain.losses(z, batch), z, tasks_params=heads, shared_params=trunk, parallel_chunk_size=1)
        jac_to_grad(trunk, aggregator)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def libmtl_step(weighting, at_features, options, model, batch):
    """LibMTL's weighting of the losses, in its own architecture class."""
    if "torchvision.models.utils" not in sys.modules:  # its 2021 release imports a module that is gone since
        gone = types.ModuleType("torchvision.models.utils")
        gone.load_state_dict_from_url = torch.hub.load_state_dict_from_url
        sys.modules["torchvision.models.utils"] = gone
    from LibMTL import weighting as weightings
    from LibMTL.architecture import HPS

    plain = Plain(model)

    class Model(HPS, getattr(weightings, weighting)):
        def zero_grad_share_params(self):
            self.encoder.zero_grad(set_to_none=False)  # the default of its time, on which it relies

    tasks = list(plain.heads)
    built = Model(tasks, lambda: plain.trunk, plain.heads, at_features, False, torch.device("cpu"))
    built.task_num, built.epoch = len(tasks), 1
    built.train_loss_buffer = torch.ones(len(tasks), 1).numpy()
    built.init_param()
    optimizer = torch.optim.SGD(built.parameters(), lr=0.01, momentum=0.9, fused=True)

    def step():
        out = built(batch.inputs["pixel_values"])
        losses = torch.stack([F.cross_entropy(out[task], batch.labels[task]) for task in tasks])
        built.backward(losses, **options)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def others():
    """What other packages offer, by name, where they are installed and can be imported."""
    found = {}
    try:
        from torchjd import aggregation
    except ImportError as error:
        print(f"TorchJD is left out: {error}")
    else:
        named = {"UPGrad": aggregation.UPGrad(), "MGDA": aggregation.MGDA()}
        for name, aggregator in named.items():
            found[f"torchjd {version('torchjd')}: {name}"] = lambda m, b, a=aggregator: torchjd_step(a, m, b)
    kinds = {
        "GradNorm": ("GradNorm", False, {"alpha": 1.5}),
        "GradNorm at the features": ("GradNorm", True, {"alpha": 1.5}),
        "MGDA": ("MGDA", False, {"mgda_gn": "none"}),
        "MGDA at the features, summed over the batch": ("MGDA", True, {"mgda_gn": "none"}),
    }
    for name, (weighting, at_features, options) in kinds.items():
        step = lambda m, b, w=weighting, f=at_features, o=options: libmtl_step(w, f, o, m, b)  # noqa: E731
        try:
            step(*make("lenet, 2 tasks, batch 256"))()
        except Exception as error:  # a package of 2021 may fail in many ways; the report says how
            print(f"LibMTL {name} is left out: {error!r}")
        else:
            found[f"LibMTL {version('LibMTL')}: {name}"] = step
    return found


def candidates(case, external):
    """Every candidate's step on its own copy of the same model."""
    model, batch = make(case)
    steps = {name: library(name, copy.deepcopy(model), batch) for name in OURS}
    steps[BY_HAND] = by_hand(model, batch)
    return steps | {name: make_step(model, batch) for name, make_step in external.items()}


def measure(case, rounds, external):
    """The row of one case."""
    steps = candidates(case, external)
    times = {name: {} for name in steps}
    for number in range(-4, rounds):  # the first ones warm up
        order = [name for name in steps if name in EVERY_ROUND or number % 4 == 0]
        shift = number % len(order)  # every candidate follows every other
        for name in order[shift:] + order[:shift]:
            began = time.process_time()
            steps[name]()
            if number >= 0:
                times[name][number] = time.process_time() - began
    row = {"case": case, "rounds": rounds, "candidates": {}}
    for name, found in times.items():
        base = times[EQUAL if name in OURS and name != EQUAL else BY_HAND]
        ratios = [seconds / base[number] for number, seconds in found.items()]
        row["candidates"][name] = {
            "over": EQUAL if base is times[EQUAL] else BY_HAND,
            "ratio_median": round(statistics.median(ratios), 3),
            "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
            "ratio_of_fastest": round(min(found.values()) / min(base.values()), 3),
            "cpu_ms_a_step": round(1e3 * statistics.median(found.values()), 2),
        }
    return row


def peak_memory(case, name):
    """MB of a fresh process: its peak, and how far that lies above what it held before the first step."""
    command = [sys.executable, __file__, "--one", case, name]
    # Freed blocks go back at once: what the allocator keeps in store differs by 10 % from run to run
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=exact)
    return [round(float(value), 1) for value in done.stdout.split()[-2:]]


def status(key):
    """A field of this process's status, in MB; ru_maxrss would carry the parent's peak over."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def solver(terms, number=60):
    """Median CPU milliseconds of the min-norm solver on random Gram matrices."""
    generator = torch.Generator().manual_seed(0)
    grams = []
    for k in range(number):
        rank = terms // 2 if k % 3 == 0 else terms + 5  # a third of them singular
        vectors = torch.randn(terms, rank, generator=generator, dtype=torch.float64) + 0.5
        grams.append(vectors @ vectors.T)
    times = []
    for gram in itertools.chain(grams[:5], grams):
        began = time.process_time()
        min_norm_weights(gram)
        times.append(time.process_time() - began)
    return round(1e3 * statistics.median(times[5:]), 4)


def main():
    """Measures every case and writes the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2)
    parser.add_argument("--rounds", type=float, default=1.0, help="factor on the number of rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        case, name = options.one
        model, batch = make(case)
        step = library(name, model, batch)
        min_norm_weights(torch.eye(2))  # NumPy's BLAS makes its buffers once a process, whatever the size of a step
        before = status("VmRSS")
        for _ in range(5):
            step()
        print(status("VmHWM"), status("VmHWM") - before)
        return
    external = others()
    rows = []
    for case, (*_, rounds) in CASES.items():
        row = measure(case, max(2, round(rounds * options.rounds)), external)
        row["peak_memory_mb"] = {
            name: dict(zip(("process", "above_the_model"), peak_memory(case, name))) for name in OURS[:4]
        }
        rows.append(row)
        print(json.dumps(row, indent=1))
    solving = {str(terms): solver(terms) for terms in (2, 8, 20, 40)}
    print("min-norm solver, CPU ms:", solving)
    if options.out:
        command = "python benchmarks/balancing.py --out " + options.out.name
        report = {"benchmark": "balancing", "command": command, "threads": 1, "versions": versions(), "rows": rows}
        report["min_norm_solver_cpu_ms_by_tasks"] = solving
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
