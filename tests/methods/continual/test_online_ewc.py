"""Online EWC: importance decays and adds up, the anchor is the last task's, whole tasks re-derived."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.methods.continual.ewc import EWC
from hubtransfer.methods.continual.online_ewc import OnlineEWC
from tests.methods.continual.streams import domain_stream, model_for, task_stream
from tests.methods.continual.test_ewc import fisher
from tests.methods.steps import assert_same_parameters, batches_of, clone, descend, run


def example(dtype=torch.float32, seed=0, n=24):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    return OnlineEWC(model_for(stream, dtype=dtype, seed=seed), strength=20.0, gamma=0.7), stream


@pytest.mark.parametrize("make", [domain_stream, task_stream])
def test_three_tasks_equal_a_plain_loop(make):
    stream = make(3, dtype=torch.float64)
    method = OnlineEWC(model_for(stream, dtype=torch.float64), strength=20.0, gamma=0.7, fisher="label")
    plain = clone(method.model)
    run(method, stream)
    parameters, importance, anchor = list(plain.parameters()), None, None
    for item in stream:
        task = item.task or "task"
        for each in batches_of(stream, item):
            loss = F.cross_entropy(plain(**each.inputs, task=task).logits, each.labels)
            if anchor is not None:
                loss = loss + 10 * sum((f * (p - a).square()).sum() for f, p, a in zip(importance, parameters, anchor))
            descend(parameters, loss)
        new = fisher(plain.eval(), item.train, task, "label")
        importance = new if importance is None else [0.7 * f + g for f, g in zip(importance, new)]
        anchor = [p.detach().clone() for p in parameters]
        plain.train()
    assert_same_parameters(method.model, plain, 1e-10)
    for (name, p), right in zip(plain.named_parameters(), importance):
        torch.testing.assert_close(method.importance.like(name, p), right)


def test_after_one_task_it_is_ewc():
    stream = domain_stream(2, dtype=torch.float64)
    one = OnlineEWC(model_for(stream, dtype=torch.float64), strength=20.0, gamma=1.0)
    two = EWC(model_for(stream, dtype=torch.float64), strength=20.0)
    run(one, stream)
    run(two, stream)
    assert_same_parameters(one.model, two.model, 1e-12)


@pytest.mark.parametrize("bad", [{"strength": -1.0}, {"gamma": 1.5}, {"fisher": "true"}, {"samples": 0}])
def test_bad_hyper_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        OnlineEWC(model_for(domain_stream()), **bad)
