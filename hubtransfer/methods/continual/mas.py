"""Memory aware synapses (Aljundi et al., 2018)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hubtransfer.data import TaskStream
from hubtransfer.functional.fisher import squared_norm
from hubtransfer.methods.importance import mean_over_examples, need_samples
from hubtransfer.methods.quadratic_penalty import QuadraticPenalty
from hubtransfer.models import TransferModel

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class MASConfig:
    """Hyper-parameters of `MAS`.

    Attributes:
        strength: lambda, how hard important parameters are held.
        samples: Examples of a task on which importance is measured (default: all): random
            ones, or the first ones of data without an end.
    """

    strength: float = 1.0
    samples: int | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.strength < 0:
            raise ValueError(f"strength must not be negative, got {self.strength}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")


class MAS(QuadraticPenalty, name="mas", config=MASConfig):
    r"""Holds each parameter as hard as the outputs depend on it.

    .. math:: L = L_t + \lambda \sum_j \Omega_j (\theta_j - \theta^*_j)^2, \quad
       \Omega_j \leftarrow \Omega_j + \frac{1}{N} \sum_i \Big|\frac{\partial \|f(x_i)\|_2^2}{\partial \theta_j}\Big|

    with the current head's outputs f, (width,), and gradients of single examples in evaluation mode. No label is used
    for it. Applies to streams of every kind, any backbone and any head with outputs (batch, width).

    Args:
        model: The model, with a head for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: the global form alone, not the local one for each layer; magnitudes are those of single
    examples, as in the paper's equation (the authors' code takes those of a batch's sum, which cancels).

    Source: https://arxiv.org/abs/1711.09601, equations 2 to 4.
    """

    paper = "Aljundi 2018"
    source = "https://arxiv.org/abs/1711.09601"
    citation = """@inproceedings{aljundi2018memory,
  title = {Memory Aware Synapses: Learning what (not) to forget},
  author = {Aljundi, Rahaf and Babiloni, Francesca and Elhoseiny, Mohamed and Rohrbach, Marcus and Tuytelaars, Tinne},
  booktitle = {European Conference on Computer Vision},
  year = {2018}
}"""

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)
        self.scale = self.config.strength

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks that the stream's data can be measured, too."""
        return need_samples(self, super().checked(scenario), self.config.samples)

    @torch.no_grad()
    def after_task(self, item: Any, runtime: "Runtime") -> None:
        """Adds the task's importance to that of the tasks before, and moves the anchor here."""

        def norms(outputs: Tensor, labels: Tensor, uniform: Tensor) -> Tensor:
            return squared_norm(outputs)

        found = mean_over_examples(self, item, runtime, norms, 1, self.config.samples)
        self.hold({name: self.importance.like(name, p) + found[name] for name, p in self.learned().items()})
