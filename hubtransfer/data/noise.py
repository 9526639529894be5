"""Random numbers that training steps use up: the same whatever else is drawn, resumed or not, on one process or two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hubtransfer.data.processes import rank, world
from hubtransfer.data.seeds import seed_of

_FACTS = "facts"


class Noise(nn.Module):
    """Draws whose numbers depend on the seed and on how many draws there were, saved and resumed with their owner.

    Each process gets its rows of what one process would draw for all, in the order of a global batch.

        >>> noise = Noise()
        >>> noise.normal(2, 3, like=torch.zeros(1)).shape, noise.drawn
        (torch.Size([2, 3]), 1)

    Attributes:
        seed: Of all further draws.
        drawn: Draws so far.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed, self.drawn = seed, 0

    def normal(self, count: int, *shape: int, like: Tensor) -> Tensor:
        """Returns standard normal numbers, (count, *shape), with the device and type of `like`."""
        return self._draw(torch.randn, count, shape, like)

    def uniform(self, count: int, *shape: int, like: Tensor) -> Tensor:
        """Returns numbers in [0, 1), (count, *shape), with the device and type of `like`."""
        return self._draw(torch.rand, count, shape, like)

    def _draw(self, draw: Any, count: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        self.drawn += 1
        generator = torch.Generator().manual_seed(seed_of("noise", self.seed, self.drawn))
        everyone = draw(count * world(), *shape, generator=generator)
        return everyone[rank() * count : (rank() + 1) * count].to(like)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + _FACTS] = torch.tensor([self.seed, self.drawn], dtype=torch.int64)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        facts, missing = state_dict.get(prefix + _FACTS), args[2]
        if facts is None:
            missing.append(prefix + _FACTS)
        else:
            self.seed, self.drawn = facts.tolist()
