"""Synaptic intelligence (Zenke, Poole and Ganguli, 2017)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hubtransfer.data import Batch
from hubtransfer.methods.parameter_state import ParameterState
from hubtransfer.methods.quadratic_penalty import QuadraticPenalty
from hubtransfer.models import TransferModel

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class SIConfig:
    """Hyper-parameters of `SI`.

    Attributes:
        strength: c, how hard important parameters are held.
        damping: xi, keeps the importance of parameters that hardly moved bounded.
    """

    strength: float = 0.1
    damping: float = 0.1

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.strength < 0:
            raise ValueError(f"strength must not be negative, got {self.strength}")
        if self.damping <= 0:
            raise ValueError(f"damping must be positive, got {self.damping}")


class SI(QuadraticPenalty, name="si", config=SIConfig):
    r"""Measures along the way how much each parameter lowered the loss, and holds it accordingly afterwards.

    .. math:: L = L_t + c \sum_j \Omega_j (\theta_j - \theta^*_j)^2, \quad
       \omega_j = -\sum_{steps} g_j\, \Delta\theta_j, \quad
       \Omega_j \leftarrow \Omega_j + \frac{\max(0, \omega_j)}{(\theta_j - \theta^{start}_j)^2 + \xi}

    with g the gradient of the loss without penalties, (parameters,), and the change of each step. Needs no second pass
    over the data. Applies to streams of every kind, any head, backbone and optimiser, and beside a memory, whose loss
    then counts as the task's own.

    Args:
        model: The model, with a head for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: a parameter that on balance raised the loss counts as unimportant in that task; the authors'
    code cuts the sum over tasks off at zero, the paper nothing.

    Source: https://arxiv.org/abs/1703.04200, equations 3 to 5.
    """

    paper = "Zenke 2017"
    source = "https://arxiv.org/abs/1703.04200"
    citation = """@inproceedings{zenke2017continual,
  title = {Continual Learning Through Synaptic Intelligence},
  author = {Zenke, Friedemann and Poole, Ben and Ganguli, Surya},
  booktitle = {International Conference on Machine Learning},
  year = {2017}
}"""

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)
        self.scale = self.config.strength
        self.path, self.start = ParameterState(), ParameterState()
        self._step: dict[str, tuple[Tensor, Tensor]] = {}

    def before_task(self, item: Any, runtime: "Runtime") -> None:
        """Starts the path of each parameter."""
        learned = self.learned()
        self.start.keep(learned)
        self.path.keep({name: torch.zeros_like(parameter) for name, parameter in learned.items()})

    @torch.no_grad()
    def observe(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """Notes each parameter and its gradient before a step; a method may take several on a batch."""
        self.settle()
        learned = {name: p for name, p in self.model.named_parameters() if p in gradients}
        self._step = {name: (p.detach().clone(), gradients[p]) for name, p in learned.items()}

    def after_step(self, batch: Batch) -> None:
        """Closes the last step on a batch."""
        self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Adds what each parameter's move in the noted step did to the loss, to first order."""
        values = dict(self.model.named_parameters())
        for name, (before, gradient) in self._step.items():
            self.path.like(name, before).addcmul_(gradient, values[name] - before, value=-1)
        self._step = {}

    @torch.no_grad()
    def after_task(self, item: Any, runtime: "Runtime") -> None:
        """Turns paths into importances."""
        found = {}
        for name, parameter in self.learned().items():
            moved = parameter - self.start.like(name, parameter)
            gained = self.path.like(name, parameter).clamp(min=0) / (moved.square() + self.config.damping)
            found[name] = self.importance.like(name, parameter) + gained
        self.hold(found)
