"""Kinds of memories: which examples of a stream are kept.

    >>> import torch
    >>> from hubtransfer.data import Batch
    >>> memory = Reservoir(2).build()
    >>> memory.add(Batch(inputs={"pixel_values": torch.zeros(5, 3)}, labels=torch.arange(5)))
    >>> len(memory), memory.seen
    (2, 5)

In a recipe: `memory: {kind: reservoir, size: 200}`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from hubtransfer.data.memory import Memory, MemoryConfig, Processor
from hubtransfer.data.slot_tree import SlotTree


@dataclass(frozen=True)
class Reservoir(MemoryConfig):
    """Every example of the stream so far is kept with equal probability size / seen.

    Slots that `drop` has freed go to the next examples.

    Source: https://doi.org/10.1145/3147.3165, algorithm R.
    """

    kind: ClassVar[str] = "reservoir"

    def build(self, processor: Processor | None = None) -> Memory:
        """Makes the memory."""
        return _Reservoir(self, processor)


@dataclass(frozen=True)
class Ring(MemoryConfig):
    """The most recent examples of each task (or class), as many of each.

    Where a new one comes and shares shrink, adding costs O(size) once.

    Attributes:
        per: What the memory is divided among: "task" or "class".
        groups: How many of them there will be; by default the share of each shrinks as more come.
    """

    kind: ClassVar[str] = "ring"
    per: Literal["task", "class"] = "task"
    groups: int | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        super().__post_init__()
        if self.per not in ("task", "class"):
            raise ValueError(f"per must be 'task' or 'class', got {self.per!r}")
        if self.groups is not None and not 1 <= self.groups <= self.size:
            raise ValueError(f"{self.size} examples cannot be divided among {self.groups} groups, at least one each")

    def build(self, processor: Processor | None = None) -> Memory:
        """Makes the memory."""
        return _Shares(self, processor, per=self.per, groups=self.groups, newest=True)


@dataclass(frozen=True)
class Herding(MemoryConfig):
    """As many examples of each class, the first ones added: they have to come best first.

    The share of a class shrinks as more classes come; the last ones added go first. That costs O(size) for each batch
    with a new class.

    Source: https://arxiv.org/abs/1611.07725, algorithms 4 and 5.
    """

    kind: ClassVar[str] = "herding"

    def build(self, processor: Processor | None = None) -> Memory:
        """Makes the memory."""
        return _Shares(self, processor, per="class", groups=None, newest=False)


@dataclass(frozen=True)
class ClassBalanced(MemoryConfig):
    """Random examples, as many of each class as the stream allows.

    Once the memory is full, an example of a class that never was the largest takes the place of a random one of the
    largest; one of another class takes the place of a random one of its own, with probability kept / seen of the class.
    Adding costs O(classes) for an example that takes another class's place, whatever the size.

    Source: https://proceedings.mlr.press/v119/chrysakis20a.html, algorithm 1.
    """

    kind: ClassVar[str] = "class_balanced"

    def build(self, processor: Processor | None = None) -> Memory:
        """Makes the memory."""
        return _ClassBalanced(self, processor)


@dataclass(frozen=True)
class GradientBased(MemoryConfig):
    """Examples whose gradients differ: each is added with a score, small where its gradient is unlike those kept.

    An example with score c < 1 takes the place of example i, drawn with probability C_i / sum C, with probability
    C_i / (C_i + c), where C are the scores kept. Adding costs O(log size) an example with c < 1.

    Source: https://arxiv.org/abs/1903.08671, algorithm 2.
    """

    kind: ClassVar[str] = "gradient_based"

    def build(self, processor: Processor | None = None) -> Memory:
        """Makes the memory."""
        return _GradientBased(self, processor)


@dataclass(frozen=True)
class Hardest(MemoryConfig):
    """The examples with the highest loss: each is added with its loss; `memory.update(slots, loss=...)` renews it.

    Adding costs O(log size) an example. Of equal losses those that are here already stay.

    Source: https://arxiv.org/abs/1812.03596, section 3 (the hard buffer).
    """

    kind: ClassVar[str] = "hardest"

    def build(self, processor: Processor | None = None) -> Memory:
        """Makes the memory."""
        return _Hardest(self, processor)


class _Reservoir(Memory):
    def choose(self, count: int, labels: Tensor, task: int, kept: Mapping[str, Tensor]) -> np.ndarray:
        numbers = np.arange(self.seen, self.seen + count)  # of the examples: so many were seen before each
        random = self.uniform(count)
        slots = (random * (numbers + 1)).astype(np.int64)  # uniform on 0 ... number, the example itself included
        slots[slots >= self.size] = -1
        free = min(count, self.size - self.filled)
        slots[:free] = np.arange(self.filled, self.filled + free)
        self.filled += free
        return slots


class _Grouped(Memory):
    """Knows the slots of each task or class, in the order that the kind wants."""

    row: ClassVar[type] = list
    """What slots of one group stand in: a list to pick any, a deque to turn around."""

    def __init__(self, config: MemoryConfig, processor: Processor | None = None) -> None:
        super().__init__(config, processor)
        self.slots_of: dict[int, Any] = {}

    def drop(self, slots: Tensor) -> None:
        """Forgets some slots."""
        gone = set(slots.tolist())
        places = {old: new for new, old in enumerate(s for s in range(self.filled) if s not in gone)}
        self.slots_of = {g: self.row(places[s] for s in own if s in places) for g, own in self.slots_of.items()}
        super().drop(slots)

    def bookkeeping(self) -> dict[str, Tensor]:
        """Returns group and slot of every example, in order, and every group (one may be without examples)."""
        pairs = [(group, slot) for group, own in self.slots_of.items() for slot in own]
        return {
            "slots": torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
            "groups": torch.tensor(list(self.slots_of), dtype=torch.int64),
        }

    def take_up(self, bookkeeping: Mapping[str, Tensor]) -> None:
        """Takes up what `bookkeeping` returned."""
        self.slots_of = {group: self.row() for group in bookkeeping["groups"].tolist()}
        for group, slot in bookkeeping["slots"].tolist():
            self.slots_of[group].append(slot)

    def take_free(self, group: int) -> int:
        """Gives a group the next free slot."""
        self.slots_of[group].append(self.filled)
        self.filled += 1
        return self.filled - 1

    def classes(self, labels: Tensor) -> np.ndarray:
        """Checks that labels are one class an example, and returns them, int64 (count,)."""
        if labels.is_floating_point() or labels.numel() != len(labels):
            raise ValueError(
                f"{type(self.config).__name__} divides the memory among classes and needs one an example, but labels "
                f"are {labels.dtype} of shape {tuple(labels.shape)}; Reservoir(size) takes examples with any labels"
            )
        return labels.flatten().cpu().numpy()


class _Shares(_Grouped):
    """Equal shares for tasks or classes, of which the newest or the first examples stay."""

    row: ClassVar[type] = deque

    def __init__(self, config: MemoryConfig, processor: Processor | None, per: str, groups: int | None, newest: bool):
        super().__init__(config, processor)
        self.per, self.groups, self.newest = per, groups, newest

    def choose(self, count: int, labels: Tensor, task: int, kept: Mapping[str, Tensor]) -> np.ndarray:
        of = np.full(count, task) if self.per == "task" else self.classes(labels)
        share = self._make_room([int(group) for group in np.unique(of)])
        slots = np.full(count, -1)
        for group in np.unique(of):
            rows, own = np.flatnonzero(of == group), self.slots_of[int(group)]
            for row in rows[-share:] if self.newest else rows[: share - len(own)]:
                if len(own) < share:
                    slots[row] = self.take_free(int(group))
                else:
                    own.rotate(-1)  # the oldest slot is the newest now
                    slots[row] = own[-1]
        return slots

    def _make_room(self, groups: list[int]) -> int:
        """Enters new groups, cuts the others to the share that is left for each, and returns the share."""
        new = [group for group in groups if group not in self.slots_of]
        known = len(self.slots_of) + len(new)
        if self.groups is not None and known > self.groups:
            raise ValueError(f"{type(self.config).__name__} was made for {self.groups} groups, but there are {known}")
        share = self.size // (self.groups or known)
        if not share:
            raise ValueError(f"{self.size} examples cannot be divided among {known} groups, at least one each")
        self.slots_of |= {group: self.row() for group in new}
        if new:
            every = map(list, self.slots_of.values())
            surplus = [slot for own in every for slot in (own[:-share] if self.newest else own[share:])]
            if surplus:
                self.drop(torch.tensor(surplus))
        return share


class _ClassBalanced(_Grouped):
    def __init__(self, config: MemoryConfig, processor: Processor | None = None) -> None:
        super().__init__(config, processor)
        self.seen_of: dict[int, int] = {}
        self.was_largest: set[int] = set()

    def choose(self, count: int, labels: Tensor, task: int, kept: Mapping[str, Tensor]) -> np.ndarray:
        random, slots = self.numpy_random(), np.full(count, -1)
        for row, label in enumerate(self.classes(labels).tolist()):
            own = self.slots_of.setdefault(label, self.row())
            self.seen_of[label] = self.seen_of.get(label, 0) + 1
            if self.filled < self.size:
                slots[row] = self.take_free(label)
                if self.filled == self.size:
                    self.was_largest |= set(self._largest())
            elif label not in self.was_largest:
                ties = self._largest()
                largest = self.slots_of[ties[int(random.integers(len(ties)))]]
                place = int(random.integers(len(largest)))
                largest[place], largest[-1] = largest[-1], largest[place]
                own.append(largest.pop())
                slots[row] = own[-1]
                self.was_largest |= set(self._largest())
            elif random.random() < len(own) / self.seen_of[label]:
                slots[row] = own[int(random.integers(len(own)))]
        return slots

    def _largest(self) -> list[int]:
        """The classes with most examples."""
        most = max(map(len, self.slots_of.values()))
        return [label for label, own in self.slots_of.items() if len(own) == most]

    def bookkeeping(self) -> dict[str, Tensor]:
        """Returns also how often each class was seen, and whether it was ever the largest."""
        rows = [(label, seen, int(label in self.was_largest)) for label, seen in self.seen_of.items()]
        return super().bookkeeping() | {"classes": torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)}

    def take_up(self, bookkeeping: Mapping[str, Tensor]) -> None:
        """Takes up what `bookkeeping` returned."""
        super().take_up(bookkeeping)
        rows = bookkeeping["classes"].tolist()
        self.seen_of = {label: seen for label, seen, _ in rows}
        self.was_largest = {label for label, _, largest in rows if largest}


class _Judged(Memory):
    """Chooses by a number that comes with each example, of which a tree of those kept knows the sum or the least."""

    column: ClassVar[str]

    def __init__(self, config: MemoryConfig, processor: Processor | None = None) -> None:
        super().__init__(config, processor)
        self._tree: SlotTree | None = None  # follows from the column: made anew where it is not known

    @abstractmethod
    def tree_of(self, numbers: list[float]) -> SlotTree:
        """The tree over the numbers of all slots that are taken."""

    def tree(self) -> SlotTree:
        """The tree over the numbers kept."""
        if self._tree is None:
            held = self._columns().get(f"kept_{self.column}")
            self._tree = self.tree_of([] if held is None else self.numbers(held[: self.filled]))
        return self._tree

    def given(self, kept: Mapping[str, Tensor]) -> list[float]:
        """The new examples' numbers, (count,), as exactly as they will be kept."""
        if self.column not in kept:
            raise ValueError(
                f"{type(self.config).__name__} chooses by {self.column}: memory.add(batch, {self.column}=...), one "
                "number an example"
            )
        held = self._columns().get(f"kept_{self.column}", kept[self.column])
        return self.numbers(kept[self.column].to(held.dtype))

    def numbers(self, values: Tensor) -> list[float]:
        """Numbers (count,) as the tree takes them."""
        return values.tolist()

    def update(self, slots: Tensor, **kept: Tensor) -> None:
        """Replaces what is kept beside the examples in some slots."""
        super().update(slots, **kept)
        if self._tree is not None and self.column in kept:
            held = self._columns()[f"kept_{self.column}"]
            self._tree.set(slots.tolist(), self.numbers(kept[self.column].to(held.dtype)))

    def drop(self, slots: Tensor) -> None:
        """Forgets some slots."""
        super().drop(slots)
        self._tree = None

    def take_up(self, bookkeeping: Mapping[str, Tensor]) -> None:
        """Other numbers are kept now."""
        self._tree = None


