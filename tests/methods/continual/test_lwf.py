"""LwF: old answers by hand, whole tasks re-derived for heads and for classes, the warm-up, patches, resume."""

import pytest
import torch
import torch.nn.functional as F

import hubtransfer as ht
from hubtransfer.data import SingleTask, TaskStream
from hubtransfer.methods.continual.l2 import L2
from hubtransfer.methods.continual.lwf import LwF
from tests.methods.continual.streams import class_stream, domain_stream, model_for, task_stream
from tests.methods.steps import (
    assert_resumes_anywhere,
    assert_same_parameters,
    batches,
    batches_of,
    clone,
    descend,
    run,
)
from tests.tiny import batch


def example(dtype=torch.float32, seed=0, n=24):
    stream = task_stream(n=n, seed=seed, dtype=dtype)
    model = model_for(stream, dtype=dtype, seed=seed)
    return LwF(model, alpha=1.0, temperature=2.0, warm_up=0.4), stream


def old_term(now, then, temperature=2.0):
    return -((then / temperature).softmax(1) * (now / temperature).log_softmax(1)).sum(1).mean()


def test_heads_of_their_own_equal_a_plain_loop():
    stream = task_stream(3, dtype=torch.float64)
    method = LwF(model_for(stream, dtype=torch.float64), alpha=1.5)
    plain = clone(method.model)
    run(method, stream)
    for t, item in enumerate(stream):
        before, old = clone(plain), [i.name for i in stream[:t]] if t else []
        parameters = [p for m in (plain.backbone.trunk, plain.heads[item.name]) for p in m.parameters()]
        for each in batches_of(stream, item):
            loss = F.cross_entropy(plain(**each.inputs, task=item.name).logits, each.labels)
            for name in old:
                then = before(**each.inputs, task=name).logits.detach()
                loss = loss + 1.5 * old_term(plain(**each.inputs, task=name).logits, then)
            descend(parameters, loss)
    assert_same_parameters(method.model, plain, 1e-10)


def test_classes_in_portions_with_a_warm_up_equal_a_plain_loop():
    stream = class_stream(3, dtype=torch.float64)
    method = LwF(model_for(stream, dtype=torch.float64), alpha=1.5, warm_up=0.7)  # 0.7 of 3 batches: 2 steps
    plain = clone(method.model)
    run(method, stream)
    for t, item in enumerate(stream):
        before, seen = clone(plain), 2 * t
        if t:
            for each in batches(item.train_source, steps=2, stage=2 * t - 1):
                logits = plain(**each.inputs).logits[:, seen : seen + 2]
                descend(plain.heads["task"].parameters(), F.cross_entropy(logits, each.labels - seen))
        for each in batches(item.train_source, stage=2 * t):
            logits = plain(**each.inputs).logits
            loss = F.cross_entropy(logits, each.labels)
            if t:
                loss = loss + 1.5 * old_term(logits[:, :seen], before(**each.inputs).logits.detach()[:, :seen])
            descend(plain.parameters(), loss)
    assert_same_parameters(method.model, plain, 1e-10)


def test_the_warm_up_moves_the_new_outputs_alone():
    method, stream = example()
    states = []
    stages = list(method.stages(stream))
    assert [stage.name for stage in stages] == ["t0", "t1/warm-up", "t1"]
    before_task = method.before_task

    def spy(item, runtime):
        before_task(item, runtime)
        states.append(clone(method.model))

    method.before_task = spy
    held = TaskStream([stream[0], stream[1]], kind="task")
    loss, seen = method.loss, []
    method.loss = lambda b: seen.append(clone(method.model)) or loss(b)
    run(method, held)
    after_warm_up = seen[3]  # the first joint step of the second task
    for name, p in states[1].named_parameters():
        assert torch.equal(p, after_warm_up.get_parameter(name)) == (not name.startswith("heads.t1")), name


