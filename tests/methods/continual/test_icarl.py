"""iCaRL: whole portions re-derived, exemplars by herding and once a pass, nearest means, what is refused."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import Herding, Ring, SingleTask, TaskStream
from hubtransfer.functional.herding import herding_order
from hubtransfer.methods.continual.icarl import ICaRL
from hubtransfer.methods.continual.l2 import L2
from hubtransfer.methods.continual.sequential import SequentialFineTune
from hubtransfer.methods.exemplars import class_means, once_a_pass
from tests.methods.continual.streams import class_stream, domain_stream, model_for, task_stream
from tests.methods.continual.test_er import logits_of
from tests.methods.steps import assert_same_parameters, batches_of, clone, descend, run
from tests.tiny import batch


def example(dtype=torch.float32, seed=0, n=24):
    stream = class_stream(n=n, seed=seed, dtype=dtype)
    return ICaRL(model_for(stream, dtype=dtype, seed=seed), memory=Herding(8)), stream


def test_three_portions_equal_a_plain_loop():
    """24 new images, batches of 8, 12 exemplars: four join each batch, and each joins once a pass."""
    stream = class_stream(3, dtype=torch.float64)
    method = ICaRL(model_for(stream, dtype=torch.float64), memory=Herding(12))
    plain, joined, contents = clone(method.model), [], []
    at, before_task = method.memory.at, method.before_task

    def looking(slots):
        joined.append(at(slots))
        return joined[-1]

    def starting(item, runtime):
        contents.append(method.memory.everything())
        before_task(item, runtime)
        joined.clear()
        method.memory.at = looking

    def ending(item, runtime, after_task=method.after_task):
        method.memory.at = at
        seen.append(list(joined))
        after_task(item, runtime)

    seen = []
    method.before_task, method.after_task = starting, ending
    run(method, stream, steps=6)
    for t, item in enumerate(stream):
        old, known = clone(plain).eval(), 2 * t + 2
        assert len(seen[t]) == (6 if t else 0)
        if t:
            for half in (seen[t][:3], seen[t][3:]):
                assert sorted(torch.cat([replay.slots for replay in half]).tolist()) == list(range(12))
        for number, each in enumerate(batches_of(stream, item, steps=6)):
            x, y = each.inputs["pixel_values"], each.labels
            if t:
                x = torch.cat([x, seen[t][number].inputs["pixel_values"]])
                y = torch.cat([y, seen[t][number].labels])
            z = logits_of(plain, x)
            loss = torch.zeros((), dtype=torch.float64)
            for c in range(known):
                q = logits_of(old, x)[:, c].sigmoid().detach() if c < 2 * t else (y == c).double()
                p = z[:, c].sigmoid()
                loss = loss - (q * p.log() + (1 - q) * (1 - p).log()).sum()
            descend(plain.parameters(), loss / (len(x) * known))
        if t < 2:
            kept = contents[t + 1]
            assert kept.labels.bincount().tolist() == [12 // known] * known
            answers = logits_of(plain, kept.inputs["pixel_values"]).sigmoid()
            torch.testing.assert_close(kept.kept["answers"], answers.detach())
    assert_same_parameters(method.model, plain, 1e-10)


def test_exemplars_are_the_herded_and_the_last_ones_go_first():
    stream = class_stream(2, dtype=torch.float64)
    method, contents = ICaRL(model_for(stream, dtype=torch.float64), memory=Herding(12)), []
    before_task = method.before_task

    def starting(item, runtime):
        contents.append(method.memory.everything())
        before_task(item, runtime)

    method.before_task = starting
    run(method, TaskStream(stream.items, kind="class"), lr=0.0)
    first, second = contents[1], method.memory.everything()
    for kept, share, portions in ((first, 6, 1), (second, 3, 2)):
        for label in range(2 * portions):
            data = stream[label // 2].train
            own = data["pixel_values"][data["labels"] == label]
            features = F.normalize(method.model.backbone.trunk(own), dim=1)
            expected = own[herding_order(features, share)]
            found = kept.inputs["pixel_values"][kept.labels == label]
            assert sorted(x.sum().item() for x in found) == sorted(x.sum().item() for x in expected)


def test_the_nearest_mean_is_predicted_and_is_the_best_of_a_linear_head():
    stream = class_stream(2)
    method = ICaRL(model_for(stream), memory=Herding(12))
    run(method, stream, steps=20, lr=0.2)
    method.eval()
    kept = method.memory.everything()
    means = []
    for label in range(4):
        features = F.normalize(method.model.backbone.trunk(kept.inputs["pixel_values"][kept.labels == label]), dim=1)
        means.append(features.mean(0) / features.mean(0).norm())
    means = torch.stack(means)
    given = batch(n=20, labels=None)
    with torch.no_grad():
        found = method.predict(given, "task")
        features = method.model.backbone.trunk(given.inputs["pixel_values"])
    distances = (F.normalize(features, dim=1)[:, None] - means[None]).square().sum(2)
    torch.testing.assert_close(found, -distances, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.argmax(1), (features @ means.T).argmax(1))
    torch.testing.assert_close(class_means(method.model, method.memory, "task", 4), means)


def test_it_remembers_what_fine_tuning_forgets():
    stream, accuracies = class_stream(3), {}
    for make in (lambda model: ICaRL(model, memory=Herding(18)), SequentialFineTune):
        method = make(model_for(stream))
        metrics = run(method, stream, steps=40, lr=0.3).evaluate()
        accuracies[type(method)] = [metrics[f"t{k}/accuracy"] for k in range(3)]
    assert min(accuracies[ICaRL]) >= 0.9
    assert min(accuracies[SequentialFineTune]) < 0.1


def test_a_class_without_exemplars_is_not_predicted_and_no_memory_means_the_head():
    stream = class_stream(2)
    method = ICaRL(model_for(stream), memory=Herding(8))
    given = batch(n=6, labels=None)
    with torch.no_grad():
        assert torch.equal(method.predict(given, "task"), method.model(**given.inputs).logits)
    run(method, TaskStream(stream.items[:1], kind="class"))
    with torch.no_grad():
        found = method.predict(given, "task")
    assert (found[:, 2:] == -5).all()
    assert (found[:, :2] >= -4).all()
    assert (found[:, :2] <= 1e-6).all()


def test_every_pass_has_an_order_of_its_own():
    memory = Herding(6).build()
    memory.add(batch([0, 0, 0, 1, 1, 1]))
    places = once_a_pass(memory, 0, 0, 18)
    passes = [places[k : k + 6].tolist() for k in (0, 6, 12)]
    assert all(sorted(one) == [0, 1, 2, 3, 4, 5] for one in passes)
    assert passes[0] != passes[1] or passes[1] != passes[2]
    pieces = [once_a_pass(memory, 0, *ends) for ends in ((0, 1), (1, 1), (1, 8), (8, 18))]
    assert torch.equal(torch.cat(pieces), places)
    assert not torch.equal(once_a_pass(memory, 1, 0, 18), places)


def test_an_order_is_made_once_a_pass(monkeypatch):
    memory, made, plain = Herding(40).build(), [], torch.randperm
    memory.set_seed(123)
    memory.add(batch([0] * 20 + [1] * 20))
    monkeypatch.setattr(torch, "randperm", lambda size, **how: made.append(size) or plain(size, **how))
    for step in range(10):  # eight of 80 places a step: two passes
        once_a_pass(memory, 3, 8 * step, 8 * step + 8)
    assert made == [40, 40]


def test_penalties_join_it():
    stream = class_stream(2)
    both = ICaRL(model_for(stream), memory=Herding(8))
    both = both + L2(both.model, strength=0.1)
    run(both, stream)
    assert len(both.method.memory) == 8


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"memory must be Herding\(size\)"):
        ICaRL(model_for(class_stream()), memory=Ring(5))
    for make, kind in ((domain_stream, "domain"), (task_stream, "task")):
        stream = make(2)
        with pytest.raises(ValueError, match=f"got kind '{kind}'"):
            list(ICaRL(model_for(stream)).stages(stream))
    stream = class_stream(3)
    with pytest.raises(ValueError, match="5 exemplars cannot be divided among 6 classes"):
        run(ICaRL(model_for(stream), memory=Herding(5)), stream)
    unread = SingleTask(iter, columns={"pixel_values": "pixel_values", "labels": "labels"}, name="t")
    with pytest.raises(ValueError, match="labels cannot be read beforehand"):
        list(ICaRL(model_for(stream)).stages(TaskStream([unread], kind="class")))
