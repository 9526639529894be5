"""A step that is held back by what it would do to some outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hubtransfer.functional.second_order import twice_differentiable
from hubtransfer.methods.update import AnyBatch, Loss, Terms, Update, total

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


@dataclass(frozen=True)
class TrialStep(Update):
    r"""Takes a step on trial, sees how far it moves some outputs, and descends on loss and movement together.

    .. math:: \tilde\theta = \theta - \eta \nabla L(\theta), \qquad
       \theta \leftarrow \theta - \eta \nabla_\theta \Big( L(\theta) +
       \frac{\lambda}{K} \sum_{k=1}^{K} \big(a_k(\theta) - a_k(\tilde\theta)\big)^2 \Big)

    over all K numbers a of the outputs. The gradient goes through the trial step too, so it needs the Hessian of L
    times a vector. The trial is plain gradient descent at the optimiser's rate; the step itself is the optimiser's own.
    Of the trial nothing remains.

    Attributes:
        loss: L, named scalar terms.
        outputs: Gives a, tensors by name; it must leave the method as it is (evaluation mode).
        weight: lambda.
        trains: Group that is changed.
        after: Called with the batch after the step.
    """

    loss: Loss
    outputs: Loss
    weight: float
    trains: str = "model"
    after: Callable[[AnyBatch], None] | None = None

    def groups(self) -> tuple[str, ...]:
        """Returns the one group it trains."""
        return (self.trains,)

    @twice_differentiable()
    def apply(self, batch: AnyBatch, runtime: "Runtime") -> Terms:
        """Takes the step and returns the loss's terms and `moved`, the weighted movement."""
        terms = runtime.call(self.loss, batch)
        parameters = runtime.params(self.trains)
        own = runtime.grad(total(terms), parameters, create_graph=True)
        groups = runtime.optimizers[self.trains].param_groups
        rates = [group["lr"] for group in groups for _ in group["params"]]
        names = runtime.names(self.trains)
        ahead = {name: p - rate * g for name, p, rate, g in zip(names, parameters, rates, own)}
        now, then = runtime.call(self.outputs, batch), runtime.call(self.outputs, batch, ahead)
        differences = torch.cat([(now[name] - then[name]).flatten() for name in now])
        penalty = self.weight * total({"moved": differences.square().mean()})
        held = runtime.grad(penalty, parameters)
        runtime.step({self.trains: [g.detach() + h for g, h in zip(own, held)]})
        if self.after is not None:
            self.after(batch)
        return {**terms, "moved": penalty}