class _GradientBased(_Judged):
    column = "score"

    def tree_of(self, numbers: list[float]) -> SlotTree:
        """Sums of scores."""
        return SlotTree(numbers + [0.0] * (self.size - len(numbers)))

    def numbers(self, values: Tensor) -> list[float]:
        """Scores; one below 0 is a rounding error, of a cosine below -1."""
        return values.clamp(min=0).tolist()

    def choose(self, count: int, labels: Tensor, task: int, kept: Mapping[str, Tensor]) -> np.ndarray:
        scores, tree, random = self.given(kept), self.tree(), self.numpy_random()
        slots, free = np.full(count, -1), min(count, self.size - self.filled)
        slots[:free] = np.arange(self.filled, self.filled + free)
        tree.set(slots[:free].tolist(), scores)
        self.filled += free
        for row in (row for row in range(free, count) if scores[row] < 1):
            total = tree.joined
            place = tree.at(random.random() * total) if total > 0 else int(random.integers(self.size))
            held = tree.value(place)
            if random.random() * (held + scores[row]) < held:
                slots[row] = place
                tree.set([place], [scores[row]])
        return slots


class _Hardest(_Judged):
    column = "loss"

    def tree_of(self, numbers: list[float]) -> SlotTree:
        """The least loss."""
        return SlotTree(numbers + [math.inf] * (self.size - len(numbers)), min, math.inf)

    def numbers(self, values: Tensor) -> list[float]:
        """Losses; what is not a number goes first."""
        return values.where(~values.isnan(), -math.inf).tolist()

    def choose(self, count: int, labels: Tensor, task: int, kept: Mapping[str, Tensor]) -> np.ndarray:
        losses, tree = self.given(kept), self.tree()
        order = sorted(range(count), key=lambda row: -losses[row])  # of equals the first
        before, free = self.filled, min(count, self.size - self.filled)
        places, stays = list(range(before, before + free)), order[:free]
        for row in order[free:]:
            if len(places) == free + before or losses[row] <= tree.joined:
                break
            places.append(tree.least())
            tree.set(places[-1:], [math.inf])
            stays.append(row)
        self.filled += free
        slots, chosen, places = np.full(count, -1), sorted(stays), sorted(places)
        slots[chosen] = places
        tree.set(places, [losses[row] for row in chosen])
        return slots
