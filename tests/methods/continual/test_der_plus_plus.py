"""DER++: a whole run re-derived with two independent draws; without beta it is DER on the first of them."""

import pytest
import torch
import torch.nn.functional as F

import hubtransfer as ht
from hubtransfer.data import Reservoir
from hubtransfer.methods.continual.der import DER
from hubtransfer.methods.continual.der_plus_plus import DERPlusPlus
from hubtransfer.methods.distillation.kd import KD
from tests.methods.continual.streams import domain_stream, model_for
from tests.methods.continual.test_er import conflicting, logits_of
from tests.methods.steps import assert_same_parameters, batches_of, clone, descend, run, watch_draws
from tests.tiny import teacher_with_logits


def example(dtype=torch.float32, seed=0, n=24):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    return DERPlusPlus(model_for(stream, dtype=dtype, seed=seed), alpha=0.7, beta=0.4, memory=Reservoir(12)), stream


def test_whole_tasks_equal_a_plain_loop_with_three_forwards():
    stream = domain_stream(2, dtype=torch.float64)
    model = model_for(stream, dtype=torch.float64)
    method = DERPlusPlus(model, alpha=0.7, beta=0.4, memory=Reservoir(100), replay_batch=5)
    plain, slots = clone(model), watch_draws(method.memory)
    run(method, stream)
    steps = [each for item in stream for each in batches_of(stream, item)]
    assert len(slots) == 2 * len(steps)
    pairs = list(zip(slots[::2], slots[1::2]))
    assert all(not torch.equal(one.sort().values, two.sort().values) for one, two in pairs[1:]), "one draw served twice"
    pixels, labels = torch.empty(0, 3, 8, 8, dtype=torch.float64), torch.empty(0, dtype=torch.long)
    logits = torch.empty(0, 3, dtype=torch.float64)
    for each, (dark, labelled) in zip(steps, pairs):
        answers = logits_of(plain, each.inputs["pixel_values"])
        loss = F.cross_entropy(answers, each.labels)
        if dark is not None:
            loss = loss + 0.7 * F.mse_loss(logits_of(plain, pixels[dark]), logits[dark])
            loss = loss + 0.4 * F.cross_entropy(logits_of(plain, pixels[labelled]), labels[labelled])
        descend(plain.parameters(), loss)
        pixels, labels = torch.cat([pixels, each.inputs["pixel_values"]]), torch.cat([labels, each.labels])
        logits = torch.cat([logits, answers.detach()])
    assert_same_parameters(method.model, plain, 1e-12)


def test_without_beta_it_is_der_on_the_first_of_each_two_draws():
    stream = domain_stream(2, dtype=torch.float64)
    one = DERPlusPlus(model_for(stream, dtype=torch.float64), alpha=0.7, beta=0.0, memory=Reservoir(12))
    two = DER(model_for(stream, dtype=torch.float64), alpha=0.7, memory=Reservoir(12))
    slots = watch_draws(one.memory)
    run(one, stream)
    dark = iter(slots[::2])

    def draws(count, times):
        drawn = next(dark)
        return [None if drawn is None else two.memory.at(drawn)]

    two.memory.draws = draws
    run(two, stream)
    assert next(dark, "all were drawn") == "all were drawn"
    assert torch.equal(one.memory.everything().labels, two.memory.everything().labels)
    assert_same_parameters(one.model, two.model, 1e-12)


def test_it_remembers():
    method = DERPlusPlus(model_for(conflicting()), alpha=0.3, beta=1.0, memory=Reservoir(24))
    metrics = run(method, conflicting(), steps=60, lr=0.3).evaluate()
    assert metrics["t0/accuracy"] == metrics["t1/accuracy"] == 1


def test_a_teacher_joins_it():
    stream = domain_stream()
    model = model_for(stream)
    method = DERPlusPlus(model, alpha=0.5, beta=0.5, memory=Reservoir(12))
    both = method + KD(model, teacher_with_logits([2.0, 0.0, -2.0]), alpha=0.5)
    run(both, stream)
    assert len(both.method.memory) == 12


def test_the_designs_face():
    method = ht.continual.DERPlusPlus(model_for(domain_stream()), alpha=0.1, beta=0.5, memory=ht.Reservoir(200))
    assert method.config.memory.size == 200
    assert method.hyper_parameters()["memory"] == {"kind": "reservoir", "size": 200}


def test_bad_hyper_parameters_are_named():
    with pytest.raises(ValueError, match="beta must not be negative"):
        DERPlusPlus(model_for(domain_stream()), beta=-1.0)
