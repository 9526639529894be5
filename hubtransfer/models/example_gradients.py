"""Sums, over examples, of squares or magnitudes of each example's own gradient."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

from hubtransfer.models.linear_traces import NotThisWay, check_sums, trace
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
            except (NotThisWay, RuntimeError, ValueError) as error:
                if len(ways) == 1:
                    raise
                logger.info("%s does not do: %s", ways.pop(0).__name__.strip("_"), error)
        for name, value in found.items():
            totals[name] += value
    return totals, count


@dataclass
class _Asked:
    model: TransferModel
    task: str
    values: Values
    parameters: Mapping[str, Tensor]
    power: Power
    trusted: bool = False  # whether linear layers were seen to be all there is


def _linear_layers(asked: _Asked, inputs: Mapping[str, Tensor], further: tuple[Tensor, ...]) -> dict[str, Tensor]:
    power = asked.power
    scalars, uses = trace(asked.model, asked.task, inputs, lambda z: asked.values(z, *further), asked.parameters)
    shifts = [use.shift for use in uses]
    totals = [torch.zeros_like(shift) for shift in shifts]
    columns = scalars.shape[1]
    for k in range(columns):
        found = torch.autograd.grad(scalars[:, k].sum(), shifts, retain_graph=True)
        for total, gradient in zip(totals, found):
            total += _raised(gradient, power)
    if not asked.trusted:
        check_sums(scalars[:, -1].sum(), found, uses)
        asked.trusted = True
    result = {}
    for use, total in zip(uses, totals):
        if use.weight is not None:
            result[use.weight] = total.T @ _raised(use.inputs, power)
        if use.bias is not None:
            result[use.bias] = total.sum(0)
    return result


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
