"""What a saved patch's folder holds, read and checked, before it becomes part of a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from hubtransfer.backbones import Backbone
from hubtransfer.config import from_dict
from hubtransfer.models import files
from hubtransfer.models.heads import HeadConfig
from hubtransfer.patches import patch_from_dict

logger = logging.getLogger(__name__)
Folder = str | os.PathLike[str]

PATCH, PATCH_TENSORS, HEAD_TENSORS = "patch.json", "patch.safetensors", "head.safetensors"


class SavedPatch(NamedTuple):
    """A patch and its head as they were saved.

    Attributes:
        folder: Where it lies.
        task: The name it was saved under.
        head: The head's config.
        patch: The patch's config.
        tensors: The patch's tensors.
        weights: The head's.
        fingerprint: Of the trunk it was made for.
        made_for: That trunk in words.
    """

    folder: Path
    task: str
    head: HeadConfig | None
    patch: Any
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    fingerprint: str
    made_for: str

    def misfit(self, backbone: Backbone, error: Exception) -> ValueError:
        """The error that says which backbone the patch was made for and which it met."""
        here = describe(backbone.source)
        return ValueError(f"this patch was made for {self.made_for} and does not fit {here}: {error}")

    def check_fingerprint(self, backbone: Backbone, strict: bool = True) -> None:
        """Compares the trunk's weights with those that the patch was made for.

        Raises:
            ValueError: if they differ and `strict`; otherwise a difference is logged.
        """
        own = backbone.fingerprint()
        if own == self.fingerprint:
            return
        message = (
            f"this patch was made for {self.made_for} with other weights (fingerprint {self.fingerprint[:12]}, this "
            f"trunk has {own[:12]})"
        )
        if strict:
            raise ValueError(f"{message}; load the trunk it was made for, or pass strict=False to use it all the same")
        logger.warning("%s; loaded all the same since strict=False", message)


def read_patch(name_or_path: Folder, revision: str | None = None, token: str | None = None) -> SavedPatch:
    """Reads a saved patch from a folder or from the Hub.

    Raises:
        FileNotFoundError: if the folder is not there or holds no patch.
        ValueError: if a file is damaged.
    """
    folder = local_folder(name_or_path, revision, token, [PATCH, PATCH_TENSORS, HEAD_TENSORS])
    manifest = files.read_manifest(folder, PATCH, "patch")
    return SavedPatch(
        folder,
        manifest["task"],
        head_from(manifest["head"], manifest["task"]),
        patch_from(manifest["patch"]),
        files.read_tensors(folder, PATCH_TENSORS, manifest) if manifest["patch"] is not None else {},
        files.read_tensors(folder, HEAD_TENSORS, manifest) if manifest["head"] is not None else {},
        str(manifest["fingerprint"]),
        describe(manifest["source"]),
    )


def local_folder(
    name_or_path: Folder, revision: str | None, token: str | None, patterns: list[str] | None = None
) -> Path:
    """The local folder itself, or the Hub's copy.

    Raises:
        FileNotFoundError: if it is neither a folder nor the name of a repository.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name = os.fspath(name_or_path)
    if path.is_absolute() or path.exists() or name.startswith((".", "~")) or name.count("/") != 1 or "\\" in name:
        raise FileNotFoundError(f"{name!r} is neither a folder nor the name of a repository such as 'me/birds'")
    from hubtransfer.models import hub

    return hub.fetch(name, revision=revision, token=token, allow_patterns=patterns)


def head_from(saved: dict[str, Any] | None, task: str) -> HeadConfig | None:
    """A head's config from its plain form."""
    return None if saved is None else from_dict(HeadConfig, saved, f"the head of task {task!r}")  # type: ignore[type-abstract]


def patch_from(saved: Any) -> Any:
    """A patch's config, or list of configs, from its plain form."""
    return None if saved is None else patch_from_dict(saved)


def describe(source: Mapping[str, Any]) -> str:
    """A backbone in words."""
    return str(source.get("name") or source.get("library"))
