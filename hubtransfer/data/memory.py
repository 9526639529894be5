"""What continual methods remember of the past: examples with their labels, logits, tasks.

Which examples are kept is said by the kind of memory (`hubtransfer.data.memory_kinds`); this file keeps them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubtransfer.data.batch import Batch
from hubtransfer.data.processes import everywhere, rank, world
from hubtransfer.functional.missing import known_classes, known_values

Processor = Callable[..., Mapping[str, Tensor]]

_FACTS = "facts"
_64_BITS = 2**64 - 1


@dataclass(frozen=True)
class MemoryConfig(ABC):
    """What every kind of memory has; a subclass names its `kind`, which is how recipes refer to it.

    Attributes:
        size: Examples kept at most, of all tasks together.
    """

    kind: ClassVar[str]
    size: int

    def __post_init__(self) -> None:
        """Checks the size.

        Raises:
            ValueError: if it leaves room for no example.
        """
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            raise ValueError(f"{type(self).__name__} needs room for at least one example, got size {self.size!r}")

    @abstractmethod
    def build(self, processor: Processor | None = None) -> Memory:
        """Makes the memory, empty.

        Args:
            processor: The model's; with it inputs are kept as they were before processing, where they are smaller then.
        """


@dataclass(frozen=True, eq=False)
class Replay(Batch):
    """Examples out of a memory.

    Attributes:
        kept: What was stored beside inputs and labels, by name, such as `logits`, each (batch, ...).
        tasks: Number of the task each example was added in, int64 (batch,).
        slots: Where each lies in the memory, int64 (batch,), on the CPU.
    """

    kept: dict[str, Tensor] = field(default_factory=dict)
    tasks: Tensor | None = None
    slots: Tensor | None = None

    def rows(self, keep: Tensor) -> Replay:
        """The examples that `keep` selects, by boolean mask or positions."""
        chosen = super().rows(keep)
        assert isinstance(chosen, Replay)
        assert self.tasks is not None and self.slots is not None
        kept = {name: value[keep.to(value.device)] for name, value in self.kept.items()}
        return replace(chosen, kept=kept, tasks=self.tasks[keep.to(self.tasks.device)], slots=self.slots[keep.cpu()])

    def span(self, first: int, last: int) -> Replay:
        """The examples `[first, last)`, without a copy."""
        assert isinstance(self.labels, Tensor)
        assert self.tasks is not None and self.slots is not None
        return Replay(
            inputs={name: value[first:last] for name, value in self.inputs.items()},
            labels=self.labels[first:last],
            kept={name: value[first:last] for name, value in self.kept.items()},
            tasks=self.tasks[first:last],
            slots=self.slots[first:last],
        )


class Memory(nn.Module, ABC):
    """Examples kept for later, in slots 0, 1, ... of which the first `len(memory)` are taken.

    Its content is a set of buffers, so it is saved and resumed with the method that owns it. Every decision is a
    function of (seed, number of decisions before), so a resumed run decides alike, and so do all processes: each adds
    the examples of all, and draws its share of what one process would draw alone. Adding and drawing cost O(batch),
    whatever the size, unless the kind of memory says otherwise.

    Inputs are kept raw (uint8 pixels) where the batch knows them, and processed when they are drawn.

    Attributes:
        size: Slots.
        seen: Examples added so far, kept or not.
        drawn: Draws so far.
        seed: Of its decisions; the trainer sets it to the run's.
    """

    def __init__(self, config: MemoryConfig, processor: Processor | None = None) -> None:
        super().__init__()
        self.config, self.size, self.processor = config, config.size, processor
        self.seed, self.seen, self.drawn, self.filled, self.is_raw = 0, 0, 0, 0, False
        self._generator = torch.Generator()
        self._place: Tensor  # follows the method from device to device
        self.register_buffer("_place", torch.empty(0), persistent=False)

    def __len__(self) -> int:
        return self.filled

    # ---------------------------------------------------------------------------------------------------- adding

    @abstractmethod
    def choose(self, count: int, labels: Tensor, task: int, kept: Mapping[str, Tensor]) -> np.ndarray:
        """Says where the next `count` examples go: int64 (count,), a slot each or -1 for none.

        Where two are given one slot the later example stays. Raises `filled` and does the memory's own bookkeeping.

        Args:
            count: Number of examples, those of all processes together.
            labels: (count,) or (count, ...).
            task: The task they belong to.
            kept: Further columns, (count, ...) each.
        """

    @torch.no_grad()
    def add(
        self, batch: Batch, *, task: int = 0, labels: Tensor | None = None, same: bool = False, **kept: Tensor
    ) -> None:
        """Offers the examples of a batch, in order, except those without a label.

        Args:
            batch: The examples.
            task: Number of the task they belong to.
            labels: Their labels, where the batch has several or none.
            same: Whether every process gives the same examples; otherwise the examples of all are added.
            **kept: What to keep beside them, (batch, ...) each, such as `logits`; the same names every time.

        Raises:
            ValueError: if there are no labels, or columns differ from those kept so far.
        """
        given = batch.labels if labels is None else labels
        if not isinstance(given, Tensor):
            raise ValueError(f"{type(self).__name__} keeps labels, but the batch has {type(given).__name__}")
        self._check_names(kept)
        gathered = _own if same or world() == 1 else everywhere
        labels, kept = gathered(given), {name: gathered(_whole(value)) for name, value in kept.items()}
        offered, some = _labelled(labels)
        if not len(offered):
            return
        slots = self.choose(len(offered), some(labels), task, {name: some(value) for name, value in kept.items()})
        self.seen += len(offered)
        rows = np.flatnonzero(slots >= 0)
        if not len(rows):  # with a full reservoir and a long past that is what happens most of the time
            return
        rows, slots = _last_of_each(rows, slots)
        stay = torch.from_numpy(offered[rows])
        columns = {"labels": labels} | {f"kept_{name}": value for name, value in kept.items()}
        columns |= {f"input_{name}": gathered(value) for name, value in self._inputs(batch).items()}
        chosen = {name: value.index_select(0, stay.to(value.device)) for name, value in columns.items()}
        chosen["task"] = torch.full((len(rows),), task, dtype=torch.int64, device=labels.device)
        self._write(torch.from_numpy(slots), chosen)

    @torch.no_grad()
    def update(self, slots: Tensor, **kept: Tensor) -> None:
        """Replaces what is kept beside the examples in some slots, or adds a column for all of them.

        Args:
            slots: int64 (count,).
            **kept: (count, ...) each.
        """
        if len(slots) < self.filled:
            self._check_names({**{name[5:]: 0 for name in self._columns() if name.startswith("kept_")}, **kept})
        self._write(slots, {f"kept_{name}": _whole(value) for name, value in kept.items()})

    def drop(self, slots: Tensor) -> None:
        """Forgets some slots; the others close up in order. Costs O(size)."""
        stays = torch.ones(self.filled, dtype=torch.bool).index_fill_(0, slots, False)
        rows = stays.nonzero().flatten().to(self._place.device)
        for value in self._columns().values():
            value[: len(rows)] = value[rows]
        self.filled = len(rows)

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What is kept of a batch's inputs: raw where that is smaller, and everything kept so far is raw."""
        if not any(name.startswith("input_") for name in self._columns()):
            raw = batch.raw() if batch.raw is not None and self.processor is not None else {}
            self.is_raw = 0 < _bytes(raw) < _bytes(batch.inputs)
            return {k: v.to(self._place.device) for k, v in raw.items()} if self.is_raw else batch.inputs
        if not self.is_raw:
            return batch.inputs
        if batch.raw is not None:
            raw = {name: value.to(self._place.device) for name, value in batch.raw().items()}
            columns = [self._columns().get(f"input_{name}", self._place) for name in raw]
            if all(c.dtype == v.dtype and c.shape[1:] == v.shape[1:] for c, v in zip(columns, raw.values())):
                return raw
        # Of a batch that was augmented there is no raw form, and images of another size become alike in processing
        everything = self.at(torch.arange(self.filled)).inputs
        for name in [name for name in self._columns() if name.startswith("input_")]:
            delattr(self, name)
        self.is_raw = False
        self._write(torch.arange(self.filled), {f"input_{name}": value for name, value in everything.items()})
        return batch.inputs

    def _write(self, slots: Tensor, values: Mapping[str, Tensor]) -> None:
        slots = slots.to(self._place.device)
        for name, value in values.items():
            column = self._column(name, value)
            column.index_copy_(0, slots, _padded(value, column.shape).to(column))

    def _column(self, name: str, like: Tensor) -> Tensor:
        """The buffer of a column, made or widened (token numbers of longer texts) where needed."""
        column = self._columns().get(name)
        if column is None:
            column = like.new_zeros((self.size, *like.shape[1:]), device=self._place.device)
            self.register_buffer(name, column)
        elif column.shape[1:] != like.shape[1:]:
            tokens = name.startswith("input_") and column.dim() == like.dim() == 2 and not like.is_floating_point()
            if not tokens:
                told = f"keeps {name.partition('_')[2] or name} of shape {tuple(column.shape[1:])}"
                raise ValueError(f"{type(self).__name__} {told}, not {tuple(like.shape[1:])}; resize or pad them")
            if like.shape[1] > column.shape[1]:
                column = F.pad(column, (0, like.shape[1] - column.shape[1]))
                setattr(self, name, column)
        return column

    def _check_names(self, kept: Mapping[str, Any]) -> None:
        known = {name[5:] for name in self._columns() if name.startswith("kept_")}
        if self.filled and set(kept) != known:
            raise ValueError(
                f"{type(self).__name__} keeps {sorted(known)} beside each example, got {sorted(kept)}; give the same "
                "every time, or update() all examples with what is new"
            )

    # --------------------------------------------------------------------------------------------------- drawing

    def draw(self, count: int) -> Replay | None:
        """Returns `count` examples, uniformly and without replacement; this process's share of those for all.

        Fewer are given while the memory holds fewer (with several processes, each gives equally many), `None` while it
        has none to give.
        """
        return self.draws(count, 1)[0]

    def draws(self, count: int, times: int) -> list[Replay] | list[None]:
        """Returns several independent draws, for the price of one reading."""
        everyone = world()
        share = min(count * everyone, self.filled) // everyone
        if not share:
            return [None] * times
        chosen = []
        for _ in range(times):
            self.drawn += 1
            slots = self._distinct(share * everyone)
            chosen.append(slots[rank() * share : (rank() + 1) * share] if everyone > 1 else slots)
        if times == 1:
            return [self.at(chosen[0])]
        together = self.at(torch.cat(chosen))
        return [together.span(number * share, (number + 1) * share) for number in range(times)]

    def _distinct(self, count: int) -> Tensor:
        """Different slots in no order, int64 (count,); what it costs depends on `count` alone."""
        if self.filled <= 32 * count:
            return torch.randperm(self.filled, generator=self.random("draw", self.drawn))[:count]
        seed = int(torch.randint(2**62, (), generator=self.random("draw", self.drawn)))
        return torch.from_numpy(np.random.default_rng(seed).choice(self.filled, count, replace=False, shuffle=False))

    def everything(self) -> Replay | None:
        """Returns all examples by slot, on every process, or `None`."""
        return self.at(torch.arange(self.filled)) if self.filled else None

    def by_task(self) -> dict[int, Replay]:
        """Returns the examples of each task, on every process. Costs O(size)."""
        tasks = self._columns()["task"][: self.filled].cpu() if self.filled else torch.empty(0, dtype=torch.int64)
        return {int(task): self.at((tasks == task).nonzero().flatten()) for task in tasks.unique()}

    def at(self, slots: Tensor) -> Replay:
        """Returns the examples in some slots, int64 (count,) on the CPU."""
        place = slots.to(self._place.device)
        found = {name: value.index_select(0, place) for name, value in self._columns().items()}
        inputs = {name[6:]: value for name, value in found.items() if name.startswith("input_")}
        if self.is_raw:
            assert self.processor is not None
            inputs = {name: made for value in inputs.values() for name, made in self.processor(value).items()}
        if "attention_mask" in inputs:
            from hubtransfer.data.reader import extent_of, trim

            extent = extent_of(inputs["attention_mask"])
            inputs = inputs if extent is None else trim(inputs, extent)
        kept = {name[5:]: value for name, value in found.items() if name.startswith("kept_")}
        return Replay(inputs=inputs, labels=found["labels"], kept=kept, tasks=found["task"], slots=slots)

    # ----------------------------------------------------------------------------------------------------- state

    def random(self, purpose: str, number: int) -> torch.Generator:
        """Returns the generator of one decision: the same whatever was drawn elsewhere. Use it before the next call."""
        mixed = (self.seed * 0x9E3779B97F4A7C15 + sum(purpose.encode()) * 0xBF58476D1CE4E5B9 + number) & _64_BITS
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64
            mixed = ((mixed ^ (mixed >> shift)) * factor) & _64_BITS
        return self._generator.manual_seed(mixed ^ (mixed >> 31))

    def uniform(self, count: int) -> np.ndarray:
        """Returns the numbers in [0, 1) by which the next `count` examples are judged, float64 (count,)."""
        return torch.rand(count, dtype=torch.float64, generator=self.random("add", self.seen)).numpy()

    def numpy_random(self) -> np.random.Generator:
        """Returns the generator by which the next examples are judged, where their number of decisions is not known."""
        return np.random.default_rng(int(torch.randint(2**62, (), generator=self.random("add", self.seen))))

    def set_seed(self, seed: int) -> None:
        """Sets the seed of all further decisions."""
        self.seed = seed

    def bookkeeping(self) -> dict[str, Tensor]:
        """Returns what a kind of memory knows besides its columns, as int64 tensors by name."""
        return {}

    def take_up(self, bookkeeping: Mapping[str, Tensor]) -> None:
        """Takes up what `bookkeeping` returned."""

    def _columns(self) -> dict[str, Tensor]:
        return {name: value for name, value in self._buffers.items() if value is not None and name != "_place"}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        facts = [self.seed, self.seen, self.drawn, self.filled, int(self.is_raw)]
        destination[prefix + _FACTS] = torch.tensor(facts, dtype=torch.int64)
        for name, value in self.bookkeeping().items():
            destination[f"{prefix}book_{name}"] = value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes a memory's whole content; columns are those of the state."""
        own = {name[len(prefix) :]: state_dict[name] for name in state_dict if name.startswith(prefix)}
        missing: list[str] = args[2]
        if _FACTS not in own:
            missing.append(prefix + _FACTS)
            return
        facts = own.pop(_FACTS).tolist()
        book = {name: own.pop(name) for name in list(own) if name.startswith("book_")}
        if wrong := {len(value) for value in own.values()} - {self.size}:
            raise ValueError(
                f"the checkpoint's memory has room for {wrong.pop()} examples, this {type(self.config).__name__} for "
                f"{self.size}; give it the size that it had"
            )
        self.seed, self.seen, self.drawn, self.filled, raw = facts
        self.is_raw = bool(raw)
        self.take_up({name[5:]: value for name, value in book.items()})
        for name in self._columns():
            delattr(self, name)
        for name, value in own.items():
            self.register_buffer(name, value.clone().to(self._place.device))


