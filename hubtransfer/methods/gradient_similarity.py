"""Cosines between the gradients of single examples, whichever heads answer for them."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hubtransfer.data import Batch
from hubtransfer.methods.continual_method import ContinualMethod
from hubtransfer.models.gradient_products import ExampleGradients, GradientsOfExamples


class Gradients(NamedTuple):
    """Gradients of the examples of a batch.

    Attributes:
        size: Examples.
        by_head: Which examples one head answers for, and their gradients.
        device: Where the examples are.
    """

    size: int
    by_head: list[tuple[Tensor, ExampleGradients]]
    device: torch.device = torch.device("cpu")

    def cosines(self, other: "Gradients") -> Tensor:
        """Returns cosines with the gradients of another batch's examples, (own, other's)."""
        blocks = [(r, c, g.cosines(h)) for r, g in self.by_head for c, h in other.by_head]
        if len(blocks) == 1 and blocks[0][2].shape == (self.size, other.size):
            return blocks[0][2]
        found = torch.zeros(self.size, other.size, dtype=blocks[0][2].dtype if blocks else None, device=self.device)
        for rows, columns, block in blocks:
            found[rows[:, None].to(self.device), columns[None].to(self.device)] = block
        return found


class GradientSimilarity:
    """Gives a method's gradients of single examples, by the parameters that the current task trains.

    Of an example of another task, with a head or patch of its own, these are the gradients by what both tasks train.
    """

    def __init__(self, method: ContinualMethod) -> None:
        self._method = method
        self._gradients = GradientsOfExamples(method.model, partial(F.cross_entropy, reduction="none"))
        self._shared: dict[str, dict[str, Tensor]] = {}

    def forget(self) -> None:
        """Has to be called when another task begins, or the model changes its structure."""
        self._shared = {}

    def of(self, batch: Batch) -> Gradients:
        """Returns the gradients of a batch's examples; the model has to be in evaluation mode."""
        method, tasks, found = self._method, self._method.task_of(batch), []
        for task in [tasks] if isinstance(tasks, str) else dict.fromkeys(tasks):
            rows = torch.tensor([row for row in range(len(batch)) if isinstance(tasks, str) or tasks[row] == task])
            part = batch if isinstance(tasks, str) else batch.rows(rows)
            if parameters := self._shared_with(task):
                found.append((rows, self._gradients.of(task, part.inputs, method.labels(part), parameters)))
        return Gradients(len(batch), found, next(iter(batch.inputs.values())).device)

    def _shared_with(self, task: str) -> dict[str, Tensor]:
        if task not in self._shared:
            model = self._method.model
            groups = model.trainable("patch" if task in model.patches else "all", task)
            own = {id(p) for group in groups for p in group["params"]}
            self._shared[task] = {name: p for name, p in self._method.learned().items() if id(p) in own}
        return self._shared[task]
