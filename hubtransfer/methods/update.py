"""What happens on one batch: descend on a loss, descend through look-ahead steps, or only count."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hubtransfer.functional.second_order import twice_differentiable
from hubtransfer.methods.aggregate import Combine, Sum

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime

Terms = dict[str, Tensor]
AnyBatch = Any  # a Batch, or a mapping of batches where a stage has several sources
Loss = Callable[[AnyBatch], Terms]


class Update(ABC):
    """One change of some groups of parameters, made from one batch."""

    @abstractmethod
    def groups(self) -> tuple[str, ...]:
        """Returns the names of the groups it changes."""

    @abstractmethod
    def apply(self, batch: AnyBatch, runtime: "Runtime") -> Terms:
        """Changes the groups and returns the named scalar terms it descended on."""

    def looks_ahead(self) -> tuple[str, ...]:
        """Returns the names of groups it differentiates without changing them."""
        return ()


@dataclass(frozen=True)
class Descend(Update):
    """One optimiser step on a loss.

    Attributes:
        loss: Returns named scalar terms, already weighted.
        trains: Group, or groups, that the step changes.
        combine: How the terms become one gradient; a mapping gives each group its own rule.
        repeat: Steps taken on the same batch.
        when: Asked with the runtime before each step; a false answer skips it. It has to be the same on all processes.
        after: Called with the batch after the last step: fill a memory, count, anneal.
    """

    loss: Loss
    trains: str | tuple[str, ...] = "model"
    combine: Combine | Mapping[str, Combine] = field(default_factory=Sum)
    repeat: int = 1
    when: Callable[["Runtime"], bool] | None = None
    after: Callable[[AnyBatch], None] | None = None

    def groups(self) -> tuple[str, ...]:
        """Returns the groups it trains."""
        return (self.trains,) if isinstance(self.trains, str) else tuple(self.trains)

    def rule(self, group: str) -> Combine:
        """Returns the combination that holds for a group."""
        return self.combine.get(group, Sum()) if isinstance(self.combine, Mapping) else self.combine

    def is_plain(self) -> bool:
        """Says whether Accelerate's own engine can run it: one step a batch on the sum of the terms."""
        return self.repeat == 1 and self.when is None and all(type(self.rule(g)) is Sum for g in self.groups())

    def apply(self, batch: AnyBatch, runtime: "Runtime") -> Terms:
        """Takes `repeat` steps and returns the terms of the last one (none when it was skipped)."""
        terms: Terms = {}
        for _ in range(self.repeat):
            if self.when is None or self.when(runtime):
                terms = runtime.descend(self, batch)
        if self.after is not None:
            self.after(batch)
        return terms


@dataclass(frozen=True)
class Accumulate(Update):
    """Counts what one batch tells, without a gradient and without an optimiser: statistics, in buffers.

    Attributes:
        count: Adds the batch, of all processes (`hubtransfer.data.processes.everywhere`), to buffers of the method or
            of its model, and returns named scalars to be watched. Parameters stay as they are.
    """

    count: Loss

    def groups(self) -> tuple[str, ...]:
        """Returns no group: nothing descends."""
        return ()

    @torch.no_grad()
    def apply(self, batch: AnyBatch, runtime: "Runtime") -> Terms:
        """Counts the batch and returns what is to be watched."""
        return runtime.call(self.count, batch)


@dataclass(frozen=True)
class Unrolled(Update):
    r"""Descends on `outer` as a function of parameters that act only through look-ahead steps.

    Group `over` takes one differentiable SGD step (its own learning rate, momentum and weight decay) for each loss in
    `inner`; the gradient of `outer` at the point reached, with respect to group `trains`, goes through all of them:

    .. math:: w_{k+1} = w_k - \eta v_{k+1}, \quad v_{k+1} = \mu v_k + \nabla_w L_k(w_k, \phi) + \lambda w_k, \quad
       \phi \leftarrow \phi - \eta_\phi \nabla_\phi L_{outer}(w_K(\phi))

    Nothing of the look-ahead remains: weights, momentum and buffers are as before.

    Attributes:
        inner: Losses of the look-ahead steps, in order.
        outer: Loss at the point reached.
        over: Group that looks ahead; it needs the SGD optimiser.
        trains: Group that is changed.
    """

    inner: Sequence[Loss]
    outer: Loss
    over: str
    trains: str

    def groups(self) -> tuple[str, ...]:
        """Returns the one group it trains."""
        return (self.trains,)

    def looks_ahead(self) -> tuple[str, ...]:
        """Returns the group whose steps it differentiates."""
        return (self.over,)

    @twice_differentiable()
    def apply(self, batch: AnyBatch, runtime: "Runtime") -> Terms:
        """Looks ahead, descends, and returns the terms of the outer loss."""
        steps = runtime.sgd_state(self.over)
        names = runtime.names(self.over)
        weights: list[Tensor] = list(runtime.params(self.over))
        velocities = [step.velocity for step in steps]
        buffers = {name: buffer.clone() for name, buffer in runtime.method.named_buffers()}
        for loss in self.inner:
            terms = runtime.call(loss, batch, {**buffers, **dict(zip(names, weights))})
            gradients = runtime.grad(total(terms), weights, create_graph=True)
            for k, (step, gradient) in enumerate(zip(steps, gradients)):
                gradient = gradient + step.weight_decay * weights[k]
                before = velocities[k]
                velocity = gradient if before is None else step.momentum * before + gradient
                velocities[k] = velocity
                direction = gradient + step.momentum * velocity if step.nesterov else velocity
                weights[k] = weights[k] - step.lr * (direction if step.momentum else gradient)
        terms = runtime.call(self.outer, batch, {**buffers, **dict(zip(names, weights))})
        runtime.step({self.trains: runtime.grad(total(terms), runtime.params(self.trains))})
        return terms


def total(terms: Terms) -> Tensor:
    """Returns the sum of all terms, in at least 32 bits."""
    values = [term.float() if term.dtype.itemsize < 4 else term for term in terms.values()]
    return values[0] if len(values) == 1 else torch.stack(values).sum()
