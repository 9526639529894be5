"""Progressive networks: what the columns before a task's own compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hubtransfer.config import unknown_name
from hubtransfer.patches import Patch

if TYPE_CHECKING:
    from hubtransfer.models.heads import Inputs
    from hubtransfer.models.switching import Switching


def earlier_maps(model: Switching, patch: Patch, inputs: Inputs) -> list[Mapping[str, Tensor]]:
    """Returns the maps that a column hears: of the trunk, then of each task it names, each of which runs once.

    A named column hears the trunk and those named before it, as it did when it was made.

    Raises:
        ValueError: if a task it hears is not there, has no column, or was made to hear others.
    """
    with model.placed(None):
        maps: list[Mapping[str, Tensor]] = [model.backbone(inputs, patch.places).maps]
    for number, name in enumerate(patch.hears or ()):
        earlier: Any = model.patches._modules.get(name)
        if earlier is None or earlier.hears is None:
            known = [task for task, each in model.patches.items() if each.hears is not None]
            raise ValueError(unknown_name("column", name, known, "the model, one of whose tasks hears it,"))
        if earlier.hears != (patch.hears or ())[:number] or not set(earlier.places) <= set(patch.places):
            raise ValueError(
                f"the column of task {name!r} hears {', '.join(earlier.hears) or 'the trunk alone'} at "
                f"{', '.join(earlier.places)}; a column that hears it has to name the same tasks before it, in the "
                "same order, and to listen at those layers"
            )
        with earlier.hearing(maps[: number + 1]), model.placed(name):
            maps.append(model.backbone(inputs, patch.places).maps)
    return maps
