"""What each of two processes runs: methods that remember, on a network with running statistics. For `torchrun`."""

import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import save_file

import hubtransfer as ht
from hubtransfer.backbones import Backbone
from hubtransfer.data import SingleTask, TaskStream
from hubtransfer.methods.registry import load_all
from hubtransfer.training import Trainer, TrainingArguments
from tests.tiny import SHAPE, tiny_data

COUNTING = ("ncm", "ranpac", "patch_per_task")
LEARNING = ("er", "fdr", "icarl")
HEADS = {
    "ncm": ht.NearestMeanHead(3),
    "ranpac": ht.RidgeHead(3, projection=20),
    "patch_per_task": ht.NearestMeanHead(3, prototypes=2),
}
OPTIONS = {"er": {"memory": ht.Reservoir(12)}, "fdr": {"memory": ht.Ring(12)}, "icarl": {"memory": ht.Herding(12)}}


def model(head):
    """Normalises its inputs, before anything that is learned, and its features, by running statistics."""
    torch.manual_seed(0)
    width = SHAPE[0] * SHAPE[1] * SHAPE[2]
    layers = OrderedDict(
        flat=nn.Flatten(), norm=nn.BatchNorm1d(width), first=nn.Linear(width, 8), inner=nn.BatchNorm1d(8), act=nn.Tanh()
    )
    network = nn.Sequential(layers).double()
    backbone = Backbone.from_module(network, dim=8, sample=torch.zeros(1, *SHAPE, dtype=torch.float64))
    return ht.TransferModel(backbone).add_task("task", head)


def stream(name):
    """Two items, to be counted with an odd number of examples each, which two processes cannot share."""
    sizes = (23, 21) if name in COUNTING else (24, 16)
    items = [tiny_data(n, seed=k, dtype=torch.float64) for k, n in enumerate(sizes)]
    return TaskStream([SingleTask(data, name=f"t{k}") for k, data in enumerate(items)], kind="class")


def run(folder: Path, batch_size: int) -> None:
    """Trains each method and writes what this process then has, and how many numbers were broadcast meanwhile."""
    torch.set_num_threads(1)
    for name in (*COUNTING, *LEARNING):
        method = load_all()[name](model(HEADS.get(name, ht.ClassificationHead(3))), **OPTIONS.get(name, {})).double()
        arguments = TrainingArguments(
            output_dir=str(folder / name), epochs=1, batch_size=batch_size, optimizer="sgd", lr=0.05, progress=False,
            plots=False, evaluate="no", save="no",
        )  # fmt: skip
        trainer = Trainer(method, stream(name), arguments)
        before, sent[0] = sum(p.numel() for p in method.parameters()), 0
        trainer.train()
        state = {key: value.contiguous() for key, value in method.state_dict().items()}
        facts = {"sent": torch.tensor(sent[0]), "parameters": torch.tensor(before)}
        save_file({**state, **facts}, folder / f"{name}{trainer.runtime.rank}.safetensors")
        trainer.runtime.wait()


sent = [0]


def counted(broadcast):
    """Adds up the numbers that data-parallel training broadcasts."""

    def broadcast_coalesced(group, tensors, *args):
        sent[0] += sum(tensor.numel() for tensor in tensors)
        return broadcast(group, tensors, *args)

    return broadcast_coalesced


if __name__ == "__main__":
    torch.distributed._broadcast_coalesced = counted(torch.distributed._broadcast_coalesced)
    run(Path(sys.argv[1]), int(sys.argv[2]))
