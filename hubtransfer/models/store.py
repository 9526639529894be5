"""Many tasks for one trunk: patches that load when they are asked for, the least recently used make room."""

from __future__ import annotations

import difflib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hubtransfer.models import files
from hubtransfer.models.mixed import Member, one_pass_is_possible
from hubtransfer.models.patch_files import HEAD_TENSORS, PATCH, SavedPatch, read_patch
from hubtransfer.patches import Layout, Patch, build_patch, packed, patch_to_dict

if TYPE_CHECKING:
    from hubtransfer.models.model import TransferModel

_KINDS = (FileNotFoundError, PermissionError, ConnectionError, OSError, ValueError)
Where = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]


class PatchStore:
    """Saved patches by task, of which at most some are in memory.

    A patch that can share a pass of the trunk with others (`Patch.gathered`) is kept as one row of numbers and its
    head: no modules, no copy of anything of the trunk, and half of what a scale-and-bias patch has on disk. Loading,
    giving and evicting are safe in several threads; what a batch was given stays whole while it runs.

    Attributes:
        model: Whose trunk the patches are for.
        source: Where they lie.
        capacity: How many may be in memory.
        max_bytes: How many bytes they may take.
        turn: Held by whoever uses the trunk.
    """

    def __init__(
        self, model: TransferModel, source: Where, *, capacity: int | None = 1000, max_bytes: int | None = None
    ) -> None:
        """Names the place; nothing is loaded yet.

        Args:
            model: Whose trunk the patches are for.
            source: A folder that holds a folder for each task; text with "{task}" in it, such as "me/{task}-patch", for
                repositories or folders named so; or a mapping from tasks to folders or repositories.
            capacity: How many patches may be in memory; None: any number.
            max_bytes: How many bytes they and their heads may take; None: any number.

        Raises:
            ValueError: if a bound is below 1.
            FileNotFoundError: if the folder does not exist.
        """
        for name, bound in (("capacity", capacity), ("max_bytes", max_bytes)):
            if bound is not None and bound < 1:
                raise ValueError(f"{name} must be at least 1 (or None: no bound), got {bound}")
        if not isinstance(source, Mapping) and "{task}" not in os.fspath(source):
            source = Path(source).expanduser()
            if not source.is_dir():
                raise FileNotFoundError(
                    f"{str(source)!r} is no folder with a folder for each task; for patches on the Hub give a name "
                    "with {task} in it, such as 'me/{task}-patch'"
                )
        self.model, self.source, self.capacity, self.max_bytes = model, source, capacity, max_bytes
        self.turn = RLock()
        self._members: OrderedDict[str, Member] = OrderedDict()  # the least recently used first
        self._built: dict[str, tuple[Patch, Layout | None]] = {}  # by config: what reads a saved patch of that kind

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        """Whether a task's patch is in memory."""
        return name in self._members

    @property
    def resident(self) -> tuple[str, ...]:
        """Tasks in memory, the least recently used first."""
        return tuple(self._members)

    @property
    def nbytes(self) -> int:
        """Bytes of the patches and heads in memory."""
        return sum(_bytes_of(member) for member in list(self._members.values()))

    def names(self) -> list[str]:
        """Tasks that there are, where the source can be listed: not for text with "{task}"."""
        if isinstance(self.source, Mapping):
            return list(self.source)
        if isinstance(self.source, Path):
            return sorted(path.parent.name for path in self.source.glob(f"*/{PATCH}"))
        return []

    def get(self, name: str) -> Member:
        """A task, loaded if it is not in memory; it is now the one used last.

        Raises:
            FileNotFoundError: if there is no patch of that name; the message names the folder and the nearest task.
            ValueError: if the patch is damaged or was made for another trunk, or the name is no plain name.
        """
        return self.hold([name])[0]

    def hold(self, names: Iterable[str]) -> list[Member]:
        """The tasks of one batch; none of them is evicted for another. Either all are loaded or nothing changes.

        Raises:
            FileNotFoundError: if there is no patch of a name.
            ValueError: as in `get`, or if the tasks are more than may be in memory.
        """
        names = list(dict.fromkeys(names))
        if self.capacity is not None and len(names) > self.capacity:
            raise ValueError(
                f"the batch has examples of {len(names)} tasks, but at most capacity={self.capacity} patches may be in "
                "memory; make the batch smaller or the capacity larger"
            )
        with self.turn:
            found = {name: self._members[name] for name in names if name in self._members}
        saved = {name: self._read(name) for name in names if name not in found}  # slow: nobody waits for it
        with self.turn:
            found |= {name: self._member(name, read) for name, read in saved.items()}
            size = sum(_bytes_of(member) for member in found.values())
            if self.max_bytes is not None and size > self.max_bytes:
                some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                raise ValueError(f"the patches of {some} take {size:,} bytes, more than max_bytes={self.max_bytes:,}")
            for name in names:
                self._members[name] = found[name]
                self._members.move_to_end(name)
            self._evict(set(names))
        return [found[name] for name in names]

    def forget(self, name: str | None = None) -> None:
        """Takes a task (or all) out of memory, so that it is read anew when it is next asked for."""
        with self.turn:
            if name is None:
                self._members.clear()
            else:
                self._members.pop(name, None)

    # ------------------------------------------------------------------------------------------------ mechanics

    def _evict(self, kept: set[str]) -> None:
        size = self.nbytes
        for name in [name for name in self._members if name not in kept]:
            over = self.capacity is not None and len(self._members) > self.capacity
            if not over and (self.max_bytes is None or size <= self.max_bytes):
                return
            size -= _bytes_of(self._members.pop(name))

    def _place(self, name: str) -> str | os.PathLike[str]:
        if not isinstance(name, str) or not name or name in (".", "..") or any(c in name for c in "/\\:\0"):
            raise ValueError(f"a task's name is a plain name without slashes, got {name!r}")
        if isinstance(self.source, Mapping):
            if name in self.source:
                return self.source[name]
        elif isinstance(self.source, Path):
            if (self.source / name).is_dir():
                return self.source / name
        else:
            return os.fspath(self.source).replace("{task}", name)
        where = "its mapping" if isinstance(self.source, Mapping) else f"{str(self.source / name)!r}"
        known = [*self.model.tasks, *self.names()]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f" ({len(known)} tasks: {', '.join(known[:5])})"
        raise FileNotFoundError(f"the store has no patch of task {name!r}: {where} does not exist{hint}")

    def _read(self, name: str) -> SavedPatch:
        place = self._place(name)
        try:
            return read_patch(place)
        except (ValueError, OSError) as error:
            kind = next(kind for kind in _KINDS if isinstance(error, kind))  # subclasses may want other arguments
            raise kind(f"task {name!r} from {os.fspath(place)!r}: {error}") from error

    @torch.no_grad()
    def _member(self, name: str, saved: SavedPatch) -> Member:
        backbone = self.model.backbone
        try:
            saved.check_fingerprint(backbone)
            patch, layout = self._reader(saved)
            if patch is not None and layout is None:  # it needs passes of its own and so modules of its own
                patch = build_patch(saved.patch, backbone).to(self.model.device)
            if patch is not None:
                patch.load_tensors(saved.tensors)
            module = self._head(saved, 0 if patch is None else patch.extra_dim)
        except ValueError as error:
            raise ValueError(f"task {name!r} from {str(saved.folder)!r}: {error}") from None
        if patch is None:
            return Member(name, saved.head, module)
        if layout is None:
            return Member(name, saved.head, module, patch.eval().requires_grad_(False))
        return Member(name, saved.head, module, None, packed(backbone, patch.gathered() or {})[1], layout)

    def _reader(self, saved: SavedPatch) -> tuple[Patch | None, Layout | None]:
        """The patch into which tensors of this kind are read, and its layout where it can be kept as a row."""
        if saved.patch is None:
            return None, None
        key = json.dumps(patch_to_dict(saved.patch), sort_keys=True)
        if key not in self._built:
            with torch.random.fork_rng(devices=[]), self.model.unmerged():
                patch = build_patch(saved.patch, self.model.backbone).to(self.model.device)
                owned = patch.gathered()
                fits = owned is not None and one_pass_is_possible(self.model, owned)
                self._built[key] = (patch, packed(self.model.backbone, owned)[0] if owned and fits else None)
        return self._built[key]

    def _head(self, saved: SavedPatch, extra_dim: int) -> nn.Module | None:
        if saved.head is None:
            return None
        with torch.random.fork_rng(devices=[]):
            module = saved.head.build(self.model.backbone, self.model.backbone.dim + extra_dim)
        files.fill(module.state_dict(keep_vars=True), saved.weights, str(saved.folder / HEAD_TENSORS))
        return module.eval().requires_grad_(False)

    def __reduce__(self) -> Any:
        """A copy of the store (with a copy of its model) starts empty."""
        make = partial(PatchStore, capacity=self.capacity, max_bytes=self.max_bytes)
        return make, (self.model, self.source)


def _bytes_of(member: Member) -> int:
    tensors: list[Tensor] = [] if member.row is None else [member.row]
    for module in (member.module, member.patch):
        tensors += [] if module is None else [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
