"""What a transformers repository says about its inputs, as our own processors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig

from hubtransfer.backbones.download import NoSuchFile, fetch, offline
from hubtransfer.backbones.processor import ImageProcessor, TextProcessor, read_tokenizer

# PIL's numbers for ways of resampling.
_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}


def image_processor(
    place: str | None, config: PretrainedConfig, image_size: int | tuple[int, int] | None, revision: str | None
) -> ImageProcessor:
    """The numbers of a repository's image processor; those of ImageNet where it has none.

    Args:
        place: Folder or id; None reads no file.
        config: Of the model; its `image_size` counts where no file states a size.
        image_size: Overrides the size.
        revision: Of the repository.
    """
    facts = _image_facts(place, revision)
    size = facts.get("size") or getattr(config, "image_size", None) or 224
    crop = facts.get("crop_size") if facts.get("do_center_crop") else None
    crop_pct, crop_mode = 1.0, "center"
    if isinstance(size, Mapping) and "shortest_edge" in size:
        edge = int(size["shortest_edge"])
        if crop is not None:
            final = _pair(crop)
            # The trifle keeps floor(final / crop_pct) from falling one pixel short.
            crop_pct = final[0] / (edge + 1e-6)
        else:
            final = (edge, edge)
            if "crop_pct" in facts:  # ConvNeXt: crops below 384 pixels, squashes from there on
                crop_pct, crop_mode = (float(facts["crop_pct"]), "center") if edge < 384 else (1.0, "squash")
    else:
        final, crop_mode = _pair(size), "squash"
        if crop is not None:
            crop_pct, final = _pair(crop)[0] / (final[0] + 1e-6), _pair(crop)
    channels = int(getattr(config, "num_channels", 3))
    usual = ((0.5,) * 3, (0.5,) * 3) if config.model_type == "vit" else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    mean, std = tuple(facts.get("image_mean") or usual[0]), tuple(facts.get("image_std") or usual[1])
    if facts.get("do_normalize") is False:
        mean, std = (0.0,) * channels, (1.0,) * channels
    if len(mean) != channels:
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return ImageProcessor(
        size=_pair(image_size) if image_size is not None else final,
        mean=mean,
        std=std,
        interpolation=_RESAMPLE.get(int(facts.get("resample", 2)), "bicubic"),
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        resize=facts.get("do_resize", True),
        rescale=float(facts.get("rescale_factor") or 1 / 255) if facts.get("do_rescale", True) else 1.0,
    )


def text_processor(
    place: str | None,
    config: PretrainedConfig,
    trust_remote_code: bool,
    revision: str | None,
    max_length: int | None = None,
) -> TextProcessor:
    """A repository's tokenizer, cut to the longest text that the model takes, or to `max_length` tokens.

    Raises:
        ValueError: If the model takes no text of that length.
    """
    tokenizer = None
    if place is not None and Path(place).is_dir():
        tokenizer = read_tokenizer(place)
    elif place is not None:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                place, revision=revision or "main", trust_remote_code=trust_remote_code, local_files_only=offline()
            )
        except (OSError, ValueError):
            # A repository of weights alone: the processor says so when it is called.
            tokenizer = None
    limits = [int(getattr(config, "max_position_embeddings", 0) or 0)]
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        limits[0] -= 2  # their position numbers start after the padding's
    if tokenizer is not None and tokenizer.model_max_length < 10**9:
        limits.append(int(tokenizer.model_max_length))
    if place is not None:
        limits.append(int(sentence_facts(place, "sentence_bert_config.json", revision).get("max_seq_length") or 0))
    known = [limit for limit in limits if limit > 0]
    longest = min(known) if known else None
    if max_length is not None and not 1 <= max_length <= (longest or max_length):
        raise ValueError(f"max_length={max_length}: the model takes texts of 1 to {longest or 'any number of'} tokens.")
    return TextProcessor(tokenizer=tokenizer, max_length=max_length or longest)


def sentence_facts(place: str, filename: str, revision: str | None) -> dict[str, Any]:
    """A JSON file that sentence-transformers adds to a model; empty where there is none."""
    path = Path(place) / filename
    if not Path(place).is_dir():
        if not place.startswith("sentence-transformers/"):
            return {}
        try:
            path = Path(fetch(place, filename, revision=revision))
        except NoSuchFile:
            return {}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _image_facts(place: str | None, revision: str | None) -> dict[str, Any]:
    if place is None:
        return {}
    if Path(place).is_dir():
        if not any((Path(place) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
            return {}
    else:
        try:
            fetch(place, "preprocessor_config.json", revision=revision)
        except NoSuchFile:
            return {}
    reader = transformers.AutoImageProcessor.from_pretrained(
        os.fspath(place),
        revision=revision or "main",
        trust_remote_code=False,
        local_files_only=Path(place).is_dir() or offline(),
    )
    return {key: value for key, value in reader.to_dict().items() if value is not None}


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        if "height" in size:
            return int(size["height"]), int(size["width"])
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    return (int(size), int(size)) if isinstance(size, (int, float)) else (int(size[0]), int(size[1]))
