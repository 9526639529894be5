"""EWC: the penalties of all earlier tasks in straight lines, the Fisher of single examples, and what it measures in."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hubtransfer as ht
from hubtransfer.data import SingleTask, TaskStream
from hubtransfer.methods.continual.ewc import EWC
from tests.methods.continual.streams import class_stream, domain_stream, model_for, task_stream
from tests.methods.steps import assert_same_parameters, batches_of, clone, descend, run
from tests.tiny import SHAPE, batch, tiny_data, tiny_model


def example(dtype=torch.float32, seed=0, n=24):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    return EWC(model_for(stream, dtype=dtype, seed=seed), strength=20.0), stream


def fisher(model, data, task, kind):
    """Examples one by one: the mean over them of expected (or chosen) squared gradients of log p."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for x, y in zip(data["pixel_values"], data["labels"]):
        log_p = model(pixel_values=x[None], task=task).logits.log_softmax(1)[0]
        classes = {"exact": range(len(log_p)), "label": [int(y)], "predicted": [int(log_p.argmax())]}[kind]
        for c in classes:
            found = torch.autograd.grad(log_p[c], parameters, retain_graph=True, allow_unused=True)
            weight = log_p[c].exp().item() if kind == "exact" else 1.0
            for t, g in zip(total, found):
                if g is not None:
                    t += weight * g.square()
    return [t / len(data["labels"]) for t in total]


def plain_loop(model, stream, kind, *, strength=20.0, steps=3, lr=0.05):
    """One penalty for each earlier task, as the paper has it."""
    parameters, past = list(model.parameters()), []
    for item in stream:
        task = item.task or "task"
        for each in batches_of(stream, item, steps=steps):
            loss = F.cross_entropy(model(**each.inputs, task=task).logits, each.labels)
            for importance, anchor in past:
                squares = [(f * (p - a).square()).sum() for f, p, a in zip(importance, parameters, anchor)]
                loss = loss + strength / 2 * sum(squares)
            descend(parameters, loss, lr)
        model.eval()
        past.append((fisher(model, item.train, task, kind), [p.detach().clone() for p in parameters]))
        model.train()
    return past


@pytest.mark.parametrize("kind", ["exact", "label", "predicted"])
def test_three_tasks_equal_one_penalty_for_each(kind):
    stream = domain_stream(3, dtype=torch.float64)
    method = EWC(model_for(stream, dtype=torch.float64), strength=20.0, fisher=kind)
    plain = clone(method.model)
    run(method, stream)
    past = plain_loop(plain, stream, kind)
    assert_same_parameters(method.model, plain, 1e-10)
    # The value of the penalty is the sum of all three quadratics too, away from every anchor.
    with torch.no_grad():
        for p, q in zip(method.model.parameters(), plain.parameters()):
            p.add_(0.3)
            q.add_(0.3)
    expected = sum(10.0 * (f * (p - a).square()).sum() for k in past for f, p, a in zip(k[0], plain.parameters(), k[1]))
    assert method.terms(batch([0, 1], dtype=torch.float64))["penalty"].item() == pytest.approx(
        expected.item(), rel=1e-9
    )


def test_heads_of_their_own():
    stream = task_stream(3, dtype=torch.float64)
    method = EWC(model_for(stream, dtype=torch.float64), strength=20.0)
    plain = clone(method.model)
    run(method, stream)
    plain_loop(plain, stream, "exact")
    assert_same_parameters(method.model, plain, 1e-10)


def test_classes_in_portions():
    stream = class_stream(2, dtype=torch.float64)
    method = EWC(model_for(stream, dtype=torch.float64), strength=20.0)
    plain = clone(method.model)
    run(method, stream)
    plain_loop(plain, stream, "exact")
    assert_same_parameters(method.model, plain, 1e-10)


def test_the_penalty_is_not_zero_and_important_weights_move_less():
    stream = domain_stream(2)
    free, held = EWC(model_for(stream), strength=0.0), EWC(model_for(stream), strength=200.0)
    first = TaskStream(stream.items[:1], kind="domain")
    for method in (free, held):
        run(method, first, steps=20)
    start = {name: p.detach().clone() for name, p in held.model.named_parameters()}
    importance = held.importance.tensors()
    drift = {}
    for name, method in (("free", free), ("held", held)):
        second = TaskStream(stream.items[1:], kind="domain")
        run(method, second, steps=20)
        drift[name] = sum((importance[k] * (p - start[k]).square()).sum() for k, p in method.model.named_parameters())
    assert drift["held"] > 0
    assert drift["held"] < 0.2 * drift["free"]


