"""How sure a mean over a few seeds is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean with its confidence interval.

    Attributes:
        mean: of the values.
        half: half the interval's width; None for a single value, which says nothing about spread.
        deviation: sample standard deviation (n - 1); None for a single value.
        n: number of values.
    """

    mean: float
    half: float | None
    deviation: float | None
    n: int

    @property
    def low(self) -> float:
        """Lower end (the mean itself for a single value)."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """Upper end (the mean itself for a single value)."""
        return self.mean + (self.half or 0.0)

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        """Such as ``91.30 ± 0.42 (n=5)``."""
        half = "" if self.half is None else f" ± {scale * self.half:.{digits}f}"
        return f"{scale * self.mean:.{digits}f}{half} (n={self.n})"


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean over seeds with Student's t interval.

    ``mean ± t_{(1 + level) / 2, n - 1} * s / sqrt(n)``, with ``s`` the sample standard deviation.

    Raises:
        ValueError: no values, or a level that is no share.
    """
    if not values:
        raise ValueError("no values to average")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, such as 0.95, not {level}")
    from scipy.special import stdtrit  # takes longer to import than most runs do to start

    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(stdtrit(count - 1, (1 + level) / 2)) * deviation / math.sqrt(count)
    return Interval(mean, half, deviation, count)
