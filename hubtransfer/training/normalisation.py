"""Running statistics of normalisation layers, which each process learns from its own examples."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime

_NAMES = ("running_mean", "running_var")


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Returns the running means and variances that move in training mode, of the module and of its tasks' patches."""
    parts = (part for part in module.modules() if part.training)
    return [buffer for part in parts for name, buffer in part._buffers.items() if name in _NAMES and buffer is not None]


@torch.no_grad()
def share_statistics(runtime: "Runtime") -> None:
    """Makes them the means over processes, after a step: whoever looks in evaluation mode sees the same everywhere.

    All other buffers are functions of what all processes know, and memories are large: so nothing else is sent.
    """
    if runtime.world > 1:
        found = running_statistics(runtime.method)
        for own, mean in zip(found, runtime.mean(found)):
            own.copy_(mean)