def test_drawn_classes_are_the_same_again_and_near_the_exact_sum():
    stream = domain_stream(1, n=600, dtype=torch.float64)
    found = []
    for kind in ("sampled", "sampled", "exact"):
        method = EWC(model_for(stream, dtype=torch.float64), fisher=kind)
        run(method, stream, steps=1)
        found.append(torch.cat([t.flatten() for t in method.importance.tensors().values()]))
    assert torch.equal(found[0], found[1])
    assert torch.nn.functional.cosine_similarity(found[0], found[2], dim=0) > 0.95
    assert found[0].sum().item() == pytest.approx(found[2].sum().item(), rel=0.15)


def test_the_fisher_is_measured_in_evaluation_mode_without_augmentation():
    """Dropout and noise on the images would change it from one measurement to the next."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Dropout(0.5))
    found = []

    def noisy(batch, generator):
        noise = torch.randn(batch.inputs["pixel_values"].shape, generator=generator)
        return batch.replace(inputs={"pixel_values": batch.inputs["pixel_values"] + noise})

    for augment in (None, noisy):
        backbone = ht.Backbone.from_module(clone(network), dim=16, sample=torch.zeros(1, *SHAPE))
        torch.manual_seed(0)
        method = EWC(ht.TransferModel(backbone).add_task("task", ht.ClassificationHead(3)))
        item = SingleTask(tiny_data(12), name="t0", augment=augment)
        run(method, TaskStream([item], kind="domain"), steps=1, lr=0.0)
        assert method.model.training
        found.append(method.importance.tensors())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])
    method.model.eval()
    expected = fisher(method.model, tiny_data(12), "task", "exact")
    for (name, _), right in zip(method.model.named_parameters(), expected):
        torch.testing.assert_close(found[0][name], right)


def test_a_number_of_samples():
    """It is a mean over 10 different images, whichever they are."""
    stream = domain_stream(1, n=24, dtype=torch.float64)
    method, seen = EWC(model_for(stream, dtype=torch.float64), samples=10, fisher="label"), []

    def noting(batch, labels=method.labels):
        seen.append(batch)
        return labels(batch)

    method.labels = noting
    run(method, stream, steps=1)
    measured = {"pixel_values": seen[-1].inputs["pixel_values"], "labels": seen[-1].labels}
    assert len(measured["pixel_values"].flatten(1).unique(dim=0)) == len(measured["labels"]) == 10
    for (name, _), right in zip(
        method.model.named_parameters(), fisher(method.model.eval(), measured, "task", "label")
    ):
        torch.testing.assert_close(method.importance.tensors()[name], right)


def test_heads_without_classes_are_refused_before_work_starts():
    model = ht.TransferModel(tiny_model().backbone).add_task("task", ht.RegressionHead(1))
    data = tiny_data(8)
    stream = TaskStream([SingleTask(data | {"labels": data["labels"].float()})], kind="domain")
    with pytest.raises(ValueError, match="EWC: Fisher information needs class probabilities, but task 'task'"):
        run(EWC(model), stream)


@pytest.mark.parametrize("bad", [{"strength": -1.0}, {"fisher": "true"}, {"samples": 0}])
def test_bad_hyper_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EWC(model_for(domain_stream()), **bad)


@pytest.mark.parametrize("kind", ["label", "exact"])
def test_examples_without_a_label_count_only_where_none_is_needed(kind):
    data = tiny_data(24, dtype=torch.float64)
    data["labels"][[3, 4, 17]] = torch.tensor([-1, -100, -1])
    stream = TaskStream([SingleTask(data, name="t")], kind="domain")
    method = EWC(model_for(stream, dtype=torch.float64), fisher=kind)
    run(method, stream)
    known = data["labels"] >= 0
    counted = {name: value[known] for name, value in data.items()} if kind == "label" else data
    expected = fisher(method.model.eval(), counted, "task", kind)
    for (name, _), right in zip(method.model.named_parameters(), expected):
        torch.testing.assert_close(method.importance.tensors()[name], right)
