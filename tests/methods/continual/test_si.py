"""SI: a quadratic by hand, whole tasks re-derived with the gradient without the penalty, the sum rule of the path."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.methods.continual.si import SI
from hubtransfer.methods.continual.task_free import TaskFree
from tests.methods.continual.streams import domain_stream, model_for, task_stream
from tests.methods.steps import assert_same_parameters, batches, batches_of, clone, gradients_of, run


def example(dtype=torch.float32, seed=0, n=24):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    return SI(model_for(stream, dtype=dtype, seed=seed), strength=0.5, damping=0.1), stream


def plain_loop(model, stream, head, *, strength, damping, steps=3, lr=0.05, keep_penalty=False):
    """Straight-line SI with SGD; `keep_penalty` is the mistake of measuring with the penalised gradient."""
    parameters = list(model.parameters())
    omega = [torch.zeros_like(p) for p in parameters]
    anchor = [p.detach().clone() for p in parameters]
    for item in stream:
        path, start = [torch.zeros_like(p) for p in parameters], [p.detach().clone() for p in parameters]
        for each in batches_of(stream, item, steps=steps):
            logits = model.heads[head(item)](model.backbone.trunk(each.inputs["pixel_values"]))
            gradients = gradients_of(F.cross_entropy(logits, each.labels), parameters)
            for p, g, w, o, a in zip(parameters, gradients, path, omega, anchor):
                penalty = 2 * strength * o * (p.detach() - a)
                move = -lr * (g + penalty)
                w -= (g + penalty if keep_penalty else g) * move
                p.data += move
        for k, p in enumerate(parameters):
            omega[k] = omega[k] + path[k].clamp(min=0) / ((p.detach() - start[k]).square() + damping)
            anchor[k] = p.detach().clone()
    return omega


def test_whole_tasks_equal_a_plain_loop():
    method, stream = example(dtype=torch.float64)
    stream = domain_stream(3, dtype=torch.float64)
    plain, wrong = clone(method.model), clone(method.model)
    run(method, stream)
    omega = plain_loop(plain, stream, lambda item: "task", strength=0.5, damping=0.1)
    assert_same_parameters(method.model, plain, 1e-12)
    for (name, _), expected in zip(plain.named_parameters(), omega):
        torch.testing.assert_close(method.importance.tensors()[name], expected, atol=1e-12, rtol=1e-9)
    others = plain_loop(wrong, stream, lambda item: "task", strength=0.5, damping=0.1, keep_penalty=True)
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(omega, others)), "the penalty would not have been noticed"


def test_one_step_by_hand():
    """Linear loss a.theta, one SGD step: omega = lr a^2, moved by lr a: Omega = lr a^2 / (lr^2 a^2 + xi)."""
    method, _ = example(dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in method.model.named_parameters()}
    run(method, domain_stream(1, dtype=torch.float64), steps=1)
    for name, p in method.model.named_parameters():
        a = (before[name] - p.detach()) / 0.05
        torch.testing.assert_close(method.importance.tensors()[name], 0.05 * a**2 / (0.05**2 * a**2 + 0.1))


def test_paths_add_up_to_the_fall_of_the_loss():
    """With small steps on one batch the sum over parameters of omega is what the loss fell by."""
    method, _ = example(dtype=torch.float64)
    stream = domain_stream(1, n=8, dtype=torch.float64)
    (each,) = batches(stream[0].train_source, steps=1)
    first = method.loss(each)["labels"].item()
    run(method, stream, steps=200, lr=2e-3)
    fall = first - method.loss(each)["labels"].item()
    paths = sum(w.sum() for w in method.path.tensors().values()).item()
    assert fall > 0.1
    assert paths == pytest.approx(fall, rel=0.01)


def test_every_step_counts_where_a_method_takes_several_on_a_batch():
    """SGD at rate a without a penalty moves by -a g: each of the 9 steps adds g * a g = move^2 / a to a path."""
    stream = domain_stream(1, dtype=torch.float64)
    method = TaskFree(model_for(stream, dtype=torch.float64), gradient_steps=3)
    parameters, seen = dict(method.model.named_parameters()), []

    def loss(batch, plain=method.loss):
        seen.append({name: p.detach().clone() for name, p in parameters.items()})
        return plain(batch)

    method.loss = loss
    both = method + SI(method.model)
    run(both, stream)
    assert len(seen) == 9
    seen.append(parameters)
    for name, path in both.parts[0].path.tensors().items():
        expected = sum((after[name].detach() - before[name]) ** 2 / 0.05 for before, after in pairwise(seen))
        torch.testing.assert_close(path, expected, rtol=1e-9, atol=1e-12)


def test_momentum_and_other_optimisers_count_the_true_move():
    method, stream = example(dtype=torch.float64)
    model = clone(method.model)
    run(method, domain_stream(1, dtype=torch.float64), optimizer="sgd", momentum=0.9)
    parameters, path = list(model.parameters()), [torch.zeros_like(p) for p in model.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    for each in batches(stream[0].train_source):
        logits = model.heads["task"](model.backbone.trunk(each.inputs["pixel_values"]))
        F.cross_entropy(logits, each.labels).backward()
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        for w, p, b in zip(path, parameters, before):
            w -= p.grad * (p.detach() - b)
        optimizer.zero_grad()
    for (name, _), expected in zip(model.named_parameters(), path):
        torch.testing.assert_close(method.path.tensors()[name], expected, atol=1e-12, rtol=1e-9)


def test_heads_of_their_own():
    stream = task_stream(3, dtype=torch.float64)
    method = SI(model_for(stream, dtype=torch.float64), strength=0.5, damping=0.1)
    plain = clone(method.model)
    run(method, stream)
    plain_loop(plain, stream, lambda item: item.name, strength=0.5, damping=0.1)
    assert_same_parameters(method.model, plain, 1e-12)


@pytest.mark.parametrize("bad", [{"strength": -1.0}, {"damping": 0.0}])
def test_bad_hyper_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SI(model_for(domain_stream()), **bad)
