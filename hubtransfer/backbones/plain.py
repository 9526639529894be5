"""The small networks of the papers, which no hub has: a perceptron, LeNet and wide residual networks, by name.

They have no weights to download; they are made from numbers, which is all that a saved model keeps of their structure.
Raw images come out as [0, 1], which is what their papers use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubtransfer.backbones.module import ModuleBackbone
from hubtransfer.backbones.names import suggestion
from hubtransfer.backbones.processor import ImageProcessor
from hubtransfer.config import from_dict

PREFIX = "plain:"


@dataclass(frozen=True, kw_only=True)
class MLP:
    """Linear layers with ReLU: the perceptron of the continual-learning protocols and of Hinton's MNIST table.

    Attributes:
        input_shape: Channels, height and width of the images.
        widths: Units of each hidden layer.
        dropout: Share of the hidden units left out in training.
        input_dropout: Share of the inputs left out in training.
        init: "torch" is torch's own; "xavier" is Xavier uniform with zero biases.
    """

    layers: ClassVar[tuple[str, ...]] = ()

    input_shape: tuple[int, int, int] = (1, 28, 28)
    widths: tuple[int, ...] = (100, 100)
    dropout: float = 0.0
    input_dropout: float = 0.0
    init: Literal["torch", "xavier"] = "torch"

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: For no hidden layer, or a share outside [0, 1).
        """
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must name at least one hidden layer of at least one unit, got {self.widths}")
        for name in ("dropout", "input_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    def build(self) -> nn.Module:
        """Images (batch, channels, height, width) -> (batch, last width)."""
        size = self.input_shape[0] * self.input_shape[1] * self.input_shape[2]
        layers: list[nn.Module] = [nn.Flatten(), *([nn.Dropout(self.input_dropout)] if self.input_dropout else [])]
        for before, width in zip((size, *self.widths), self.widths):
            linear = nn.Linear(before, width)
            if self.init == "xavier":
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU(), *([nn.Dropout(self.dropout)] if self.dropout else [])]
        return nn.Sequential(*layers)


@dataclass(frozen=True, kw_only=True)
class LeNet:
    """Two convolutions of 5 x 5 with pooling and a hidden layer: the shared trunk of Sener and Koltun's MultiMNIST.

    Attributes:
        input_shape: Channels, height and width of the images.
        channels: Of the two convolutions.
        width: Units of the hidden layer.
    """

    layers: ClassVar[tuple[str, ...]] = ("0", "1")

    input_shape: tuple[int, int, int] = (1, 28, 28)
    channels: tuple[int, int] = (10, 20)
    width: int = 50

    def build(self) -> nn.Module:
        """Images (batch, channels, height, width) -> (batch, width)."""
        height, width = ((side - 4) // 2 for side in self.input_shape[1:])
        height, width = ((side - 4) // 2 for side in (height, width))
        if min(height, width) < 1:
            raise ValueError(f"input_shape {self.input_shape} is too small for two convolutions of 5 x 5 with pooling")
        first, second = self.channels
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(self.input_shape[0], first, 5), nn.MaxPool2d(2), nn.ReLU()),
            nn.Sequential(nn.Conv2d(first, second, 5), nn.MaxPool2d(2), nn.ReLU()),
            nn.Flatten(),
            nn.Linear(second * height * width, self.width),
            nn.ReLU(),
        )


