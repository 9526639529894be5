"""CN-DPM: who learns what by hand, growth and the memory, the mixture's answer, new data make new experts."""

import math

import pytest
import torch
import torch.nn.functional as F

import hubtransfer as ht
from hubtransfer.methods.continual.cn_dpm import CNDPM
from tests.methods.continual.streams import class_stream, domain_stream, model_for, task_stream
from tests.methods.steps import batches, run
from tests.tiny import tiny_backbone, tiny_model

QUICK = {"memory": 8, "generator_steps": 2, "classifier_steps": 2, "sleep_batch": 8, "hidden": (8,), "latent": 2}


def example(dtype=torch.float32, seed=0, n=24):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    return CNDPM(model_for(stream, dtype=dtype, seed=seed), samples=3, portion=n, **QUICK), stream


def grown(experts=2, **options):
    """A method with some experts that have learned 3, 4, ... examples."""
    method = CNDPM(tiny_model(3, kind="mlp", dtype=torch.float64), samples=3, **{**QUICK, **options})
    for _ in range(experts):
        method.grow("add_expert")
    method.double()
    method.count(torch.arange(experts) + 3)
    return method.eval()


def joint_by_hand(method, each, chill):
    """ln n_k + ln p_k(x) + ln p_k(y | x)^(1 / chill) of each expert, (batch, experts)."""
    pixels, columns = each.inputs["pixel_values"], []
    for k, name in enumerate(method.experts):
        density = method.model.heads[f"{name} inputs"]
        mean, log_variance = density.encoder(pixels.flatten(1).clamp(0, 1)).chunk(2, 1)
        bound = -0.5 * 192 * math.log(2 * math.pi) - 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
        for code in density.codes:
            decoded = density.decoder(mean + (log_variance / 2).exp() * code).sigmoid()
            bound = bound - (pixels.flatten(1).clamp(0, 1) - decoded).square().sum(1) / 6
        log_p = (method.model(pixel_values=pixels, task=name).logits.log_softmax(1) / chill).log_softmax(1)
        columns.append(math.log(3 + k) + bound + log_p.gather(1, each.labels[:, None])[:, 0])
    return torch.stack(columns, 1)


