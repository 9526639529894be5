"""How alike the gradients of single examples are, without ever writing them down where layers are linear."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from hubtransfer.functional.second_order import twice_differentiable
from hubtransfer.models.linear_traces import NotThisWay, check_sums, trace
from hubtransfer.models.model import TransferModel

logger = logging.getLogger(__name__)

Part = tuple[Tensor, Tensor | None]
Losses = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ExampleGradients:
    r"""Gradients of single examples by parameter, (examples, ...) each.

    Attributes:
        parts: Of a linear layer's weight the factors :math:`\delta` (examples, outputs) and a (examples, inputs), of
            which the gradient of example i is :math:`\delta_i a_i^\top`; of any other parameter its gradients, flat,
            and None.
        count: Examples.
    """

    parts: dict[str, Part]
    count: int

    def products(self, other: ExampleGradients) -> Tensor:
        r"""Returns inner products with other examples' gradients over the parameters that both have, (own, other's).

        .. math:: \langle \delta_i a_i^\top, \delta_j a_j^\top \rangle = (\delta_i^\top \delta_j)(a_i^\top a_j)
        """
        total = next(iter(self.parts.values()))[0].new_zeros(self.count, other.count)
        for name in self.parts.keys() & other.parts.keys():
            (left, a), (right, b) = self.parts[name], other.parts[name]
            if (a is None) != (b is None):
                (left, a), (right, b) = _flat(left, a), _flat(right, b)
            product = left @ right.T
            total = total + (product if a is None or b is None else product * (a @ b.T))
        return total

    def norms(self) -> Tensor:
        """Returns each example's norm over all parameters, (examples,)."""
        squares = [left.square().sum(1) * (1 if a is None else a.square().sum(1)) for left, a in self.parts.values()]
        return torch.stack(squares).sum(0).sqrt()

    def cosines(self, other: ExampleGradients) -> Tensor:
        """Returns cosines with other examples' gradients, (own, other's); 0 where a gradient is zero."""
        sizes = self.norms()[:, None] * other.norms()[None]
        return torch.where(sizes > 0, self.products(other) / sizes.clamp(min=torch.finfo(sizes.dtype).tiny), 0.0)


class GradientsOfExamples:
    """Gives the gradients of single examples of a model, in evaluation mode.

    Networks whose parameters all lie in linear layers need one pass for all examples, and room for the layers' inputs
    and outputs alone. Others get all gradients at once (`torch.func.vmap`), which takes room for examples times
    parameters, or one by one where their code does not allow that. All three give the same numbers.

    Args:
        model: The model.
        losses: From logits (batch, classes) and labels (batch,) to losses (batch,).
    """

    def __init__(self, model: TransferModel, losses: Losses) -> None:
        self.model, self.losses = model, losses
        self._ways = [self._traced, self._vectorised, self._one_by_one]
        self._trusted = False

    def of(
        self, task: str, inputs: Mapping[str, Tensor], labels: Tensor, parameters: Mapping[str, Tensor]
    ) -> ExampleGradients:
        """Returns the gradients of some examples.

        Args:
            task: Whose head answers.
            inputs: The model's, (batch, ...).
            labels: (batch,).
            parameters: By which to differentiate, by their names in the model.

        Raises:
            ValueError: if the model is in training mode.
        """
        if self.model.training:
            raise ValueError("gradients of single examples need the model in evaluation mode: model.eval() first")
        while True:
            try:
                with torch.enable_grad():
                    return ExampleGradients(self._ways[0](task, inputs, labels, parameters), len(labels))
            except (NotThisWay, RuntimeError, ValueError) as error:
                if len(self._ways) == 1:
                    raise
                logger.info("%s does not do: %s", self._ways.pop(0).__name__.strip("_"), error)

    def _traced(
        self, task: str, inputs: Mapping[str, Tensor], labels: Tensor, parameters: Mapping[str, Tensor]
    ) -> dict[str, Part]:
        loss, uses = trace(self.model, task, inputs, lambda z: self.losses(z, labels).sum(), parameters)
        deltas = torch.autograd.grad(loss, [use.shift for use in uses], retain_graph=not self._trusted)
        if not self._trusted:
            check_sums(loss, deltas, uses)
            self._trusted = True
        parts: dict[str, Part] = {}
        for use, delta in zip(uses, deltas):
            parts |= {} if use.weight is None else {use.weight: (delta, use.inputs)}
            parts |= {} if use.bias is None else {use.bias: (delta, None)}
        return parts

    def _vectorised(
        self, task: str, inputs: Mapping[str, Tensor], labels: Tensor, parameters: Mapping[str, Tensor]
    ) -> dict[str, Part]:
        def loss(weights: dict[str, Tensor], one: dict[str, Tensor], label: Tensor) -> Tensor:
            example = {name: tensor[None] for name, tensor in one.items()}
            logits = functional_call(self.model, weights, (), {**example, "task": task}).logits
            return self.losses(logits, label[None])[0]

        fixed = {name: p.detach() for name, p in parameters.items()}
        with twice_differentiable():  # fused attention would run one example after another
            found = vmap(grad(loss), (None, 0, 0))(fixed, dict(inputs), labels)
        return {name: (gradient.flatten(1), None) for name, gradient in found.items()}

    def _one_by_one(
        self, task: str, inputs: Mapping[str, Tensor], labels: Tensor, parameters: Mapping[str, Tensor]
    ) -> dict[str, Part]:
        flags = {p: p.requires_grad for p in parameters.values()}
        rows = []
        try:
            for p in flags:
                p.requires_grad_(True)
            for i in range(len(labels)):
                logits = self.model(**{name: tensor[i : i + 1] for name, tensor in inputs.items()}, task=task).logits
                loss = self.losses(logits, labels[i : i + 1])[0]
                found = torch.autograd.grad(loss, list(flags), allow_unused=True)
                rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(flags, found)])
        finally:
            for p, flag in flags.items():
                p.requires_grad_(flag)
        return {name: (torch.stack(column).flatten(1), None) for name, column in zip(parameters, zip(*rows))}


def _flat(delta: Tensor, inputs: Tensor | None) -> Part:
    return (delta, None) if inputs is None else ((delta[:, :, None] * inputs[:, None, :]).flatten(1), None)
