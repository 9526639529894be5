"""Backbones from transformers."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from hubtransfer.backbones import names, offline
from hubtransfer.backbones.backbone import Backbone, Inputs
from hubtransfer.backbones.configs import config_facts, independent, is_local, read_config
from hubtransfer.backbones.download import HubError, fetch
from hubtransfer.backbones.probe import Hint
from hubtransfer.backbones.processing import image_processor, sentence_facts, text_processor
from hubtransfer.backbones.processor import ImageProcessor, Processor

logger = logging.getLogger(__name__)

POOLINGS = ("cls", "mean", "pooler", "cls+mean", "last")
# Heads that concatenate the class token and the mean of the patches.
_CLS_AND_MEAN = ("dinov2", "dinov2_with_registers")
# Decoders, whose head reads the last token that is not padding.
_LAST = (
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "opt",
    "bloom",
)


class TransformersBackbone(Backbone):
    """The bare model inside a transformers classifier; pooled is what that classifier's head reads."""

    def __init__(self, trunk: PreTrainedModel, pooling: str | None, *, source: dict[str, Any], processor: Processor):
        config = trunk.config
        modality = "text" if trunk.main_input_name == "input_ids" else "image"
        super().__init__(trunk, modality=modality, processor=processor, source=source)  # type: ignore[arg-type]
        pooler = getattr(trunk, "pooler", None)
        self.pooling = pooling or _usual_pooling(trunk)
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r} is not one of {', '.join(POOLINGS)}.")
        if self.pooling != "pooler" and isinstance(pooler, nn.Module):
            # A pooler nobody reads would hold parameters without gradients.
            trunk.pooler = None  # type: ignore[assignment]
        accepted = inspect.signature(trunk.forward).parameters
        self._accepted = {
            name
            for name in ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "inputs_embeds")
            if name in accepted
        }
        native = getattr(config, "image_size", None)
        size = processor.size if isinstance(processor, ImageProcessor) else None
        self._interpolate = (
            size is not None and native is not None and _pair(native) != size and "interpolate_pos_encoding" in accepted
        )
        shape: tuple[int, ...] = (1, 4)
        hints: dict[str, Hint] = {}
        if size is not None:
            shape = (1, int(getattr(config, "num_channels", 3)), *size)
        kind = torch.long if modality == "text" else torch.float32
        sample = {trunk.main_input_name: (shape, kind)}
        patch = getattr(config, "patch_size", None)
        if isinstance(patch, int) and modality == "image" and not hasattr(config, "depths"):
            hints = {name: Hint(None, patch) for name, _ in trunk.named_modules() if name}
        try:
            self.survey(sample, hints=hints)
        except ValueError:
            if pooling is not None or self.pooling != "pooler":
                raise
            # Some types have the module and give nothing under `pooler_output`.
            self.pooling = "mean"
            self.survey(sample, hints=hints)
        self.eval()

    def run(self, inputs: Inputs) -> Tensor:
        """Inputs -> (batch, dim), pooled as `pooling` says.

        Raises:
            ValueError: For input names that the model does not take.
        """
        if isinstance(inputs, Mapping):
            # Tokenizers make segment ids for models that have none, too.
            named = {key: value for key, value in inputs.items() if key != "token_type_ids" or key in self._accepted}
            unknown = named.keys() - self._accepted
            if unknown:
                raise ValueError(
                    f"{type(self.trunk).__name__} does not take {sorted(unknown)}; it takes {sorted(self._accepted)}."
                )
        else:
            named = {self.trunk.main_input_name: inputs}  # type: ignore[dict-item]
        extra = {"interpolate_pos_encoding": True} if self._interpolate else {}
        output = self.trunk(**named, **extra, return_dict=True)
        if self.pooling == "pooler":
            return output.pooler_output.flatten(1)
        hidden = output.last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.modality == "text":
            mask = named.get("attention_mask")
            if mask is None:
                mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            if self.pooling == "last":
                places = torch.arange(mask.shape[1], device=mask.device)
                return hidden[torch.arange(len(hidden), device=hidden.device), (mask * places).argmax(1)]
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        if hidden.dim() == 4:
            return hidden.mean((2, 3))
        patches = hidden[:, self._front :].mean(1)
        return patches if self.pooling == "mean" else torch.cat([hidden[:, 0], patches], 1)

    @property
    def _front(self) -> int:
        """Class and register tokens at the front of the last hidden state."""
        config = self.trunk.config
        if hasattr(config, "num_register_tokens"):
            return 1 + int(config.num_register_tokens)  # type: ignore[arg-type]
        embeddings = getattr(self.trunk, "embeddings", None)
        return sum(getattr(embeddings, name, None) is not None for name in ("cls_token", "distillation_token"))


