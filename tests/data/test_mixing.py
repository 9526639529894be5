"""Streams of several tasks that take turns: exact shares, any start, equal over processes; and hidden labels."""

import math
from collections import Counter

import pytest
import torch

from hubtransfer.data import Augment, Loader, Mixing, Mixture, MultiTask, Source
from hubtransfer.data.draws import keep_labels
from hubtransfer.data.mixing import Turns, quotas

BOTH = pytest.mark.parametrize("batches", ["alternating", "mixed"])


def numbers(n, start=0):
    """Images whose every pixel is the example's number."""
    pixels = torch.arange(start, start + n).float().view(n, 1, 1, 1).expand(n, 1, 4, 4).clone()
    return {"pixel_values": pixels, "labels": torch.arange(n) % 3}


def mixture(sizes=None, augment=None, **mixing):
    sizes = sizes or {"a": 40, "b": 20, "c": 12}
    sources = {task: Source.of(numbers(n, 100 * k), augment=augment) for k, (task, n) in enumerate(sizes.items())}
    return Mixture(sources, Mixing(**mixing))


def seen(steps):
    """Examples by task in the order in which steps give them."""
    found = {}
    for step in steps:
        for task, batch in step.items():
            found.setdefault(task, []).extend(batch.index.tolist())
    return found


def same(first, second):
    first, second = list(first), list(second)
    assert [list(step) for step in first] == [list(step) for step in second]
    for one, two in zip(first, second):
        for task in one:
            assert torch.equal(one[task].inputs["pixel_values"], two[task].inputs["pixel_values"])
            assert torch.equal(one[task].labels, two[task].labels)
            assert one[task].share == two[task].share


def test_shares_by_hand():
    sizes = {"a": 800, "b": 100, "c": 100}
    assert Mixing().shares(sizes) == pytest.approx({"a": 0.8, "b": 0.1, "c": 0.1})
    # cube roots of 8 : 1 : 1 are 2 : 1 : 1
    assert Mixing(temperature=3).shares(sizes) == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.25})
    assert Mixing(temperature=math.inf).shares(sizes) == pytest.approx(dict.fromkeys(sizes, 1 / 3))
    assert Mixing(weights={"a": 1, "b": 1, "c": 2}).shares(sizes) == pytest.approx({"a": 0.25, "b": 0.25, "c": 0.5})
    # 10 slots at 0.45, 0.35, 0.2: floors 4, 3, 2; one left over, the remainders are 0.5, 0.5 and 0
    assert sum(quotas({"a": 0.45, "b": 0.35, "c": 0.2}, 10).values()) == 10
    assert quotas({"a": 0.45, "b": 0.35, "c": 0.2}, 10)["c"] == 2


def test_alternating_steps_belong_to_one_task_in_exact_shares():
    loader = Loader(mixture(temperature=math.inf), batch_size=4)
    assert loader.steps_per_epoch == 18  # 72 examples
    steps = list(loader.batches(0))
    assert all(len(step) == 1 for step in steps)
    assert Counter(task for step in steps for task in step) == {"a": 6, "b": 6, "c": 6}
    assert all(len(batch) == 4 and batch.share is None for step in steps for batch in step.values())
    order = [next(iter(step)) for step in steps]
    assert order != [next(iter(step)) for step in loader.batches(1)]
    # a has fewer turns than it has examples, b more: each of its 20 once, and 4 again; c all of its 12 twice
    counts = {task: Counter(rows) for task, rows in seen(steps).items()}
    assert len(counts["a"]) == 24
    assert sorted(Counter(counts["b"].values()).items()) == [(1, 16), (2, 4)]
    assert set(counts["c"].values()) == {2}


def test_mixed_steps_have_examples_of_several_tasks():
    loader = Loader(mixture(batches="mixed"), batch_size=8)
    steps = list(loader.batches(0))
    assert len(steps) == loader.steps_per_epoch == 9
    assert all(sum(map(len, step.values())) == 8 for step in steps)
    assert all(batch.share == len(batch) / 8 for step in steps for batch in step.values())
    assert any(len(step) > 1 for step in steps)
    # by size: everything exactly once
    assert {task: sorted(rows) for task, rows in seen(steps).items()} == {
        "a": list(range(40)), "b": list(range(20)), "c": list(range(12))}  # fmt: skip


def test_a_batch_holds_its_own_tasks_examples():
    for step in Loader(mixture(batches="mixed"), batch_size=8).batches(0):
        for task, batch in step.items():
            base = {"a": 0, "b": 100, "c": 200}[task]
            assert (batch.inputs["pixel_values"][:, 0, 0, 0] - base).tolist() == batch.index.tolist()


