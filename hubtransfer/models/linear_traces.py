"""What linear layers saw in one pass, from which follow the gradients of every example by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hubtransfer.models.heads import LinearHead
from hubtransfer.models.model import TransferModel


class NotThisWay(Exception):
    """The network is of another form."""


class Use(NamedTuple):
    """A linear layer in one pass: its weight's gradient of example i is the outer product of delta_i and a_i.

    Attributes:
        layer: The layer.
        inputs: a, (batch, inputs).
        shift: Zeros that were added to the outputs, (batch, outputs): the gradient with respect to them is delta.
        weight: Name of its weight in the model, where that is asked for.
        bias: Name of its bias, likewise.
    """

    layer: nn.Module
    inputs: Tensor
    shift: Tensor
    weight: str | None
    bias: str | None


def trace(
    model: TransferModel,
    task: str,
    inputs: Mapping[str, Tensor],
    values: Callable[[Tensor], Tensor],
    parameters: Mapping[str, Tensor],
) -> tuple[Tensor, list[Use]]:
    """Runs a model whose parameters in question all lie in linear layers that see each example once.

    Args:
        model: The model, in evaluation mode, in which examples do not see one another.
        task: Whose head answers.
        inputs: The model's inputs, (batch, ...).
        values: From logits to scalars of each example.
        parameters: Those in question, by their names in the model.

    Returns:
        What `values` gave and the layers' uses.

    Raises:
        NotThisWay: if some parameter lies elsewhere, or a layer sees an example more often.
    """
    names = {id(p): name for name, p in parameters.items()}
    layers = [m for m in model.modules() if any(id(p) in names for p in m._parameters.values())]
    if task in model.patches or any(type(layer) not in (nn.Linear, LinearHead) for layer in layers):
        raise NotThisWay("not all parameters are those of linear layers")
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def note(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        shift = torch.zeros_like(output, requires_grad=True)
        seen[layer].append((given[0].detach(), shift))
        return output + shift

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        scalars = values(model(**inputs, task=task).logits)
    finally:
        for hook in hooks:
            hook.remove()
    own = [{kind: names.get(id(p)) for kind, p in layer._parameters.items() if p is not None} for layer in layers]
    asked = sum(name is not None for each in own for name in each.values())
    if any(len(use) != 1 or use[0][0].ndim != 2 for use in seen.values()) or len(names) < asked:
        raise NotThisWay("a linear layer sees an example more often than once")
    uses = [Use(layer, *seen[layer][0], each.get("weight"), each.get("bias")) for layer, each in zip(layers, own)]
    return scalars, uses


def check_sums(scalar: Tensor, deltas: Sequence[Tensor], uses: Sequence[Use]) -> None:
    """Checks that no weight is used outside its layer: its gradient would be one that the layer does not know of.

    Args:
        scalar: What the deltas are gradients of, a scalar whose graph is still there.
        deltas: Gradients with respect to the layers' outputs, (batch, outputs) each.
        uses: The layers.

    Raises:
        NotThisWay: if the layers' gradients do not add up to a weight's.
    """
    for use, delta in zip(uses, deltas):
        weight = use.layer._parameters["weight"]
        if use.weight is None or weight is None or not weight.requires_grad:
            continue
        (whole,) = torch.autograd.grad(scalar, [weight], retain_graph=True, allow_unused=True)
        own = delta.T @ use.inputs
        if whole is None or not torch.allclose(whole, own, rtol=1e-3, atol=1e-3 * float(own.abs().max()) + 1e-12):
            raise NotThisWay("a linear layer's weight is used in other places too")
