"""Trunks whose hidden units come and go: perceptrons, and whatever else is linear layers in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hubtransfer.backbones import Backbone
from hubtransfer.models.growth import register_growth
from hubtransfer.models.heads import LinearHead
from hubtransfer.patches.flow import trace_flow

if TYPE_CHECKING:
    from hubtransfer.models.model import TransferModel

NEW = -1
"""A unit that comes from nowhere, in a list of where units come from."""


def linear_chain(backbone: Backbone) -> list[str]:
    """Returns the names of the trunk's linear layers, input side first.

    Raises:
        ValueError: if the trunk is anything but linear layers in a row, with functions of single units between them.
    """
    layers = [name for name, module in backbone.trunk.named_modules() if isinstance(module, nn.Linear)]
    own = {id(p) for name in layers for p in backbone.trunk.get_submodule(name).parameters()}
    others = [name for name, p in backbone.trunk.named_parameters() if id(p) not in own]
    what = f"it has {others[0]!r}" if others else "" if layers else "it has none"
    if not what:
        flows = trace_flow(backbone)
        layers.sort(key=lambda name: backbone._seen[name].start)
        for name, after in zip(layers, [*layers[1:], None]):
            flow = flows.get(name)
            right = flow is not None and flow.open and flow.consumers == ([after] if after else [])
            if flow is None or not right or flow.head != (after is None):
                why = flow.blocked if flow is not None and flow.blocked else "its output goes elsewhere"
                what = f"layer {name!r} is no link of a chain: {why}"
                break
    if what:
        raise ValueError(
            f"units can come and go in a trunk of linear layers in a row, such as plain:mlp; of this one "
            f"({type(backbone.trunk).__name__}) {what}"
        )
    return layers


@register_growth("units")
@torch.no_grad()
def set_units(model: TransferModel, sources: Mapping[str, Sequence[int]], seed: int = 0) -> None:
    """Makes every hidden layer of the trunk anew out of units that it has: some stay, go, are doubled or are new.

    The first unit made of one that there was is that unit: it reads what it read, and nothing else. A further one made
    of it is its double, which reads the doubles of what that one reads where there are any. New units start as torch
    starts a linear layer. Heads go on reading the units that they read, and nothing else.

    Args:
        model: Its trunk is linear layers in a row.
        sources: Layer -> for each unit from now on the number of the unit it is made of, -1 for a new one.
        seed: Of the new units.

    Raises:
        ValueError: if the trunk is something else, or a layer or unit does not exist.
    """
    backbone = model.backbone
    chain = linear_chain(backbone)
    if set(sources) != set(chain):
        raise ValueError(f"sources must name the layers {', '.join(chain)}, got {', '.join(sources) or 'none'}")
    linears: dict[str, nn.Linear] = {name: backbone.trunk.get_submodule(name) for name in chain}  # type: ignore[misc]
    for name, layer in linears.items():
        if not sources[name] or not all(NEW <= row < layer.out_features for row in sources[name]):
            raise ValueError(f"layer {name!r} has units 0 to {layer.out_features - 1}; got sources {sources[name]}")
    below: Sequence[int] = range(linears[chain[0]].in_features)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, layer in linears.items():
            _rebuild(layer, sources[name], below)
            below = sources[name]
    for task, head in model.heads.items():
        if isinstance(head, LinearHead):
            model.heads[task] = _with_columns(head, below)
    backbone.survey(backbone._sample, layers=[layer.name for layer in backbone.layers])


def _rebuild(layer: nn.Linear, rows: Sequence[int], columns: Sequence[int]) -> None:
    fresh = nn.Linear(len(columns), len(rows), layer.bias is not None).to(layer.weight)
    weight, bias = fresh.weight.detach(), None if fresh.bias is None else fresh.bias.detach()
    first, last = (
        {c: k for k, c in order if c >= 0} for order in (reversed(list(enumerate(columns))), enumerate(columns))
    )
    seen: set[int] = set()
    for k, row in enumerate(rows):
        if row == NEW:
            continue
        where = last if row in seen else first
        seen.add(row)
        weight[k] = 0
        weight[k, list(where.values())] = layer.weight[row, list(where)]
        if bias is not None:
            bias[k] = layer.bias[row]
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
    layer.in_features, layer.out_features = len(columns), len(rows)


def _with_columns(head: LinearHead, sources: Sequence[int]) -> LinearHead:
    new = LinearHead(len(sources), head.out_features, head.dropout).to(head.weight)
    weight: Tensor = torch.zeros_like(new.weight)
    for column, source in reversed(list(enumerate(sources))):
        if 0 <= source < head.in_features and source not in sources[:column]:
            weight[:, column] = head.weight[:, source]
    new.weight.copy_(weight)
    new.bias.copy_(head.bias)
    for p, old in zip(new.parameters(), head.parameters()):
        p.requires_grad_(old.requires_grad)
    return new.train(head.training)
