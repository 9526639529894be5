"""A method on several tasks of one model: which tasks, which data, and what each counts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hubtransfer.backbones import Towers
from hubtransfer.data import MultiTask
from hubtransfer.methods.method import Method
from hubtransfer.methods.task_losses import known_labels, shared_and_own, task_names
from hubtransfer.methods.update import AnyBatch
from hubtransfer.models import TransferModel


class MultiTaskMethod(Method, scenario=MultiTask):
    """Several tasks that learn together.

    Args:
        model: A model with a head for every task.
        tasks: Names of the tasks (default: all of the model's).
        **config: Hyper-parameters.

    Attributes:
        tasks: Their names, in order.
        weights: What each task counts at the moment, (tasks,); a subclass keeps it. The log shows it.
    """

    weights: Tensor

    def __init__(self, model: TransferModel, tasks: Sequence[str] | None = None, **config: Any) -> None:
        names = task_names(model, tasks, type(self).__name__)
        super().__init__(model, self.configure(config), task=names[0])
        self.tasks = names

    def watched(self) -> Mapping[str, Tensor | float]:
        """Returns the weight of each task."""
        return {f"weight/{task}": weight for task, weight in zip(self.tasks, self.weights.detach())}

    def shared_and_own(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Returns what may change of the trunk, which tasks share, and of their heads and patches.

        Parameters that were frozen (`requires_grad` false) before training are left out.
        """
        shared, own = shared_and_own(self.model, self.tasks)
        return [p for p in shared if p.requires_grad], [p for p in own if p.requires_grad]

    def alone(self) -> dict[str, str]:
        """Returns the tasks that cannot read the same output of the trunk as others, and why."""
        if isinstance(self.model.backbone, Towers):
            return dict.fromkeys(self.tasks, "has networks of its own")
        return {task: "has a patch" for task in self.tasks if task in self.model.patches}

    def labelled(self, batch: AnyBatch) -> Tensor:
        """Says which tasks have a label in this batch: bool (tasks,)."""
        return torch.stack([self._has_labels(task, batch) for task in self.tasks])

    def _has_labels(self, task: str, batch: AnyBatch) -> Tensor:
        known = known_labels(self.model, task, batch)
        return torch.zeros((), dtype=torch.bool, device=self.model.device) if known is None else known.any()
