"""Depthwise patches: a task's own depthwise convolutions, or new ones beside the trunk's layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hubtransfer.patches.gather import Gather, Owned, lent, plain_forward, stacked
from hubtransfer.patches.patch import Patch, PatchConfig
from hubtransfer.patches.places import chosen
from hubtransfer.patches.stand_in import StandIn

if TYPE_CHECKING:
    from hubtransfer.backbones import Backbone


def is_depthwise(module: nn.Module) -> bool:
    """A convolution with one filter (or several) for each input channel alone."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels > 1


@dataclass(frozen=True, kw_only=True)
class DepthwiseConfig(PatchConfig):
    """A task's own copies of the depthwise convolutions.

    y_c = k_c * x_c for each channel c with the task's own filters k (c, 1, h, w); they start as copies of the
    trunk's. With ``insert=True``, for trunks that have none, y = f(x) + k * f(x) after each chosen layer f with k = 0
    at first, so the function starts exactly unchanged.

    Source: Mudrakarta, Sandler, Zhmoginov, Howard 2019, "K for the Price of 1", section 3 (DW patch).
    Differs from the paper: inserting is ours; the paper patches MobileNetV2, which has depthwise convolutions.

    Attributes:
        layers: regular expression over whole module names of the trunk. None: all depthwise convolutions; when
            inserting, after every layer that the backbone offers maps of.
        insert: add new depthwise convolutions instead of owning copies.
        kernel_size: of the inserted ones, odd.
    """

    kind: ClassVar[str] = "depthwise"
    paper: ClassVar[str] = "Mudrakarta 2019"
    summary: ClassVar[str] = "a task's own depthwise convolutions (or inserted ones that start at zero)"
    citation: ClassVar[str] = """@inproceedings{mudrakarta2019k,
  title={K for the Price of 1: Parameter-efficient Multi-task and Transfer Learning},
  author={Mudrakarta, Pramod Kaushik and Sandler, Mark and Zhmoginov, Andrey and Howard, Andrew},
  booktitle={International Conference on Learning Representations}, year={2019}}"""

    layers: str | None = None
    insert: bool = False
    kernel_size: int = 3

    def __post_init__(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd, so that maps keep their size.")

    def build(self, backbone: "Backbone", dim: int | None = None) -> "DepthwisePatch":
        """Copy the trunk's depthwise filters into a new patch, or make inserted ones."""
        return DepthwisePatch(self, backbone)


class DepthwisePatch(Patch):
    """See `DepthwiseConfig`."""

    config: DepthwiseConfig

    def __init__(self, config: DepthwiseConfig, backbone: "Backbone"):
        super().__init__(config, backbone)
        if config.insert:
            self._insert(backbone)
            return
        for name, module in chosen(backbone.trunk, config.layers):
            if is_depthwise(module):
                self._own_tensors(name, module)
        if not self._bindings:
            raise ValueError(_nothing_found(backbone, config.layers))

    def gathered(self) -> Mapping[str, Owned] | None:
        """Every depthwise convolution; inserted ones are layers of their own, which are not gathered."""
        return None if self.config.insert else self._owned_layers(lambda module: DEPTHWISE)

    def _insert(self, backbone: "Backbone") -> None:
        if backbone.modality == "text":
            raise ValueError(
                "inserted depthwise convolutions need maps of an image; over the words of a text they would mix in the "
                "padding. Use ScaleBiasConfig() or a peft config such as LoraConfig()."
            )
        names = {name for name, _ in chosen(backbone.trunk, self.config.layers)}
        layers = [layer for layer in backbone.layers if layer.name in names]
        if not layers:
            offered = ", ".join(layer.name for layer in backbone.layers)
            raise ValueError(f"layers={self.config.layers!r} matches no layer that gives maps: {offered}.")
        like = next(iter(backbone.trunk.parameters()))
        for layer in layers:
            module = InsertedDepthwise(layer.channels, self.config.kernel_size, layer.kind == "tokens", layer.prefix)
            self._stand_in(layer.name, module.to(like))


class DepthwiseGather(Gather):
    """One grouped convolution for all examples, which become channels: (b, c, h, w) is one example of b c channels."""

    def rows(self, module: nn.Module, owners: Sequence[nn.Module]) -> Tensor:
        """Filters and, where the layer has them, biases: (owners, numbers)."""
        return torch.cat([part for key in module._parameters if (part := stacked(owners, key)) is not None], 1)

    def run(self, module: nn.Module, rows: Tensor, x: Tensor) -> Tensor:
        """(batch, c, h, w) -> (batch, c times the filters a channel, ...)."""
        assert isinstance(module, _ConvNd)
        rows = rows.to(module.weight.dtype)
        weight = rows[:, : module.weight.numel()].reshape(-1, *module.weight.shape[1:])
        bias = None if module.bias is None else rows[:, module.weight.numel() :].reshape(-1)
        as_channels = x if len(rows) == 1 else x.reshape(1, -1, *x.shape[2:])
        with lent(module, _parameters={"weight": weight, "bias": bias}, groups=len(rows) * module.groups):
            out = plain_forward(module, as_channels)
        return out.reshape(len(x), -1, *out.shape[2:])


DEPTHWISE = DepthwiseGather()


class InsertedDepthwise(StandIn):
    """y = f(x) + k * f(x), f the trunk's layer: maps (b, c, h, w) or (b, h, w, c), or tokens (b, n, c) on a square."""

    def __init__(self, channels: int, kernel_size: int, tokens: bool, prefix: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False)
        nn.init.zeros_(self.conv.weight)
        self.tokens = tokens
        self.prefix = prefix

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The trunk's layer and the residual on its (first) output."""
        output = self.base_layer(*args, **kwargs)
        if isinstance(output, tuple):
            return (self._residual(output[0]), *output[1:])
        return self._residual(output)

    def _residual(self, x: Tensor) -> Tensor:
        if self.tokens and x.dim() == 3:
            kept, tokens = x[:, : self.prefix], x[:, self.prefix :]
            side = round(tokens.shape[1] ** 0.5)
            if side * side != tokens.shape[1]:
                raise ValueError(
                    f"{tokens.shape[1]} tokens do not lie on a square; choose other layers to insert after."
                )
            maps = tokens.transpose(1, 2).unflatten(2, (side, side))
            return torch.cat([kept, tokens + self.conv(maps).flatten(2).transpose(1, 2)], dim=1)
        if x.shape[1] == self.conv.in_channels:
            return x + self.conv(x)
        return x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _nothing_found(backbone: "Backbone", layers: str | None) -> str:
    found = [name for name, module in backbone.trunk.named_modules() if is_depthwise(module)]
    if found:
        return f"layers={layers!r} matches none of the {len(found)} depthwise convolutions: {', '.join(found[:4])}, ..."
    inserted = "" if backbone.modality == "text" else "DepthwiseConfig(insert=True), "
    return (
        f"{type(backbone.trunk).__name__} has no depthwise convolution. Use {inserted}ScaleBiasConfig(), "
        "a peft config such as LoraConfig(), or a backbone that has some (timm/mobilenetv2_100, "
        "timm/mobilenetv3_small_100, timm/tf_efficientnet_lite0, timm/convnext_tiny)."
    )