def test_an_example_goes_to_the_experts_or_into_the_memory():
    (each,) = batches(domain_stream(1, dtype=torch.float64)[0].train_source, steps=1)
    method = grown(chill=0.1)
    with torch.no_grad():
        joint = joint_by_hand(method, each, 0.1)
        new = method.model.heads["new expert inputs"](each.inputs["pixel_values"])
        margin = joint.amax(1) - new  # called new where ln alpha is larger
    method = grown(chill=0.1, log_alpha=float(margin.median()) + 1e-6)
    method.place(each)
    is_new = margin < method.config.log_alpha
    assert 0 < is_new.sum() < len(is_new)
    assert torch.equal(method.memory.everything().labels, each.labels[is_new])
    shares = joint.softmax(1) * ~is_new[:, None]
    torch.testing.assert_close(each.memo["judged"][1], shares, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(method.learned_by, torch.tensor([3.0, 4.0], dtype=torch.float64) + shares.sum(0))


@pytest.mark.parametrize("missing", [-1, -100])
def test_examples_without_a_label_are_nobodys(missing):
    (each,) = batches(domain_stream(1, dtype=torch.float64)[0].train_source, steps=1)
    labels = each.labels.clone()
    labels[[0, 3]] = missing
    known = labels != missing
    losses, kept, learned = [], [], []
    for given in (each.replace(labels=labels), each.rows(known)):
        method = grown(chill=0.1, log_alpha=0.0)
        with torch.no_grad():  # half of the examples that have a label are new
            margin = joint_by_hand(method, each.rows(known), 0.1).amax(1)
            margin -= method.model.heads["new expert inputs"](each.rows(known).inputs["pixel_values"])
        method = grown(chill=0.1, log_alpha=float(margin.median()) + 1e-6)
        told = method.place(given)
        method.noise.normal = lambda count, *shape, like: torch.zeros(count, *shape).to(like)
        losses.append([told["evidence"], *method.share_loss(1, given).values()])
        kept.append(method.memory.everything().labels)
        learned.append(method.learned_by)
    assert torch.equal(*kept)
    torch.testing.assert_close(*learned)
    for masked, left_out in zip(*losses):
        torch.testing.assert_close(masked, left_out)


def test_a_batch_without_labels_changes_nothing():
    (each,) = batches(domain_stream(1, dtype=torch.float64)[0].train_source, steps=1)
    method = grown()
    nothing = each.replace(labels=torch.full_like(each.labels, -1))
    assert method.place(nothing)["evidence"] == 0
    assert len(method.memory) == 0 and method.learned_by.tolist() == [3, 4]
    assert [value.item() for value in method.share_loss(0, nothing).values()] == [0, 0]


def test_each_seed_reads_the_portions_in_an_order_of_its_own():
    item = domain_stream(1, n=24)[0]

    def order(seed):
        method = CNDPM(tiny_model(3, kind="mlp"), **{**QUICK, "portion": 10})
        method.memory.set_seed(seed)
        return torch.cat([data.dataset.index for data in method.portions(item)]).tolist()

    assert sorted(order(0)) == list(range(24)) == sorted(order(1))
    assert order(0) == order(0) != order(1)


def test_the_mixture_answers():
    (each,) = batches(domain_stream(1, dtype=torch.float64)[0].train_source, steps=1)
    method = grown()
    with torch.no_grad():
        answer = method.predict(each, "task")
        for y in range(3):
            labels = torch.full_like(each.labels, y)
            expected = joint_by_hand(method, each.replace(labels=labels), 1.0).logsumexp(1)
            torch.testing.assert_close(answer[:, y], expected)


def test_it_falls_asleep_when_the_memory_is_full_and_grows_an_expert():
    method, stream = example()
    run(method, stream)
    model = method.model
    assert len(method.experts) >= 1
    assert [operation for operation, _ in method.growth] == ["add_expert"] * len(method.experts)
    assert list(model.tasks)[:3] == ["task", "new expert inputs", "task inputs"]
    assert len(method.memory) < 8
    assert method.learned_by.sum() + len(method.memory) == pytest.approx(48)


def test_asleep_the_newest_expert_learns_from_the_memory():
    stream = class_stream(2)
    options = {**QUICK, "memory": 24, "generator_steps": 150, "classifier_steps": 60}
    method = CNDPM(tiny_model(4, kind="mlp"), samples=3, **options, generator_lr=0.01, classifier_lr=0.01)
    run(method, stream)
    pixels, labels = stream[0].train["pixel_values"], stream[0].train["labels"]
    with torch.no_grad():
        method.eval()
        density = method.model.heads["task inputs"]
        assert density(pixels).mean() > method.model.heads["new expert inputs"](pixels).mean() + 1
        assert (method.model(pixel_values=pixels, task="task").logits.argmax(1) == labels).float().mean() > 0.9


def test_new_classes_make_a_new_expert_and_the_old_one_keeps_its_own():
    stream = class_stream(2)
    options = {
        **QUICK,
        "memory": 16,
        "portion": 24,
        "generator_steps": 150,
        "classifier_steps": 100,
        "log_alpha": -20.0,
    }
    method = CNDPM(tiny_model(4, kind="mlp"), samples=3, **options, generator_lr=0.01, classifier_lr=0.01)
    metrics = run(method, stream).evaluate()
    assert method.experts == ["task", "expert-1"]
    assert min(metrics["t0/accuracy"], metrics["t1/accuracy"]) > 0.9


def test_a_loaded_model_answers_as_the_mixture(tmp_path):
    """What a saved model holds is all that the mixture needs, and what it needs to learn on."""
    method, stream = grown(), domain_stream(dtype=torch.float64)
    method.model.save_pretrained(tmp_path)
    loaded = ht.TransferModel.from_pretrained(tmp_path, backbone=tiny_backbone("mlp", torch.float64, 3))
    again = CNDPM(loaded, samples=3, portion=24, **QUICK)
    assert again.experts == method.experts == ["task", "expert-1"]
    assert again.learned_by.tolist() == [3, 4]
    (each,) = batches(stream[0].train_source, steps=1)
    with torch.no_grad():
        answers = [m.eval().predict(each, "task") for m in (method, again)]
        assert torch.equal(*answers)
        assert not torch.allclose(answers[0], loaded(**each.inputs, task="task").logits)
    run(again, stream)
    assert again.learned_by.sum() + len(again.memory) == pytest.approx(3 + 4 + 48)


def test_streams_that_tell_the_task_are_refused():
    stream = task_stream()
    with pytest.raises(ValueError, match="finds an example's expert itself"):
        run(CNDPM(model_for(stream), **QUICK), stream)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"memory": 0}, "memory must be at least 1, got 0"),
        ({"portion": 0}, "portion must be at least 1, got 0"),
        ({"chill": 0.0}, "chill must be positive, got 0.0"),
        ({"hidden": ()}, "hidden must name at least one layer"),
        ({"chil": 0.1}, "did you mean 'chill'"),
    ],
)
def test_bad_hyper_parameters_are_named(bad, message):
    with pytest.raises((ValueError, TypeError), match=message):
        CNDPM(model_for(domain_stream()), **bad)


def test_asleep_a_classifier_descends_on_cross_entropy():
    """The classifier stage's loss is the plain one on what the memory draws."""
    method = grown(experts=1)
    (each,) = batches(domain_stream(1, dtype=torch.float64)[0].train_source, steps=1)
    method.memory.add(each)
    drawn = {}
    method.recalled = lambda: drawn.setdefault("batch", method.memory.everything())
    loss = method.classifier_loss(each)["labels"]
    logits = method.model(**drawn["batch"].inputs, task="task").logits
    torch.testing.assert_close(loss, F.cross_entropy(logits, drawn["batch"].labels))
