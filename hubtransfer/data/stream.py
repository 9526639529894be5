"""Batches of data that can only be read in their own order."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from hubtransfer.data.augmented import STREAMED
from hubtransfer.data.batch import Batch
from hubtransfer.data.reader import Processor, as_batch, process
from hubtransfer.data.seeds import seed_of, seeded
from hubtransfer.data.source import Source, find_fields
from hubtransfer.data.table import as_item, collate


class StreamReader:
    """Reads a stream in global batches and keeps this process's share of each.

    Every process reads the whole stream but processes its own share only, so the batches do not depend on the
    number of processes. A stream that can say where it stands (``state_dict``) is resumed there; any other one is
    read again up to that place.

    Args:
        source: the stream.
        processor: turns images or texts into inputs.
        batch_size: examples a step and process.
        seed: for streams whose own code is random.
        rank: number of this process.
        world: number of processes.
        trim: cut a smaller last global batch to a multiple of ``world``.
        augment: ``augment(batch, epoch, step, total, offset) -> batch``.
    """

    def __init__(
        self,
        source: Source,
        processor: Processor | None,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        trim: bool,
        augment: Callable[[Batch, int, int, int, int], Batch],
    ):
        self.source, self.processor, self.augment = source, processor, augment
        self.batch_size, self.seed, self.rank, self.world, self.trim = batch_size, seed, rank, world, trim

    def batches(self, epoch: int, start: int, state: Any, workers: int) -> Iterator[tuple[Batch, Any]]:
        """Batches from number ``start`` on, each with the state of the stream after it.

        ``state`` is where the stream stands at ``start`` when that is known. With workers one process reads ahead.
        """
        if not workers:
            return self._read(epoch, start, state)
        ahead = _Ahead(partial(self._read, epoch, start, state))
        # A generator of its own: the loader would draw its worker's seed from the one that training uses
        return iter(DataLoader(ahead, batch_size=None, num_workers=1, generator=torch.Generator()))

    def _read(self, epoch: int, start: int, state: Any) -> Iterator[tuple[Batch, Any]]:
        total = self.batch_size * self.world
        first, data, examples = self._open(epoch, start, state)
        for step in itertools.count(first):
            # Random transforms in the stream's own code: the same at every resume
            with seeded(seed_of(self.seed, "stream", self.source.name, epoch, step)):
                items = list(itertools.islice(examples, total))
            if step < start and items:
                continue
            if self.trim:
                items = items[: len(items) - len(items) % self.world]
            if not items:
                if step == 0:
                    hint = "give a data set that has some or, where it can be read only once, a function that makes it"
                    raise ValueError(f"{self.source.where} gave no examples in epoch {epoch}; {hint} anew")
                return
            share = len(items) // self.world if self.trim else self.batch_size
            offset = self.rank * share
            if offset >= len(items):
                return  # without trimming the last processes may be left without examples
            # The state of a stream with a skip in it means nothing to the stream itself
            after = data.state_dict() if _exact(data) and (first == 0 or state is not None) else None
            yield self._batch(items[offset : offset + share], epoch, step, total, offset), after

    def _open(self, epoch: int, start: int, state: Any) -> tuple[int, Any, Iterator[Any]]:
        """The stream at batch ``start``, or at an earlier one, whose number comes with it."""
        data = self.source.dataset
        data = data() if callable(data) and not hasattr(data, "__iter__") else copy.copy(data)
        if hasattr(data, "set_epoch"):
            data.set_epoch(epoch)
        if state is not None:
            data.load_state_dict(copy.deepcopy(state))
            return start, data, iter(data)
        if start and _exact(data) and hasattr(data, "skip"):  # without decoding; a shuffled one would change its order
            data = data.skip(start * self.batch_size * self.world)
            return start, data, iter(data)
        return 0, data, iter(data)

    def _batch(self, items: Sequence[Any], epoch: int, step: int, total: int, offset: int) -> Batch:
        where = self.source.where
        examples: list[Mapping[str, Any]] = [as_item(item, where) for item in items]
        fields = find_fields(list(examples[0]), self.source)
        values = process(collate(examples, fields.columns, where), fields, self.processor, where)
        return self.augment(as_batch(values, self.source, None, changing=STREAMED), epoch, step, total, offset)


class _Ahead(IterableDataset):
    """A stream's batches for the one worker process that reads ahead."""

    def __init__(self, read: Callable[[], Iterator[tuple[Batch, Any]]]):
        self.read = read

    def __iter__(self) -> Iterator[tuple[Batch, Any]]:
        return self.read()


def _exact(data: Any) -> bool:
    """Whether the stream's own state brings it back exactly; a ``datasets`` shuffle buffer is lost with it."""
    if not (hasattr(data, "state_dict") and hasattr(data, "load_state_dict")):
        return False
    if not hasattr(data, "_ex_iterable"):
        return not type(data).__module__.startswith("datasets.")
    layer = data._ex_iterable
    while layer is not None:
        if "BufferShuffled" in type(layer).__name__:
            return False
        layer = getattr(layer, "ex_iterable", None)
    return True
