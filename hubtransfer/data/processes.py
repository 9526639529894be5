"""Rows of all processes: what a memory needs so that it is the same everywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def world() -> int:
    """Number of processes that run together."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process."""
    return torch.distributed.get_rank() if world() > 1 else 0


def from_process(source: int, tensor: Tensor) -> Tensor:
    """Returns a tensor of process `source`; the others give one of the same shape and type, which is filled."""
    if world() > 1:
        torch.distributed.broadcast(tensor, source)
    return tensor


def everywhere(tensor: Tensor) -> Tensor:
    """Returns the rows of all processes, which have equally many, in the order of the processes."""
    if world() == 1:
        return tensor
    found = [torch.empty_like(tensor) for _ in range(world())]
    torch.distributed.all_gather(found, tensor.contiguous())
    return torch.cat(found)
