"""Random numbers that depend on where one is, not on what ran before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_of(*parts: Any) -> int:
    """A seed that depends on every part and nothing else (Python's ``hash`` differs from process to process)."""
    return int.from_bytes(sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def row_bytes(seed: int, rows: Tensor, count: int) -> Tensor:
    """Random bytes for each of some rows, from the seed and the row's number alone: rows can be had in any order.

    Word k of row i is the output of SplitMix64 number ``i * words + k``, eight bytes a word, the lowest first.

    Source: Steele, Lea, Flood 2014, https://doi.org/10.1145/2660193.2660195, with the constants of Java's
    ``SplittableRandom``.

    Args:
        seed: state of the generator before its first output.
        rows: row numbers, int64 ``(n,)``.
        count: bytes for each row.

    Returns:
        uint8 ``(n, count)``, uniform on 0 ... 255.

    >>> row_bytes(0, torch.tensor([1, 0]), 2).tolist()  # of 0x6e789e6aa1b965f4 and 0xe220a8397b1dcdaf
    [[244, 101], [175, 205]]
    """
    words = -(-count // 8)
    number = rows.numpy().astype(np.uint64)[:, None] * np.uint64(words) + np.arange(1, words + 1, dtype=np.uint64)
    z: Any = np.uint64(seed % 2**64) + number * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return torch.from_numpy(z.astype("<u8", copy=False).view(np.uint8)[:, :count])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run somebody's random transforms under a seed of ours; outside, no generator has moved."""
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)
