"""Online elastic weight consolidation (Schwarz et al., 2018)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hubtransfer.data import TaskStream
from hubtransfer.methods.continual.ewc import EWCConfig
from hubtransfer.methods.importance import fisher_diagonal, need_classes, need_samples
from hubtransfer.methods.quadratic_penalty import QuadraticPenalty
from hubtransfer.models import TransferModel

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class OnlineEWCConfig(EWCConfig):
    """Hyper-parameters of `OnlineEWC`: those of `EWC`, and how fast the old importance decays.

    Attributes:
        gamma: Share of the earlier tasks' importance that stays when a task is added.
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        super().__post_init__()
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], got {self.gamma}")


class OnlineEWC(QuadraticPenalty, name="online_ewc", config=OnlineEWCConfig):
    r"""Holds each parameter near where the last task left it, by the Fisher information of all tasks, the old decaying.

    .. math:: L = L_t + \frac{\lambda}{2} \sum_j F^*_{t-1,j} (\theta_j - \theta^*_{t-1,j})^2, \quad
       F^*_t = \gamma F^*_{t-1} + F_t

    with F_t of the model that task t left, (parameters,), from gradients of single examples in evaluation mode. Applies
    to streams of every kind and any backbone; heads predict classes.

    Args:
        model: The model, with a head for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: Fisher information is not normalised, and the penalty has F* where the paper has gamma F*,
    which is a matter of lambda alone; there is no knowledge base to compress into.

    Source: https://arxiv.org/abs/1805.06370, section 3.1, equations 8 and 9.
    """

    paper = "Schwarz 2018"
    source = "https://arxiv.org/abs/1805.06370"
    citation = """@inproceedings{schwarz2018progress,
  title = {Progress \\& Compress: A scalable framework for continual learning},
  author = {Schwarz, Jonathan and Luketina, Jelena and Czarnecki, Wojciech M. and Grabska-Barwinska, Agnieszka and
            Teh, Yee Whye and Pascanu, Razvan and Hadsell, Raia},
  booktitle = {International Conference on Machine Learning},
  year = {2018}
}"""

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)
        self.scale = self.config.strength / 2

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks the stream's heads, and that its data can be measured, too."""
        items = need_samples(self, super().checked(scenario), self.config.samples)
        return need_classes(self, items, "Fisher information")

    @torch.no_grad()
    def after_task(self, item: Any, runtime: "Runtime") -> None:
        """Lets the old importance decay, adds the task's, and moves the anchor here."""
        found = fisher_diagonal(self, item, runtime, self.config.fisher, self.config.samples)
        decayed = {name: self.config.gamma * value for name, value in self.importance.tensors().items()}
        self.importance.keep(decayed)
        learned = self.learned()
        self.hold({name: self.importance.like(name, p) + found[name] for name, p in learned.items()})
