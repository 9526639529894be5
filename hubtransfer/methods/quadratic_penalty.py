"""Penalties that hold each parameter near a value it had, in proportion to its importance."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hubtransfer.data import Batch
from hubtransfer.methods.parameter_state import ParameterState
from hubtransfer.methods.penalty import Penalty
from hubtransfer.methods.update import Terms
from hubtransfer.models import TransferModel

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


class QuadraticPenalty(Penalty):
    r"""Draws parameters to an anchor, each by its own importance.

    .. math:: R(\theta) = s \sum_j \Omega_j (\theta_j - \theta^*_j)^2

    over all parameters of the trunk, the heads and the patches that some task has trained. A parameter that no finished
    task has trained (another task's head, a class that came later) has importance 0. Methods differ in the scale s and
    in how they measure after a task (`after_task`). What is measured survives a resumed run; it is never exported.

    Attributes:
        importance: Omega, by parameter.
        anchor: theta*, by parameter.
    """

    scale: float
    """s."""

    def __init__(self, model: TransferModel, config: Any = None, *, task: str | None = None) -> None:
        super().__init__(model, config, task=task)
        self.importance, self.anchor = ParameterState(), ParameterState()

    def terms(self, batch: Batch) -> Terms:
        """Returns the scalar `penalty`, once a task has been learned."""
        if not self.importance:
            return {}
        return {"penalty": self.scale * weighted_distance(self.model, self.importance, self.anchor)}

    @abstractmethod
    def after_task(self, item: Any, runtime: "Runtime") -> None:
        """Measures what the task left behind."""

    def hold(self, importance: Mapping[str, Tensor]) -> None:
        """Takes new importances by parameter, and the parameters' present values as anchors of all of them."""
        self.importance.keep(importance)
        values = dict(self.model.named_parameters())
        self.anchor.keep({name: values[name] for name in importance})


def weighted_distance(model: TransferModel, importance: ParameterState, anchor: ParameterState) -> Tensor:
    r"""Returns :math:`\sum_j \Omega_j (\theta_j - \theta^*_j)^2`, over the parameters that have an importance."""
    parts = []
    for name, parameter in model.named_parameters():
        if name in importance:
            moved = parameter - anchor.like(name, parameter)
            parts.append((importance.like(name, parameter) * moved * moved).sum())
    return torch.stack(parts).sum()
