"""One batch with examples of several tasks: one pass of the trunk where patches allow it, each head on its own rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from hubtransfer.backbones import Features
from hubtransfer.patches import Gather, Layout, Owned, Patch, applied, gathered, gathering_fails

if TYPE_CHECKING:
    from hubtransfer.models.heads import HeadConfig, Inputs
    from hubtransfer.models.model import TransferModel

logger = logging.getLogger(__name__)


class Member(NamedTuple):
    """A task of the batch.

    Attributes:
        name: Its name.
        head: Its head's config.
        module: Its head.
        patch: Its patch; none for tasks that use the trunk as it is and for those that come as a row.
        row: Its patch as numbers, (total,), where it comes from a store.
        layout: Which of the row's numbers belong to which layer.
    """

    name: str
    head: HeadConfig | None
    module: nn.Module | None
    patch: Patch | None = None
    row: Tensor | None = None
    layout: Layout | None = None


def run_mixed(
    model: TransferModel, inputs: Inputs, labels: Tensor | None, tasks: Sequence[str], layers: Sequence[str]
) -> tuple[Tensor | None, Tensor | list[Tensor], Features]:
    r"""Runs every example through its own task.

    In evaluation mode the trunk runs once: each example takes its own task's tensors in the layers that patches own.
    Kinds of patches that cannot do this, and all of them in training mode, get a pass for each patch. Tasks without a
    patch share a pass in any case.

    .. math:: L = \sum_t \frac{n_t}{n} L_t

    with n_t of the n examples belonging to task t.

    Args:
        model: The model.
        inputs: A tensor or a mapping of tensors, (batch, ...).
        labels: (batch, ...), or none.
        tasks: One name an example.
        layers: Maps to return.

    Returns:
        The loss (with labels); the logits in the order of the examples, one tensor when all are of one shape and a list
        otherwise; the features in the order of the examples.

    Raises:
        ValueError: if there is no such task or not one name for each example.
    """
    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    if len(tasks) != len(first) or not len(tasks):
        raise ValueError(f"task= names {len(tasks)} tasks for {len(first)} examples; give one name, or one each")
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(tasks):
        rows.setdefault(name, []).append(row)

    order: list[int] = []
    found: list[Features] = []
    logits: list[Tensor] = []
    loss = None
    for members in _passes(model, model.members(rows)):
        own = sorted(row for member in members for row in rows[member.name])
        part = inputs if len(own) == len(tasks) else _take(inputs, own)
        wanted = tuple(dict.fromkeys([*layers, *_read_by_heads(model, members)]))
        with model.turn(), _prepared(model, members, [tasks[row] for row in own], part):
            features = model.backbone(part, wanted)
        place = {row: k for k, row in enumerate(own)}
        for member in members:
            few = _rows_of(model.own_features(features, member.name), [place[row] for row in rows[member.name]])
            found.append(few)
            logits.append(_logits(member, few, part))
            order += rows[member.name]
            if labels is not None:
                known = labels[torch.tensor(rows[member.name], device=labels.device)]
                term = _loss(member, logits[-1], known) * (len(known) / len(tasks))
                loss = term if loss is None else loss + term

    pooled = [few.pooled for few in found]
    whole = _in_order(pooled, order) if _alike(pooled) else pooled[0]
    maps = {name: _in_order([few.maps[name] for few in found], order) for name in layers}
    if _alike(logits):
        return loss, _in_order(logits, order), Features(whole, maps)
    by_example = dict(zip(order, (row for part in logits for row in part)))
    return loss, [by_example[row] for row in range(len(tasks))], Features(whole, maps)


def one_pass_is_possible(model: TransferModel, owned: Mapping[str, Owned | tuple[Gather, slice]]) -> bool:
    """Whether examples with their own tensors in these layers can go through the trunk together; tried once."""
    key = frozenset(owned)
    if key not in model.one_pass:
        with torch.autocast(model.device.type, enabled=False), model.turn():
            reason = gathering_fails(model.backbone, {name: found[0] for name, found in owned.items()})
        model.one_pass[key] = reason is None
        if reason is not None:
            logger.warning("batches of several tasks need a pass of the trunk for each patch: %s", reason)
    return model.one_pass[key]


# ---- passes


def _passes(model: TransferModel, members: Sequence[Member]) -> list[list[Member]]:
    """Which tasks run through the trunk together."""
    shared: list[Member] = []
    plain: list[Member] = []
    alone: list[Member] = []
    for member in members:
        if member.patch is None:
            (plain if member.row is None else shared).append(member)
        else:
            owned = member.patch.gathered() if model.may_gather else None
            fits = owned is not None and one_pass_is_possible(model, owned)
            (shared if fits else alone).append(member)
    if not plain and len(shared) == 1 and shared[0].row is None:
        alone, shared = shared + alone, []  # nothing to share
    together = shared + plain
    return [*([together] if together else []), *([member] for member in alone)]


def _prepared(
    model: TransferModel, members: Sequence[Member], tasks: Sequence[str], inputs: Inputs
) -> AbstractContextManager[None]:
    """While this lasts the trunk computes for these tasks, one name an example."""
    first = members[0]
    if len(members) > 1 or first.row is not None:
        layers = _examples(model, members, tasks)
        if layers:
            return gathered(model.backbone, layers)
    if first.name in model.tasks:
        return model.computing(first.name, inputs)
    return nullcontext() if first.patch is None else applied(first.patch)


def _examples(
    model: TransferModel, members: Sequence[Member], tasks: Sequence[str]
) -> dict[str, tuple[Gather, Tensor]]:
    """Each layer that patches own, with the numbers of each example, (examples, numbers); one row for one task."""
    own: list[Mapping[str, Owned]] = []
    stored: dict[int, list[Member]] = {}  # by layout
    gathers: dict[str, Gather] = {}
    number: dict[str, int] = {}
    for member in members:
        if member.row is None:
            number[member.name] = len(own)
            own.append(member.patch.gathered() or {} if member.patch is not None else {})
            gathers |= {name: owned.gather for name, owned in own[-1].items()}
        elif member.layout is not None:
            stored.setdefault(id(member.layout), []).append(member)
            gathers |= {name: gather for name, (gather, _) in member.layout.items()}
    blocks: list[tuple[Layout, Tensor]] = []
    for group in stored.values():
        start = len(number)
        number |= {member.name: start + k for k, member in enumerate(group)}
        blocks.append((group[0].layout or {}, torch.stack([member.row for member in group if member.row is not None])))
    examples = torch.tensor([number[name] for name in tasks], device=model.device)
    trunk = model.backbone.trunk
    found = {}
    for name, gather in gathers.items():
        module = trunk.get_submodule(name)
        owners = [layers[name].owner if name in layers else module for layers in own]
        parts = [gather.rows(module, owners)] if owners else []
        for layout, rows in blocks:
            if name in layout:
                parts.append(rows[:, layout[name][1]].to(model.device))
            else:
                parts.append(gather.rows(module, [module]).expand(len(rows), -1))
        every = parts[0] if len(parts) == 1 else torch.cat(parts)
        found[name] = (gather, every if len(members) == 1 else every.index_select(0, examples))
    return found


# ---- heads


def _read_by_heads(model: TransferModel, members: Sequence[Member]) -> list[str]:
    return [name for member in members if member.head is not None for name in member.head.layers(model.backbone)]


def _logits(member: Member, features: Features, inputs: Inputs) -> Tensor:
    if member.head is None:
        return features.pooled
    assert member.module is not None
    return member.head.logits(member.module, features, inputs)


def _loss(member: Member, logits: Tensor, labels: Tensor) -> Tensor:
    if member.head is None:
        raise ValueError(f"task {member.name!r} has no head and so no loss")
    try:
        return member.head.loss(logits, labels)
    except ValueError as error:
        raise ValueError(f"task {member.name!r}: {error}") from None


# ---- rows


def _take(values: Inputs, rows: Sequence[int]) -> Inputs:
    if isinstance(values, Mapping):
        return {name: value[torch.tensor(rows, device=value.device)] for name, value in values.items()}
    return values[torch.tensor(rows, device=values.device)]


def _rows_of(features: Features, rows: Sequence[int]) -> Features:
    chosen = torch.tensor(rows, device=features.pooled.device)
    return Features(features.pooled[chosen], {name: value[chosen] for name, value in features.maps.items()})


def _in_order(parts: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """Rows of the parts, of which the k-th belongs to example `order[k]`, in the order of the examples."""
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    if list(order) == sorted(order):
        return joined
    inverse = torch.empty(len(order), dtype=torch.long)
    inverse[torch.tensor(order)] = torch.arange(len(order))
    return joined[inverse.to(joined.device)]


def _alike(tensors: Sequence[Tensor]) -> bool:
    return len({tensor.shape[1:] for tensor in tensors}) == 1
