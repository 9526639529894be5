"""Permuted MNIST, 20 tasks, all evaluated after each: the library beside a loop written by hand, whole processes.

    HUBTRANSFER_DATA=<folder of mnist/train-images-idx3-ubyte.gz ...> python benchmarks/continual.py --out FILE.json

Both run the same protocol (batches of 128, one epoch a task, plain SGD, a perceptron 784-100-100-10, one thread) with
the same permutations, in processes of their own, in turns. Seconds are those of the whole process, imports included;
CPU seconds beside them tell how much of that a busy machine took away.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

BATCH = 128
# strategy -> lr, alpha (logits), beta (labels); the published settings for a buffer of 200
SETTINGS = {"sgd": (0.2, 0.0, 0.0), "er": (0.2, 0.0, 0.0), "der_plus_plus": (0.1, 1.0, 1.0)}
DRAWS = {"sgd": 0, "er": 1, "der_plus_plus": 2}
MEMORY = 200


def by_hand(strategy: str, tasks: int) -> float:
    """The loop one would write: tensors, one forward for batch and replay, cached test sets."""
    import gzip

    import numpy as np
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(1)
    lr, alpha, beta = SETTINGS[strategy]
    folder = Path(os.environ["HUBTRANSFER_DATA"]) / "mnist"

    def read(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, labels = (
            np.frombuffer(gzip.decompress((folder / f"{part}-{what}-ubyte.gz").read_bytes()), np.uint8, offset=skip)
            for what, skip in (("images-idx3", 16), ("labels-idx1", 8))
        )
        return torch.from_numpy(pixels).view(-1, 784).float().div_(255), torch.from_numpy(labels).long()

    (pixels, labels), (test_pixels, test_labels) = read("train"), read("t10k")
    orders = [torch.randperm(784, generator=torch.Generator().manual_seed(seed_of("permutation", 0, t)))
              for t in range(tasks)]  # fmt: skip
    tests = [test_pixels[:, order] for order in orders]
    torch.manual_seed(0)
    layers = [torch.nn.Linear(784, 100), torch.nn.Linear(100, 100), torch.nn.Linear(100, 10)]
    for layer in layers[:2]:
        torch.nn.init.xavier_uniform_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    network = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, fused=True)
    kept = torch.zeros(MEMORY, 784), torch.zeros(MEMORY, dtype=torch.long), torch.zeros(MEMORY, 10)
    seen, accuracies = 0, []
    for order in orders:
        current = pixels[:, order]
        for rows in torch.randperm(len(labels)).split(BATCH):
            x, y = current[rows], labels[rows]
            count, filled = len(x), min(seen, MEMORY)
            times = DRAWS[strategy] if filled else 0
            draw = [torch.randperm(filled)[:BATCH] for _ in range(times)]
            logits = network(torch.cat([x, *(kept[0][d] for d in draw)]) if draw else x)
            if strategy == "er" and draw:
                loss = F.cross_entropy(logits, torch.cat([y, kept[1][draw[0]]]))
            else:
                loss = F.cross_entropy(logits[:count], y)
                if draw:
                    size = len(draw[0])
                    loss = loss + alpha * F.mse_loss(logits[count : count + size], kept[2][draw[0]])
                    loss = loss + beta * F.cross_entropy(logits[count + size :], kept[1][draw[1]])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if strategy != "sgd":  # reservoir sampling
                positions = torch.arange(seen, seen + count)
                slots = (torch.rand(count) * (positions + 1)).long()
                slots = torch.where(positions < MEMORY, positions, slots)
                chosen = (slots < MEMORY).nonzero().flatten().tolist()
                answers = logits.detach()
                for row in chosen:
                    slot = slots[row]
                    kept[0][slot], kept[1][slot], kept[2][slot] = x[row], y[row], answers[row]
                seen += count
        with torch.no_grad():
            accuracies = [(network(test).argmax(1) == test_labels).float().mean().item() for test in tests]
    return sum(accuracies) / tasks


def with_library(strategy: str, tasks: int) -> float:
    """The same through a recipe."""
    import tempfile

    import torch

    torch.set_num_threads(1)
    from hubtransfer import recipe
    from hubtransfer.training import Trainer

    lr, alpha, beta = SETTINGS[strategy]
    memory = {"memory": {"kind": "reservoir", "size": MEMORY}, "replay_batch": BATCH}
    methods = {
        "sgd": {"name": "sequential"},
        "er": {"name": "er", **memory},
        "der_plus_plus": {"name": "der_plus_plus", "alpha": alpha, "beta": beta, **memory},
    }
    training = {"epochs": 1, "batch_size": BATCH, "optimizer": "sgd", "lr": lr, "momentum": 0.0, "schedule": "constant"}
    training |= {"evaluate": "stage", "eval_batch_size": 2500, "save": "no", "logging_steps": 100}
    with tempfile.TemporaryDirectory() as folder:
        built = recipe.build(
            {
                "method": methods[strategy],
                "model": {"backbone": "plain:mlp", "pretrained": False,
                          "options": {"widths": [100, 100], "init": "xavier"}},
                "data": {"stream": {"permuted": {"name": "mnist", "tasks": tasks}}},
                "training": {**training, "plots": False, "progress": False, "output_dir": folder},
            }
        )  # fmt: skip
        return Trainer(*built).train().metrics["average_accuracy"]


def seed_of(*parts: object) -> int:
    """As the library makes seeds, so that both see the same permutations."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


LOOPS = {"library": with_library, "by_hand": by_hand}


def run(loop: str, strategy: str, tasks: int) -> dict[str, float]:
    """One whole process: accuracy, seconds, CPU seconds."""
    command = [sys.executable, __file__, "--one", loop, strategy, "--tasks", str(tasks)]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])}: {done.stderr[-2000:]}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"accuracy": float(done.stdout.split()[-1]), "seconds": seconds, "cpu_seconds": used}


def main() -> None:
    """Measures every strategy in turns and writes the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--strategies", nargs="*", default=list(SETTINGS))
    options = parser.parse_args()
    if options.one:
        print(LOOPS[options.one[0]](options.one[1], options.tasks))
        return
    rows = []
    for strategy in options.strategies:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in LOOPS}
        for number in range(options.rounds):
            for name in list(LOOPS)[:: 1 if number % 2 else -1]:
                found[name].append(run(name, strategy, options.tasks))
                print(strategy, name, found[name][-1], flush=True)
        row: dict[str, object] = {"strategy": strategy, "tasks": options.tasks, "rounds": options.rounds}
        for key in ("seconds", "cpu_seconds"):
            pairs = zip(found["library"], found["by_hand"])
            row[f"ratio_{key}"] = round(statistics.median(a[key] / b[key] for a, b in pairs), 3)
            row[key] = {name: round(statistics.median(one[key] for one in many), 1) for name, many in found.items()}
        row["accuracy"] = {
            name: round(statistics.mean(one["accuracy"] for one in many), 4) for name, many in found.items()
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.out:
        from hubtransfer.training.record import versions

        report = {"benchmark": "continual", "threads": 1, "load": os.getloadavg()[0], "versions": versions()}
        options.out.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
