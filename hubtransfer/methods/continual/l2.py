"""L2 regularisation towards the weights of the last task: what elastic weight consolidation is compared with."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hubtransfer.methods.quadratic_penalty import QuadraticPenalty
from hubtransfer.models import TransferModel

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class L2Config:
    """Hyper-parameters of `L2`.

    Attributes:
        strength: lambda, how hard weights are held.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.strength < 0:
            raise ValueError(f"strength must not be negative, got {self.strength}")


class L2(QuadraticPenalty, name="l2", config=L2Config):
    r"""Holds all parameters alike near the values that the task before left.

    .. math:: L = L_t + \frac{\lambda}{2} \|\theta - \theta^*_{t-1}\|_2^2

    Applies to streams of every kind, any head and any backbone.

    Args:
        model: The model, with a head for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: nothing; the paper gives no formula for this baseline beyond its name.

    Source: https://arxiv.org/abs/1612.00796, section 2.1, figure 2 (the comparison).
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

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)
        self.scale = self.config.strength / 2

    def after_task(self, item: Any, runtime: "Runtime") -> None:
        """Anchors what the task has trained."""
        self.hold({name: torch.ones_like(parameter) for name, parameter in self.learned().items()})
