"""GEM: two gradients by hand, whole tasks re-derived, no memory's loss rises, streams of every kind."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import Ring, SingleTask, TaskStream
from hubtransfer.methods.continual.gem import GEM, GEMProjection
from hubtransfer.methods.continual.l2 import L2
from tests.methods.continual.streams import class_stream, domain_stream, model_for, task_stream
from tests.methods.steps import assert_same_parameters, batches, batches_of, begin, clone, gradients_of, move, run
from tests.tiny import tiny_data


def example(dtype=torch.float32, seed=0, n=24):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    return GEM(model_for(stream, dtype=dtype, seed=seed), memory=Ring(6), margin=0.5), stream


def solve(current, rows, margin, ridge):
    """The dual by coordinate descent, which needs no solver: each v_k in turn to its best value."""
    gram, products = rows @ rows.T + ridge * torch.eye(len(rows), dtype=rows.dtype), rows @ current
    v = torch.full_like(products, margin)
    for _ in range(3000):
        for k in range(len(v)):
            rest = gram[k] @ v - gram[k, k] * v[k] + products[k]
            v[k] = max(margin, -(rest / gram[k, k]).item())
    return current + v @ rows


def test_two_gradients_by_hand():
    """g = (-3, 1) against (1, 1): without margin (-2, 2); with a margin of 2 it is g + 2 (1, 1)."""
    rows = torch.tensor([[-3.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    assert GEMProjection(0.0, 0.0).aggregate(rows).tolist() == pytest.approx([-2.0, 2.0])
    assert GEMProjection(2.0, 0.0).aggregate(rows).tolist() == pytest.approx([-1.0, 3.0])
    met = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    assert torch.equal(GEMProjection(2.0, 1e-3).aggregate(met), met[0])
    assert torch.equal(GEMProjection(2.0, 1e-3).aggregate(met[:1]), met[0])


@pytest.mark.parametrize("make", [domain_stream, task_stream])
def test_three_tasks_equal_a_plain_loop(make):
    stream = make(3, dtype=torch.float64)
    method = GEM(model_for(stream, dtype=torch.float64), memory=Ring(9), margin=0.1)
    plain, kept = clone(method.model), []
    remember = method.after_task

    def spy(item, runtime):
        remember(item, runtime)
        kept.append({number: (r.inputs["pixel_values"], r.labels) for number, r in method.memory.by_task().items()})

    method.after_task = spy
    run(method, stream)
    violated = 0
    for t, item in enumerate(stream):
        names = [i.task or "task" for i in stream]
        heads = [plain.heads[name] for name in dict.fromkeys(names[: t + 1])]
        parameters = [p for m in (plain.backbone.trunk, *heads) for p in m.parameters()]

        def gradient(x, y, name, parameters=parameters):
            loss = F.cross_entropy(plain(pixel_values=x, task=name).logits, y)
            return torch.cat([g.flatten() for g in gradients_of(loss, parameters)])

        for each in batches_of(stream, item):
            g = gradient(each.inputs["pixel_values"], each.labels, names[t])
            if t:
                rows = torch.stack([gradient(*kept[t - 1][k], names[k]) for k in range(t)])
                if (rows @ g < 0).any():
                    violated += 1
                    g = solve(g, rows, 0.1, 1e-3)
            parts = g.split([p.numel() for p in parameters])
            move(parameters, [part.view_as(p) for p, part in zip(parameters, parts)])
    assert violated, "the projection was never needed"
    assert_same_parameters(method.model, plain, 1e-7)


@pytest.mark.parametrize("make", [domain_stream, task_stream, class_stream])
def test_a_small_step_raises_no_memorys_loss(make):
    """The defining property, where plain fine-tuning would raise it."""
    stream = make(3, dtype=torch.float64)
    method = GEM(model_for(stream, dtype=torch.float64), memory=Ring(12), margin=0.0, ridge=0.0)
    run(method, stream, steps=5)
    again = make(3, dtype=torch.float64, seed=3)
    runtime, stage = begin(method, again, stage=1, lr=1e-5)
    batch = batches(stage.data, steps=1)[0].replace(task=again[1].task)
    before = {k: v.item() for k, v in method.loss(batch).items()}
    assert len(before) >= 3
    plain = clone(method.model)
    stage.updates[0].apply(batch, runtime)
    after = {k: v.item() for k, v in method.loss(batch).items()}
    runtime.end()
    for name in before:
        if name != "labels":
            assert after[name] <= before[name] + 1e-9, name
    method.model.load_state_dict(plain.state_dict())


def test_the_memory_holds_equal_shares_of_finished_tasks():
    stream = domain_stream(3)
    method = GEM(model_for(stream), memory=Ring(9, groups=3))
    seen = []
    method.before_task = lambda item, runtime: seen.append({k: len(v) for k, v in method.memory.by_task().items()})
    run(method, stream)
    assert seen == [{}, {0: 3}, {0: 3, 1: 3}]
    for number, replay in method.memory.by_task().items():
        for image in replay.inputs["pixel_values"]:
            assert any(torch.equal(image, other) for other in stream[number].train["pixel_values"])


def test_beside_a_penalty():
    stream = domain_stream(2)
    method = GEM(model_for(stream), memory=Ring(6))
    both = method + L2(method.model, strength=0.1)
    run(both, stream)
    assert len(both.method.memory) == 6


@pytest.mark.parametrize("bad", [{"margin": -1.0}, {"ridge": -1.0}])
def test_bad_hyper_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        GEM(model_for(domain_stream()), **bad)


def test_each_task_is_remembered_by_other_rows():
    data = tiny_data(24)
    stream = TaskStream([SingleTask(data, evaluation=data, name=f"t{k}") for k in range(3)], kind="domain")
    method = GEM(model_for(stream), memory=Ring(12, groups=3))
    run(method, stream)
    sums = [sorted(kept.inputs["pixel_values"].flatten(1).sum(1).tolist()) for kept in method.memory.by_task().values()]
    assert sums[0] != sums[1] != sums[2] != sums[0]
