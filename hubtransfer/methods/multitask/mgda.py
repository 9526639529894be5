"""Multiple-gradient descent (Sener and Koltun, 2018)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hubtransfer.functional.min_norm import min_norm_weights
from hubtransfer.methods.aggregate import Gradients, GramAggregator
from hubtransfer.methods.balance import Balancing, TaskGradients, over_labelled
from hubtransfer.models import TransferModel

Normalization = Literal["none", "l2", "loss", "loss+"]


@dataclass(frozen=True, kw_only=True)
class MGDAConfig:
    """Hyper-parameters of `MGDA`.

    Attributes:
        normalization: What each task's gradient is divided by: nothing, its norm ("l2"), the task's loss ("loss"), or
            both ("loss+").
    """

    normalization: Normalization = "none"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.normalization not in ("none", "l2", "loss", "loss+"):
            raise ValueError(f"normalization must be 'none', 'l2', 'loss' or 'loss+', got {self.normalization!r}")


class MinNorm(GramAggregator):
    r"""Weights of the shortest convex combination of (normalised) gradients.

    .. math:: w_t \propto \alpha_t / n_t, \quad
       \alpha = \arg\min_{\alpha \ge 0,\, \sum \alpha_t = 1} \Big\|\sum_t \alpha_t g_t / n_t\Big\|

    The sum of the weights is 1. The combination conflicts with no task: its inner product with every gradient is
    non-negative, and is zero for all tasks only at a Pareto-stationary point.
    """

    def __init__(self, normalization: Normalization = "none") -> None:
        self.normalization = normalization

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Maps the Gram matrix (terms, terms) and the losses (terms,) to weights (terms,)."""
        if not gram.sum().isfinite():
            return torch.full_like(losses, 1 / len(losses))  # the training loop names the loss that is not finite
        if self.normalization == "none":
            return min_norm_weights(gram)
        size = torch.ones_like(losses, dtype=gram.dtype)
        if self.normalization in ("l2", "loss+"):
            size = size * gram.diagonal().clamp(min=0).sqrt()
        if self.normalization in ("loss", "loss+"):
            size = size * losses.to(gram).abs()
        size = torch.where(size > 0, size, 1.0)  # a task without gradient or loss stays as it is: it is satisfied
        weights = min_norm_weights(gram / torch.outer(size, size)) / size
        return weights / weights.sum()


class MGDA(Balancing, name="mgda", config=MGDAConfig):
    r"""Moves the shared parameters so that no task's loss rises to first order; heads follow their own gradients.

    .. math:: \theta \leftarrow \theta - \eta \sum_t \alpha_t \nabla_\theta L_t, \quad
       \alpha = \arg\min_{\alpha \ge 0,\, \sum \alpha_t = 1} \Big\|\sum_t \alpha_t \nabla_\theta L_t\Big\|_2^2

    with trunk parameters (theta) and one loss a task. The problem is solved exactly on the Gram matrix (tasks, tasks).
    Tasks share inputs (one trunk forward) or bring their own batches.

    Args:
        model: A model with a head for every task.
        tasks: Names of the tasks that learn together (default: all of the model's).

    Differs from the paper: the exact solution in place of Frank-Wolfe; heads are not scaled by alpha, as in the
    paper's algorithm 2 but unlike the authors' code; with a normalisation the weights are divided by it too, so that
    the step still conflicts with no task (the code applies alpha to the raw gradients).

    Source: https://arxiv.org/abs/1810.04650, equation 3 and algorithm 2.
    """

    paper = "Sener & Koltun 2018"
    source = "https://arxiv.org/abs/1810.04650"
    citation = """@inproceedings{sener2018multi,
  title = {Multi-Task Learning as Multi-Objective Optimization},
  author = {Sener, Ozan and Koltun, Vladlen},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2018}
}"""

    def __init__(self, model: TransferModel, tasks: Sequence[str] | None = None, **config: Any) -> None:
        super().__init__(model, tasks, **config)
        self.rule = MinNorm(self.config.normalization)

    def combine(self, gradients: TaskGradients) -> Mapping[str, Gradients]:
        """The shortest combination for the trunk, plain gradients for the heads."""
        weights = over_labelled(self.rule.weights, self.gram(gradients), gradients)
        return {"shared": gradients.shared(self.keep(weights, gradients)), "heads": gradients.own()}

    def gram(self, gradients: TaskGradients) -> Tensor:
        """Inner products of the gradients that are compared: (tasks, tasks)."""
        return gradients.gram()