def test_the_term_is_the_entropy_at_first_and_no_smaller_later():
    stream = task_stream(2)
    method = LwF(model_for(stream))
    run(method, TaskStream(stream.items[:1], kind="task"))
    terms = []
    loss = method.terms
    method.terms = lambda b: terms.append(loss(b)) or terms[-1]
    trainer_stream = TaskStream(stream.items[1:], kind="task")
    run(method, trainer_stream)
    (first,) = batches(trainer_stream[0].train_source, steps=1)
    p = (method.before.outputs(method.model, first, method._answers)[0] / 2).softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    assert terms[0]["old"].item() == pytest.approx(entropy.item(), rel=1e-4)
    assert loss(first)["old"].item() >= entropy.item() - 1e-6


def test_the_old_answers_stay_nearer_than_without_it():
    stream = task_stream(2)
    drift = []
    for alpha in (0.0, 5.0):
        method = LwF(model_for(stream), alpha=alpha)
        run(method, stream, steps=20)
        (each,) = batches(stream[1].train_source, steps=1, batch_size=24)
        (then,) = method.before.outputs(method.model, each, method._answers)
        drift.append((method.model(**each.inputs, task="t0").logits - then).square().mean().item())
    assert drift[1] < 0.3 * drift[0]


def test_a_patch_a_task_over_a_trunk_that_learns():
    stream = task_stream(2)
    model = model_for(stream, kind="cnn", patch=ht.ScaleBiasConfig())
    free, held = LwF(clone(model), alpha=0.0), LwF(model, alpha=5.0)
    drift = []
    for method in (free, held):
        run(method, stream, steps=30, lr=0.1)
        (each,) = batches(stream[1].train_source, steps=1, batch_size=24)
        (then,) = method.before.outputs(method.model, each, method._answers)
        drift.append((method.model(**each.inputs, task="t0").logits - then).square().mean().item())
    assert 0 < drift[1] < 0.6 * drift[0]
    frozen = LwF(model_for(stream, kind="cnn", patch=ht.ScaleBiasConfig()), trains="patch")
    trunk = {name: p.detach().clone() for name, p in frozen.model.backbone.named_parameters()}
    run(frozen, stream)
    assert all(torch.equal(p, trunk[name]) for name, p in frozen.model.backbone.named_parameters())


@pytest.mark.parametrize("make", [task_stream, class_stream])
def test_cut_anywhere_it_resumes_with_the_same_bits_even_beside_others(make, tmp_path):
    stream = make(3)

    def method():
        model = model_for(stream)
        return LwF(model, warm_up=0.4) + L2(model, strength=0.1), stream

    assert_resumes_anywhere(method, tmp_path)


def test_the_copy_is_no_part_of_the_model_and_is_held_once():
    method, stream = example()
    run(method, stream)
    names = [name for name in method.state_dict() if "trunk" in name]
    assert len(names) == 2 * len([n for n in method.model.state_dict() if "trunk" in n])
    assert not any("before" in name for name in method.model.state_dict())


def test_one_head_for_the_same_classes_is_refused_with_the_reason():
    stream = domain_stream()
    with pytest.raises(ValueError, match="'domain'.*contradict"):
        run(LwF(model_for(stream)), stream)
    with pytest.raises(ValueError, match="'domain'.*contradict"):
        run(L2(model := model_for(stream)) + LwF(model), stream)


def test_other_heads_are_refused():
    model = ht.TransferModel(model_for(domain_stream()).backbone).add_task("t0", ht.RegressionHead(1))
    data = {"pixel_values": batch([0]).inputs["pixel_values"], "labels": torch.zeros(1)}
    with pytest.raises(ValueError, match="LwF: keeping old answers needs class probabilities, but task 't0'"):
        run(LwF(model), TaskStream([SingleTask(data, name="t0")], kind="task"))


@pytest.mark.parametrize("bad", [{"alpha": -1.0}, {"temperature": 0.5}, {"warm_up": -1.0}, {"trains": "head"}])
def test_bad_hyper_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        LwF(model_for(task_stream()), **bad)