def _labelled(labels: Tensor) -> tuple[np.ndarray, Callable[[Tensor], Tensor]]:
    """Which examples have a label, int64 (count,), and what selects them."""
    if labels.dim() > 1:
        return np.arange(len(labels)), _own
    on_cpu = not labels.is_floating_point() and labels.device.type == "cpu"
    if on_cpu and len(labels) and int(labels.min()) >= 0:  # what most batches are, told in one pass
        return np.arange(len(labels)), _own
    known = (known_values if labels.is_floating_point() else known_classes)(labels)
    rows = known.nonzero().flatten().cpu().numpy()
    return rows, _own if len(rows) == len(labels) else lambda value: value[known.to(value.device)]


def _whole(value: Tensor) -> Tensor:
    """What is kept of a tensor: detached, and in at least 32 bits."""
    value = value.detach()
    return value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value


def _bytes(values: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in values.values())


def _last_of_each(rows: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of several rows in one slot the last; returns rows and their slots."""
    if len(rows) > 1:
        _, first = np.unique(slots[rows][::-1], return_index=True)
        rows = np.sort(rows[len(rows) - 1 - first])
    return rows, slots[rows]


def _own(value: Tensor) -> Tensor:
    return value


def _padded(value: Tensor, shape: torch.Size) -> Tensor:
    """Token numbers with zeros behind, up to the width of their column."""
    short = shape[1] - value.shape[1] if value.dim() == 2 and len(shape) == 2 else 0
    return F.pad(value, (0, short)) if short > 0 else value
