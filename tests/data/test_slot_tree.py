"""Trees over numbers: sums and minima of a plain computation, whatever the size and the changes."""

import math

import numpy as np
import pytest

from hubtransfer.data.slot_tree import SlotTree


def test_a_target_falls_into_the_slot_whose_share_of_the_sum_it_is_in():
    """Shares of 0.5, 0, 1.5, 1, 2 end at 0.5, 0.5, 2, 3, 5."""
    tree = SlotTree([0.5, 0.0, 1.5, 1.0, 2.0])
    assert tree.joined == 5.0
    targets = [0.0, 0.49, 0.5, 1.99, 2.0, 2.99, 3.0, 4.99]
    assert [tree.at(target) for target in targets] == [0, 0, 2, 2, 3, 3, 4, 4]
    tree.set([2, 4], [0.0, 0.5])  # ends: 0.5, 0.5, 0.5, 1.5, 2
    assert tree.joined == 2.0
    assert [tree.at(target) for target in (0.49, 0.5, 1.49, 1.5, 1.99)] == [0, 3, 3, 4, 4]


def test_a_target_at_the_very_end_never_falls_into_an_empty_slot():
    tree = SlotTree([0.0, 0.1, 0.2, 0.0, 0.0, 0.0])
    assert tree.at(math.nextafter(tree.joined, 1)) == 2


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13])
def test_changes_leave_what_a_new_tree_has(size):
    random = np.random.default_rng(size)
    values = random.random(size)
    sums, minima = SlotTree(values.tolist()), SlotTree(values.tolist(), min, math.inf)
    for _ in range(20):
        slot = int(random.integers(size))
        values[slot] = random.integers(4) / 4
        sums.set([slot], [float(values[slot])])
        minima.set([slot], [float(values[slot])])
        assert sums.joined == SlotTree(values.tolist()).joined == pytest.approx(values.sum())
        assert minima.joined == values.min()
        assert minima.least() == np.flatnonzero(values == values.min())[-1]
