"""Weighting by homoscedastic uncertainty (Kendall, Gal and Cipolla, 2018)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hubtransfer.data import Batch, MultiTask
from hubtransfer.data.processes import everywhere
from hubtransfer.methods.multi_task_method import MultiTaskMethod
from hubtransfer.methods.stage import OptimizerConfig, Stage
from hubtransfer.methods.task_losses import task_losses, task_streams
from hubtransfer.methods.update import AnyBatch, Descend, Terms
from hubtransfer.models import TransferModel


@dataclass(frozen=True, kw_only=True)
class UncertaintyConfig:
    """Hyper-parameters of `Uncertainty`.

    Attributes:
        initial: Value that every log variance starts from.
        lowest: Value that no log variance falls below.
    """

    initial: float = 0.0
    lowest: float = -10.0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: if the start lies below the lowest value.
        """
        if not self.initial >= self.lowest:
            raise ValueError(f"initial must not lie below lowest ({self.lowest}), got {self.initial}")


class Uncertainty(MultiTaskMethod, name="uncertainty", config=UncertaintyConfig):
    r"""Learns how noisy each task is, and weighs its loss by the inverse of that variance.

    .. math:: L = \sum_t c_t\, e^{-s_t} L_t + \tfrac{1}{2} s_t, \quad
       c_t = \tfrac{1}{2} \text{ for regression},\; 1 \text{ for classification}

    with one learned log variance a task, :math:`s_t = \log \sigma_t^2`, and the tasks' losses :math:`L_t` (mean squared
    errors, cross-entropies). The kind is the head's: heads for several labels or for pixels count as classification. At
    its minimum in s a term is :math:`s_t = \log(2 c_t L_t)`, where the weight is :math:`1 / (2 L_t)`. The sum may be
    negative. The log variances are a group of their own, `log_variance`, without weight decay.

    Args:
        model: A model with a head for every task.
        tasks: Names of the tasks that learn together (default: all of the model's).

    Differs from the paper: log variances stay at or above `lowest`, so a weight is at most :math:`c_t e^{10}`, as a
    loss of zero or less has no minimum in s. The authors' notebook has twice these terms, other implementations 1/2 for
    every kind; this is the paper.
    A task without labels in a batch adds nothing there, and its log variance stays.

    Source: https://arxiv.org/abs/1705.07115, equations 7 and 10, and the logarithm of section 3.2.
    """

    paper = "Kendall 2018"
    source = "https://arxiv.org/abs/1705.07115"
    citation = """@inproceedings{kendall2018multi,
  title = {Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics},
  author = {Kendall, Alex and Gal, Yarin and Cipolla, Roberto},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2018}
}"""

    def __init__(self, model: TransferModel, tasks: Sequence[str] | None = None, **config: Any) -> None:
        super().__init__(model, tasks, **config)
        start = float(self.config.initial)
        self.log_variance = nn.ParameterDict({task: nn.Parameter(torch.tensor(start)) for task in self.tasks})

    @property
    def weights(self) -> Tensor:  # type: ignore[override]
        """The factor of each task's loss, (tasks,)."""
        return torch.stack([self.weight(task) for task in self.tasks])

    def weight(self, task: str) -> Tensor:
        """Returns the factor of a task's loss, a scalar."""
        head = self.model.tasks[task].head
        factor = 0.5 if head is not None and head.kind == "regression" else 1.0
        return factor * torch.exp(-self.log_variance[task])

    def groups(self) -> Mapping[str, list[nn.Parameter]]:
        """Two groups: the model, and the log variances."""
        shared, own = self.shared_and_own()
        return {"model": [*shared, *own], "log_variance": list(self.log_variance.values())}

    def loss(self, batch: AnyBatch) -> Terms:
        """Returns each task's term under its name: scalars."""
        losses = task_losses(self.model, self.tasks, batch)
        labelled = everywhere(self.labelled(batch).int()[None]).any(0)  # on a process that has none, too: s is shared
        there = dict(zip(self.tasks, labelled.tolist()))
        if isinstance(batch, Batch):
            shares = dict.fromkeys(losses, 1.0)
        else:
            shares = {t: 0.0 if t not in batch else batch[t].share or 1.0 for t in losses}
        return {
            task: self.weight(task) * loss + shares[task] * self.log_variance[task] / 2 if there[task] else loss
            for task, loss in losses.items()
        }

    @torch.no_grad()
    def bound(self, batch: AnyBatch) -> None:
        """Keeps the log variances themselves in bounds: beyond, a task whose loss rises again could not get back."""
        for s in self.log_variance.values():
            s.clamp_(min=self.config.lowest)

    def stages(self, scenario: MultiTask) -> Iterator[Stage]:
        """One stage."""
        data = task_streams(scenario, self.tasks, "Uncertainty")
        undecayed = {"log_variance": OptimizerConfig(weight_decay=0.0)}
        descend = Descend(self.loss, trains=("model", "log_variance"), after=self.bound)
        yield Stage("train", data, [descend], optimizers=undecayed)
