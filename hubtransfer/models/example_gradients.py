"""Sums, over examples, of squares or magnitudes of each example's own gradient."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from hubtransfer.models.heads import LinearHead
from hubtransfer.models.model import TransferModel

logger = logging.getLogger(__name__)

Values = Callable[..., Tensor]
Power = Literal[1, 2]
_ROOM = 1 << 25  # numbers that gradients of several examples may take together

Example = tuple[Mapping[str, Tensor], tuple[Tensor, ...]]


def sum_over_examples(
    model: TransferModel,
    task: str,
    batches: Iterable[Example],
    values: Values,
    parameters: Mapping[str, Tensor],
    power: Power,
) -> tuple[dict[str, Tensor], int]:
    r"""Returns :math:`\sum_i \sum_k |\partial v_{ik} / \partial \theta_j|^{power}` by parameter, and how many i.

    The square of a batch's mean gradient is another thing and far smaller: gradients of different examples cancel.

    Networks whose parameters all lie in linear layers that see each example once need no gradient of any one example:
    for layer inputs a and output gradients :math:`\delta` it is :math:`\delta_i a_i^\top`, so that
    :math:`\sum_{ik} (\delta_{ik} a_i^\top)^2 = (\sum_k \delta_{\cdot k}^2)^\top a^2`, one product of matrices. Others
    get the gradients of many examples at once (`torch.func.vmap`), or one by one where their code does not allow that.
    All three give the same numbers. The model has to be in evaluation mode, in which examples do not see one another.

    Args:
        model: The model.
        task: Whose head answers.
        batches: Pairs of the model's inputs (batch, ...) and further tensors (batch, ...) that `values` needs.
        values: `values(logits, *further)` gives scalars of each example, (batch, k).
        parameters: Those that matter, by their names in the model.
        power: 2 for squares, 1 for magnitudes.

    Returns:
        One tensor a parameter, in its shape, and the number of examples.

    Raises:
        ValueError: if the model is in training mode.
    """
    if model.training:
        raise ValueError("gradients of single examples need the model in evaluation mode: model.eval() first")
    totals = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    asked = _Asked(model, task, values, parameters, power)
    count, ways = 0, [_linear_layers, _vectorised, _one_by_one]
    for inputs, further in batches:
        count += len(next(iter(inputs.values())))
        while True:
            try:
                with torch.enable_grad():  # whoever measures may not be recording
                    found = ways[0](asked, inputs, further)
                break
            except (_NotThisWay, RuntimeError, ValueError) as error:
                if len(ways) == 1:
                    raise
                logger.info("%s does not do: %s", ways.pop(0).__name__.strip("_"), error)
        for name, value in found.items():
            totals[name] += value
    return totals, count


class _NotThisWay(Exception):
    """The network is of another form."""


@dataclass
class _Asked:
    model: TransferModel
    task: str
    values: Values
    parameters: Mapping[str, Tensor]
    power: Power
    trusted: bool = False  # whether linear layers were seen to be all there is


class _Use(NamedTuple):
    inputs: Tensor  # (batch, width)
    shift: Tensor  # zeros that were added to the output, (batch, width): its gradient is the output's


def _linear_layers(asked: _Asked, inputs: Mapping[str, Tensor], further: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model, parameters, power = asked.model, asked.parameters, asked.power
    names = {id(p): name for name, p in parameters.items()}
    layers = [m for m in model.modules() if any(id(p) in names for p in m._parameters.values())]
    if asked.task in model.patches or any(type(layer) not in (nn.Linear, LinearHead) for layer in layers):
        raise _NotThisWay("not all parameters are those of linear layers")
    uses: dict[nn.Module, list[_Use]] = {layer: [] for layer in layers}

    def note(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        shift = torch.zeros_like(output, requires_grad=True)
        uses[layer].append(_Use(given[0].detach(), shift))
        return output + shift

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        scalars = asked.values(model(**inputs, task=asked.task).logits, *further)
    finally:
        for hook in hooks:
            hook.remove()
    if any(len(use) != 1 or use[0].inputs.ndim != 2 for use in uses.values()) or len(names) < sum(
        len([p for p in layer._parameters.values() if p is not None and id(p) in names]) for layer in layers
    ):
        raise _NotThisWay("a linear layer sees an example more often than once")
    shifts = [uses[layer][0].shift for layer in layers]
    totals = [torch.zeros_like(shift) for shift in shifts]
    columns = scalars.shape[1]
    for k in range(columns):
        found = torch.autograd.grad(scalars[:, k].sum(), shifts, retain_graph=True)
        for total, gradient in zip(totals, found):
            total += _raised(gradient, power)
    if not asked.trusted:
        _check_sum(scalars[:, -1].sum(), found, layers, uses, names)
        asked.trusted = True
    result = {}
    for layer, total in zip(layers, totals):
        for kind, parameter in layer._parameters.items():
            if parameter is not None and id(parameter) in names:
                given = _raised(uses[layer][0].inputs, power)
                result[names[id(parameter)]] = total.T @ given if kind == "weight" else total.sum(0)
    return result


def _check_sum(scalar: Tensor, found: Sequence[Tensor], layers: Any, uses: Any, names: Any) -> None:
    """A weight that is also used outside its layer has a gradient that the layer does not know of."""
    for layer, gradient in zip(layers, found):
        weight = layer._parameters["weight"]
        if weight is None or id(weight) not in names or not weight.requires_grad:
            continue
        (whole,) = torch.autograd.grad(scalar, [weight], retain_graph=True, allow_unused=True)
        own = gradient.T @ uses[layer][0].inputs
        if whole is None or not torch.allclose(whole, own, rtol=1e-3, atol=1e-3 * float(own.abs().max()) + 1e-12):
            raise _NotThisWay("a linear layer's weight is used in other places too")


def _vectorised(asked: _Asked, inputs: Mapping[str, Tensor], further: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model, parameters, power = asked.model, asked.parameters, asked.power
    fixed = {name: p.detach() for name, p in parameters.items()}

    def scalars(weights: dict[str, Tensor], one: dict[str, Tensor], more: tuple[Tensor, ...]) -> Tensor:
        example = {name: tensor[None] for name, tensor in one.items()}
        logits = functional_call(model, weights, (), {**example, "task": asked.task}).logits
        return asked.values(logits, *(tensor[None] for tensor in more))[0]

    example = {name: tensor[:1] for name, tensor in inputs.items()}
    with torch.no_grad():
        columns = asked.values(model(**example, task=asked.task).logits, *(t[:1] for t in further)).shape[1]
    size = columns * max(1, sum(p.numel() for p in fixed.values()))
    rows = max(1, _ROOM // size)
    result = {name: torch.zeros_like(p) for name, p in fixed.items()}
    gradients = vmap(jacrev(scalars), (None, 0, 0))
    for start in range(0, len(next(iter(inputs.values()))), rows):
        piece = {name: tensor[start : start + rows] for name, tensor in inputs.items()}
        found = gradients(fixed, piece, tuple(t[start : start + rows] for t in further))
        for name, gradient in found.items():
            result[name] += _raised(gradient, power).sum((0, 1))
    return result


def _one_by_one(asked: _Asked, inputs: Mapping[str, Tensor], further: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model, parameters, power = asked.model, asked.parameters, asked.power
    result = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    flags = {p: p.requires_grad for p in parameters.values()}
    try:
        for p in flags:
            p.requires_grad_(True)
        for i in range(len(next(iter(inputs.values())))):
            example = {name: tensor[i : i + 1] for name, tensor in inputs.items()}
            scalars = asked.values(model(**example, task=asked.task).logits, *(t[i : i + 1] for t in further))[0]
            for scalar in scalars:
                found = torch.autograd.grad(scalar, list(flags), retain_graph=True, allow_unused=True)
                for name, gradient in zip(parameters, found):
                    if gradient is not None:
                        result[name] += _raised(gradient, power)
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
    return result


def _raised(tensor: Tensor, power: Power) -> Tensor:
    return tensor.square() if power == 2 else tensor.abs()
