"""What holds a head's weights and applies them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubtransfer.backbones import LayerInfo


class LinearHead(nn.Linear):
    """A linear layer with dropout in front: (batch, dim) -> (batch, width)."""

    def __init__(self, dim: int, width: int, dropout: float = 0.0) -> None:
        super().__init__(dim, width)
        self.dropout = dropout

    def forward(self, pooled: Tensor) -> Tensor:
        """Maps pooled features (batch, dim) to logits (batch, width)."""
        return super().forward(F.dropout(pooled, self.dropout, self.training) if self.dropout else pooled)

    def resized(self, dim: int, width: int, zero_init: bool = False) -> LinearHead:
        """Returns a larger head with the same logits so far: new inputs count nothing yet, new outputs start afresh."""
        new = LinearHead(dim, width, self.dropout).to(self.weight)
        with torch.no_grad():
            if zero_init:
                new.weight.zero_()
                new.bias.zero_()
            new.weight[: self.out_features, self.in_features :] = 0
            new.weight[: self.out_features, : self.in_features] = self.weight
            new.bias[: self.out_features] = self.bias
        return new


class PixelHead(nn.Conv2d):
    """A 1x1 convolution on one layer's map, enlarged to the size of the input."""

    def __init__(self, layer: LayerInfo, width: int) -> None:
        super().__init__(layer.channels, width, 1)
        self.layer = layer

    def grid(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Folds patch tokens (b, prefix + h * w, d) to a map (b, d, h, w), without the prefix tokens."""
        tokens = tokens[:, self.layer.prefix :]
        height, width = (round(side / self.layer.reduction) for side in size)
        if height * width != tokens.shape[1]:
            raise ValueError(
                f"layer {self.layer.name!r} gives {tokens.shape[1]} patch tokens, which do not fill the grid "
                f"{height} x {width} of an input {size[0]} x {size[1]} (one token for {self.layer.reduction} pixels); "
                "resize the images to a multiple of that."
            )
        return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """Maps (b, c, h, w), or tokens (b, n, c), to logits (b, classes, *size) by bilinear interpolation."""
        maps = self.grid(features, size) if self.layer.kind == "tokens" else features
        return F.interpolate(super().forward(maps), size=size, mode="bilinear", align_corners=False)
