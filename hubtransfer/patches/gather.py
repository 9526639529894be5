"""One pass of the trunk for examples of different tasks: the layers that patches own run with each example's tensors.

A layer's tensors for one task are a row of numbers, with everything that evaluation leaves fixed folded in (running
statistics into scale and shift). The rows of a batch's examples are looked up, (batch, numbers), and the layer's own
``forward`` computes with them. Evaluation only: in training the statistics of a batch belong to one task.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hubtransfer.backbones import Backbone

_ABSENT = object()


class Gather(ABC):
    """How one sort of layer runs when every example has tensors of its own. Has no state: one object for all layers."""

    @abstractmethod
    def rows(self, module: nn.Module, owners: Sequence[nn.Module]) -> Tensor:
        """What owners' tensors for a layer are, as rows (owners, numbers); differentiable.

        Args:
            module: The trunk's layer.
            owners: Modules that hold tensors in the place of the layer's, under the same names; the layer may be one.
        """

    @abstractmethod
    def run(self, module: nn.Module, rows: Tensor, x: Tensor) -> Tensor:
        """The layer's output for inputs (batch, ...), example i computed with row i of (batch, numbers).

        A single row, (1, numbers), is for all examples.
        """


class Owned(NamedTuple):
    """A layer's tensors of one task.

    Attributes:
        gather: How the layer runs with several tasks' tensors.
        owner: The module that holds the task's.
    """

    gather: Gather
    owner: nn.Module


Layout = Mapping[str, tuple[Gather, slice]]
"""Layer -> how it runs with several tasks' tensors, and which numbers of a task's row are its."""


@torch.no_grad()
def packed(backbone: "Backbone", owned: Mapping[str, Owned]) -> tuple[Layout, Tensor]:
    """A task's layers as one row of numbers, (total,), and where each lies in it."""
    layout: dict[str, tuple[Gather, slice]] = {}
    parts: list[Tensor] = []
    start = 0
    for name, (gather, owner) in owned.items():
        parts.append(gather.rows(backbone.trunk.get_submodule(name), [owner])[0])
        layout[name] = (gather, slice(start, start := start + len(parts[-1])))
    return layout, torch.cat(parts)


@contextmanager
def gathered(backbone: "Backbone", layers: Mapping[str, tuple[Gather, Tensor]]) -> Iterator[None]:
    """While this lasts a batch's examples run with their own tensors in these layers of the trunk.

    Args:
        backbone: In evaluation mode. It is as before afterwards. Not for several threads at once.
        layers: Name of the layer -> how it runs, and the examples' rows (batch, numbers), or one row for all.
    """
    modules = [(backbone.trunk.get_submodule(name), *how) for name, how in layers.items()]
    undo: list[tuple[dict[str, Any], Any]] = []
    try:
        for module, gather, rows in modules:
            entries = module.__dict__
            undo.append((entries, entries.get("forward", _ABSENT)))
            entries["forward"] = partial(_run, gather, module, rows)
        yield
    finally:
        for entries, old in reversed(undo):
            if old is _ABSENT:
                entries.pop("forward", None)
            else:
                entries["forward"] = old


def _run(gather: Gather, module: nn.Module, rows: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    pieces, rest = divmod(len(x), len(rows))
    if rest or not pieces:
        raise ValueError(f"{type(module).__name__} got {len(x)} rows for a batch of {len(rows)} examples")
    if (
        pieces > 1 and len(rows) > 1
    ):  # windows or tokens as rows, those of one example together (`gathering_fails` finds out)
        rows = rows.repeat_interleave(pieces, 0)
    if args or kwargs:
        raise ValueError(f"{type(module).__name__} takes more than one input")
    return gather.run(module, rows, x)


@contextmanager
def lent(module: nn.Module, **entries: Any) -> Iterator[None]:
    """Attributes of a module (its ``_parameters``, ``groups`` ...) are others for a while."""
    own = module.__dict__
    old = {key: own[key] for key in entries}
    own.update(entries)
    try:
        yield
    finally:
        own.update(old)


def plain_forward(module: nn.Module, x: Tensor) -> Tensor:
    """The layer as its class computes it."""
    return type(module).forward(module, x)


def stacked(owners: Sequence[nn.Module], key: str, which: str = "_parameters") -> Tensor | None:
    """One tensor of several owners as rows (owners, numbers); None where the layer has none of that name."""
    tensors = [getattr(owner, which).get(key) for owner in owners]
    if any(tensor is None for tensor in tensors):
        return None
    return torch.stack(tensors).flatten(1)


@torch.no_grad()
def gathering_fails(backbone: "Backbone", gathers: Mapping[str, Gather]) -> str | None:
    """Tries whether examples with unlike tensors in these layers come out together as they do one by one.

    Networks may fold the batch into other axes, or normalise something that has no batch: then they do not.

    Args:
        backbone: Is left as it is.
        gathers: Layers that shall be gathered.

    Returns:
        Why it is not possible; None if it is.
    """
    if not backbone._sample:
        return "the backbone has no sample input to try it on"
    generator = torch.Generator().manual_seed(0)
    like = next(iter(backbone.trunk.parameters()))
    tolerance = 1e-3 if like.dtype.itemsize >= 4 else 0.05  # of the largest output
    inputs = {}
    for name, (shape, dtype) in backbone._sample.items():
        shape = (2, *shape[1:])
        floats = dtype.is_floating_point
        values = torch.randn(shape, generator=generator) if floats else torch.ones(shape)
        inputs[name] = values.to(like.device, like.dtype if floats else dtype)
    layers = {}
    for name, gather in gathers.items():
        module = backbone.trunk.get_submodule(name)
        row = gather.rows(module, [module])
        noise = torch.rand(2, row.shape[1], generator=generator).to(row)
        layers[name] = (gather, torch.cat([row, row * (0.75 + 0.5 * noise[:1]) + 0.1 * noise[1:]]))
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        backbone.eval()
        with gathered(backbone, layers):
            together = backbone(inputs).pooled
        for k in range(2):
            with gathered(backbone, {name: (gather, rows[k : k + 1]) for name, (gather, rows) in layers.items()}):
                alone = backbone({name: values[k : k + 1] for name, values in inputs.items()}).pooled
            worst = (together[k] - alone[0]).abs().max() / alone.abs().max().clamp(min=1e-6)
            if not worst <= tolerance:
                return f"outputs differ by {worst:.1e} from those of one example at a time"
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for module, mode in modes:
            module.__dict__["training"] = mode
    return None
