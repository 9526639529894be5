"""Batches of one data set or of several side by side: deterministic, resumable anywhere, equal over processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hubtransfer.data.augmented import Augmented
from hubtransfer.data.batch import Batch, Streams
from hubtransfer.data.mixing import Mixture, Span, Turns, turns_per_epoch
from hubtransfer.data.reader import Processor, Reader, as_batch, fingerprint_of, reader_for
from hubtransfer.data.seeds import seed_of
from hubtransfer.data.source import Source, is_mapping_of_datasets
from hubtransfer.data.stream import StreamReader

ONE = ""
"""Name of the only stream of a loader that gives plain batches."""


class Loader:
    """Batches of a source, or of several sources side by side.

    Order depends on ``(seed, epoch)`` alone and ``batches(epoch, start)`` reads nothing before ``start``. A global
    batch has ``batch_size * world`` examples and each process takes its contiguous share of it, so one process with
    batches of ``2n`` sees what two processes with ``n`` see together. An epoch's last global batch is cut to a
    multiple of ``world``, so that every process takes as many steps of equal size (``trim=False`` keeps those
    examples, for evaluation).

    With several sources an epoch is one pass over the longest; shorter ones start over with a fresh random order in
    the middle of a batch, so every stream of a step has the same number of examples. Sources that take turns (a
    :class:`~hubtransfer.data.mixing.Mixture`) have full batches only, and a step has those streams whose turn it is.

    Processing happens once an example where the result fits into ``cache_limit``; augmentation comes after it and
    leaves what is kept untouched. Otherwise images are kept decoded, or read by ``workers`` processes. Streams of
    unknown length are read by at most one worker, in their own order.

    Args:
        sources: a source, a mapping from names to sources, a mixture, or a bare data set.
        processor: turns images or texts into inputs; None: columns are the inputs.
        batch_size: examples a step and process. A data set smaller than the (global) batch gives one smaller batch.
        seed: of order and augmentation.
        stage: number of the stage that reads: each has random orders of its own, or every task of a stream would see,
            and remember, the same rows at the same time.
        rank: number of this process.
        world: number of processes.
        shuffle: whether epochs run in a fresh random order; False keeps the data set's.
        drop_last: leave out an epoch's smaller last batch (never its only one).
        trim: cut the last global batch to a multiple of ``world``.
        workers: processes that read data which are not kept in memory.
        device: where batches go; None: the CPU.
        cache_limit: bytes of processed or decoded examples that a source may keep.

    Raises:
        ValueError: sizes, rank or world make no sense, or fewer examples than processes.
    """

    def __init__(
        self,
        sources: Any,
        processor: Processor | None = None,
        *,
        batch_size: int,
        seed: int = 0,
        stage: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        drop_last: bool = False,
        trim: bool = True,
        workers: int = 0,
        device: torch.device | str | None = None,
        cache_limit: int = 2 * 2**30,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be 0 to {world - 1} for world = {world}, not {rank}")
        if workers < 0:
            raise ValueError(f"workers must be at least 0, not {workers}")
        self.single = not is_mapping_of_datasets(sources)
        named = {ONE: Source.of(sources)} if self.single else {name: Source.of(s) for name, s in sources.items()}
        if not named:
            raise ValueError("no sources")
        self.sources: dict[str, Source] = {name: source.check() for name, source in named.items()}
        self.processor, self.batch_size, self.seed, self.rank, self.world = processor, batch_size, seed, rank, world
        self.stage = stage
        self.shuffle, self.drop_last, self.trim, self.workers = shuffle, drop_last, trim, workers
        self.device, self.cache_limit = torch.device(device or "cpu"), cache_limit
        sizes = [len(source.table) for source in self.sources.values() if not source.iterable]
        self.unbounded = len(sizes) < len(self.sources)
        self.length = max(sizes, default=0)
        self.mixing = sources.mixing if isinstance(sources, Mixture) else None
        if self.mixing is not None and self.unbounded:
            endless = next(name for name, source in self.sources.items() if source.iterable)
            raise ValueError(f"data sets that take turns must have a size; that of {endless!r} is a stream without one")
        if trim and not self.unbounded and self.length < world:
            raise ValueError(f"{self.length} examples cannot be split over {world} processes")
        self._position: dict[str, Any] = {}

    @property
    def global_batch(self) -> int:
        """Examples that all processes together see in a step."""
        return self.batch_size * self.world

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches an epoch, or None when a source is a stream of unknown length."""
        if self.unbounded:
            return None
        if self.mixing is not None:
            return turns_per_epoch(self._sizes, self.global_batch)
        full, rest = divmod(self.length, self.global_batch)
        if self.trim:
            rest -= rest % self.world
        return full + int(rest > 0 and not (self.drop_last and full))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Batches ``start``, ``start + 1``, ... of an epoch: a :class:`Batch` each, or :data:`Streams` for a mapping.

        Raises:
            ValueError: the epoch has fewer than ``start`` batches.
        """
        steps = self.steps_per_epoch
        if not 0 <= start <= (start if steps is None else steps):
            raise ValueError(f"batch {start} of an epoch that has {steps}")
        if self.mixing is not None:
            yield from self._in_turns(epoch, start)
            return
        runs = [self._run(name, epoch, start) for name in self.sources]
        position = {name: self._position.get(name) for name in self.sources}
        self._position = {"epoch": epoch, "step": start, **{k: v for k, v in position.items() if v is not None}}
        # Not strict: streams of unknown length end when the first of them does
        for step, found in enumerate(zip(*runs), start + 1):
            states = {name: state for name, (_, state) in zip(self.sources, found) if state is not None}
            self._position = {"epoch": epoch, "step": step, **states}
            streams: Streams = {name: self._place(batch) for name, (batch, _) in zip(self.sources, found)}
            yield streams[ONE] if self.single else streams

    def _in_turns(self, epoch: int, start: int) -> Iterator[Streams]:
        """Batches of a mixture: in each step of the sources whose turn it is."""
        turns = self.turns(epoch)
        runs = {name: self._run(name, epoch, start) for name in self.sources}
        for step in range(start, turns.steps):
            self._position = {"epoch": epoch, "step": step + 1}
            present = [name for name in self.sources if turns.span(name, step, self.rank)]
            yield {name: self._place(next(runs[name])[0]) for name in present}

    def turns(self, epoch: int) -> Turns:
        """Who has which step of an epoch, for a mixture."""
        assert self.mixing is not None
        if self._turns is None or self._turns.epoch != epoch:
            self._turns = Turns(self.mixing, self._sizes, self.batch_size, self.world, self.seed, epoch)
        return self._turns

    _turns: Turns | None = None

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {name: len(source.table) for name, source in self.sources.items()}

    def state_dict(self) -> dict[str, Any]:
        """Where streams of unknown length stand after the last batch given; nothing else needs a state."""
        return dict(self._position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue streams where ``state`` says, so that ``batches(epoch, start)`` need not read up to ``start``."""
        self._position = dict(state)

    def _run(self, name: str, epoch: int, start: int) -> Iterator[tuple[Batch, Any]]:
        """One source's batches, each with the state its stream has after it (None for tables)."""
        source = self.sources[name]
        if source.iterable:
            stream = StreamReader(
                source,
                self.processor,
                batch_size=self.batch_size,
                seed=self.seed,
                rank=self.rank,
                world=self.world,
                trim=self.trim,
                augment=Augmented(source, self.seed, name),
            )
            at = self._position
            known = at.get(name) if (at.get("epoch"), at.get("step")) == (epoch, start) else None
            return stream.batches(epoch, start, known, self.workers)
        steps = self.steps_per_epoch
        numbers: Sequence[int] = range(start, 2**62 if steps is None else steps)
        if steps and numbers and self.mixing is not None:
            numbers = [step for step in numbers if self.span(name, epoch, step)]
        elif steps and numbers and self._share(self.bounds(steps - 1)) is None:
            numbers = numbers[:-1]  # without trimming the last processes may be left without examples
        fetch = _Fetch(self, name, epoch)
        if self.workers and fetch.reader.direct:
            dataset: Any = fetch
            # A generator of its own: the loader would draw its workers' seed from the one that training uses
            loader = DataLoader(
                dataset,
                batch_size=None,
                sampler=numbers,
                num_workers=self.workers,
                pin_memory=self._pinned,
                generator=torch.Generator(),
            )
            return ((batch, None) for batch in loader)
        return ((fetch[number], None) for number in numbers)

    def _share(self, bounds: tuple[int, int]) -> tuple[int, int] | None:
        """Where this process's rows of a global batch lie in it, ``[first, last)``; None if it has none."""
        count = bounds[1] - bounds[0]
        share = count // self.world if self.trim else self.batch_size
        first, last = self.rank * share, min((self.rank + 1) * share, count)
        return (first, last) if first < last else None

    def span(self, name: str, epoch: int, step: int) -> Span | None:
        """Positions of a source's rows in a step; None if this process has none."""
        if self.mixing is not None:
            return self.turns(epoch).span(name, step, self.rank)
        first, last = self.bounds(step)
        share = self._share((first, last))
        return None if share is None else Span(first, last, first + share[0], first + share[1])

    @property
    def _pinned(self) -> bool:
        return self.device.type == "cuda"

    def _place(self, batch: Batch) -> Batch:
        if self._pinned and all(value.device.type == "cpu" for value in batch.inputs.values()):
            batch = batch.pin_memory()
        return batch.to(self.device)

    @cached_property
    def _readers(self) -> dict[str, Reader]:
        return {
            name: reader_for(source, self.processor, self.cache_limit, self.device, in_process=not self.workers)
            for name, source in self.sources.items()
            if not source.iterable
        }

    def order(self, name: str, epoch: int, turn: int) -> Tensor:
        """Order in which a source is read at its ``turn``-th pass of an epoch, int64 ``(examples,)``."""
        source = self.sources[name]
        size = len(source.table)
        if not (self.shuffle and source.shuffle):
            return torch.arange(size)
        # The first stage reads in the order of a loader that knows of no stages
        place = (name, epoch, turn, *([self.stage] if self.stage else []))
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", *place))
        return torch.randperm(size, generator=generator)

    def bounds(self, step: int) -> tuple[int, int]:
        """Positions ``[first, last)`` in the epoch that the global batch of a step takes."""
        first = step * self.global_batch
        if self.unbounded:
            return first, first + self.global_batch
        last = min(first + self.global_batch, self.length)
        return first, last - (last - first) % self.world if self.trim else last