@BOTH
@pytest.mark.parametrize("augment", [None, Augment(flip=0.5)])
def test_any_start_gives_the_same_batches(batches, augment):
    whole = list(Loader(mixture(batches=batches, augment=augment), batch_size=6, seed=5).batches(2))
    for start in range(len(whole) + 1):
        fresh = Loader(mixture(batches=batches, augment=augment), batch_size=6, seed=5)
        same(whole[start:], fresh.batches(2, start))
    with pytest.raises(ValueError, match="batch 13 of an epoch that has 12"):
        list(fresh.batches(2, 13))


@BOTH
def test_worker_processes_give_the_same_batches(batches):
    class Slow(torch.utils.data.Dataset):
        def __init__(self, n):
            self.data = numbers(n)

        def __len__(self):
            return len(self.data["labels"])

        def __getitem__(self, i):
            return self.data["pixel_values"][i], int(self.data["labels"][i])

    def made(workers):
        sources = {"a": Source.of(Slow(20)), "b": Source.of(Slow(8))}
        return Loader(Mixture(sources, Mixing(batches=batches)), batch_size=4, workers=workers).batches(0)

    same(made(0), made(2))


@BOTH
@pytest.mark.parametrize("augment", [None, Augment(flip=0.5, shift=0.25)])
def test_two_processes_see_what_one_sees(batches, augment):
    source = mixture(batches=batches, augment=augment)
    one = list(Loader(source, batch_size=8, seed=3).batches(1))
    two = [list(Loader(source, batch_size=4, rank=rank, world=2, seed=3).batches(1)) for rank in (0, 1)]
    assert len(one) == len(two[0]) == len(two[1])
    for whole, *parts in zip(one, *two):
        for task, batch in whole.items():
            own = [part[task] for part in parts if task in part]
            assert torch.equal(batch.index, torch.cat([part.index for part in own]))
            joined = torch.cat([part.inputs["pixel_values"] for part in own])
            assert torch.equal(batch.inputs["pixel_values"], joined)
            if batches == "mixed":
                assert batch.share == pytest.approx(sum(part.share for part in own) / 2)


def test_a_step_is_looked_up_without_going_through_those_before():
    turns = Turns(Mixing(batches="mixed"), {"a": 30, "b": 10}, batch_size=5, world=2, seed=0, epoch=0)
    spans = [[turns.span(task, step, rank) for rank in (0, 1)] for task in "ab" for step in range(turns.steps)]
    for pair in spans:
        own = [s for s in pair if s is not None]
        for s in own:
            assert s.first <= s.own_first < s.own_last <= s.last
        if len(own) == 2:
            assert own[0].own_last == own[1].own_first and own[0][:2] == own[1][:2]
    assert sum(s.own_last - s.own_first for pair in spans for s in pair if s) == 40


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixing(batches="mixd"), "'alternating' or 'mixed', not 'mixd'"),
        (lambda: Mixing(temperature=0), "temperature must be positive, not 0"),
        (lambda: Mixing(weights={"a": -1.0}), "weight of task 'a' must be positive"),
        (lambda: Mixing(weights={"a": 1.0}, temperature=2), "not both"),
        (lambda: mixture(weights={"a": 1.0, "b": 1.0}), "no weight for task 'c'"),
        (lambda: mixture(weights={"a": 1.0, "b": 1.0, "c": 1.0, "bb": 1.0}), "'bb'; the tasks are: a, b, c; did you"),
        (
            lambda: next(Loader(mixture(weights={"a": 1.0, "b": 1.0, "c": 1e-6}), batch_size=4).batches(0)),
            "task 'c' would get none of an epoch's 18 steps",
        ),
        (
            lambda: Loader(Mixture({"a": Source.of(lambda: iter([numbers(1)]))}, Mixing()), batch_size=2),
            "that of 'a' is a stream",
        ),
        (lambda: MultiTask(train=numbers(4), labels={"a": "labels"}, mixing=Mixing()), "share their inputs"),
        (lambda: MultiTask({"a": numbers(4)}, mixing=Mixing(weights={"b": 1.0})), "weight for 'b'"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_hidden_labels():
    labels = torch.arange(30) % 3
    kept = keep_labels(labels, 6, seed=1)
    known = kept != -100
    assert Counter(labels[known].tolist()) == {0: 2, 1: 2, 2: 2}
    assert torch.equal(kept[known], labels[known])
    assert torch.equal(keep_labels(labels, 6, seed=1), kept)
    real = keep_labels(torch.rand(10), 4, seed=0)
    assert (~real.isnan()).sum() == 4
    with pytest.raises(ValueError, match="1 to 30 can be kept, not 31"):
        keep_labels(labels, 31, seed=0)
