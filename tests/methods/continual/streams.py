"""Tiny streams of tasks, one of each kind, and models with the heads they need."""

import torch

from hubtransfer.data import SingleTask, TaskStream
from hubtransfer.models import ClassificationHead, TransferModel
from tests.tiny import tiny_backbone, tiny_data, tiny_model


def domain_stream(tasks=2, n=24, *, seed=0, dtype=torch.float32):
    """The same three classes in every task, other images."""
    sets = [tiny_data(n, seed=10 * seed + k, dtype=dtype) for k in range(tasks)]
    return TaskStream([SingleTask(data, evaluation=data, name=f"t{k}") for k, data in enumerate(sets)], kind="domain")


def task_stream(tasks=2, n=24, *, seed=0, dtype=torch.float32):
    """Three classes of its own for each task."""
    sets = [tiny_data(n, seed=10 * seed + k, dtype=dtype) for k in range(tasks)]
    return TaskStream([SingleTask(data, evaluation=data, name=f"t{k}") for k, data in enumerate(sets)], kind="task")


def class_stream(tasks=2, n=24, *, seed=0, dtype=torch.float32):
    """Two new classes in each task."""
    sets = [tiny_data(n, num_classes=2, seed=10 * seed + k, dtype=dtype) for k in range(tasks)]
    sets = [data | {"labels": data["labels"] + 2 * k} for k, data in enumerate(sets)]
    return TaskStream([SingleTask(data, evaluation=data, name=f"t{k}") for k, data in enumerate(sets)], kind="class")


def model_for(stream, *, kind="mlp", dtype=torch.float32, seed=0, patch=None):
    """A tiny model with a head for each task of a stream of tasks, or with one head."""
    if stream.kind != "task":
        return tiny_model(2 * len(stream) if stream.kind == "class" else 3, kind=kind, dtype=dtype, seed=seed)
    model = TransferModel(tiny_backbone(kind, dtype, seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        for item in stream:
            model.add_task(item.name, ClassificationHead(3), patch=patch)
    return model.set_task(stream[0].name)
