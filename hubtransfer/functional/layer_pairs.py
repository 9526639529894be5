"""Which layers of two networks to compare: chosen from their names and sizes alone."""

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

PairRule = Literal["single", "one_to_one", "all_to_all"]
NamedPairs = tuple[tuple[str, str], ...]
Pairs = PairRule | NamedPairs
"""What configs say of pairs: a rule, or pairs (teacher's layer, student's layer) by name."""


class Layer(Protocol):
    """What is asked of a layer: `hubtransfer.backbones.LayerInfo` has it."""

    @property
    def name(self) -> str:
        """Its name in the trunk."""

    @property
    def kind(self) -> str:
        """Either "map" or "tokens"."""

    @property
    def reduction(self) -> int:
        """Input pixels on a side for one position of the map."""


def stage_layers(layers: Sequence[Layer], stages: int = 4) -> list[str]:
    """Returns the names of the layers that end a stage, shallow to deep.

    Feature maps: the last layer of each reduction, the deepest `stages` of them. Tokens, whose reduction never
    changes: the layers at `stages` equal relative depths, the last one among them.

    >>> from types import SimpleNamespace as L
    >>> stage_layers([L(name=n, kind="map", reduction=r) for n, r in [("a", 2), ("b", 4), ("c", 4), ("d", 8)]])
    ['a', 'c', 'd']
    >>> stage_layers([L(name=str(i), kind="tokens", reduction=16) for i in range(12)])
    ['2', '5', '8', '11']
    """
    if len({(layer.kind, layer.reduction) for layer in layers}) > 1:
        return [layer.name for layer in {layer.reduction: layer for layer in layers}.values()][-stages:]
    count = min(stages, len(layers))
    return [layers[math.ceil(len(layers) * (k + 1) / count) - 1].name for k in range(count)]


def pair_layers(source: Sequence[Layer], target: Sequence[Layer], rule: PairRule) -> list[tuple[str, str]]:
    """Returns pairs (layer of the source, layer of the target).

    Args:
        source: Layers of the network that teaches, shallow to deep.
        target: Layers of the network that learns, shallow to deep.
        rule: "single": the last of both. "one_to_one": stage ends of the same reduction; if none agree (tokens and
            maps, say), by relative depth. "all_to_all": every stage end with every other.

    Raises:
        ValueError: if a network has no layers, or for an unknown rule.

    >>> from types import SimpleNamespace as L
    >>> a = [L(name="a1", kind="map", reduction=2), L(name="a2", kind="map", reduction=4)]
    >>> b = [L(name="b1", kind="map", reduction=4), L(name="b2", kind="map", reduction=8)]
    >>> pair_layers(a, b, "one_to_one")
    [('a2', 'b1')]
    >>> pair_layers(a, b, "single")
    [('a2', 'b2')]
    """
    if not source or not target:
        raise ValueError(f"{'the source' if not source else 'the target'} backbone names no layers to pair")
    ends, own = stage_layers(source), stage_layers(target)
    if rule == "single":
        return [(ends[-1], own[-1])]
    if rule == "all_to_all":
        return [(a, b) for a in ends for b in own]
    if rule != "one_to_one":
        raise ValueError(f"pairs must be 'single', 'one_to_one' or 'all_to_all', got {rule!r}")
    both = ((source, ends), (target, own))
    theirs, mine = ({layer.reduction: layer.name for layer in net if layer.name in names} for net, names in both)
    if len(theirs) == len(ends) and len(mine) == len(own) and theirs.keys() & mine.keys():
        return [(name, mine[reduction]) for reduction, name in theirs.items() if reduction in mine]
    count = min(len(ends), len(own))
    return list(zip(ends[-count:], own[-count:]))


def check_pairs(pairs: Any, *more: str) -> None:
    """Checks what a config says of pairs: the name of a rule (`more` are others) or pairs of layer names.

    Raises:
        ValueError: if it is neither, or empty.
    """
    rules = (*get_args(PairRule), *more)
    named = not isinstance(pairs, str) and pairs and all(not isinstance(p, str) and len(p) == 2 for p in pairs)
    if pairs not in rules and not named:
        raise ValueError(f"pairs must be one of {rules} or pairs (teacher's layer, student's layer), got {pairs!r}")


def same_depth(i: int, own: int, other: int) -> int:
    """Returns which of `other` equal layers belongs to layer `i` of `own`: floor(i M / N), to the last one the last.

    >>> [same_depth(i, 3, 6) for i in range(3)]
    [0, 2, 5]
    >>> [same_depth(i, 4, 2) for i in range(4)]
    [0, 0, 1, 1]
    """
    return other - 1 if i == own - 1 and own > 1 else i * other // own
