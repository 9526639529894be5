"""From configs to patches, and from configs to JSON and back."""

import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hubtransfer.patches.patch import PATCHES, ComposedPatch, Patch, PatchConfig

if TYPE_CHECKING:
    from hubtransfer.backbones import Backbone


def build_patch(config: Any, backbone: "Backbone") -> Patch:
    """Make a patch for a backbone, which is left as it is.

    Args:
        config: a `PatchConfig`, a config of peft, or a list of them for a composed patch.
        backbone: whose trunk the patch is for.

    Raises:
        TypeError: for anything else.
        ValueError: when the backbone has nothing for such a patch, or two of a list own the same tensor.
    """
    if isinstance(config, Sequence) and not isinstance(config, str):
        if not config:
            raise ValueError("an empty list of patch configs; leave patch=None for a task without a patch.")
        parts: list[Patch] = []
        dim = backbone.dim
        for each in config:
            part = _build_one(each, backbone, dim)
            if part.extra_dim and not part.behind_trunk and any(earlier.behind_trunk for earlier in parts):
                raise ValueError(
                    "a WidenConfig that feeds the head stands before the DeepenConfig in a list of patches."
                )
            parts.append(part)
            dim += parts[-1].extra_dim
        if len(parts) > 1 and any(part.hears is not None for part in parts):
            raise ValueError("a patch that reads other tasks' maps stands alone: give it as patch=..., not in a list.")
        return parts[0] if len(parts) == 1 else ComposedPatch(parts, backbone)
    return _build_one(config, backbone, backbone.dim)


def _build_one(config: Any, backbone: "Backbone", dim: int) -> Patch:
    if isinstance(config, PatchConfig):
        return config.build(backbone, dim)
    if is_of_peft(config):
        from hubtransfer.patches.peft import PeftPatch

        return PeftPatch(config, backbone)
    raise TypeError(
        f"a patch is described by one of {', '.join(c.__name__ for c in PATCHES.values())}, a peft config or a list "
        f"of them, not by {config!r}."
    )


def is_of_peft(config: Any) -> bool:
    """Whether this is a config of peft. While nobody has imported peft, which takes seconds, there is none."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(config, peft.PeftConfig)


def patch_to_dict(config: Any) -> Any:
    """A config as plain JSON values, with its kind; a list of configs as a list."""
    if isinstance(config, Sequence) and not isinstance(config, str):
        return [patch_to_dict(each) for each in config]
    if isinstance(config, PatchConfig):
        return {"kind": config.kind, **{k: _plain(v) for k, v in dataclasses.asdict(config).items()}}
    if is_of_peft(config):
        from hubtransfer.patches.peft import peft_to_dict

        return peft_to_dict(config)
    raise TypeError(f"not a patch config: {config!r}")


def patch_from_dict(data: Any) -> Any:
    """The inverse of `patch_to_dict`; unknown kinds and keys are errors that name the nearest.

    Raises:
        ValueError: for an unknown kind or key.
    """
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [patch_from_dict(each) for each in data]
    if not isinstance(data, Mapping) or "kind" not in data:
        raise ValueError(f"a patch is saved as a mapping with a `kind`, not as {data!r}.")
    kind, values = data["kind"], {k: v for k, v in data.items() if k != "kind"}
    if kind == "peft":
        from hubtransfer.patches.peft import peft_from_dict

        return peft_from_dict(data)
    if kind not in PATCHES:
        raise ValueError(f"unknown patch kind {kind!r}{_nearest(kind, PATCHES)}; there are {', '.join(PATCHES)}, peft.")
    fields = {field.name: field for field in dataclasses.fields(PATCHES[kind])}
    for key in values:
        if key not in fields:
            raise ValueError(f"unknown key {key!r} in a {kind} patch{_nearest(key, fields)}.")
    return PATCHES[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, set, frozenset)) else value


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
