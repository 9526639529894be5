"""Which examples, and what is made of them: deterministic splits, subsets, sizes and overlapping digits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from hubtransfer.data.seeds import seed_of
from hubtransfer.functional.missing import MISSING_CLASS


def stratified(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of two parts, ``share`` of every class in the first; both in ascending order.

    Args:
        labels: class numbers ``(n,)``.
        share: between 0 and 1.
        seed: of the choice.
    """
    first = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        generator = torch.Generator().manual_seed(seed_of("split", seed, label))
        count = max(1, min(round(share * len(rows)), len(rows) - 1))  # both parts know every class, if that can be
        chosen = torch.randperm(len(rows), generator=generator)[:count]
        first[rows[chosen]] = True
    return first.nonzero().flatten(), (~first).nonzero().flatten()


def resize(pixels: Tensor, size: int) -> Tensor:
    """Images ``(n, h, w)`` or ``(n, h, w, c)``, uint8, at another size; bilinear, antialiased when smaller."""
    channels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    made = torch.cat(
        [
            interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round().clamp(0, 255).byte()
            for part in channels.split(4096)
        ]
    )
    return made[:, 0] if pixels.ndim == 3 else made.permute(0, 2, 3, 1).contiguous()


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Two digits on one image: 36 x 36 pixels, the second 6 lower and to the right, the lighter pixel wins, 28 x 28.

    Source: https://arxiv.org/abs/1810.04650, section 5.1, and the authors' loader (nearest pixel).

    Args:
        first: upper left digits, uint8 ``(n, 28, 28)``.
        second: lower right digits, likewise.
    """
    canvas = torch.zeros(len(first), 36, 36, dtype=torch.uint8)
    canvas[:, :28, :28] = first
    canvas[:, 6:34, 6:34] = torch.maximum(canvas[:, 6:34, 6:34], second)
    nearest = ((torch.arange(28) + 0.5) * (36 / 28)).long()
    return canvas[:, nearest][:, :, nearest]


def evenly(labels: Tensor, limit: int, seed: int) -> Tensor:
    """``limit`` rows, as evenly over classes as they allow: each class in random order, dealt in turns."""
    turn, tie = torch.empty(len(labels)), torch.empty(len(labels))
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        generator = torch.Generator().manual_seed(seed_of("limit", seed, label))
        turn[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)).float()
        tie[rows] = torch.rand(1, generator=generator)
    order = np.lexsort((tie.numpy(), turn.numpy()))
    return torch.from_numpy(np.sort(order[:limit]))


def keep_labels(labels: Tensor, count: int, seed: int) -> Tensor:
    """The same labels, all but ``count`` of them missing: of class numbers evenly many of each class stay.

    Args:
        labels: class numbers ``(n,)``, -100 where missing then; or real values ``(n, ...)``, NaN where missing then.
        count: how many examples keep their label.
        seed: of the choice.

    Raises:
        ValueError: there are not as many.
    """
    if not 1 <= count <= len(labels):
        raise ValueError(f"of {len(labels)} labels 1 to {len(labels)} can be kept, not {count}")
    real = labels.is_floating_point()
    groups = torch.zeros(len(labels), dtype=torch.long) if real or labels.ndim > 1 else labels
    kept = torch.full_like(labels, float("nan") if real else MISSING_CLASS)
    rows = evenly(groups, count, seed)
    kept[rows] = labels[rows]
    return kept
