"""The head of a model card: what the Hub searches, filters and shows of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

SPLITS = frozenset({"train", "test", "validation", "evaluation", "source", "target", "stream"})

# the Hub's name for a task by what goes in and what the head is for; pairs that are missing have none there
PIPELINES = {
    ("image", "classification"): "image-classification",
    ("image", "multi_label"): "image-classification",
    ("image", "dense"): "image-segmentation",
    ("image", None): "image-feature-extraction",
    ("text", "classification"): "text-classification",
    ("text", "multi_label"): "text-classification",
    ("text", "regression"): "text-classification",
    ("text", "dense"): "token-classification",
    ("text", None): "feature-extraction",
    ("tensor", "classification"): "tabular-classification",
    ("tensor", "multi_label"): "tabular-classification",
    ("tensor", "regression"): "tabular-regression",
}


def metadata(
    model: Any,
    run: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    tasks: Mapping[str, Any],
    *,
    name: str,
    license: str | None,
    patch_only: bool,
) -> ModelCardData:
    """The card's head, which the Hub searches and shows."""
    pipelines = {key: _pipeline(model, spec) for key, spec in tasks.items()}
    base = base_model(model)
    patched = [spec for spec in tasks.values() if patch_configs(spec)]
    adapter = patch_only or (bool(tasks) and len(patched) == len(tasks))
    named = [*(run.get("data") or {}), *(row["dataset"] for row in results)]
    results = [row for row in results if all(map(math.isfinite, row["values"]))]  # the Hub takes no NaN
    methods = [run["method"]["name"]] if run.get("method", {}).get("name") else []
    return ModelCardData(
        library_name="hubtransfer",
        license=license,
        base_model=base,
        base_model_relation=None if base is None else "adapter" if adapter else "finetune",
        pipeline_tag=next(iter(pipelines.values())) if tasks else PIPELINES.get((model.backbone.modality, None)),
        datasets=unique(key for key in named if _is_repo_id(key) and key not in SPLITS) or None,
        metrics=unique(row["metric"] for row in results) or None,
        tags=unique(["transfer-learning", *methods, *(c for spec in patched for c in map(_kind, patch_configs(spec)))]),
        model_name=title_of(name) if results else None,
        eval_results=[
            EvalResult(
                task_type=pipelines.get(row.get("task", "")) or "other",
                task_name=row.get("task"),
                dataset_type=row["dataset"],
                dataset_name=row["dataset"],
                dataset_split=row.get("split"),
                metric_type=row["metric"],
                metric_name=f"{row['metric']} (mean of {len(row['values'])} seeds)"
                if row["values"][1:]
                else row["metric"],
                metric_value=round(fmean(row["values"]), 6),
            )
            for row in results
        ]
        or None,
    )


def base_model(model: Any) -> str | None:
    """The Hub name of the weights a model started from; None for random weights, own modules and local folders."""
    source = model.backbone.source
    if source.get("library") not in ("timm", "transformers") or not source.get("pretrained"):
        return None
    exact = (getattr(model.backbone.trunk, "pretrained_cfg", None) or {}).get("hf_hub_id")  # with timm's weight tag
    name = exact or source["name"].removeprefix("hf-hub:").removeprefix("hf_hub:")
    return name if "/" in name and _is_repo_id(name) and not Path(name).exists() else None


def _pipeline(model: Any, spec: Any) -> str | None:
    return PIPELINES.get((model.backbone.modality, getattr(spec.head, "predicts", None)))


def patch_configs(spec: Any) -> list[Any]:
    """A task's patch configs, none, one or several."""
    patch = getattr(spec, "patch", None)
    return list(patch) if isinstance(patch, list | tuple) else [] if patch is None else [patch]


def _kind(config: Any) -> str:
    return (
        str(getattr(config, "kind", None) or getattr(config, "peft_type", type(config).__name__)).split(".")[-1].lower()
    )


def title_of(name: str) -> str:
    """A repository's or folder's own name."""
    return name.rstrip("/").split("/")[-1]


def unique(items: Iterable[str]) -> list[str]:
    """Each item once, in the order they came."""
    return list(dict.fromkeys(items))


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
