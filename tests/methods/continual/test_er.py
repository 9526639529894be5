"""ER: a whole run re-derived with a memory kept by hand, heads of their own, texts, composition, what is refused."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import Batch, ClassBalanced, Reservoir, Ring, SingleTask, TaskStream
from hubtransfer.methods.continual.er import ER
from hubtransfer.methods.continual.si import SI
from tests.methods.continual.streams import domain_stream, model_for, task_stream
from tests.methods.steps import assert_same_parameters, batches, batches_of, clone, descend, run, watch_draws
from tests.tiny import tiny_data


def example(dtype=torch.float32, seed=0, n=24):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    return ER(model_for(stream, dtype=dtype, seed=seed), memory=Reservoir(12)), stream


def logits_of(model, pixels, head="task"):
    return model.heads[head](model.backbone.trunk(pixels))


def test_whole_tasks_equal_a_plain_loop():
    """The memory is large enough to keep everything, so its content is known; which slots are drawn is asked of it."""
    stream = domain_stream(2, dtype=torch.float64)
    method = ER(model_for(stream, dtype=torch.float64), memory=Reservoir(100), replay_batch=5)
    plain, slots = clone(method.model), watch_draws(method.memory)
    run(method, stream)
    pixels, labels = torch.empty(0, 3, 8, 8, dtype=torch.float64), torch.empty(0, dtype=torch.long)
    steps = [each for item in stream for each in batches_of(stream, item)]
    assert len(steps) == len(slots) == 6
    assert slots[0] is None
    for each, drawn in zip(steps, slots):
        x, y = each.inputs["pixel_values"], each.labels
        if drawn is not None:
            assert len(drawn.unique()) == 5
            x, y = torch.cat([x, pixels[drawn]]), torch.cat([y, labels[drawn]])
        descend(plain.parameters(), F.cross_entropy(logits_of(plain, x), y))
        pixels, labels = torch.cat([pixels, each.inputs["pixel_values"]]), torch.cat([labels, each.labels])
    assert_same_parameters(method.model, plain, 1e-12)
    kept = method.memory.everything()
    assert torch.equal(kept.inputs["pixel_values"], pixels)
    assert kept.tasks.tolist() == [0] * 24 + [1] * 24


def test_heads_of_their_own_answer_for_their_examples():
    stream = task_stream(2, dtype=torch.float64)
    method = ER(model_for(stream, dtype=torch.float64), memory=Reservoir(100))
    run(method, stream)
    (each,) = batches(stream[1].train_source, steps=1)
    replay = method.memory.at(torch.tensor([0, 1, 30, 47, 2]))
    assert replay.tasks.tolist() == [0, 0, 1, 1, 0]
    expected = F.cross_entropy(logits_of(method.model, each.inputs["pixel_values"], "t1"), each.labels, reduction="sum")
    for row, task in enumerate(replay.tasks.tolist()):
        logits = logits_of(method.model, replay.inputs["pixel_values"][row : row + 1], f"t{task}")
        expected = expected + F.cross_entropy(logits, replay.labels[row : row + 1])
    torch.testing.assert_close(method.loss_together(each, replay), expected / 13)


def conflicting():
    """The second task shows other images; a network that only sees them forgets the first ones."""
    sets = [tiny_data(24, seed=seed) for seed in (0, 1)]
    sets[1]["labels"] = (sets[1]["labels"] + 1) % 3
    return TaskStream([SingleTask(data, evaluation=data, name=f"t{k}") for k, data in enumerate(sets)], kind="domain")


def test_it_remembers():
    method = ER(model_for(conflicting()), memory=ClassBalanced(24))
    metrics = run(method, conflicting(), steps=60, lr=0.3).evaluate()
    assert metrics["t0/accuracy"] == metrics["t1/accuracy"] == 1


def test_penalties_join_it():
    stream = domain_stream()
    model = model_for(stream)
    both = ER(model, memory=Ring(12)) + SI(model, strength=0.5)
    run(both, stream)
    assert len(both.method.memory) == 12
    assert any((value > 0).any() for value in both.parts[0].importance.tensors().values())


def test_texts_of_other_lengths_are_drawn_beside_the_batch():
    method, stream = example()
    method.begin(stream[0], None)
    calls = []

    def forward(input_ids, attention_mask, task, labels=None):
        calls.append(input_ids)
        return type("Output", (), {"loss": input_ids.sum() * 0.0})

    method.memory.add(_texts([5, 6, 7], [8]), task=0)
    method.model.forward = forward
    method.loss(_texts([1], [2]))
    assert calls[0].shape == (4, 3)
    assert calls[0][:2].tolist() == [[1, 0, 0], [2, 0, 0]]


def _texts(*rows):
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return Batch(inputs={"input_ids": ids, "attention_mask": (ids > 0).long()}, labels=torch.zeros(len(rows)).long())


def test_a_stream_that_ends_early_leaves_a_working_memory():
    """A task smaller than a batch, and a memory that is never full."""
    stream = TaskStream([SingleTask(tiny_data(n, seed=n), name=f"t{n}") for n in (3, 5)], kind="domain")
    method = ER(model_for(stream), memory=Reservoir(100), replay_batch=64)
    run(method, stream, steps=2)
    assert len(method.memory) == 2 * 3 + 2 * 5


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"memory": 200}, "memory must be a kind of memory such as Reservoir"),
        ({"replay_batch": 0}, "replay_batch must be at least 1, got 0"),
        ({"memry": Reservoir(2)}, "did you mean 'memory'"),
    ],
)
def test_bad_hyper_parameters_are_named(bad, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ER(model_for(domain_stream()), **bad)


def test_a_stream_without_a_head_for_a_task_is_refused():
    stream = task_stream(2)
    model = model_for(stream).remove_task("t1")
    with pytest.raises(ValueError, match="task 't1'"):
        run(ER(model), stream)
