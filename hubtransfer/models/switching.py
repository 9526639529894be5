"""Which task the trunk computes for: its patch goes in, and the modules that learn for it are in training mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from hubtransfer.backbones import Backbone
from hubtransfer.models.columns import earlier_maps
from hubtransfer.models.tasks import TaskModules
from hubtransfer.patches import applied, train_where_it_learns

if TYPE_CHECKING:
    from hubtransfer.models.store import PatchStore

_NOTHING: AbstractContextManager[None] = nullcontext()
_NOT_SET = object()


class Switching(nn.Module):
    """A backbone with one patch for each of some tasks, of which one at a time is in place.

    Attributes:
        backbone: The shared trunk.
        heads: Task name -> the head's module.
        patches: Task name -> its patch, for the tasks that have one.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = TaskModules()
        self.patches = TaskModules()
        self.active_task: str | None = None
        self._merge: tuple[str, AbstractContextManager[None]] | None = None
        self._mode_of: Any = _NOT_SET  # the task whose training flags the trunk's modules carry now
        self._modes: dict[str | None, list[tuple[nn.Module, bool]]] = {}
        self.one_pass: dict[frozenset[str], bool] = {}
        self.store: PatchStore | None = None

    def _merged_with(self, name: str) -> None:
        """Leaves the task's patch in place until `revert`."""
        patch: Any = self.patches._modules.get(name)
        if patch is not None and patch.hears is not None:
            raise ValueError(
                f"the patch of task {name!r} reads the trunk beside itself, so it cannot be merged into it; "
                f"run the task by name, model(..., task={name!r})"
            )
        self.revert()
        merging = applied(self.patches[name]) if name in self.patches else nullcontext()  # type: ignore[arg-type]
        merging.__enter__()
        self._merge = (name, merging)
        self._forget_modes()

    def revert(self) -> Self:
        """Undoes `merge`: the trunk has its own tensors again, the very same objects."""
        if self._merge is not None:
            self._merge[1].__exit__(None, None, None)
            self._merge = None
            self._forget_modes()
        return self

    def train(self, mode: bool = True) -> Self:
        """Puts what learns into training mode: modules without a trainable parameter stay in evaluation mode.

        So the statistics of a frozen trunk never drift. Call it after `requires_grad` is set.
        """
        super().train(False)
        self.training = mode
        self._forget_modes()
        if mode:
            for head in self.heads.values():
                train_where_it_learns(head)
            self._set_modes(self.active_task)
        return self

    @contextmanager
    def computing(self, name: str | None, inputs: Any = None) -> Iterator[None]:
        """While this lasts the trunk computes for the task, its modules in the mode that holds for it.

        Args:
            name: The task.
            inputs: What the trunk will get, which columns of other tasks see before.
        """
        patch: Any = self.patches._modules.get(name) if name is not None else None
        alone = patch is None or patch.hears is None
        hearing = _NOTHING if alone else patch.hearing(earlier_maps(self, patch, inputs))
        with hearing, self.placed(name):
            yield

    @contextmanager
    def placed(self, name: str | None) -> Iterator[None]:
        """The same, but for what a column hears."""
        if self.training and self._mode_of != name:
            self._set_modes(name)
        with self._running(name):
            yield

    def _running(self, name: str | None) -> AbstractContextManager[None]:
        """While this lasts the trunk computes what the task needs."""
        if self._merge is not None:
            if name != self._merge[0]:
                raise ValueError(
                    f"task {self._merge[0]!r} is merged into the trunk; model.revert() before {name!r} runs"
                )
            return _NOTHING
        patch = self.patches._modules.get(name) if name is not None else None
        return _NOTHING if patch is None else applied(patch)  # type: ignore[arg-type]

    def _set_modes(self, name: str | None) -> None:
        """Gives the trunk's modules the training flags that hold for a task: another one may train other parts."""
        with self._running(name):
            if name not in self._modes:
                train_where_it_learns(self.backbone)
                self._modes[name] = [(module, module.training) for module in self.backbone.modules()]
            for module, flag in self._modes[name]:
                module.__dict__["training"] = flag  # nn.Module.__setattr__ is ten times slower
        self._mode_of = name

    def _forget_modes(self) -> Self:
        self._modes.clear()
        self._mode_of = _NOT_SET
        return self

    def _refuse_when_merged(self, what: str) -> None:
        if self._merge is not None:
            raise ValueError(
                f"cannot {what} while task {self._merge[0]!r} is merged into the trunk: model.revert() first"
            )

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """Takes a merged patch out for a while."""
        merged = self._merge[0] if self._merge is not None else None
        self.revert()
        try:
            yield
        finally:
            if merged is not None:
                self._merged_with(merged)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with self.unmerged():  # .to() makes new buffers: they must land in the patch and in the trunk, not in one
            return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        with self.unmerged():
            self._forget_modes()
            clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone
