"""Elastic weight consolidation (Kirkpatrick et al., 2017)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hubtransfer.data import Batch, TaskStream
from hubtransfer.functional.fisher import FISHER_KINDS, FisherKind
from hubtransfer.methods.importance import fisher_diagonal, need_classes, need_samples
from hubtransfer.methods.quadratic_penalty import QuadraticPenalty
from hubtransfer.methods.update import Terms
from hubtransfer.models import TransferModel

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class EWCConfig:
    """Hyper-parameters of `EWC`.

    Attributes:
        strength: lambda, how hard important parameters are held.
        fisher: "exact" (over all classes), "sampled" (a class drawn from the model), "predicted" or "label" (the
            empirical Fisher). See `hubtransfer.functional.fisher`.
        samples: Examples of a task on which the Fisher information is measured (default: all): random
            ones, or the first ones of data without an end.
    """

    strength: float = 1.0
    fisher: FisherKind = "exact"
    samples: int | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.strength < 0:
            raise ValueError(f"strength must not be negative, got {self.strength}")
        if self.fisher not in FISHER_KINDS:
            raise ValueError(f"fisher must be one of {', '.join(FISHER_KINDS)}, got {self.fisher!r}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")


class EWC(QuadraticPenalty, name="ewc", config=EWCConfig):
    r"""Holds each parameter near where every earlier task left it, as hard as the Fisher information says it mattered.

    .. math:: L = L_t + \sum_{k<t} \frac{\lambda}{2} \sum_j F_{k,j} (\theta_j - \theta^*_{k,j})^2, \quad
       F_{k,j} = \frac{1}{N} \sum_i E_{y \sim p(y | x_i)} \Big(\frac{\partial \log p(y | x_i)}{\partial \theta_j}\Big)^2

    with F of the model that task k left, (parameters,), from gradients of single examples in evaluation mode. Applies
    to streams of every kind and any backbone; heads predict classes.

    Args:
        model: The model, with a head for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: the sum over tasks is kept as one quadratic with the same values and gradients, so that
    memory does not grow: the sum of all F, its weighted mean of all anchors, and a constant.

    Source: https://arxiv.org/abs/1612.00796, equation 3; several tasks: section 2.1.
    """

    paper = "Kirkpatrick 2017"
    source = "https://arxiv.org/abs/1612.00796"
    citation = """@article{kirkpatrick2017overcoming,
  title = {Overcoming catastrophic forgetting in neural networks},
  author = {Kirkpatrick, James and Pascanu, Razvan and Rabinowitz, Neil and Veness, Joel and Desjardins, Guillaume and
            Rusu, Andrei A. and Milan, Kieran and Quan, John and Ramalho, Tiago and Grabska-Barwinska, Agnieszka and
            Hassabis, Demis and Clopath, Claudia and Kumaran, Dharshan and Hadsell, Raia},
  journal = {Proceedings of the National Academy of Sciences},
  year = {2017}
}"""

    constant: Tensor

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)
        self.scale = self.config.strength / 2
        self.register_buffer("constant", torch.zeros((), dtype=next(model.parameters()).dtype))

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks the stream's heads, and that its data can be measured, too."""
        items = need_samples(self, super().checked(scenario), self.config.samples)
        return need_classes(self, items, "Fisher information")

    def terms(self, batch: Batch) -> Terms:
        """Returns the scalar `penalty`, once a task has been learned."""
        return {name: value + self.scale * self.constant for name, value in super().terms(batch).items()}

    @torch.no_grad()
    def after_task(self, item: Any, runtime: "Runtime") -> None:
        """Adds the task's quadratic to the sum of those before: one quadratic around the weighted mean of anchors."""
        found = fisher_diagonal(self, item, runtime, self.config.fisher, self.config.samples)
        for name, parameter in self.learned().items():
            before, new = self.importance.like(name, parameter), found[name]
            both = before + new
            share = torch.where(both > 0, new / both, 1.0)
            moved = parameter - self.anchor.like(name, parameter)
            self.constant += (before * share * moved.square()).sum()
            self.anchor.keep({name: parameter - (1 - share) * moved})
            self.importance.keep({name: both})
