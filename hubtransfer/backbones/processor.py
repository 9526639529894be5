"""From raw images and texts to the inputs of a backbone."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FILE = "processor.json"
INTERPOLATIONS = ("bilinear", "bicubic", "nearest")


class Processor(ABC):
    """Calls as `processor(raw) -> dict of tensors`, the keyword arguments of the model."""

    kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type[Processor]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Processor._kinds[cls.kind] = cls

    @abstractmethod
    def __call__(self, raw: Any) -> dict[str, Tensor]:
        """Process a batch."""

    def is_elementwise(self, raw: Tensor) -> bool:
        """Whether each value of `raw` becomes one value: then processing again costs no more than keeping results."""
        return False

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """JSON facts; a tokenizer is not among them (see `save`)."""

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Processor:
        """The counterpart of `to_dict`.

        Raises:
            ValueError: If the facts name no known kind, or hold a key that the kind does not have.
        """
        facts = dict(facts)
        kind = facts.pop("kind", None)
        if kind not in Processor._kinds:
            raise ValueError(f"Unknown kind of processor {kind!r}; valid: {', '.join(Processor._kinds)}.")
        try:
            return Processor._kinds[kind](**facts)
        except TypeError as error:
            raise ValueError(f"These are not the facts of a {kind} processor: {facts} ({error}).") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `processor.json`, and the tokenizer's files if there is one, into the folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Processor:
        """The counterpart of `save`.

        Raises:
            ValueError: If the folder holds no `processor.json`.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise ValueError(f"There is no {FILE} in {os.fspath(folder)!r}.")
        processor = Processor.from_dict(json.loads(path.read_text(encoding="utf-8")))
        if isinstance(processor, TextProcessor):
            processor = replace(processor, tokenizer=read_tokenizer(folder))
        return processor


