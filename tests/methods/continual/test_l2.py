"""L2: nothing in the first task, lambda times the way from the anchor afterwards, whole steps re-derived."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.methods.continual.l2 import L2
from tests.methods.continual.streams import domain_stream, model_for, task_stream
from tests.methods.steps import assert_same_parameters, batches_of, clone, descend, run
from tests.tiny import batch


def example(dtype=torch.float32, seed=0, n=24):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    return L2(model_for(stream, dtype=dtype, seed=seed), strength=0.5), stream


def test_the_first_task_has_no_penalty():
    method, _ = example()
    assert set(method.loss(batch([0, 1]))) == {"labels"}
    assert method.terms(batch([0, 1])) == {}


def test_the_penalty_by_hand():
    """Every parameter moved by 0.1: lambda/2 * 0.01 each."""
    method, stream = example()
    run(method, stream)
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter.add_(0.1)
    count = sum(p.numel() for p in method.model.parameters())
    assert method.terms(batch([0, 1]))["penalty"].item() == pytest.approx(0.25 * 0.01 * count, rel=1e-4)


def test_steps_equal_a_plain_loop():
    method, stream = example(dtype=torch.float64)
    plain = clone(method.model)
    run(method, stream)
    anchor = None
    for item in stream:
        for each in batches_of(stream, item):
            loss = F.cross_entropy(plain.heads["task"](plain.backbone.trunk(each.inputs["pixel_values"])), each.labels)
            if anchor is not None:
                loss = loss + 0.25 * sum((p - a).square().sum() for p, a in zip(plain.parameters(), anchor))
            descend(plain.parameters(), loss)
        anchor = [p.detach().clone() for p in plain.parameters()]
    assert_same_parameters(method.model, plain, 1e-12)


def test_heads_of_other_tasks_do_not_move_even_with_weight_decay():
    stream = task_stream()
    method = L2(model_for(stream), strength=0.5)
    heads = {name: clone(head) for name, head in method.model.heads.items()}
    seen = []
    method.before_task = lambda item, runtime: seen.append(
        [p.detach().clone() for p in method.model.heads["t0"].parameters()]
    )
    run(method, stream, weight_decay=0.1)
    for kept, now in zip(seen[1], method.model.heads["t0"].parameters()):
        assert torch.equal(kept, now)
    assert not torch.equal(heads["t1"].weight, method.model.heads["t1"].weight)


def test_a_negative_strength_is_named():
    with pytest.raises(ValueError, match="strength"):
        L2(model_for(domain_stream()), strength=-1)
