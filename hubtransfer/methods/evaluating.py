"""Evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

TOGETHER = 512
"""Examples that a model in evaluation mode is given in one pass, however many there are."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode, and every part back into the mode it had.

    Flags are set directly, because a model's own `train` and `eval` decide for its parts.
    """
    modes = {part: part.training for part in module.modules()}
    try:
        for part in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