@dataclass(frozen=True, kw_only=True)
class WideResNet:
    """The residual network of small images: a convolution and three groups of pre-activation blocks.

    Attributes:
        input_shape: Channels, height and width of the images.
        depth: Layers with weights, 6 n + 4.
        width: Factor k on the groups' channels 16, 32 and 64.
        stride: Of the first convolution; 2 makes everything after it four times cheaper.
        dropout: Share of a block's inner activations left out in training.
    """

    layers: ClassVar[tuple[str, ...]] = ("group1", "group2", "group3")

    input_shape: tuple[int, int, int] = (1, 28, 28)
    depth: int = 16
    width: float = 1
    stride: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Checks depth and stride.

        Raises:
            ValueError: If the depth is not 6 n + 4, or the stride is less than 1.
        """
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}")
        if self.depth < 10 or (self.depth - 4) % 6:
            near = max(10, 6 * round((self.depth - 4) / 6) + 4)
            raise ValueError(
                f"depth must be 6 n + 4, such as 10, 16, 22 or 28; got {self.depth}, the nearest is {near}"
            )

    def build(self) -> nn.Module:
        """Images (batch, channels, height, width) -> maps (batch, 64 k, height / (4 stride), width / (4 stride))."""
        return _WideResNet(self)


class _WideResNet(nn.Module):
    def __init__(self, config: WideResNet) -> None:
        super().__init__()
        blocks = (config.depth - 4) // 6
        widths = [round(channels * config.width) for channels in (16, 32, 64)]
        self.stem = nn.Conv2d(config.input_shape[0], 16, 3, config.stride, padding=1, bias=False)
        groups = []
        for before, channels, stride in zip((16, *widths), widths, (1, 2, 2)):
            first = _Block(before, channels, stride, config.dropout)
            groups.append(
                nn.Sequential(first, *(_Block(channels, channels, 1, config.dropout) for _ in range(blocks - 1)))
            )
        self.group1, self.group2, self.group3 = groups
        self.norm = nn.BatchNorm2d(widths[-1])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.norm(self.group3(self.group2(self.group1(self.stem(images))))))


class _Block(nn.Module):
    """Norm, ReLU, convolution, twice; the shortcut is a convolution of 1 x 1 where sizes differ."""

    def __init__(self, before: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = before == channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(before, channels, 1, stride, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        active = F.relu(self.norm1(images))
        inner = self.conv2(self.dropout(F.relu(self.norm2(self.conv1(active)))))
        return inner + (images if self.shortcut is None else self.shortcut(active))


NETWORKS: dict[str, type[MLP] | type[LeNet] | type[WideResNet]] = {
    "mlp": MLP,
    "lenet": LeNet,
    "wide_resnet": WideResNet,
}


def from_plain(name: str, *, pretrained: bool, kwargs: Mapping[str, Any]) -> ModuleBackbone:
    """Makes a network named `plain:<network>`, with random weights.

    Args:
        name: Such as "plain:mlp".
        pretrained: Must be false: nobody published weights for them.
        kwargs: The network's numbers; `image_size` sets height and width of `input_shape`.

    Raises:
        ValueError: For an unknown network or number, naming the nearest, or with `pretrained`.
    """
    kind = name.removeprefix(PREFIX)
    if kind not in NETWORKS:
        raise ValueError(f"Unknown network {name!r}.{suggestion(kind, NETWORKS)} There are: {', '.join(NETWORKS)}.")
    if pretrained:
        raise ValueError(f"{name!r} has no published weights: pass pretrained=False.")
    options = dict(kwargs)
    size = options.pop("image_size", None)
    if size is not None:
        channels = options.get("input_shape", NETWORKS[kind].input_shape)[0]
        options["input_shape"] = (channels, size, size)
    config = from_dict(NETWORKS[kind], options, where=name)
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    channels, height, width = config.input_shape
    processor = ImageProcessor(
        size=(height, width), mean=(0.0,) * channels, std=(1.0,) * channels, interpolation="bilinear"
    )
    source = {"library": "plain", "name": name, "pretrained": False, "kwargs": plain, "config": plain}
    backbone = ModuleBackbone(config.build(), modality="image", processor=processor, source=source)
    sample = {"pixel_values": ((2, channels, height, width), torch.float32)}
    backbone.survey(sample, layers=config.layers)
    return backbone.eval()


def from_source(source: Mapping[str, Any]) -> ModuleBackbone:
    """See `Backbone.from_source`."""
    return from_plain(str(source["name"]), pretrained=False, kwargs=source["config"])