def from_transformers(
    name: str, *, pretrained: bool, trust_remote_code: bool, revision: str | None, kwargs: Mapping[str, Any]
) -> Backbone:
    """See `Backbone.from_pretrained`."""
    options = dict(kwargs)
    pooling, image_size = options.pop("pooling", None), options.pop("image_size", None)
    max_length = options.pop("max_length", None)
    place, notice = _place(name, pretrained, revision)
    facts: dict[str, Any] = {}
    if place is None:
        model_type, changes = names.KNOWN_CHECKPOINTS.get(name, (name, {}))
        facts = {"model_type": model_type, **changes}
    else:
        facts = json.loads(Path(_file(place, "config.json", revision)).read_text(encoding="utf-8"))
        if "architecture" in facts and "model_type" not in facts:
            from hubtransfer.backbones import timm

            return timm.from_timm(f"hf-hub:{name}", pretrained=pretrained, revision=revision, kwargs=kwargs)
    if image_size is not None and not pretrained:
        # Published position embeddings keep their own size and are interpolated; random ones are made to measure.
        options["image_size"] = image_size
    config = read_config(name if place is None else place, facts, options, trust_remote_code, revision)
    if pretrained and place is not None:
        trunk = _load(place, config, pooling, trust_remote_code, revision)
        if notice:
            logger.warning("%s", notice)
    else:
        trunk = _build(config, pooling, trust_remote_code)
    if pooling is None and trunk.main_input_name == "input_ids":
        pooling = _sentence_pooling(name, place, revision)
    processor: Processor
    if trunk.main_input_name == "input_ids":
        processor = text_processor(place, config, trust_remote_code, revision, max_length)
    elif max_length is None:
        processor = image_processor(place, config, image_size, revision)
    else:
        raise ValueError(f"max_length={max_length!r}: {name!r} reads images, not texts.")
    source = {"library": "transformers", "name": name, "pretrained": pretrained, "kwargs": {**kwargs}}
    source["config"] = config.to_diff_dict()
    if revision is not None:
        source["revision"] = revision
    return _wrap(trunk, pooling, source, processor)


def from_source(source: Mapping[str, Any], *, trust_remote_code: bool) -> Backbone:
    """See `Backbone.from_source`."""
    facts = dict(source["config"])
    if facts.get("auto_map"):
        if not trust_remote_code:
            raise ValueError(
                f"The structure of {source['name']!r} comes from that repository's own code: read it, then pass "
                "trust_remote_code=True."
            )
        config = AutoConfig.from_pretrained(source["name"], trust_remote_code=True, revision=source.get("revision"))
    elif facts.get("model_type") in transformers.CONFIG_MAPPING:
        config = transformers.CONFIG_MAPPING[facts["model_type"]](**independent(facts))
    else:
        near = names.suggestion(str(facts.get("model_type")), names.transformers_types())
        raise ValueError(
            f"transformers {transformers.__version__} has no model type {facts.get('model_type')!r}.{near}"
        )
    trunk = _build(config, source.get("pooling"), trust_remote_code)
    processor: Processor
    if trunk.main_input_name == "input_ids":
        processor = text_processor(None, config, False, None, source.get("kwargs", {}).get("max_length"))
    else:
        processor = image_processor(None, config, source.get("kwargs", {}).get("image_size"), None)
    return _wrap(trunk, source.get("pooling"), dict(source), processor)


def adopt(module: nn.Module) -> Backbone | None:
    """Wrap a transformers model, a classifier's bare model inside; None if it is another module."""
    if not isinstance(module, PreTrainedModel):
        return None
    trunk: Any = _bare(module)
    pooling = None
    kind = _classifier(trunk.config)
    if trunk is module and kind is not None and isinstance(getattr(trunk, "pooler", None), nn.Module):
        # A bare model carries a pooler even where its type's classifier reads the class token.
        with torch.device("meta"):
            pooling = _usual_pooling(kind._from_config(trunk.config).base_model)
    processor: Processor
    if trunk.main_input_name == "input_ids":
        processor = text_processor(None, trunk.config, False, None)
    else:
        processor = image_processor(None, trunk.config, None, None)
    name = trunk.config.name_or_path or trunk.config.model_type
    source = {"library": "transformers", "name": name, "kwargs": {}, "config": config_facts(trunk.config)}
    return _wrap(trunk, pooling, source, processor)


def _wrap(
    trunk: PreTrainedModel, pooling: str | None, source: dict[str, Any], processor: Processor
) -> TransformersBackbone:
    backbone = TransformersBackbone(trunk, pooling, source=source, processor=processor)
    source["pooling"] = backbone.pooling
    return backbone


def _place(name: str, pretrained: bool, revision: str | None) -> tuple[str | None, str | None]:
    """Where the files of a model are: a folder or an id; None when its structure is known without any file."""
    if Path(name).is_dir():
        return name, None
    if not pretrained and (name in names.KNOWN_CHECKPOINTS or "/" not in name):
        return None, None
    try:
        fetch(name, "config.json", revision=revision)
    except HubError as error:
        packaged = offline.TRANSFORMERS_FOLDERS.get(name)
        found = None if packaged is None else packaged()
        if found is not None:
            return str(found[1]), f"{name}: no answer from the Hub, so weights from the installed package {found[0]}"
        near = "" if name in names.KNOWN_CHECKPOINTS else names.suggestion(name, names.KNOWN_CHECKPOINTS, n=3)
        raise type(error)(f"{error}{near}") from error
    return name, None


