"""Heads: what a task reads from the backbone, what its labels may be, and its plain loss.

A head is a frozen config (1:1 with YAML and `config.json`); `build` makes the module that holds its weights. Labels are
checked twice: `check` reads all of them before any work starts, `loss` makes sure of what costs nothing on each batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from hubtransfer.backbones import Backbone, Features, LayerInfo
from hubtransfer.functional.missing import (
    MISSING_CLASS,
    VOID_PIXEL,
    known_classes,
    known_flags,
    known_pixels,
    known_values,
)
from hubtransfer.models.head_modules import LinearHead, PixelHead
from hubtransfer.models.labels import outside, refuse, require_integers, require_shape

Inputs = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class HeadConfig(ABC):
    """What every head has; a subclass names its `kind`, which is how files refer to it."""

    kind: ClassVar[str]
    labels: ClassVar[tuple[str, ...] | None] = None
    zero_init: ClassVar[bool] = False
    dropout: ClassVar[float] = 0.0

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of outputs."""

    @property
    def predicts(self) -> str:
        """The kind of what it predicts, which decides how it is measured: for one of another form, the plain kind."""
        cls = type(self)
        return next(c for c in reversed(cls.mro()) if issubclass(c, HeadConfig) and "kind" in c.__dict__).kind

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the task's plain loss, a scalar."""

    @abstractmethod
    def check(self, labels: Tensor) -> None:
        """Raises ValueError unless every label can be learned; the message holds the offending value."""

    @staticmethod
    @abstractmethod
    def known(labels: Tensor) -> Tensor:
        """Says which labels are known, true or false for each; the others are masked in loss and metrics."""

    def __post_init__(self) -> None:
        if not isinstance(self.width, int) or self.width < 1:
            raise ValueError(f"{type(self).__name__} needs at least one output, got {self.width!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.labels is not None:
            object.__setattr__(self, "labels", tuple(self.labels))
            if len(self.labels) != self.width:
                raise ValueError(f"{len(self.labels)} label names were given for {self.width} outputs")

    def layers(self, backbone: Backbone) -> tuple[str, ...]:
        """Names the maps that the head reads; none by default: it reads the pooled features."""
        return ()

    def build(self, backbone: Backbone, dim: int | None = None) -> nn.Module:
        """Makes the module with the head's weights, on the backbone's device and in its precision.

        Args:
            backbone: What the head reads.
            dim: Width of the pooled features where a patch has changed it.
        """
        return self._place(LinearHead(dim or backbone.dim, self.width, self.dropout), backbone)

    def logits(self, module: nn.Module, features: Features, inputs: Inputs | None = None) -> Tensor:
        """Applies the head's module: (batch, width) for heads on pooled features."""
        return module(features.pooled)

    def _place(self, module: LinearHead | PixelHead, backbone: Backbone) -> nn.Module:
        if self.zero_init:
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        like = next((p for p in backbone.trunk.parameters() if p.is_floating_point()), None)
        return module if like is None else module.to(like.device, like.dtype)


@dataclass(frozen=True)
class ClassificationHead(HeadConfig):
    r"""One class out of several: mean cross-entropy.

    .. math:: L = -\frac{1}{|V|} \sum_{i \in V} \sum_c q_{ic} \log \operatorname{softmax}(z_i)_c, \quad
       q_i = (1 - \epsilon)\, y_i + \epsilon / C

    over the examples V that have a label.

    Attributes:
        num_classes: C.
        labels: Names of the classes, for people.
        zero_init: Starts from zero weights, so that every class is equally likely (BiT).
        dropout: Probability of dropping a pooled feature.
        label_smoothing: epsilon, in [0, 1).
    """

    kind: ClassVar[str] = "classification"
    known = staticmethod(known_classes)
    num_classes: int
    _: KW_ONLY
    labels: tuple[str, ...] | None = None  # type: ignore[misc]
    zero_init: bool = False  # type: ignore[misc]
    dropout: float = 0.0  # type: ignore[misc]
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")

    @property
    def width(self) -> int:
        """Number of classes."""
        return self.num_classes

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of logits (b, c).

        Args:
            logits: (b, c).
            labels: Class indices (b,), -100 or -1 where there is none, or probabilities (b, c) (MixUp).

        Raises:
            ValueError: if the labels have another shape or type, or (on the CPU) lie outside the classes.
        """
        self._check_form(labels, len(logits))
        if labels.is_floating_point():
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if labels.device.type == "cpu" and len(labels) and int(labels.min()) >= 0:  # a GPU would have to be waited for
            try:
                return F.cross_entropy(logits, labels.long(), label_smoothing=self.label_smoothing)
            except IndexError:
                self.check(labels)
                raise
        known = known_classes(labels)
        labels = labels.long().masked_fill(~known, MISSING_CLASS)
        try:
            total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        except IndexError:  # a class that does not exist; `check` finds it and says which
            self.check(labels)
            raise
        return total / known.sum().clamp(min=1)

    def check(self, labels: Tensor) -> None:
        """Checks class indices (n,) or probabilities (n, c)."""
        self._check_form(labels, None)
        if labels.is_floating_point():
            refuse(~(labels >= 0), labels, "class probabilities must not be negative or NaN")
            return
        bad = ((labels < 0) | (labels >= self.num_classes)) & known_classes(labels)
        refuse(bad, labels, outside(self.num_classes, MISSING_CLASS))

    def _check_form(self, labels: Tensor, batch: int | None) -> None:
        if labels.is_floating_point():
            what = f"float labels are probabilities of {self.num_classes} classes"
            require_shape(labels, (batch, self.num_classes), what)
            return
        require_integers(labels, f"{self.num_classes} classes")
        require_shape(labels, (batch,), f"a label is one of {self.num_classes} class indices")


@dataclass(frozen=True)
class MultiLabelHead(HeadConfig):
    r"""Any number of labels at once: mean binary cross-entropy over the labels that are known.

    .. math:: L = -\frac{1}{|K|} \sum_{(i, j) \in K} y_{ij} \log \sigma(z_{ij}) + (1 - y_{ij}) \log(1 - \sigma(z_{ij}))

    A label that is NaN or -1 is unknown and counts nowhere.

    Attributes:
        num_labels: Number of labels.
        labels: Their names, for people.
        zero_init: Starts from zero weights.
        dropout: Probability of dropping a pooled feature.
    """

    kind: ClassVar[str] = "multi_label"
    known = staticmethod(known_flags)
    num_labels: int
    _: KW_ONLY
    labels: tuple[str, ...] | None = None  # type: ignore[misc]
    zero_init: bool = False  # type: ignore[misc]
    dropout: float = 0.0  # type: ignore[misc]

    @property
    def width(self) -> int:
        """Number of labels."""
        return self.num_labels

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean binary cross-entropy of logits (b, n) with labels (b, n) in [0, 1], NaN or -1 where unknown.

        Raises:
            ValueError: if the labels have another shape or (on the CPU) lie outside [0, 1].
        """
        if labels.device.type == "cpu":
            self.check(labels, len(logits))
        labels = labels.to(logits.dtype)
        known = known_flags(labels)
        losses = F.binary_cross_entropy_with_logits(
            logits, labels.masked_fill(~known, 0), weight=known.to(logits.dtype), reduction="sum"
        )
        return losses / known.sum().clamp(min=1)

    def check(self, labels: Tensor, batch: int | None = None) -> None:
        """Checks labels (n, num_labels): 0, 1 or a probability; NaN or -1 where unknown."""
        require_shape(labels, (batch, self.num_labels), f"one value for each of {self.num_labels} labels")
        bad = ((labels < 0) & (labels != -1)) | (labels > 1)
        refuse(bad, labels, f"each of the {self.num_labels} labels must be 0, 1 or between, NaN or -1 where unknown")


@dataclass(frozen=True)
class RegressionHead(HeadConfig):
    r"""Numbers: mean squared error over the targets that are known (not NaN).

    .. math:: L = \frac{1}{|K|} \sum_{(i, j) \in K} (z_{ij} - y_{ij})^2

    Attributes:
        num_outputs: Numbers an example.
        labels: Names of the outputs, for people.
        zero_init: Starts from zero weights.
        dropout: Probability of dropping a pooled feature.
    """

    kind: ClassVar[str] = "regression"
    known = staticmethod(known_values)
    num_outputs: int = 1
    _: KW_ONLY
    labels: tuple[str, ...] | None = None  # type: ignore[misc]
    zero_init: bool = False  # type: ignore[misc]
    dropout: float = 0.0  # type: ignore[misc]

    @property
    def width(self) -> int:
        """Number of outputs."""
        return self.num_outputs

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error of logits (b, n) to labels (b, n), or (b,) for one output; NaN where unknown.

        Raises:
            ValueError: if the labels have another shape.
        """
        self._check_form(labels, len(logits))
        labels = labels.to(logits.dtype).reshape(logits.shape)
        known = known_values(labels)
        errors = (logits - labels.masked_fill(~known, 0)) * known
        return errors.square().sum() / known.sum().clamp(min=1)

    def check(self, labels: Tensor) -> None:
        """Checks targets (n,) or (n, num_outputs): finite, or NaN where unknown."""
        self._check_form(labels, None)
        if labels.is_floating_point():
            refuse(labels.isinf(), labels, "targets must be finite, NaN where unknown")

    def _check_form(self, labels: Tensor, batch: int | None) -> None:
        if labels.dim() == 1 and self.num_outputs == 1:
            require_shape(labels, (batch,), "one number an example")
        else:
            require_shape(labels, (batch, self.num_outputs), f"{self.num_outputs} numbers an example")


@dataclass(frozen=True)
class DenseHead(HeadConfig):
    """One class a pixel: cross-entropy of a 1x1 convolution on the deepest map, enlarged to the size of the input.

    Patch tokens are folded to a grid without the prefix tokens. A pixel labelled 255, -100 or -1 counts nowhere.

    Attributes:
        num_classes: Number of classes.
        labels: Their names, for people.
        zero_init: Starts from zero weights.
    """

    kind: ClassVar[str] = "dense"
    known = staticmethod(known_pixels)
    num_classes: int
    _: KW_ONLY
    labels: tuple[str, ...] | None = None  # type: ignore[misc]
    zero_init: bool = False  # type: ignore[misc]

    @property
    def width(self) -> int:
        """Number of classes."""
        return self.num_classes

    def layers(self, backbone: Backbone) -> tuple[str, ...]:
        """The deepest layer."""
        return (self._deepest(backbone).name,)

    def build(self, backbone: Backbone, dim: int | None = None) -> nn.Module:
        """Makes the 1x1 convolution.

        Raises:
            ValueError: if the backbone has no maps of images.
        """
        return self._place(PixelHead(self._deepest(backbone), self.num_classes), backbone)

    def logits(self, module: nn.Module, features: Features, inputs: Inputs | None = None) -> Tensor:
        """Returns logits (b, num_classes, height, width) of the input's size.

        Raises:
            ValueError: if the inputs, whose size they take, or the map are missing.
        """
        image = inputs.get("pixel_values") if isinstance(inputs, Mapping) else inputs
        layer: LayerInfo = module.layer  # type: ignore[assignment]
        if image is None or layer.name not in features.maps:
            raise ValueError(
                f"a dense head needs the inputs and the map of layer {layer.name!r}: call the model itself, or "
                f"logits(model.features(x, layers=[{layer.name!r}]), inputs=x)"
            )
        return module(features.maps[layer.name], tuple(image.shape[-2:]))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of logits (b, c, h, w) with class indices (b, h, w), 255 where there is none.

        Raises:
            ValueError: if the labels have another shape or type, or (on the CPU) lie outside the classes.
        """
        require_integers(labels, f"{self.num_classes} classes")
        require_shape(labels, (len(logits), *logits.shape[-2:]), "one class index a pixel of the input")
        known = known_pixels(labels)
        labels = labels.long().masked_fill(~known, MISSING_CLASS)
        try:
            total = F.cross_entropy(logits, labels, reduction="sum")
        except (IndexError, RuntimeError):
            self.check(labels)
            raise
        return total / known.sum().clamp(min=1)

    def check(self, labels: Tensor) -> None:
        """Checks class indices (n, h, w)."""
        require_integers(labels, f"{self.num_classes} classes")
        require_shape(labels, (None, None, None), "one class index a pixel of the input")
        bad = ((labels < 0) | (labels >= self.num_classes)) & known_pixels(labels)
        refuse(bad, labels, outside(self.num_classes, VOID_PIXEL))

    def _deepest(self, backbone: Backbone) -> LayerInfo:
        if backbone.modality == "text" or not backbone.layers:
            raise ValueError(f"DenseHead labels pixels, but this backbone ({backbone.modality}) has no maps of images")
        return backbone.layers[-1]
