"""Augmentation of whole batches, after processing.

It works on processed (standardised) images: what the loader keeps of each example then serves every epoch, and
geometry is the same before and after standardisation. Random numbers are drawn on the CPU for all processes' rows of a
step, so neither the device nor the number of processes changes what an example becomes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, one_hot

from hubtransfer.data.batch import Batch

IGNORED = -100
"""Label of pixels that come from outside the image."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random flips, shifts and small affine maps, drawn anew for each image. Maps of labels move with their images.

    Args:
        flip: probability of a horizontal flip.
        shift: largest shift, as a share of the side (a crop of the padded image); whole pixels.
        rotate: largest rotation, degrees.
        scale: largest relative change of size, 0.1: between 0.9 and 1.1.
        shear: largest horizontal shear, degrees.
        fill: what comes from outside: ``"zero"`` (the mean colour of standardised images) or ``"edge"``.
        variants: stores the augmentation: each image has so many variants, which epochs take in turn, so that what
            a teacher or a frozen trunk says of them is computed once and kept. None: drawn anew in each epoch.
    """

    flip: float = 0.5
    shift: float = 0.125
    rotate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    fill: Literal["zero", "edge"] = "zero"
    variants: int | None = None

    def __post_init__(self) -> None:
        for name in ("flip", "shift", "scale"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name == "scale" and value == 1):
                raise ValueError(f"{name} must be a share between 0 and 1, not {value}")
        for name in ("rotate", "shear"):
            if not 0 <= getattr(self, name) < 90 + 90 * (name == "rotate"):
                raise ValueError(f"{name} must be an angle in degrees, not {getattr(self, name)}")
        if self.fill not in ("zero", "edge"):
            raise ValueError(f"fill must be 'zero' or 'edge', not {self.fill!r}")
        if self.variants is not None and self.variants < 1:
            raise ValueError(f"variants must be at least 1, or None to draw anew in each epoch, not {self.variants}")

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with its images moved."""
        return self.apply(batch, self.draw(len(batch), generator))

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random numbers for ``count`` images: ``flip`` in [0, 1), the others in [-1, 1), each ``(count,)``."""
        names = ("flip", "across", "down", "rotate", "scale", "shear")
        drawn = dict(zip(names, torch.rand(len(names), count, generator=generator)))
        return {name: value if name == "flip" else 2 * value - 1 for name, value in drawn.items()}

    def apply(self, batch: Batch, drawn: dict[str, Tensor]) -> Batch:
        """Move each image as its random numbers say.

        Raises:
            ValueError: the batch has no images ``(batch, channels, height, width)``.
        """
        images = batch.inputs.get("pixel_values")
        if images is None or images.ndim != 4 or not images.is_floating_point():
            found = {k: f"{tuple(v.shape)} {v.dtype}" for k, v in batch.inputs.items()}
            raise ValueError(f"Augment needs images, float pixel_values (batch, channels, height, width), not {found}")
        height, width = images.shape[-2:]

        def move(value: Tensor) -> Tensor:
            if value is images:
                return self._move(value, drawn, fill=0.0)
            if value.ndim == 3 and value.shape[1:] == (height, width):
                return self._move(value[:, None], drawn, fill=IGNORED)[:, 0]
            return value

        return batch.map(move)

    def _move(self, images: Tensor, drawn: dict[str, Tensor], fill: float) -> Tensor:
        if self.flip or self.shift:
            images = self._flip_and_shift(images, drawn, fill)
        if self.rotate or self.scale or self.shear:
            images = self._affine(images, drawn, fill)
        return images

    def _flip_and_shift(self, images: Tensor, drawn: dict[str, Tensor], fill: float) -> Tensor:
        """By index, so that pixels stay exactly what they were."""
        (count, channels, height, width), device = images.shape, images.device
        down = (drawn["down"] * math.floor(self.shift * height + 0.5)).round().long().to(device)
        across = (drawn["across"] * math.floor(self.shift * width + 0.5)).round().long().to(device)
        rows = torch.arange(height, device=device) + down[:, None]
        columns = torch.arange(width, device=device) + across[:, None]
        mirrored = (drawn["flip"] < self.flip).to(device)[:, None]
        columns = torch.where(mirrored, width - 1 - columns, columns)
        place = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
        place = place.view(count, 1, -1).expand(count, channels, -1)
        moved = images.reshape(count, channels, -1).gather(2, place).view_as(images)
        if self.fill == "edge":
            return moved
        kept = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        return moved.masked_fill_(~kept[:, None], fill)

    def _affine(self, images: Tensor, drawn: dict[str, Tensor], fill: float) -> Tensor:
        """By interpolation around the centre: bilinear for images, nearest for labels."""
        angle = (drawn["rotate"] * math.radians(self.rotate)).to(images.device)
        size = (1 + drawn["scale"] * self.scale).to(images.device)
        slant = torch.tan(drawn["shear"] * math.radians(self.shear)).to(images.device)
        ratio = images.shape[-1] / images.shape[-2]  # a rotation in pixels, though grids run from -1 to 1 either way
        cos, sin, zero = angle.cos() / size, angle.sin() / size, torch.zeros_like(angle)
        first = torch.stack([cos, (slant * cos - sin) / ratio, zero], dim=1)
        second = torch.stack([sin * ratio, slant * sin + cos, zero], dim=1)
        labels = not images.is_floating_point()
        values = images.double() if labels else images
        grid = affine_grid(
            torch.stack([first, second], dim=1).to(values.dtype), list(images.shape), align_corners=False
        )
        mode, padding = ("nearest" if labels else "bilinear"), ("border" if self.fill == "edge" else "zeros")
        moved = grid_sample(values - fill, grid, mode=mode, padding_mode=padding, align_corners=False) + fill
        return moved.to(images.dtype)


@dataclass(frozen=True, kw_only=True)
class MixUp:
    """Mixes neighbours of a batch, images and labels alike; labels become shares ``(batch, classes)``.

    ``x = lambda x_i + (1 - lambda) x_j``, ``y = lambda y_i + (1 - lambda) y_j``, ``lambda ~ Beta(alpha, alpha)``.

    Args:
        alpha: strength; 1: any mixture is as likely.
        num_classes: width of the labels; None: one more than the largest label of the training set.

    Source: https://arxiv.org/abs/1710.09412, equation 1.

    Differs from the paper: lambda is drawn for each example, not for each batch; the partner of an example is its
    neighbour in the (already random) order, so that batches split evenly over processes mix the same way.
    """

    alpha: float = 0.2
    num_classes: int | None = None

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, not {self.alpha}")
        if self.num_classes is not None and self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, not {self.num_classes}")

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch, mixed."""
        return self.apply(batch, self.draw(len(batch), generator))

    def for_labels(self, labels: Any) -> MixUp:
        """Itself with ``num_classes`` known, from all labels of a data set where it was not given."""
        if self.num_classes is not None or not isinstance(labels, Tensor) or labels.is_floating_point():
            return self
        return MixUp(alpha=self.alpha, num_classes=max(2, int(labels.max()) + 1))

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Share ``(count,)`` that each example keeps of itself."""
        from scipy.special import betaincinv  # takes longer to import than most runs do to start

        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        return {"kept": torch.from_numpy(betaincinv(self.alpha, self.alpha, uniform.numpy())).float()}

    def apply(self, batch: Batch, drawn: dict[str, Tensor]) -> Batch:
        """Mix as the random numbers say; the odd one out of a batch stays as it is.

        Raises:
            ValueError: no images, no class labels, or the number of classes is not known.
        """
        images, labels = batch.inputs.get("pixel_values"), batch.labels
        if images is None or not images.is_floating_point():
            raise ValueError(f"MixUp needs float pixel_values, not {', '.join(batch.inputs)}")
        if (
            not isinstance(labels, Tensor)
            or labels.ndim not in (1, 2)
            or (labels.ndim == 1) == labels.is_floating_point()
        ):
            raise ValueError("MixUp needs one class number, or shares of classes, for each example")
        if labels.ndim == 1:
            if self.num_classes is None:
                raise ValueError("MixUp does not know the number of classes here: give it num_classes")
            if int(labels.max()) >= self.num_classes:
                raise ValueError(f"label {int(labels.max())} is out of range for num_classes = {self.num_classes}")
            if int(labels.min()) < 0:
                raise ValueError("MixUp cannot mix an example without a label: leave those out, or MixUp")
            labels = one_hot(labels, self.num_classes)
        partner = torch.arange(len(images)) ^ 1
        alone = partner >= len(images)
        partner, kept = torch.where(alone, partner ^ 1, partner), torch.where(alone, 1.0, drawn["kept"])

        def mix(value: Tensor) -> Tensor:
            share = kept.to(value).reshape(-1, *[1] * (value.ndim - 1))
            return share * value + (1 - share) * value[partner.to(value.device)]

        return batch.replace(inputs={**batch.inputs, "pixel_values": mix(images)}, labels=mix(labels.to(images.dtype)))