@dataclass(frozen=True, kw_only=True)
class ImageProcessor(Processor):
    """Resize, crop to the centre, scale to [0, 1], standardise.

    Attributes:
        size: Height and width of the result.
        mean: Per channel, subtracted from pixels in [0, 1]; its length is the number of channels.
        std: Per channel, divided by.
        interpolation: "bilinear", "bicubic" or "nearest"; the first two are antialiased, as in PIL.
        crop_pct: The image is resized to `size / crop_pct` before the crop.
        crop_mode: "center" keeps the aspect ratio (the short side is fitted, the long one cropped), "squash" does not,
            "border" fits the long side and pads with the mean colour.
        resize: False leaves the size alone.
        rescale: Factor from raw to [0, 1] pixels.
    """

    kind: ClassVar[str] = "image"

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    resize: bool = True
    rescale: float = 1 / 255

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", (self.size, self.size) if isinstance(self.size, int) else tuple(self.size))
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation={self.interpolation!r} is not one of {', '.join(INTERPOLATIONS)}.")
        if self.crop_mode not in ("center", "squash", "border"):
            raise ValueError(f"crop_mode={self.crop_mode!r} is not one of center, squash, border.")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std has {len(self.std)}.")

    def __call__(self, raw: Any) -> dict[str, Tensor]:
        """Process a batch of images.

        Args:
            raw: A uint8 tensor or array (n, h, w), (n, h, w, c) or (n, c, h, w), handled as one batch; a list of PIL
                images, arrays or tensors, of which those of one size are handled together; a float tensor
                (n, c, height, width), which counts as processed.

        Returns:
            `pixel_values`, float32 (n, c, height, width).

        Raises:
            TypeError: For another dtype, or things that are not images.
            ValueError: For another shape.
        """
        if isinstance(raw, Mapping):
            raise TypeError(f"Expected images, got a mapping with the keys {sorted(raw)}; pass one of its columns.")
        if isinstance(raw, np.ndarray):
            raw = torch.from_numpy(np.ascontiguousarray(raw))
        if isinstance(raw, Tensor):
            if raw.is_floating_point():
                return {"pixel_values": self._checked(raw)}
            return {"pixel_values": self._process(_as_batch(raw))}
        items = [raw] if hasattr(raw, "convert") else list(raw)
        images = [self._as_tensor(image) for image in items]
        if not images:
            return {"pixel_values": torch.empty(0, len(self.mean), *self.size)}
        if all(image.is_floating_point() for image in images):
            if len({image.shape for image in images}) > 1:
                raise ValueError(
                    f"Float images count as processed, but differ in shape: {sorted({tuple(i.shape) for i in images})}."
                )
            return {"pixel_values": self._checked(torch.stack(images))}
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for number, image in enumerate(images):
            by_shape.setdefault(tuple(image.shape), []).append(number)
        if len(by_shape) == 1:
            return {"pixel_values": self._process(_as_batch(torch.stack(images)))}
        parts = [self._process(_as_batch(torch.stack([images[i] for i in rows]))) for rows in by_shape.values()]
        order = torch.tensor([i for rows in by_shape.values() for i in rows])
        return {"pixel_values": torch.cat(parts)[order.argsort()]}

    def is_elementwise(self, raw: Tensor) -> bool:
        """Whether images have the right size already, so that they are only scaled."""
        if raw.is_floating_point():
            return True
        height, width = _as_batch(raw).shape[-2:]
        return not self.resize or ((height, width) == self.size and self.crop_pct == 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON facts."""
        facts = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"kind": self.kind, **facts}

    def _as_tensor(self, image: Any) -> Tensor:
        if hasattr(image, "convert"):  # PIL
            image = image.convert("L" if len(self.mean) == 1 else "RGB")
            return torch.from_numpy(np.array(image))
        if isinstance(image, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(image))
        if isinstance(image, Tensor):
            return image
        if isinstance(image, (list, tuple)):  # what `datasets` makes of an array column
            return torch.as_tensor(np.asarray(image, dtype=np.uint8))
        raise TypeError(
            f"Expected PIL images, uint8 arrays or tensors, got {type(image).__name__}: {str(image)[:60]!r}."
        )

    def _checked(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != len(self.mean):
            raise ValueError(
                f"Float images count as processed and must be (n, {len(self.mean)}, height, width), got "
                f"{tuple(images.shape)}. Pass raw images as uint8."
            )
        return images

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor]:
        std = torch.tensor(self.std)
        return torch.tensor(self.rescale) / std, torch.tensor(self.mean) / std

    def _process(self, images: Tensor) -> Tensor:
        """(n, c, h, w) uint8 -> (n, channels, height, width) float32."""
        channels = len(self.mean)
        if images.shape[1] == 4 and channels == 3:
            images = images[:, :3]
        if images.shape[1] not in (1, channels):
            raise ValueError(f"Images with {images.shape[1]} channels, but the backbone takes {channels}.")
        if self.resize:
            images = self._fitted(images)
        scale, shift = (value.to(images.device) for value in self._affine)
        if images.shape[1] != channels:  # greyscale becomes as many equal channels as there are means
            images = images.expand(-1, channels, -1, -1)
        scaled = images.float()
        if scaled is images:
            scaled = images.clone()
        scaled *= float(scale[0]) if len(set(self.std)) == 1 else scale[:, None, None]
        if any(self.mean):
            scaled -= shift[:, None, None]
        return scaled

    def _fitted(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        target = [math.floor(side / self.crop_pct) for side in self.size]
        if self.crop_mode == "squash":
            new = (target[0], target[1])
        else:
            ratios = [target[0] / height, target[1] / width]
            by_height = (min if self.crop_mode == "border" else max)(ratios) == ratios[0]
            # As torchvision does: the fitted side is exact, the other one is cut down to whole pixels.
            if by_height:
                new = (target[0], max(1, int(target[0] * width / height)))
            else:
                new = (max(1, int(target[1] * height / width)), target[1])
        if new != (height, width):
            images = self._resized(images, new)
        return self._cropped(images)

    def _resized(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        if self.interpolation == "nearest":
            return F.interpolate(images.float(), size, mode="nearest-exact").to(images.dtype)
        if images.device.type == "cpu":  # uint8 arithmetic there is PIL's
            return F.interpolate(images, size, mode=self.interpolation, antialias=True, align_corners=False)
        resized = F.interpolate(images.float(), size, mode=self.interpolation, antialias=True, align_corners=False)
        return resized.round_().clamp_(0, 255).to(images.dtype)

    def _cropped(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        missing = [max(0, self.size[0] - height), max(0, self.size[1] - width)]
        if any(missing):
            before = [pad // 2 for pad in missing]
            full = (images.shape[0], images.shape[1], height + missing[0], width + missing[1])
            colour = torch.tensor([round(255 * value) for value in self.mean], dtype=images.dtype, device=images.device)
            if self.crop_mode != "border":
                colour = torch.zeros_like(colour)
            elif images.shape[1] == 1:
                full = (full[0], len(self.mean), *full[2:])
            canvas = colour[: full[1], None, None].expand(full).contiguous()
            canvas[..., before[0] : before[0] + height, before[1] : before[1] + width] = images
            images, (height, width) = canvas, (canvas.shape[-2], canvas.shape[-1])
        top, left = round((height - self.size[0]) / 2), round((width - self.size[1]) / 2)
        return images[..., top : top + self.size[0], left : left + self.size[1]]


@dataclass(frozen=True, kw_only=True)
class TextProcessor(Processor):
    """A tokenizer with a longest length.

    Attributes:
        max_length: Texts are cut to this many tokens; None takes any length.
        tokenizer: Of transformers; None until it is given or loaded.
    """

    kind: ClassVar[str] = "text"

    max_length: int | None = None
    tokenizer: Any = field(default=None, repr=False, compare=False)

    def __call__(self, raw: str | Sequence[str] | Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        """Tokenise a batch of texts, or of pairs of texts.

        Returns:
            `input_ids`, `attention_mask` (and `token_type_ids` where the tokenizer makes them), int64 (n, longest).

        Raises:
            TypeError: For things that are not texts.
            ValueError: If there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "This backbone came without a tokenizer: set `backbone.processor = TextProcessor(tokenizer=..., "
                "max_length=...)` with any transformers tokenizer, or pass input_ids yourself."
            )
        texts = [raw] if isinstance(raw, str) else list(raw)
        wrong = next((text for text in texts if not _is_text(text)), None)
        if wrong is not None:
            raise TypeError(f"Expected texts or pairs of texts, got {type(wrong).__name__}: {str(wrong)[:60]!r}.")
        encoded = self.tokenizer(
            [text if isinstance(text, str) else tuple(text) for text in texts],
            padding=True,
            truncation=self.max_length is not None,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return dict(encoded)

    def to_dict(self) -> dict[str, Any]:
        """JSON facts, without the tokenizer."""
        return {"kind": self.kind, "max_length": self.max_length}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `processor.json` and the tokenizer's files."""
        super().save(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True, kw_only=True)
class TensorProcessor(Processor):
    """For plain modules: arrays become float tensors and are otherwise left alone.

    Attributes:
        mean: Subtracted from every value.
        std: Every value is divided by it.
    """

    kind: ClassVar[str] = "tensor"

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, raw: Any) -> dict[str, Tensor]:
        """Arrays, tensors or lists of either -> `pixel_values`, floats with the same shape.

        Arrays become float32 (numpy's float64 is nobody's choice); a torch float64 tensor stays one.
        """
        if isinstance(raw, (list, tuple)) and raw and isinstance(raw[0], Tensor):
            raw = torch.stack(list(raw))
        own = not (isinstance(raw, Tensor) and raw.is_floating_point())
        tensor = torch.as_tensor(raw if isinstance(raw, Tensor) else np.asarray(raw)).float() if own else raw
        if self.mean:
            tensor = tensor - self.mean
        if self.std != 1.0:
            tensor = tensor / self.std
        return {"pixel_values": tensor}

    def is_elementwise(self, raw: Tensor) -> bool:
        """Always."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """JSON facts."""
        return {"kind": self.kind, "mean": self.mean, "std": self.std}


def read_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer in a folder, or None if there is none. Never runs a repository's own code."""
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "vocab.json",
        "spiece.model",
        "sentencepiece.bpe.model",
    )
    if not any((Path(folder) / name).is_file() for name in names):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True, trust_remote_code=False)


def _as_batch(images: Tensor) -> Tensor:
    """Raw images of one size -> (n, c, h, w)."""
    if images.dtype != torch.uint8:
        raise TypeError(f"Raw images are uint8 and processed ones float, got {images.dtype}.")
    if images.dim() == 3 and images.shape[-1] not in (3, 4):
        return images[:, None]
    if images.dim() == 4:
        if images.shape[1] in (1, 3):
            return images
        if images.shape[-1] in (1, 3, 4):
            return images.permute(0, 3, 1, 2)
    raise ValueError(
        f"Raw images of shape {tuple(images.shape)}: expected (n, h, w), (n, h, w, c) or (n, c, h, w) with 1 or 3 "
        "channels. A single image goes into a list."
    )


def _is_text(text: Any) -> bool:
    pair = isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(part, str) for part in text)
    return isinstance(text, str) or pair