class _Fetch:
    """Batches of one table by step number: what a worker process needs."""

    def __init__(self, loader: Loader, name: str, epoch: int):
        self.loader, self.name, self.epoch = loader, name, epoch
        self.source, self.reader = loader.sources[name], loader._readers[name]
        self.size = len(self.source.table)
        self.orders: dict[int, Tensor] = {}
        self.augment = Augmented(self.source, loader.seed, name)
        plain = self.source.table.fixed and not self.source.augment
        settled = self.augment.changing is None
        key = fingerprint_of(self.source, loader.processor) if settled else ""
        self.origin = self.augment.origin(key, epoch)
        self.offers_raw = plain and self.reader.gives_unprocessed and not loader.workers

    def rows(self, first: int, last: int) -> Tensor:
        """Rows at positions ``[first, last)`` of the endless row of passes over the data set."""
        pieces = []
        while first < last:
            turn, offset = divmod(first, self.size)
            if turn not in self.orders:
                self.orders = {t: o for t, o in self.orders.items() if t == turn - 1}
                self.orders[turn] = self.loader.order(self.name, self.epoch, turn)
            piece = self.orders[turn][offset : offset + last - first]
            pieces.append(piece)
            first += len(piece)
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.long)

    def __getitem__(self, step: int) -> Batch:
        loader = self.loader
        span = loader.span(self.name, self.epoch, step)
        assert span is not None, "only steps in which this process has examples are fetched"
        together = self.rows(span.first, span.last)
        offset = span.own_first - span.first
        index = together[offset : span.own_last - span.first]
        seed = seed_of(loader.seed, "rows", self.name, self.epoch, step, loader.rank)
        values = self.reader.read(index, together, seed)
        facts: dict[str, Any] = {"origin": self.origin, "changing": self.augment.changing}
        facts["size"] = self.size if self.origin else None
        if self.offers_raw:
            facts["raw"] = partial(self.reader.unprocessed, index)
        batch = as_batch(values, self.source, index, **facts)
        if loader.mixing is not None and loader.mixing.batches == "mixed":
            batch = batch.replace(share=len(index) / loader.batch_size)
        return self.augment(batch, self.epoch, step, loader.global_batch, offset)


def in_groups(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yields batches by so many; the last group may be smaller."""
    if size == 1:
        for batch in batches:
            yield [batch]
        return
    while group := list(islice(batches, size)):
        yield group
