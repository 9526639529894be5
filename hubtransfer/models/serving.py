"""A model that answers for many tasks: which of them are its own, which come from a store, and whose turn it is."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, cast

import torch

from hubtransfer.models.mixed import Member
from hubtransfer.models.switching import Switching
from hubtransfer.patches import checkpointing_is_on

if TYPE_CHECKING:
    from hubtransfer.models.model import TransferModel
    from hubtransfer.models.store import PatchStore, Where

_NOBODY: AbstractContextManager[object] = nullcontext()


class Serving(Switching):
    """What a `TransferModel` does for batches of several tasks.

    Attributes:
        store: Where tasks come from that the model does not have itself; none by default.
        one_pass: Layers in which tasks may differ -> whether one pass of the trunk does for all of them, once tried.
    """

    def serve(self, source: Where, *, capacity: int | None = 1000, max_bytes: int | None = None) -> PatchStore:
        """Lets tasks come from saved patches: from now on they are loaded when they are first named.

        A batch may have examples of any of them, ``model(x, task=["birds", "cars", ...])``, and takes one pass of the
        trunk. Calls are then safe in several threads, in evaluation mode; they take turns.

        Args:
            source: A folder that holds a folder for each task; text with "{task}" in it, such as "me/{task}-patch", for
                repositories or folders named so; or a mapping from tasks to folders or repositories.
            capacity: How many patches may be in memory; the least recently used make room. None: any number.
            max_bytes: How many bytes they and their heads may take; None: any number.

        Returns:
            The store; also the attribute `store`, which may be set to None again.

        Raises:
            ValueError: if a bound is below 1.
            FileNotFoundError: if the folder does not exist.
        """
        from hubtransfer.models.store import PatchStore

        self.store = PatchStore(cast("TransferModel", self), source, capacity=capacity, max_bytes=max_bytes)
        return self.store

    def members(self, names: Iterable[str]) -> list[Member]:
        """Tasks by name, the model's own or the store's.

        Raises:
            ValueError: if there is no such task, or one from the store is asked for in training or while another one
                is merged.
            FileNotFoundError: if the store has no such patch.
        """
        model = cast("TransferModel", self)
        names = list(names)
        others = [name for name in names if self.is_stored(name)]
        if others:
            self._refuse_when_merged(f"run task {others[0]!r}")
            if self.training:
                raise ValueError(f"task {others[0]!r} comes from the store, which only evaluates: model.eval() first")
        held = dict(zip(others, self.store.hold(others))) if self.store is not None else {}
        found = []
        for name in names:
            if name in held:
                found.append(held[name])
            else:
                spec = model.tasks[model.task_name(name)]
                found.append(Member(name, spec.head, self.heads.get(name), self.patches.get(name)))  # type: ignore[arg-type]
        return found

    def is_stored(self, name: str) -> bool:
        """Whether a task is not the model's own and so has to come from the store."""
        return self.store is not None and name not in cast("TransferModel", self).tasks

    @property
    def may_gather(self) -> bool:
        """Whether tasks with patches may share a pass: statistics stay, and nothing is recomputed later."""
        if self.training or self._merge is not None:
            return False
        return not (torch.is_grad_enabled() and checkpointing_is_on(self.backbone.trunk))

    def turn(self) -> AbstractContextManager[object]:
        """Held by whoever uses the trunk while a model is served to several threads."""
        return _NOBODY if self.store is None else self.store.turn
