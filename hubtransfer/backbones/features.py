"""What every backbone gives."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """What a backbone gives.

    Attributes:
        pooled: The classifier's input, (batch, dim).
        maps: Outputs of the layers that were asked for, shallow to deep: (batch, channels, height, width) for layers of
            kind "map", (batch, n, channels) with the prefix tokens for kind "tokens".
        by_task: Of each task, where tasks have networks of their own that run together (`Towers`); else empty.
    """

    pooled: Tensor
    maps: dict[str, Tensor]
    by_task: Mapping[str, Features] = MappingProxyType({})

    def rows(self, keep: slice) -> Features:
        """Those of some examples."""
        own = {task: features.rows(keep) for task, features in self.by_task.items()}
        return Features(self.pooled[keep], {name: value[keep] for name, value in self.maps.items()}, own)
