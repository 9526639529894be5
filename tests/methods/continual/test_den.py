"""DEN: steps re-derived, nothing forgotten where all that moved is split, growth only where needed, what is refused."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import TaskStream
from hubtransfer.methods.continual.den import DEN
from tests.methods.continual.streams import domain_stream, model_for, task_stream
from tests.methods.steps import batches, begin, run

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def example(dtype=torch.float32, seed=0, n=24):
    stream = task_stream(2, n=n, seed=seed, dtype=dtype)
    return DEN(model_for(stream, dtype=dtype, seed=seed), units=3, split=1e-3, seed=seed), stream


def learned(tasks=2, **options):
    """A method in float64 that has learned a stream."""
    stream = task_stream(tasks, dtype=torch.float64)
    method = DEN(model_for(stream, dtype=torch.float64), **{"units": 3, **options}).double()
    run(method, stream)
    return method, stream


def second_task(stage, **options):
    """A method that has learned the first of two tasks and stands in a stage of the second; its runtime and stage."""
    stream = task_stream(2, dtype=torch.float64)
    method = DEN(model_for(stream, dtype=torch.float64), **options).double()
    run(method, TaskStream([stream[0]], kind="task"))
    method.widths = method.widths[:0]
    stages = list(method.stages(stream))
    stages[1].enter(None)
    with torch.no_grad():
        method.model.heads["t1"].weight[:, 4:] = 0
        method.model.backbone.trunk.second.weight[:4, 9:] = 0
    method.before_task(stream[1], None)
    method.choose(None)
    runtime, found = begin(method, stream, stage)
    return method, stream, runtime, found


def test_what_is_forgotten_is_only_what_moved_and_was_not_split():
    """With sigma 0 each unit that moved is split: the first task's answers are those of its time."""
    method, stream = learned(3, split=0.0)
    alone = DEN(model_for(stream, dtype=torch.float64)).double()
    run(alone, TaskStream([stream[0]], kind="task"))
    assert min(method.chain.widths) >= 32
    for ask in (method.model.eval(), alone.model.eval()):
        ask.logits_found = ask(pixel_values=X, task="t0").logits
    torch.testing.assert_close(method.model.logits_found, alone.model.logits_found, atol=1e-13, rtol=0)


def test_predictions_during_the_stream_are_those_of_the_saved_model():
    method, stream = learned(2)
    (each,) = batches(stream[0].train_source, steps=1)
    after = method.model.eval()(pixel_values=each.inputs["pixel_values"], task="t0").logits
    del method.model.patches["t0"]
    torch.testing.assert_close(method.predict(each, "t0"), after, atol=1e-13, rtol=0)
    assert not torch.allclose(method.model(**each.inputs, task="t0").logits, after, atol=1e-6)


def test_retraining_moves_the_sub_network_alone():
    """The head reads units 0 to 3 of the second layer, and these read units 0 to 8 of the first."""
    method, stream, runtime, stage = second_task(2, l2=0.3)
    assert [flags.nonzero().flatten().tolist() for flags in method.chosen.tensors().values()] == [
        list(range(9)),
        list(range(4)),
    ]
    trunk, head = method.model.backbone.trunk, method.model.heads["t1"]
    (each,) = batches(stream[1].train_source, steps=1)
    params = [trunk.first.weight, trunk.first.bias, trunk.second.weight, trunk.second.bias, head.weight, head.bias]
    start = [p.detach().clone() for p in params]
    loss = F.cross_entropy(head(trunk(each.inputs["pixel_values"])), each.labels)
    for p in params:
        p.requires_grad_(True)
    gradients = torch.autograd.grad(loss, params)
    stage.updates[0].apply(each, runtime)
    parts = [(slice(9), slice(None)), (slice(9),), (slice(4), slice(9)), (slice(4),), (slice(None), slice(4)), (...,)]
    for p, before, g, part in zip(params, start, gradients, parts):
        expected = before.clone()
        expected[part] -= 0.05 * (g[part] + 0.6 * before[part])
        torch.testing.assert_close(p.detach(), expected, atol=1e-14, rtol=0)


def test_the_drift_is_the_squared_way():
    method, stream, *_ = second_task(4, drift=0.7)
    with torch.no_grad():
        method.model.backbone.trunk.first.weight[0, :3] += 2.0
        method.model.backbone.trunk.second.bias[1] += 1.0
    (each,) = batches(stream[1].train_source, steps=1)
    torch.testing.assert_close(method.drifting(each)["drift"].item(), 0.7 * (3 * 4 + 1))


def test_a_split_leaves_the_new_tasks_answers_as_they_are():
    method, *_ = second_task(4, split=0.0)
    trunk = method.model.backbone.trunk
    start = {name: p.clone() for name, p in trunk.named_parameters()}
    with torch.no_grad():
        trunk.first.weight[:9] += 0.1
        trunk.second.weight[:4, :9] += 0.1
    before = method.model(pixel_values=X, task="t1").logits
    method.split(None, None)
    assert method.chain.widths == [25, 20]
    torch.testing.assert_close(method.model(pixel_values=X, task="t1").logits, before, atol=1e-14, rtol=0)
    assert torch.equal(trunk.first.weight[:16], start["first.weight"])
    assert torch.equal(trunk.second.weight[:16, :16], start["second.weight"])


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({"loss": 100.0, "split": 100.0}, [16, 16]),  # enough as it is
        ({"loss": 0.0, "split": 100.0}, [19, 19]),
        ({"loss": 0.0, "split": 100.0, "group_lasso": 100.0}, [16, 16]),  # new units have nothing to say
        ({"loss": 100.0, "split": 0.0}, [32, 32]),
    ],
)
def test_it_grows_where_it_has_to(options, widths):
    method, _ = learned(2, **options)
    assert method.chain.widths == widths


def test_l1_makes_weights_of_the_first_task_zero():
    shares = []
    for l1 in (0.01, 0.0):
        stream = TaskStream([task_stream(1)[0]], kind="task")
        method = DEN(model_for(stream), l1=l1)
        run(method, stream)
        shares += [(weight == 0).float().mean().item() for weight in method.chain.weights("t0")]
    assert all(0.02 < share < 0.9 for share in shares[:3])
    assert shares[3:] == [0, 0, 0]


def test_other_streams_and_trunks_are_refused_with_the_reason():
    stream = domain_stream()
    with pytest.raises(ValueError, match="has to know the task at test time.*'domain'"):
        run(DEN(model_for(stream, kind="mlp")), stream)
    with pytest.raises(ValueError, match="linear layers in a row"):
        DEN(model_for(task_stream(), kind="cnn"))


@pytest.mark.parametrize("bad", [{"l1": -1.0}, {"split": -0.1}, {"units": 0}])
def test_bad_hyper_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        DEN(model_for(task_stream()), **bad)
