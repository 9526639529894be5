"""Patches: the few tensors in which one task differs from the shared trunk; apply and revert are exact."""

from typing import TYPE_CHECKING, Any

from hubtransfer.patches.build import build_patch, patch_from_dict, patch_to_dict
from hubtransfer.patches.column import ColumnConfig, ColumnPatch
from hubtransfer.patches.deepen import DeepenConfig
from hubtransfer.patches.depthwise import DepthwiseConfig
from hubtransfer.patches.earlier_units import EarlierUnitsConfig
from hubtransfer.patches.gather import Gather, Layout, Owned, gathered, gathering_fails, packed
from hubtransfer.patches.patch import PATCHES, ComposedPatch, Patch, PatchConfig, applied
from hubtransfer.patches.places import Slot, checkpointing_is_on
from hubtransfer.patches.registry import patches
from hubtransfer.patches.scale_bias import ScaleBiasConfig
from hubtransfer.patches.split import SplitConfig
from hubtransfer.patches.training_mode import train_where_it_learns
from hubtransfer.patches.widen import WidenConfig

if TYPE_CHECKING:
    from hubtransfer.patches.export import export_peft


def __getattr__(name: str) -> Any:
    """`export_peft` imports peft, which takes seconds, when it is asked for."""
    if name == "export_peft":
        from hubtransfer.patches.export import export_peft

        return export_peft
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "PATCHES",
    "ColumnConfig",
    "ColumnPatch",
    "ComposedPatch",
    "DeepenConfig",
    "DepthwiseConfig",
    "EarlierUnitsConfig",
    "Gather",
    "Layout",
    "Owned",
    "Patch",
    "PatchConfig",
    "ScaleBiasConfig",
    "Slot",
    "SplitConfig",
    "WidenConfig",
    "applied",
    "build_patch",
    "checkpointing_is_on",
    "export_peft",
    "gathered",
    "gathering_fails",
    "packed",
    "patch_from_dict",
    "patch_to_dict",
    "patches",
    "train_where_it_learns",
]
