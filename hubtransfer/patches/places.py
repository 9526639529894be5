"""Where in a trunk a patch's tensors go: dictionary entries found by name, so that a copied model finds its own."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from hubtransfer.backbones import Backbone


HEAD = "@head"  # as a name: what stands between trunk and head, the backbone's `neck`


class Slot(NamedTuple):
    """While a patch is applied, ``target[key]`` is ``source[source_key]``."""

    target: dict[str, Any]
    key: str
    source: dict[str, Any]
    source_key: str


class Binding(NamedTuple):
    """A slot by name. A module is given as itself when the patch owns it, by its name when it is the trunk's."""

    host: str | nn.Module
    attr: str
    key: str
    source: str | nn.Module
    source_attr: str
    source_key: str

    def resolve(self, backbone: "Backbone") -> Slot:
        """Find the dictionaries."""
        target = _entries(self.host, self.attr, backbone)
        return Slot(target, self.key, _entries(self.source, self.source_attr, backbone), self.source_key)


def _entries(module: str | nn.Module, attr: str, backbone: "Backbone") -> dict[str, Any]:
    if isinstance(module, str):
        found = backbone if module == HEAD else backbone.trunk.get_submodule(module)
    else:
        found = module
    return found.__dict__ if attr == "__dict__" else getattr(found, attr)


def places_of(trunk: nn.Module, module: nn.Module) -> list[tuple[str, str]]:
    """Every (parent's name, key) under which the trunk holds this very module: several when it is shared."""
    return [
        (name, key)
        for name, parent in trunk.named_modules()
        for key, child in parent._modules.items()
        if child is module
    ]


def chosen(trunk: nn.Module, layers: str | None) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the trunk whose whole name matches the regular expression (all of them without one).

    Raises:
        ValueError: when `layers` is not a regular expression.
    """
    try:
        pattern = re.compile(layers if layers is not None else ".*")
    except re.error as error:
        raise ValueError(f"layers={layers!r} is not a regular expression: {error}") from None
    return ((name, module) for name, module in trunk.named_modules() if pattern.fullmatch(name))


def checkpointing(trunk: nn.Module) -> list[tuple[dict[str, Any], str, bool]]:
    """Where flags for activation checkpointing are: (the module's attributes, the flag, only in training mode?)."""
    flags: list[tuple[dict[str, Any], str, bool]] = []
    for module in trunk.modules():
        if hasattr(module, "grad_checkpointing"):  # timm
            flags.append((module.__dict__, "grad_checkpointing", False))
        if hasattr(module, "gradient_checkpointing"):  # transformers
            flags.append((module.__dict__, "gradient_checkpointing", True))
    return flags


def checkpointing_is_on(trunk: nn.Module) -> bool:
    """Whether some module would compute its activations a second time in backward."""
    return any(flags.get(key) for flags, key, _ in checkpointing(trunk))
