"""A weighted sum of the tasks' losses: the baseline of every multi-task method (Caruana, 1997)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import nn

from hubtransfer.config import unknown_name
from hubtransfer.data import MultiTask
from hubtransfer.methods.multi_task_method import MultiTaskMethod
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.task_losses import task_losses, task_streams
from hubtransfer.methods.update import AnyBatch, Descend, Terms
from hubtransfer.models import TransferModel


@dataclass(frozen=True, kw_only=True)
class FixedWeightsConfig:
    """Hyper-parameters of `FixedWeights`.

    Attributes:
        weights: Task -> its factor, 1 for tasks that are left out: equal weighting by default.
    """

    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the task whose weight is negative or not finite.
        """
        for task, weight in (self.weights or {}).items():
            if not (isfinite(weight) and weight >= 0):
                raise ValueError(f"weights[{task!r}] must be finite and not negative, got {weight}")


class FixedWeights(MultiTaskMethod, name="fixed_weights", config=FixedWeightsConfig):
    r"""Trains all tasks on the weighted sum of their losses; with equal weights the baseline of every table.

    .. math:: L = \sum_t w_t L_t

    with one loss a task, a mean over the examples that have a label of it. Heads are scaled like the trunk.

    Args:
        model: A model with a head for every task.
        tasks: Names of the tasks that learn together (default: all of the model's).

    Raises:
        ValueError: if a weight belongs to no task.

    Differs from the paper: the losses' weights can be set.

    Source: https://doi.org/10.1023/A:1007379606734, section 2.
    """

    paper = "Caruana 1997"
    source = "https://doi.org/10.1023/A:1007379606734"
    citation = """@article{caruana1997multitask,
  title = {Multitask Learning},
  author = {Caruana, Rich},
  journal = {Machine Learning},
  volume = {28},
  pages = {41--75},
  year = {1997}
}"""

    def __init__(self, model: TransferModel, tasks: Sequence[str] | None = None, **config: Any) -> None:
        super().__init__(model, tasks, **config)
        given = self.config.weights or {}
        for task in given:
            if task not in self.tasks:
                raise ValueError(unknown_name("task", task, self.tasks, "FixedWeights.weights"))
        self.register_buffer("weights", torch.tensor([float(given.get(task, 1.0)) for task in self.tasks]))

    def groups(self) -> Mapping[str, list[nn.Parameter]]:
        """One group: the trunk and the tasks' heads and patches."""
        shared, own = self.shared_and_own()
        return {"model": [*shared, *own]}

    def loss(self, batch: AnyBatch) -> Terms:
        """Returns each task's weighted loss under its name: scalars."""
        losses = task_losses(self.model, self.tasks, batch)
        weights = dict(zip(self.tasks, self.weights))
        return {task: weights[task] * loss for task, loss in losses.items()}

    def stages(self, scenario: MultiTask) -> Iterator[Stage]:
        """One stage."""
        yield Stage("train", task_streams(scenario, self.tasks, "FixedWeights"), [Descend(self.loss)])
