"""Models in which every task has a network of its own, stitched to the others or not."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hubtransfer.backbones import Backbone, Towers
from hubtransfer.backbones.towers import check_alike
from hubtransfer.models.growth import register_growth
from hubtransfer.models.heads import LinearHead

if TYPE_CHECKING:
    from hubtransfer.models.model import TransferModel


@register_growth("towers")
def grow_towers(
    model: TransferModel,
    tasks: Sequence[str],
    layers: Sequence[str] = (),
    members: int = 1,
    same: float = 0.9,
    different: float = 0.1,
    sources: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Gives each task networks of its own in place of the one trunk; see `hubtransfer.backbones.Towers`.

    Linear heads that are there already are replaced by wider ones where `members` is more than one.

    Args:
        model: Changed in place; a model with such towers already stays as it is.
        tasks: Names of the tasks.
        layers: After which layers cross-stitch units stand.
        members: Networks a task.
        same: A unit's alpha for the network itself at first.
        different: For all other networks together.
        sources: What each network is made from, where they are not copies of the model's trunk (`Backbone.source`).

    Raises:
        ValueError: if there is nothing to stitch, or layers differ in shape.
    """
    owners = tuple(task for task in tasks for _ in range(members))
    there = model.backbone
    if isinstance(there, Towers):
        if (there.tasks, there.stitched) != (owners, tuple(layers)):
            raise ValueError(
                f"the trunk has towers for tasks {there.tasks}, stitched after {there.stitched}; these would be "
                f"{owners} and {tuple(layers)}"
            )
        return
    if sources is not None and len(sources) != len(owners):
        raise ValueError(f"{len(owners)} networks need as many sources, got {len(sources)}")
    made = [there, *(copy.deepcopy(there) for _ in owners[1:])]
    if sources is not None:
        made = [one if source == there.source else Backbone.from_source(source) for one, source in zip(made, sources)]
    like = next(there.parameters(), torch.zeros(()))
    model.backbone = Towers([one.to(like) for one in made], owners, layers, same, different)
    for name in model.heads if members > 1 else ():
        old = model.heads[name]
        if not isinstance(old, LinearHead):
            raise ValueError(f"task {name!r}: several networks a task need a head on pooled features")
        model.heads[name] = LinearHead(model.backbone.dim, old.out_features, old.dropout).to(like)


def stitched_model(
    models: Mapping[str, TransferModel], layers: Sequence[str] | None = None, same: float = 0.9, different: float = 0.1
) -> TransferModel:
    """Makes one model out of single-task ones: their networks side by side, with cross-stitch units in between.

    Args:
        models: Task -> the model that has its network and head; it is copied. Networks may differ as long as the
            stitched layers have equal names and shapes.
        layers: After which layers units stand; by default after all of `Backbone.layers`.
        same: A unit's alpha for the network itself at first.
        different: For all other networks together.

    Raises:
        ValueError: if a model has no such task or has a patch for it, or layers differ in shape.
    """
    from hubtransfer.models.model import TransferModel

    for task, one in models.items():
        one.task_name(task)
        if task in one.patches:
            raise ValueError(f"task {task!r} has a patch: stitch networks without patches")
    backbones = [one.backbone for one in models.values()]
    chosen = [info.name for info in backbones[0].layers] if layers is None else list(layers)
    check_alike(backbones, list(models), chosen)
    sources = None
    if any(one.source != backbones[0].source for one in backbones):
        sources = [one.source for one in backbones]
    made = TransferModel(copy.deepcopy(backbones[0]))
    made.grow("towers", tasks=list(models), layers=chosen, same=same, different=different, sources=sources)
    towers = made.backbone.trunk.towers
    for tower, (task, one) in zip(towers, models.items()):  # type: ignore[arg-type]
        tower.load_state_dict(one.backbone.state_dict())
        made.add_task(task, one.tasks[task].head)
        if task in one.heads:
            made.heads[task].load_state_dict(one.heads[task].state_dict())
    return made.eval()
