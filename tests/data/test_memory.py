"""Memories keep what their kind says, cost what they say, and decide the same wherever and whenever they decide."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hubtransfer.backbones.processor import ImageProcessor
from hubtransfer.config import from_dict, to_dict
from hubtransfer.data import (
    Batch,
    ClassBalanced,
    GradientBased,
    Hardest,
    Herding,
    Loader,
    MemoryConfig,
    Reservoir,
    Ring,
    Source,
    memory as memory_module,
)

KINDS = [Reservoir(6), Ring(6), Ring(6, per="class"), Herding(6), ClassBalanced(6), GradientBased(6), Hardest(6)]


def numbered(first, count, labels=None):
    """Examples that are their own numbers."""
    numbers = torch.arange(first, first + count)
    return Batch(inputs={"pixel_values": numbers.float()[:, None]}, labels=numbers % 3 if labels is None else labels)


def kept_numbers(memory):
    return sorted(memory.everything().inputs["pixel_values"].flatten().int().tolist())


def judged(config, numbers):
    """What a kind that chooses by a number wants beside the examples."""
    column = {GradientBased: "score", Hardest: "loss"}.get(type(config))
    return {} if column is None else {column: torch.as_tensor(numbers)}


def filled(config, batches=5, seed=0):
    memory = config.build()
    memory.set_seed(seed)
    extra = judged(config, [0.2, 0.9, 1.5, 0.4])
    for step in range(batches):
        memory.add(numbered(4 * step, 4), task=step // 2, logits=torch.full((4, 2), float(step)), **extra)
    return memory


def test_a_reservoir_keeps_every_example_with_the_same_probability():
    counts, runs = np.zeros(24), 800
    for seed in range(runs):
        memory = Reservoir(6).build()
        memory.set_seed(seed)
        for first in range(0, 24, 4):
            memory.add(numbered(first, 4))
        assert memory.seen == 24
        assert len(memory) == 6
        counts[kept_numbers(memory)] += 1
    # Each of 24 examples is one of the 6 with probability 1/4: 200 +- 12.2 of 800 runs; the limit is 5 times that
    assert np.abs(counts - 200).max() < 61


def test_a_reservoir_of_one_keeps_the_second_example_half_of_the_time():
    """The draw is from [0, seen] with the new example counted; without it the second would always be kept."""
    kept = 0
    for seed in range(400):
        memory = Reservoir(1).build()
        memory.set_seed(seed)
        memory.add(numbered(0, 1))
        memory.add(numbered(1, 1))
        kept += kept_numbers(memory)[0]
    assert abs(kept - 200) < 50  # 5 standard deviations


def test_slots_that_a_reservoir_forgot_go_to_the_next_examples():
    memory = Reservoir(6).build()
    memory.add(numbered(0, 4))
    memory.drop(torch.tensor([1, 3]))
    memory.add(numbered(10, 3))
    assert kept_numbers(memory) == [0, 2, 10, 11, 12]
    memory.add(numbered(20, 1))
    memory.drop(torch.tensor([0, 1]))  # 8 were seen, and nothing forgotten comes back
    memory.add(numbered(30, 1))
    assert kept_numbers(memory) == [10, 11, 12, 20, 30]


def test_a_ring_keeps_the_newest_of_each_task_and_shares_shrink():
    memory = Ring(6).build()
    memory.add(numbered(0, 10), task=0)
    assert kept_numbers(memory) == [4, 5, 6, 7, 8, 9]
    memory.add(numbered(10, 2), task=1)
    assert kept_numbers(memory) == [7, 8, 9, 10, 11]
    memory.add(numbered(12, 4), task=1)
    assert kept_numbers(memory) == [7, 8, 9, 13, 14, 15]
    memory.add(numbered(20, 9), task=2)
    assert {task: len(replay) for task, replay in memory.by_task().items()} == {0: 2, 1: 2, 2: 2}
    assert kept_numbers(memory) == [8, 9, 14, 15, 27, 28]


def test_a_ring_for_a_known_number_of_tasks_gives_each_its_share_from_the_start():
    memory = Ring(6, groups=3).build()
    memory.add(numbered(0, 10), task=0)
    assert kept_numbers(memory) == [8, 9]
    memory.add(numbered(10, 10), task=7)
    memory.add(numbered(20, 10), task=3)
    assert kept_numbers(memory) == [8, 9, 18, 19, 28, 29]
    with pytest.raises(ValueError, match="made for 3 groups, but there are 4"):
        memory.add(numbered(30, 1), task=4)


def test_herding_keeps_the_first_of_each_class_and_drops_the_last():
    memory = Herding(6).build()
    memory.add(numbered(0, 5, torch.zeros(5, dtype=torch.long)))
    assert kept_numbers(memory) == [0, 1, 2, 3, 4]
    memory.add(numbered(10, 5, torch.ones(5, dtype=torch.long)))
    assert kept_numbers(memory) == [0, 1, 2, 10, 11, 12]
    memory.add(numbered(20, 5, torch.full((5,), 2)))
    assert kept_numbers(memory) == [0, 1, 10, 11, 20, 21]


def test_the_hardest_stay_and_a_loss_may_be_renewed():
    memory = Hardest(3).build()
    memory.add(numbered(0, 2), loss=torch.tensor([1.0, 5.0]))
    memory.add(numbered(10, 3), loss=torch.tensor([2.0, 0.5, 3.0]))
    assert kept_numbers(memory) == [1, 10, 12]
    slots = torch.arange(3)
    memory.update(slots, loss=torch.tensor([0.1, 2.0, 0.2]))  # whatever lies in slot 1 is the hardest now
    hardest = int(memory.at(slots[1:2]).inputs["pixel_values"].flatten()[0])
    memory.add(numbered(20, 2), loss=torch.tensor([1.0, 1.0]))
    assert kept_numbers(memory) == sorted([hardest, 20, 21])
    with pytest.raises(ValueError, match=r"Hardest chooses by loss: memory.add\(batch, loss=...\)"):
        Hardest(2).build().add(numbered(0, 2))


def test_a_class_balanced_memory_keeps_rare_classes_whole():
    """480 examples of class 0, then 5 of class 1 and 5 of class 2: with 20 places the rare ones are all kept."""
    memory = ClassBalanced(20).build()
    for _ in range(12):
        memory.add(numbered(0, 40, torch.zeros(40, dtype=torch.long)))
    memory.add(numbered(100, 10, torch.tensor([1, 2] * 5)))
    for _ in range(5):
        memory.add(numbered(200, 40, torch.zeros(40, dtype=torch.long)))
    assert memory.everything().labels.bincount().tolist() == [10, 5, 5]
    assert [n for n in kept_numbers(memory) if 100 <= n < 200] == list(range(100, 110))


def test_a_class_balanced_memory_draws_uniformly_within_a_class():
    counts = np.zeros(30)
    for seed in range(600):
        memory = ClassBalanced(6).build()
        memory.set_seed(seed)
        memory.add(numbered(0, 30, torch.zeros(30, dtype=torch.long)))
        counts[kept_numbers(memory)] += 1
    assert np.abs(counts - 120).max() < 49  # 5 standard deviations of 600 draws with probability 1/5


def test_a_gradient_based_memory_replaces_in_proportion_to_scores():
    """C = (0.3, 0.9) and c = 0.9: slot 0 goes with 1/4 * 1/4 = 1/16, slot 1 with 3/4 * 1/2 = 3/8."""
    gone = np.zeros(3)
    for seed in range(800):
        memory = GradientBased(2).build()
        memory.set_seed(seed)
        memory.add(numbered(0, 2), score=torch.tensor([0.3, 0.9]))
        memory.add(numbered(2, 1), score=torch.tensor([0.9]))
        missing = ({0, 1, 2} - set(kept_numbers(memory))).pop()
        gone[missing] += 1
    assert abs(gone[0] - 50) < 35  # 5 standard deviations
    assert abs(gone[1] - 300) < 69
    memory.add(numbered(9, 1), score=torch.tensor([1.0]))
    assert 9 not in kept_numbers(memory), "an example whose gradient is like those kept never enters"


def test_a_gradient_based_memory_of_many_slots_replaces_in_proportion_to_scores():
    """C = (0.4, 0, 0.8, 0.2, 0.6), of sum 2, and c = 0.2: slot i goes with C_i / 2 * C_i / (C_i + 0.2).

    That is 2/15, 0, 8/25, 1/20, 9/40 of 1000 runs; 5 standard deviations of the largest are 74. A score below 0
    counts as 0.
    """
    gone = np.zeros(6)
    for seed in range(1000):
        memory = GradientBased(5).build()
        memory.set_seed(seed)
        memory.add(numbered(0, 3), score=torch.tensor([0.9, -1e-7, 0.8]))
        memory.add(numbered(3, 2), score=torch.tensor([0.2, 0.6]))
        memory.update(torch.tensor([0]), score=torch.tensor([0.4]))
        memory.add(numbered(5, 1), score=torch.tensor([0.2]))
        gone[({*range(6)} - set(kept_numbers(memory))).pop()] += 1
    expected = 1000 * np.array([2 / 15, 0, 8 / 25, 1 / 20, 9 / 40])
    assert np.abs(gone[:5] - expected).max() < 74
    assert gone[1] == 0
    assert gone[0] > 80
    assert gone[3] < 90


def test_the_hardest_of_a_stream_are_those_of_all_its_losses_at_once():
    random = np.random.default_rng(0)
    memory, losses = Hardest(7).build(), np.round(random.random(60), 1)  # with many that are equal
    losses[31] = np.nan
    for first in range(0, 60, 6):
        memory.add(numbered(first, 6), loss=torch.tensor(losses[first : first + 6]))
        so_far = np.nan_to_num(losses[: first + 6], nan=-1)
        assert kept_numbers(memory) == sorted(np.argsort(-so_far, kind="stable")[:7].tolist())
    memory.drop(torch.tensor([0, 3]))
    assert len(memory) == 5
    memory.add(numbered(70, 2), loss=torch.tensor([0.0, 0.0], dtype=torch.float64))
    assert {70, 71} < set(kept_numbers(memory))


def test_draws_are_without_replacement_and_follow_one_another():
    memory = filled(Reservoir(6))
    first, second = memory.draw(4), memory.draw(4)
    for replay in (first, second):
        assert len(replay.slots.unique()) == len(replay) == 4
        assert torch.equal(replay.labels, replay.inputs["pixel_values"].flatten().long() % 3)
        assert torch.equal(replay.kept["logits"][:, 0], replay.inputs["pixel_values"].flatten() // 4)
    draws = np.zeros(6)
    for _ in range(1000):
        draws[memory.draw(3).slots.numpy()] += 1
    assert np.abs(draws - 500).max() < 80
    assert not torch.equal(first.slots.sort().values, second.slots.sort().values)


def test_a_memory_smaller_than_a_batch_gives_all_it_has_and_an_empty_one_nothing():
    memory = Reservoir(3).build()
    assert memory.draw(8) is None
    assert memory.everything() is None
    assert memory.by_task() == {}
    memory.add(numbered(0, 8))
    assert sorted(memory.draw(8).slots.tolist()) == [0, 1, 2]


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_a_saved_memory_goes_on_as_if_it_had_never_stopped(config):
    one = filled(config)
    one.draw(2)
    two = config.build()
    two.load_state_dict(one.state_dict())
    for memory in (one, two):
        for step in range(6, 12):
            extra = judged(config, [0.3, 0.5, 0.1 * step, 0.2 * step])
            memory.add(numbered(4 * step, 4), task=step // 2, logits=torch.zeros(4, 2), **extra)
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert torch.equal(one.draw(3).slots, two.draw(3).slots)


@pytest.mark.parametrize("config", KINDS, ids=str)
@pytest.mark.parametrize("size", [4, 9])
def test_a_saved_memory_of_another_size_is_refused_and_nothing_is_taken_from_it(config, size):
    memory = dataclasses.replace(config, size=size).build()
    with pytest.raises(ValueError, match=f"memory has room for 6 examples, this {type(config).__name__} for {size}"):
        memory.load_state_dict(filled(config).state_dict())
    assert len(memory) == memory.seen == memory.drawn == 0


def test_decisions_do_not_depend_on_other_random_numbers_but_on_the_seed():
    one = filled(Reservoir(6))
    torch.manual_seed(5)
    np.random.seed(5)
    again, other = filled(Reservoir(6)), filled(Reservoir(6), seed=1)
    assert kept_numbers(one) == kept_numbers(again)
    assert kept_numbers(one) != kept_numbers(other)


def test_processes_share_one_draw(monkeypatch):
    state = filled(Reservoir(6)).state_dict()
    alone = filled(Reservoir(6)).draw(4).slots
    monkeypatch.setattr(memory_module, "world", lambda: 2)
    parts = []
    for number in (0, 1):
        memory = Reservoir(6).build()
        memory.load_state_dict(state)
        monkeypatch.setattr(memory_module, "rank", lambda number=number: number)
        parts.append(memory.draw(2).slots)
    assert torch.equal(torch.cat(parts), alone)
    assert memory.draw(5).slots.shape == (3,), "six examples for two processes that want five each"


@pytest.mark.parametrize("kind", [Reservoir, Ring, Herding, ClassBalanced, GradientBased, Hardest])
def test_adding_and_drawing_cost_as_much_as_the_batch(kind):
    small, large = kind(100).build(), kind(100_000).build()
    column = {GradientBased: "score", Hardest: "loss"}.get(kind)

    def numbers(count, scale):
        return {} if column is None else {column: scale * torch.rand(count)}

    fastest = {}
    for name, memory in (("small", small), ("large", large)):
        memory.add(numbered(0, memory.size, torch.zeros(memory.size, dtype=torch.long)), **numbers(memory.size, 1))
        memory.draw(64)
        times = []
        for _ in range(20):
            began = time.perf_counter()
            memory.draw(64)
            # Hard ones take the place of others, and likely ones of the same class
            memory.add(numbered(0, 64, torch.zeros(64, dtype=torch.long)), **numbers(64, 0.9 + (column == "loss")))
            times.append(time.perf_counter() - began)
        fastest[name] = min(times)
    assert fastest["large"] < 10 * fastest["small"], "a cost in proportion to the size would be 1000 times as much"


def uint8_source(augment=None):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 5, 5), dtype=torch.uint8, generator=generator)
    return Source(dataset={"pixel_values": pixels, "labels": torch.arange(12) % 3}, augment=augment)


def test_inputs_are_kept_raw_and_drawn_as_they_were_seen():
    processor = ImageProcessor(size=(5, 5), mean=(0.2,), std=(0.3,))
    batch = next(iter(Loader(uint8_source(), processor, batch_size=8).batches(0)))
    memory = Reservoir(8).build(processor)
    memory.add(batch)
    assert memory.state_dict()["input_pixel_values"].dtype == torch.uint8
    assert torch.equal(memory.everything().inputs["pixel_values"], batch.inputs["pixel_values"])
    again = Reservoir(8).build(processor)
    again.load_state_dict(memory.state_dict())
    assert torch.equal(again.everything().inputs["pixel_values"], batch.inputs["pixel_values"])


def test_augmented_inputs_are_kept_as_they_were_augmented():
    processor = ImageProcessor(size=(5, 5), mean=(0.2,), std=(0.3,))
    plain = next(iter(Loader(uint8_source(), processor, batch_size=8).batches(0)))
    changed = uint8_source(lambda batch, generator: batch.map(lambda v: v + 1 if v.is_floating_point() else v))
    batch = next(iter(Loader(changed, processor, batch_size=8).batches(0)))
    assert batch.raw is None
    memory = Ring(12, groups=2).build(processor)
    memory.add(plain, task=0)
    memory.add(batch, task=1)  # what was raw so far is processed now
    tasks = memory.by_task()
    assert torch.equal(tasks[0].inputs["pixel_values"], plain.inputs["pixel_values"][-6:])
    assert torch.equal(tasks[1].inputs["pixel_values"], batch.inputs["pixel_values"][-6:])


def test_texts_of_other_lengths_are_padded_and_cut_again():
    memory = Ring(6, groups=2).build()

    def texts(*rows):
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        return Batch(
            inputs={"input_ids": ids, "attention_mask": (ids > 0).long()}, labels=torch.zeros(len(rows)).long()
        )

    memory.add(texts([5, 6], [7]), task=0)
    memory.add(texts([1, 2, 3, 4]), task=1)
    assert memory.at(torch.tensor([0, 1])).inputs["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert memory.everything().inputs["input_ids"].tolist() == [[5, 6, 0, 0], [7, 0, 0, 0], [1, 2, 3, 4]]


def test_update_replaces_columns_and_adds_new_ones_for_all():
    memory = filled(Reservoir(6))
    memory.update(torch.tensor([1, 3]), logits=torch.full((2, 2), -1.0))
    logits = memory.everything().kept["logits"]
    assert (logits[[1, 3]] == -1).all()
    assert (logits[[0, 2, 4, 5]] >= 0).all()
    memory.update(torch.arange(6), weight=torch.arange(6.0))
    assert memory.everything().kept["weight"].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="update\\(\\) all examples"):
        memory.update(torch.tensor([0]), other=torch.zeros(1))


def test_rows_of_a_replay_take_everything_along():
    replay = filled(Reservoir(6)).everything()
    part = replay.rows(torch.tensor([4, 0]))
    assert part.slots.tolist() == [4, 0]
    for name in ("labels", "tasks"):
        assert torch.equal(getattr(part, name), getattr(replay, name)[[4, 0]])
    assert torch.equal(part.kept["logits"], replay.kept["logits"][[4, 0]])


@pytest.mark.parametrize("size", [0, -1, True, 2.5])
@pytest.mark.parametrize("kind", [Reservoir, Ring, Herding, ClassBalanced, GradientBased, Hardest])
def test_a_memory_without_room_is_refused(kind, size):
    with pytest.raises(ValueError, match=f"{kind.__name__} needs room for at least one example"):
        kind(size)


def test_wrong_content_is_named():
    memory = filled(Reservoir(6))
    with pytest.raises(ValueError, match=r"keeps \['logits'\] beside each example, got \[\]"):
        memory.add(numbered(0, 4))
    with pytest.raises(ValueError, match=r"keeps logits of shape \(2,\), not \(3,\); resize or pad"):
        memory.add(numbered(0, 400), logits=torch.zeros(400, 3))
    with pytest.raises(ValueError, match="keeps labels"):
        Reservoir(6).build().add(Batch(inputs={"pixel_values": torch.zeros(2, 1)}))
    with pytest.raises(ValueError, match="chooses by score"):
        GradientBased(6).build().add(numbered(0, 4))
    for kind in (Ring(6, per="class"), Herding(6), ClassBalanced(6)):
        for labels in (torch.zeros(4, 3, 3).long(), torch.zeros(4, 5)):
            with pytest.raises(ValueError, match="among classes and needs one an example"):
                kind.build().add(numbered(0, 4, labels))
    with pytest.raises(ValueError, match="cannot be divided among 3 groups"):
        Ring(2, per="class").build().add(numbered(0, 3))
    with pytest.raises(ValueError, match="divided among 9 groups"):
        Ring(6, groups=9)
    with pytest.raises(ValueError, match="per must be"):
        Ring(6, per="classes")


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_kinds_are_plain_data(config):
    plain = to_dict(config)
    assert plain["kind"] == type(config).kind
    assert from_dict(MemoryConfig, plain) == config


def test_raw_images_of_another_size_are_kept_as_they_were_processed():
    """Raw pixels fit no common column; processed they do. Nothing kept before is lost."""
    processor = ImageProcessor(size=(5, 5), mean=(0.2,), std=(0.3,))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (8, 9, 9), dtype=torch.uint8, generator=generator)
    other = {"pixel_values": pixels, "labels": torch.arange(8)}
    small = next(iter(Loader(uint8_source(), processor, batch_size=6).batches(0)))
    large = next(iter(Loader(Source(dataset=other), processor, batch_size=6).batches(0)))
    assert large.raw is not None
    memory = Ring(12, groups=2).build(processor)
    for task, batch in ((0, small), (1, large), (0, small), (1, large)):
        memory.add(batch, task=task)
    tasks = memory.by_task()
    for task, batch in ((0, small), (1, large)):
        mine = {row.sum().item() for row in tasks[task].inputs["pixel_values"].float()}
        assert mine == {row.sum().item() for row in batch.inputs["pixel_values"].float()}
    again = Ring(12, groups=2).build(processor)
    again.load_state_dict(memory.state_dict())
    assert torch.equal(again.everything().inputs["pixel_values"], memory.everything().inputs["pixel_values"])


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_examples_without_a_label_are_not_kept(config):
    memory = config.build()
    labels = torch.tensor([0, -1, 1, -100, 2, -1])
    extra = judged(config, [0.1, 0.0, 0.2, 0.0, 0.3, 0.0])
    memory.add(numbered(0, 6, labels), twice=labels * 2, **extra)
    assert memory.seen == 3
    everything = memory.everything()
    kept = dict(zip(everything.inputs["pixel_values"].flatten().int().tolist(), everything.kept["twice"].tolist()))
    assert kept == {0: 0, 2: 2, 4: 4}
    none = judged(config, [0.0, 0.0])
    memory.add(numbered(6, 2, torch.tensor([-1, -100])), twice=torch.zeros(2).long(), **none)
    assert memory.seen == 3


class Made(TorchDispatchMode):
    """Notes the numbers of the largest tensor that is made while it is active; what is changed in place is not made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [each for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)]
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.numel())
        return found


@pytest.mark.parametrize("kind", [Reservoir, Ring, Herding, ClassBalanced, GradientBased, Hardest])
def test_adding_and_drawing_copy_no_column(kind):
    """Rows of 10 numbers: the largest tensor is a batch of 16, not one number for each of 4,998 kept examples."""
    memory, column = kind(4998).build(), {GradientBased: "score", Hardest: "loss"}.get(kind)

    def add(count):
        batch = Batch(inputs={"pixel_values": torch.rand(count, 10)}, labels=torch.arange(count) % 3)
        memory.add(batch, **({} if column is None else {column: torch.rand(count)}))

    add(4998)
    memory.draw(16)
    with Made() as made:
        for _ in range(3):
            add(16)
            memory.draw(16)
    assert len(memory) == 4998
    assert 0 < made.largest <= 160
