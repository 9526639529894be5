"""A memory of the embeddings of all examples of a data set, by example number."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubtransfer.data.processes import everywhere

__all__ = ["EmbeddingBank", "everywhere"]


class EmbeddingBank(nn.Module):
    """Moving averages of teacher's and student's embeddings, saved and resumed with the method.

    It grows to the data set it is shown. Rows of examples that were not seen yet are random directions, the same in
    every process, of class -1. Processes write their examples into all banks.

    Attributes:
        teacher: (rows, d) of unit length.
        student: (rows, d) of unit length.
        classes: (rows,) int64.
    """

    teacher: Tensor
    student: Tensor
    classes: Tensor

    def __init__(self, dim: int, momentum: float, like: Tensor) -> None:
        """Starts empty; `like` gives dtype and device, `momentum` is the share of a row that stays."""
        super().__init__()
        self.momentum = momentum
        self.register_buffer("teacher", like.new_empty((0, dim), requires_grad=False))
        self.register_buffer("student", like.new_empty((0, dim), requires_grad=False))
        self.register_buffer("classes", torch.empty(0, dtype=torch.int64, device=like.device))
        self._sorted: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.classes)

    def reserve(self, rows: int) -> None:
        """Grows to at least so many rows."""
        have = len(self)
        if rows <= have:
            return
        new = torch.Generator().manual_seed(have)
        for name in ("teacher", "student"):
            old = getattr(self, name)
            random = torch.randn(rows - have, old.shape[1], generator=new, dtype=torch.float64)
            setattr(self, name, torch.cat([old, F.normalize(random, dim=1).to(old)]))
        self.classes = torch.cat([self.classes, self.classes.new_full((rows - have,), -1)])
        self._sorted = None

    def by_class(self) -> tuple[Tensor, Tensor]:
        """Returns the rows sorted by class and their classes."""
        if self._sorted is None:
            ordered, order = self.classes.sort()
            self._sorted = order, ordered
        return self._sorted

    @torch.no_grad()
    def learn_classes(self, index: Tensor, classes: Tensor) -> None:
        """Notes the classes of examples, those of other processes too."""
        index, classes = everywhere(index), everywhere(classes)
        self.reserve(int(index.max()) + 1)
        if not torch.equal(self.classes[index], classes):
            self.classes[index] = classes
            self._sorted = None

    @torch.no_grad()
    def update(self, index: Tensor, teacher: Tensor, student: Tensor) -> None:
        """Moves the rows of examples, those of other processes too, towards their embeddings (batch, d)."""
        index = everywhere(index)
        for bank, new in ((self.teacher, teacher), (self.student, student)):
            moved = self.momentum * bank[index] + (1 - self.momentum) * everywhere(new.detach().to(bank))
            bank[index] = F.normalize(moved, dim=1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("teacher", "student", "classes"):
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and saved.shape != own.shape and saved.shape[1:] == own.shape[1:]:
                setattr(self, name, own.new_empty(saved.shape))
        self._sorted = None
        super()._load_from_state_dict(state_dict, prefix, *args)
