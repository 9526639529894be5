"""How several tasks with data sets of their own take turns."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hubtransfer.data.seeds import seed_of
from hubtransfer.data.source import Source


@dataclass(frozen=True, kw_only=True)
class Mixing:
    r"""Which task's examples a step sees, where tasks have data sets of their own.

    Task t has its share of an epoch's steps (``"alternating"``) or examples (``"mixed"``):

    .. math:: p_t = \frac{n_t^{1/T}}{\sum_u n_u^{1/T}} \quad\text{or}\quad p_t = \frac{w_t}{\sum_u w_u}

    with n_t the size of its data set, T the temperature and w_t given weights. Shares are kept exactly (to rounding) in
    every epoch and their order is random. An epoch has as many examples as all data sets together; a data set whose
    share is larger than its size starts over, in a fresh random order.

    Args:
        batches: ``"alternating"``: all examples of a step are of one task. ``"mixed"``: a step has examples of several,
            and its loss is the mean over its examples.
        temperature: T; 1 samples by size, infinity (``.inf``) equally often.
        weights: task -> w_t, in place of sizes.

    Source: https://arxiv.org/abs/1907.05019 (sampling with a temperature).
    """

    batches: Literal["alternating", "mixed"] = "alternating"
    temperature: float = 1.0
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.batches not in ("alternating", "mixed"):
            raise ValueError(f"batches must be 'alternating' or 'mixed', not {self.batches!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        if self.weights is not None and self.temperature != 1:
            raise ValueError(f"give weights or a temperature, not both: weights take the place of sizes, got {self}")
        for task, weight in (self.weights or {}).items():
            if not 0 < weight < math.inf:
                raise ValueError(f"the weight of task {task!r} must be positive and finite, not {weight}")

    def shares(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Each task's share p_t of an epoch, from the sizes of all data sets.

        Raises:
            ValueError: a task without a weight, or a weight without a task.

        >>> Mixing(temperature=2).shares({"a": 900, "b": 100})
        {'a': 0.75, 'b': 0.25}
        """
        self.check(sizes)
        if self.weights is not None:
            raw = {task: float(self.weights[task]) for task in sizes}
        else:
            raw = {task: size ** (1 / self.temperature) for task, size in sizes.items()}
        total = math.fsum(raw.values())
        return {task: value / total for task, value in raw.items()}

    def check(self, tasks: Mapping[str, Any]) -> None:
        """Raise unless weights, where they are given, are those of these tasks."""
        if self.weights is None:
            return
        for task in self.weights:
            if task not in tasks:
                near = difflib.get_close_matches(task, tasks, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"mixing has a weight for {task!r}; the tasks are: {', '.join(tasks)}{hint}")
        missing = [task for task in tasks if task not in self.weights]
        if missing:
            raise ValueError(f"mixing has no weight for task {missing[0]!r}: give each task one")


class Mixture(dict[str, Source]):
    """Sources by task that take turns as a :class:`Mixing` says; a plain mapping has a batch of each in every step."""

    def __init__(self, sources: Mapping[str, Source], mixing: Mixing):
        super().__init__(sources)
        self.mixing = mixing
        mixing.check(self)

    def only(self, tasks: Any) -> Mixture:
        """The sources of some tasks, with their weights."""
        weights = self.mixing.weights
        kept = None if weights is None else {task: weights[task] for task in tasks}
        mixing = Mixing(batches=self.mixing.batches, temperature=self.mixing.temperature, weights=kept)
        return Mixture({task: self[task] for task in tasks}, mixing)


class Span(NamedTuple):
    """Which positions in the endless row of passes over a source a step takes.

    Attributes:
        first: Of all processes together.
        last: One past the last.
        own_first: Of this process.
        own_last: One past the last.
    """

    first: int
    last: int
    own_first: int
    own_last: int


class Turns:
    """The turns of one epoch: a function of sizes, seed and epoch alone, so that any step can be looked up.

    Args:
        mixing: who gets how much.
        sizes: task -> examples.
        batch_size: examples a step and process.
        world: number of processes.
        seed: of the order.
        epoch: number of the epoch.

    Raises:
        ValueError: a task's share is so small that the epoch would have nothing of it.
    """

    def __init__(self, mixing: Mixing, sizes: Mapping[str, int], batch_size: int, world: int, seed: int, epoch: int):
        self.epoch, self.batch_size, self.world = epoch, batch_size, world
        self.mixed = mixing.batches == "mixed"
        self.steps = turns_per_epoch(sizes, batch_size * world)
        slots = self.steps * batch_size * world if self.mixed else self.steps
        counts = quotas(mixing.shares(sizes), slots)
        for task, count in counts.items():
            if not count:
                raise ValueError(
                    f"task {task!r} would get none of an epoch's {slots} {'examples' if self.mixed else 'steps'}: "
                    "give it a larger weight, or raise the temperature"
                )
        owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(list(counts.values())))
        generator = torch.Generator().manual_seed(seed_of(seed, "turns", epoch))
        owners = owners[torch.randperm(slots, generator=generator)]
        # How many of the slots before each one are a task's: positions by subtraction, for any step at once
        self.before: dict[str, Tensor] = {
            task: torch.cat([torch.zeros(1, dtype=torch.long), (owners == k).cumsum(0)])
            for k, task in enumerate(counts)
        }

    def span(self, task: str, step: int, rank: int) -> Span | None:
        """What a step takes of a task's source; None if nothing, for this process."""
        before, total = self.before[task], self.batch_size * self.world
        if not self.mixed:
            turn, after = int(before[step]), int(before[step + 1])
            own = turn * total + rank * self.batch_size
            return Span(turn * total, after * total, own, own + self.batch_size) if after > turn else None
        start = step * total + rank * self.batch_size
        first, last = int(before[step * total]), int(before[(step + 1) * total])
        own_first, own_last = int(before[start]), int(before[start + self.batch_size])
        return Span(first, last, own_first, own_last) if own_last > own_first else None


def turns_per_epoch(sizes: Mapping[str, int], total: int) -> int:
    """Steps of an epoch that has as many examples as all data sets together, in full global batches of ``total``."""
    return -(-sum(sizes.values()) // total)


def quotas(shares: Mapping[str, float], slots: int) -> dict[str, int]:
    """Whole numbers that add up to ``slots``, as near to the shares as can be (largest remainders first).

    >>> quotas({"a": 0.5, "b": 0.3, "c": 0.2}, 9)
    {'a': 4, 'b': 3, 'c': 2}
    """
    exact = np.array([share * slots for share in shares.values()])
    counts = np.floor(exact + 1e-9).astype(int)
    for k in np.argsort(counts - exact, kind="stable")[: slots - counts.sum()]:
        counts[k] += 1
    return dict(zip(shares, counts.tolist()))