def _file(place: str, filename: str, revision: str | None) -> str:
    path = Path(place)
    return str(path / filename) if path.is_dir() else fetch(place, filename, revision=revision)


def _classifier(config: PretrainedConfig, pooling: str | None = None) -> type[PreTrainedModel] | None:
    """The class whose bare model is the trunk; it knows whether its head reads a pooler."""
    heads = (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
    for table in (*heads, MODEL_MAPPING):
        if type(config) not in table:
            continue
        found = table[type(config)]
        kind: Any = found[0] if isinstance(found, (tuple, list)) else found
        if pooling == "pooler" and table is not MODEL_MAPPING:
            # A pooler that is asked for is in the plain model, even where the type's classifier reads none.
            with torch.device("meta"):
                if getattr(kind._from_config(config).base_model, "pooler", ...) is None:
                    continue
        return kind
    return None


def _bare(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head; a model that has none is left whole."""
    if isinstance(model, MODEL_MAPPING.get(type(model.config), ())):  # type: ignore[arg-type]
        return model
    trunk: Any = model.base_model
    if trunk is model and any(isinstance(getattr(model, name, None), nn.Linear) for name in ("classifier", "score")):
        raise ValueError(
            f"{type(model).__name__} has no bare model inside that takes images or texts alone. timm has the image "
            "towers of CLIP and SigLIP: 'vit_base_patch16_clip_224', 'vit_base_patch16_siglip_224' and others."
        )
    return trunk


def _remote(config: PretrainedConfig) -> Any:
    kinds = getattr(config, "auto_map", None) or {}
    return next((getattr(transformers, kind) for kind in kinds if kind.startswith("AutoModel")), transformers.AutoModel)


def _build(config: PretrainedConfig, pooling: str | None, trust_remote_code: bool) -> PreTrainedModel:
    kind = _classifier(config, pooling)
    if kind is None:
        return _bare(_remote(config).from_config(config, trust_remote_code=trust_remote_code))
    return _bare(kind._from_config(config, dtype=torch.float32))


def _load(
    place: str, config: PretrainedConfig, pooling: str | None, trust_remote_code: bool, revision: str | None
) -> PreTrainedModel:
    kind = _classifier(config, pooling)
    extra: dict[str, Any] = {"trust_remote_code": trust_remote_code} if kind is None else {}
    # The head that is made here and thrown away would be announced as not initialised.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        loader: Any = kind or _remote(config)
        model, report = loader.from_pretrained(
            place,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            revision=revision or "main",
            local_files_only=is_local(place),
            **extra,
        )
    except OSError as error:
        raise ValueError(f"{place!r} has no weights as safetensors, the only format that is read: {error}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    trunk = _bare(model)
    prefix = f"{model.base_model_prefix}." if trunk is not model else ""
    lost = sorted(key for key in report["missing_keys"] if key.startswith(prefix))
    absent = [key for key in lost if not key.startswith(f"{prefix}pooler.")]
    if absent:
        raise ValueError(
            f"The weights of {place!r} lack {len(absent)} tensors of the trunk: {', '.join(absent[:5])} ..."
        )
    if lost:
        logger.warning(
            "%s: the pooler is not among the weights and starts random; pooling='cls' or 'mean' needs none", place
        )
    return trunk


def _usual_pooling(trunk: PreTrainedModel) -> str:
    """What the sequence or image classifier of this model type reads."""
    kind = trunk.config.model_type
    if kind in _CLS_AND_MEAN:
        return "cls+mean"
    if kind in _LAST:
        return "last"
    stated = getattr(trunk.config, "classifier_pooling", None)  # ModernBERT
    if stated in POOLINGS:
        return stated
    if isinstance(getattr(trunk, "pooler", None), nn.Module) or kind in ("convnext", "convnextv2", "mobilevit", "cvt"):
        return "pooler"
    tokens = any(hasattr(getattr(trunk, "embeddings", None), name) for name in ("cls_token", "word_embeddings"))
    return "cls" if tokens or trunk.main_input_name == "input_ids" else "mean"


def _sentence_pooling(name: str, place: str | None, revision: str | None) -> str | None:
    """The pooling that a sentence-transformers repository states; None where it states none."""
    if place is None:
        return "mean" if name.startswith("sentence-transformers/") else None
    stated = sentence_facts(place, "1_Pooling/config.json", revision)
    return "mean" if stated.get("pooling_mode_mean_tokens") else "cls" if stated.get("pooling_mode_cls_token") else None


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
