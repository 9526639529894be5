"""A number for each slot of a memory, with their sum or their least one at hand: what drawing by score costs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence


class SlotTree:
    """A binary tree over numbers whose inner nodes join two of them: a change and a look-up cost O(log size).

    A node depends on the numbers below it alone, so a tree made anew of the same numbers is the same bit by bit.

        >>> tree = SlotTree([0.5, 0.0, 1.5])
        >>> tree.joined, tree.at(0.4), tree.at(0.6)
        (2.0, 0, 2)
        >>> tree.set([2], [0.25])
        >>> tree.joined
        0.75

    Args:
        values: The numbers, (size,).
        join: Makes one number of two: `operator.add` for sums, `min` for the least.
        nothing: What joins any number without changing it: 0 or infinity.
    """

    def __init__(
        self, values: Sequence[float], join: Callable[[float, float], float] = operator.add, nothing: float = 0.0
    ) -> None:
        self._join, self._first = join, 1 << max(0, len(values) - 1).bit_length()
        levels = [[*values, *[nothing] * (self._first - len(values))]]
        while len(levels[-1]) > 1:
            levels.append(list(map(join, levels[-1][::2], levels[-1][1::2])))
        # Node k joins nodes 2k and 2k + 1, and the last half are the slots
        self._nodes = [nothing, *(value for level in reversed(levels) for value in level)]

    @property
    def joined(self) -> float:
        """All numbers joined."""
        return self._nodes[1]

    def value(self, slot: int) -> float:
        """The number of a slot."""
        return self._nodes[self._first + slot]

    def set(self, slots: Iterable[int], values: Iterable[float]) -> None:
        """Changes the numbers of some slots, (count,)."""
        nodes, join = self._nodes, self._join
        for slot, value in zip(slots, values):
            node = self._first + slot
            nodes[node] = value
            while node > 1:
                node >>= 1
                nodes[node] = join(nodes[2 * node], nodes[2 * node + 1])

    def at(self, target: float) -> int:
        """Of sums: the slot in which the numbers, added up from the first, exceed `target`; never one with 0."""
        node, nodes = 1, self._nodes
        while node < self._first:
            node *= 2
            if target >= nodes[node] and nodes[node + 1] > 0:
                target -= nodes[node]
                node += 1
        return node - self._first

    def least(self) -> int:
        """Of minima: the slot of the least number, of equals the last."""
        node, nodes = 1, self._nodes
        while node < self._first:
            node *= 2
            node += nodes[node + 1] <= nodes[node]
        return node - self._first
