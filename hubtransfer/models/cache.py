"""Outputs kept by example number, so that what never changes is computed once."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from hubtransfer.data.processes import everywhere, from_process, world

if TYPE_CHECKING:
    from hubtransfer.data import Batch

logger = logging.getLogger(__name__)


class OutputCache(nn.Module):
    """Rows of outputs of unchanging data sets, by example number.

    Memory is taken once for all examples of a data set, on the device of the outputs; rows are written and read for a
    whole batch at a time. What is cached is not saved: a module only so that the sizes of batches are (see `outputs`).

    Attributes:
        limit: Most bytes held in memory; a data set that would exceed it goes to `folder`.
        folder: Where rows beyond the limit are kept, in files that are mapped into memory and vanish with the process,
            each process its own. Without one, a data set beyond the limit is not cached, which is logged once; so is
            why inputs that may change are not.
    """

    def __init__(self, limit: int = 2 << 30, folder: str | PathLike[str] | None = None) -> None:
        super().__init__()
        self.limit = limit
        self.folder = folder
        self._tables: dict[str, _Table | None] = {}
        self._batch: dict[str, int] = {}
        self._refused: set[str] = set()

    def outputs(
        self, batch: Batch, compute: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], of: str = ""
    ) -> tuple[Tensor, ...]:
        """Returns `compute(inputs)` for a batch, from memory where all its examples are known.

        A matrix product may round an example's row otherwise in a batch of another size, so that a run that was resumed
        would differ in the last bit from one that was not. Therefore a smaller batch (the last one of an epoch) is
        filled up to the size of the largest with copies of its first example.

        Args:
            batch: Kept where `origin` and `index` are set.
            compute: Maps inputs (batch, ...) to tensors (batch, ...), each row from its own example alone.
            of: What is computed, where that is not always the same.
        """
        if batch.origin is None or batch.index is None:
            self._refuse(batch)
            return compute(batch.inputs)
        key = batch.origin + of
        known = self.lookup(key, batch.index)
        if known is not None:
            device = next(iter(batch.inputs.values())).device
            return tuple(tensor.to(device) for tensor in known)
        count = len(batch)
        missing = self._batch.setdefault(batch.origin, count) - count
        if missing <= 0:
            self._batch[batch.origin] = count
            result = compute(batch.inputs)
        else:
            filled = {k: torch.cat([v, v[:1].expand(missing, *v.shape[1:])]) for k, v in batch.inputs.items()}
            result = tuple(tensor[:count] for tensor in compute(filled))
        self.store(key, batch.index, result, batch.size)
        return result

    def _refuse(self, batch: Batch) -> None:
        """Logs once why nothing is kept."""
        reason = batch.changing or "the batch does not name the unchanging data set that it comes from"
        if reason not in self._refused:
            self._refused.add(reason)
            logger.warning("outputs of a frozen network are computed at each step instead of being cached: %s", reason)

    def get_extra_state(self) -> Tensor:
        """The largest batch seen of each data set, as JSON in a tensor of bytes."""
        return torch.frombuffer(bytearray(json.dumps(self._batch).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """The counterpart of `get_extra_state`."""
        self._batch = json.loads(bytes(state.cpu().tolist()))

    def lookup(self, origin: str | None, index: Tensor | None) -> tuple[Tensor, ...] | None:
        """Returns what was stored for these examples, tensors (batch, ...), or none if any of them is missing.

        Args:
            origin: Key of the data set; none for inputs that are never the same again.
            index: Example numbers (batch,), int64.
        """
        table = self._tables.get(origin) if origin is not None else None
        if table is None or index is None:
            return None
        index = index.cpu()
        if len(index) and int(index.max()) >= len(table.known):
            return None
        if not bool(table.known[index].all()):
            return None
        rows = index.to(table.tensors[0].device, non_blocking=True)
        return tuple(tensor[rows] for tensor in table.tensors)

    def store(
        self, origin: str | None, index: Tensor | None, outputs: Sequence[Tensor], size: int | None = None
    ) -> None:
        """Keeps the outputs of these examples.

        Args:
            origin: Key of the data set; none keeps nothing.
            index: Example numbers (batch,), int64, non-negative.
            outputs: Tensors (batch, ...), row k belonging to example `index[k]`.
            size: Number of examples of the data set, where it is known.
        """
        if origin is None or index is None or not len(index):
            return
        index = index.cpu()
        needed = max(size or 0, int(index.max()) + 1)
        table = self._tables.get(origin)
        if origin in self._tables and table is None:
            return  # too large
        if table is not None and any(new.shape[1:] != old.shape[1:] for new, old in zip(outputs, table.tensors)):
            logger.warning("outputs are of unequal shapes and computed at each step instead of being cached")
            self._tables[origin] = None
            return
        if table is None or needed > len(table.known):
            table = self._make(origin, table, needed, outputs)
            if table is None:
                return
        rows = index.to(table.tensors[0].device, non_blocking=True)
        for tensor, output in zip(table.tensors, outputs):
            tensor[rows] = output.detach().to(tensor)
        table.known[index] = True

    @torch.no_grad()
    def share(self) -> None:
        """Tells the other processes the rows they lack; all of them have to call it, with the same module, at one time.

        Each process sees another share of the examples in each epoch: once all have shared the rows of the first, none
        computes a row that another one knows. What only some of them keep stays theirs.
        """
        if world() == 1:
            return
        tables = {key: table for key, table in self._tables.items() if table is not None}
        forms: list[dict[str, str]] = gather_object([{key: table.form() for key, table in tables.items()}])
        for key in sorted(forms[0]):
            if all(each.get(key) == forms[0][key] for each in forms):
                tables[key].share()

    def clear(self) -> None:
        """Forgets what it holds."""
        self._tables.clear()

    def bytes(self) -> int:
        """Memory held, in bytes; what lies on disk does not count."""
        held = [table for table in self._tables.values() if table is not None and not table.on_disk]
        return sum(t.numel() * t.element_size() for table in held for t in table.tensors)

    def _limit(self, device: torch.device) -> int:
        """The limit; on a GPU at most a quarter of what is free there, for a network trains beside it."""
        if device.type != "cuda":
            return self.limit
        return min(self.limit, self.bytes() + torch.cuda.mem_get_info(device)[0] // 4)

    def _make(self, origin: str, old: _Table | None, rows: int, like: Sequence[Tensor]) -> _Table | None:
        """Takes memory for a data set; twice as much as needed where its size was not announced."""
        rows = rows if old is None else max(rows, 2 * len(old.known))
        wanted = sum(rows * tensor[0].numel() * tensor.element_size() for tensor in like)
        on_disk = self.bytes() + wanted > self._limit(like[0].device)
        if on_disk and self.folder is None:
            logger.warning(
                "outputs of %d examples would take %.1f GiB and are computed at each step instead of being cached; "
                "OutputCache(folder=...) keeps them on disk",
                rows,
                wanted / 2**30,
            )
            self._tables[origin] = None
            return None
        shapes = [(rows, *tensor.shape[1:]) for tensor in like]
        if on_disk:
            assert self.folder is not None
            tensors = [_on_disk(shape, tensor.dtype, self.folder) for shape, tensor in zip(shapes, like)]
        else:
            tensors = [tensor.new_empty(shape, requires_grad=False) for shape, tensor in zip(shapes, like)]
        table = _Table(tensors, rows, on_disk)
        if old is not None:
            count = len(old.known)
            table.known[:count] = old.known
            for new, before in zip(table.tensors, old.tensors):
                new[:count] = before
        self._tables[origin] = table
        return table


class _Table:
    """One data set's rows, and which of them are known."""

    def __init__(self, tensors: list[Tensor], rows: int, on_disk: bool = False) -> None:
        self.tensors = tensors
        self.on_disk = on_disk
        self.known = torch.zeros(rows, dtype=torch.bool)

    def form(self) -> str:
        """Shapes and types, which processes have to agree on."""
        return str([(tensor.dtype, tuple(tensor.shape)) for tensor in self.tensors])

    def share(self, at_once: int = 1024) -> None:
        """Fills in rows that other processes know, so many at a time, each from the first process that knows it."""
        device = PartialState().device  # where processes talk to one another
        known = everywhere(self.known.to(device, torch.uint8)[None]).cpu().bool()
        told = known.any(0) & ~known.all(0)
        first = known.int().argmax(0)
        for source in range(world()):
            for rows in (told & (first == source)).nonzero()[:, 0].split(at_once):
                for tensor in self.tensors:
                    place = rows.to(tensor.device)
                    tensor[place] = from_process(source, tensor[place].to(device)).to(tensor)
        self.known |= told


def _on_disk(shape: Sequence[int], dtype: torch.dtype, folder: str | PathLike[str]) -> Tensor:
    """A tensor in a file that has no name any more: its room is free again once nobody holds the tensor."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as place:
        tensor = torch.from_file(f"{place}/rows", shared=True, size=math.prod(shape), dtype=dtype)
    return tensor.view(*shape)
