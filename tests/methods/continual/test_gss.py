"""GSS: scores and steps re-derived with gradients of single examples, the subset kept, rare examples stay."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import GradientBased, Reservoir, SingleTask, TaskStream
from hubtransfer.functional.subsets import least_similar
from hubtransfer.methods.continual.gss import GSS
from hubtransfer.methods.continual.si import SI
from hubtransfer.methods.gradient_similarity import Gradients
from hubtransfer.models import RegressionHead, TransferModel
from tests.methods.continual.streams import domain_stream, model_for, task_stream
from tests.methods.continual.test_er import logits_of
from tests.methods.steps import assert_same_parameters, batches, batches_of, clone, descend, run
from tests.tiny import tiny_backbone, tiny_data


def example(dtype=torch.float32, seed=0, n=24):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    return GSS(model_for(stream, dtype=dtype, seed=seed), compared=4, memory=GradientBased(10)), stream


def gradients(model, pixels, labels, head="task"):
    """One by one, (examples, parameters)."""
    rows = []
    for x, y in zip(pixels, labels):
        loss = F.cross_entropy(logits_of(model, x[None], head), y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def cosines(one, two):
    return F.cosine_similarity(one[:, None], two[None], dim=2)


def watch(memory):
    """Lists what was drawn, what new examples were compared with, and what was added with which scores."""
    seen = {"drawn": [], "compared": [], "added": []}
    draw, at, add = memory.draw, memory.at, memory.add

    def drawing(count):
        seen["inside"] = True
        seen["drawn"].append(draw(count))
        seen["inside"] = False
        return seen["drawn"][-1]

    def looking(slots):
        found = at(slots)
        if not seen.get("inside"):
            seen["compared"].append(found)
        return found

    def adding(batch, **kept):
        seen["added"].append(kept["score"])
        add(batch, **kept)

    memory.draw, memory.at, memory.add = drawing, looking, adding
    return seen


def test_scores_and_steps_equal_a_plain_loop():
    stream = domain_stream(2, dtype=torch.float64)
    method = GSS(model_for(stream, dtype=torch.float64), compared=4, memory=GradientBased(10), replay_batch=5)
    plain, seen = clone(method.model), watch(method.memory)
    run(method, stream)
    compared = iter(seen["compared"])
    for each, drawn, scores in zip(
        [e for item in stream for e in batches_of(stream, item)], seen["drawn"], seen["added"], strict=True
    ):
        x, y = each.inputs["pixel_values"], each.labels
        both = (x, y) if drawn is None else (torch.cat([x, drawn.inputs["pixel_values"]]), torch.cat([y, drawn.labels]))
        descend(plain.parameters(), F.cross_entropy(logits_of(plain, both[0]), both[1]))
        if drawn is None:
            rows = gradients(plain, x, y)
            expected = [0.1] + [1 + cosines(rows[i : i + 1], rows[:i]).max().item() for i in range(1, 8)]
            assert scores.tolist() == pytest.approx(expected)
        else:
            others = next(compared)
            assert len(others.slots.unique()) == 4
            expected = (
                1
                + cosines(gradients(plain, x, y), gradients(plain, others.inputs["pixel_values"], others.labels))
                .max(1)
                .values
            )
            torch.testing.assert_close(scores, expected)
    assert_same_parameters(method.model, plain, 1e-10)


@pytest.mark.parametrize("selection", ["greedy", "iqp"])
def test_rare_classes_stay(selection):
    """Four of 64 images are of classes 1 and 2; by chance both are among 16 kept in one run of five."""
    data = tiny_data(192)
    common, rare = (data["labels"] == 0).nonzero().flatten()[:60], (data["labels"] > 0).nonzero().flatten()[:4]
    for seed in range(5):
        order = torch.cat([common, rare])[torch.randperm(64, generator=torch.Generator().manual_seed(seed))]
        stream = TaskStream([SingleTask({k: v[order] for k, v in data.items()}, name="t")], kind="domain")
        method = GSS(model_for(stream), selection=selection, compared=16, memory=GradientBased(16))
        run(method, stream, steps=24, lr=0.01, seed=seed)
        assert method.memory.everything().labels.unique().tolist() == [0, 1, 2]


def test_the_program_keeps_the_least_similar_of_memory_and_batch():
    stream = domain_stream(1, dtype=torch.float64)
    method = GSS(model_for(stream, dtype=torch.float64), selection="iqp", memory=GradientBased(8))
    method.begin(stream[0], None)
    first, second = batches(stream[0].train_source, steps=2)
    method.after_step(first)
    assert torch.equal(method.memory.everything().inputs["pixel_values"], first.inputs["pixel_values"])
    method.after_step(second)
    pixels = torch.cat([each.inputs["pixel_values"] for each in (first, second)])
    rows = gradients(method.model, pixels, torch.cat([first.labels, second.labels]))
    expected = pixels[least_similar(cosines(rows, rows), 8, start=torch.arange(16) < 8)]
    kept = method.memory.everything().inputs["pixel_values"]
    assert 0 < (expected[:, None] == pixels[8:]).flatten(2).all(2).any(0).sum() < 8, "the choice says something"
    assert sorted(one.sum().item() for one in kept) == sorted(one.sum().item() for one in expected)
    assert method.memory.seen == 16


def test_with_heads_of_their_own_gradients_meet_in_the_trunk():
    stream = task_stream(2, dtype=torch.float64)
    method = GSS(model_for(stream, dtype=torch.float64), compared=100, memory=GradientBased(40))
    run(method, stream)
    method.eval()
    kept = method.memory.everything()
    assert set(kept.tasks.tolist()) == {0, 1}
    (each,) = batches(stream[1].train_source, steps=1)
    found = method._gradients.of(each).cosines(method._gradients.of(kept))
    trunk = list(method.model.backbone.trunk.parameters())
    own = trunk + list(method.model.heads["t1"].parameters())
    for column, (x, y, task) in enumerate(zip(kept.inputs["pixel_values"], kept.labels, kept.tasks.tolist())):
        shared = own if task else trunk
        right = torch.autograd.grad(F.cross_entropy(logits_of(method.model, x[None], f"t{task}"), y[None]), shared)
        for row in (0, 5):
            z = logits_of(method.model, each.inputs["pixel_values"][row : row + 1], "t1")
            left = torch.autograd.grad(F.cross_entropy(z, each.labels[row : row + 1]), own)
            inner = sum((a * b).sum() for a, b in zip(left, right))
            sizes = [sum(g.square().sum() for g in gradient) ** 0.5 for gradient in (left, right)]
            torch.testing.assert_close(found[row, column], inner / (sizes[0] * sizes[1]))


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_scoring_changes_nothing_of_the_model(kind):
    stream = domain_stream(1)
    method = GSS(model_for(stream, kind=kind), memory=GradientBased(8))
    method.begin(stream[0], None)
    before, modes = clone(method.model), [m.training for m in method.modules()]
    for each in batches(stream[0].train_source):
        method.after_step(each)
    assert_same_parameters(method.model, before, 0.0)
    assert modes == [m.training for m in method.modules()]
    assert all(p.grad is None for p in method.parameters())


def test_penalties_join_it():
    stream = domain_stream()
    model = model_for(stream)
    both = GSS(model, memory=GradientBased(12)) + SI(model, strength=0.5)
    run(both, stream)
    assert len(both.method.memory) == 12


def test_what_cannot_be():
    stream = domain_stream()
    model = model_for(stream)
    for bad in ({"selection": "iqp2"}, {"compared": 0}, {"memory": Reservoir(5)}, {"replay_batch": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            GSS(model, **bad)
    numbers = TransferModel(tiny_backbone("mlp")).add_task("task", RegressionHead(1))
    with pytest.raises(ValueError, match="GSS: a loss of single examples needs class probabilities"):
        list(GSS(numbers).stages(stream))


@pytest.mark.parametrize("selection", ["greedy", "iqp"])
@pytest.mark.parametrize("missing", [-1, -100])
def test_examples_without_a_label_have_no_part_in_the_choice(selection, missing):
    data = tiny_data(24, dtype=torch.float64)
    data["labels"][::3] = missing  # all of class 0
    stream = TaskStream([SingleTask(data, name="t")], kind="domain")
    method = GSS(model_for(stream, dtype=torch.float64), selection=selection, memory=GradientBased(8))
    seen = watch(method.memory)
    run(method, stream, steps=1)
    (each,) = batches(stream[0].train_source, steps=1)
    known = each.labels >= 0
    assert 0 < known.sum() < 8
    if selection == "greedy":
        rows = gradients(method.model, each.inputs["pixel_values"][known], each.labels[known])
        expected = [0.1] + [1 + cosines(rows[i : i + 1], rows[:i]).max().item() for i in range(1, len(rows))]
        assert seen["added"][0][known].tolist() == pytest.approx(expected)
    run(method, stream, steps=6)
    assert len(method.memory) == 8
    assert (method.memory.everything().labels > 0).all()


def test_cosines_of_several_heads_are_where_the_examples_are():
    class Rows:
        def __init__(self, count):
            self.count = count

        def cosines(self, other):
            return torch.zeros(self.count, other.count, device="meta")  # stands for a GPU

    there = torch.device("meta")
    two = Gradients(4, [(torch.tensor([0, 1]), Rows(2)), (torch.tensor([2, 3]), Rows(2))], there)
    one = Gradients(3, [(torch.arange(3), Rows(3))], there)
    assert two.cosines(one).device == one.cosines(one).device == there
    assert Gradients(2, [], there).cosines(one).device == there
