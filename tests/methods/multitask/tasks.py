"""Small multi-task models and data: heads of several kinds, on shared inputs or on a data set each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hubtransfer.data import Batch, MultiTask
from hubtransfer.models import ClassificationHead, DenseHead, RegressionHead, TransferModel
from tests.tiny import tiny_backbone, tiny_data

HEADS = {"left": ClassificationHead(3), "right": ClassificationHead(2), "size": RegressionHead(1), "map": DenseHead(2)}


def model_with(
    tasks: Sequence[str], dtype: torch.dtype = torch.float32, seed: int = 0, **patches: Any
) -> TransferModel:
    """A tiny CNN with a head for each task, and patches for those that are named."""
    model = TransferModel(tiny_backbone(dtype=dtype, seed=seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        for task in tasks:
            model.add_task(task, HEADS[task], patch=patches.get(task))
    return model


def two_headed(dtype: torch.dtype = torch.float32, seed: int = 0, **patches: Any) -> TransferModel:
    """Two classifications."""
    return model_with(("left", "right"), dtype, seed, **patches)


def shared_data(n: int = 24, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Images with a label for each of the four tasks."""
    left = tiny_data(n, 3, seed=seed, dtype=dtype)
    pixels = left["pixel_values"]
    size = pixels.square().mean((1, 2, 3))
    bright = (pixels.mean(1) > 0).long()
    return {
        "pixel_values": pixels,
        "left": left["labels"],
        "right": (torch.arange(n) // 3) % 2,
        "size": size,
        "map": bright,
    }


def scenario(
    n: int = 24, seed: int = 0, dtype: torch.dtype = torch.float32, tasks: Sequence[str] = ("left", "right")
) -> MultiTask:
    """Tasks that share inputs."""
    data = shared_data(n, seed, dtype)
    data = {"pixel_values": data["pixel_values"], **{task: data[task] for task in tasks}}
    return MultiTask(train=data, labels={task: task for task in tasks}, evaluation=data)


def streams() -> MultiTask:
    """A data set a task."""
    return MultiTask(datasets={"left": tiny_data(24, 3), "right": tiny_data(16, 2, seed=1)})


def batch_of(data: dict[str, Tensor], rows: slice = slice(0, 8)) -> Batch:
    """A batch of shared inputs with labels by task."""
    labels = {name: value[rows] for name, value in data.items() if name != "pixel_values"}
    return Batch(inputs={"pixel_values": data["pixel_values"][rows]}, labels=labels)


def flat_gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradient of a loss as one vector; the graph stays."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(found, parameters)])
