"""Task-free: a whole run re-derived with buffer, window and importances by hand; plateaus, peaks, what is refused."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import Hardest, SingleTask, TaskStream
from hubtransfer.functional.plateau import Plateau, plateau
from hubtransfer.methods.continual.sequential import SequentialFineTune
from hubtransfer.methods.continual.task_free import TaskFree
from tests.methods.continual.streams import domain_stream, model_for, task_stream
from tests.methods.steps import assert_same_parameters, batches_of, clone, descend, run
from tests.tiny import tiny_data

EASY = {"window": 2, "mean_below": 10.0, "variance_below": 10.0}  # every window is a plateau


def example(dtype=torch.float32, seed=0, n=24):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    return TaskFree(model_for(stream, dtype=dtype, seed=seed), memory=Hardest(12), gradient_steps=2, **EASY), stream


def importances(model, pixels):
    """The mean over examples of the magnitude of each one's own gradient of the squared norm of its outputs."""
    parameters = list(model.parameters())
    totals = [torch.zeros_like(p) for p in parameters]
    for row in pixels:
        norm = model(pixel_values=row[None]).logits.square().sum()
        for total, gradient in zip(totals, torch.autograd.grad(norm, parameters)):
            total += gradient.abs() / len(pixels)
    return totals


def test_a_whole_run_equals_a_plain_loop():
    stream = domain_stream(2, dtype=torch.float64)
    method = TaskFree(model_for(stream, dtype=torch.float64), memory=Hardest(6), gradient_steps=2, strength=3.0, **EASY)
    plain = clone(method.model)
    run(method, stream)
    parameters = list(plain.parameters())
    x_hard, y_hard = torch.empty(0, 3, 8, 8, dtype=torch.float64), torch.empty(0, dtype=torch.long)
    window, said, omega, anchor, found = [], Plateau(False, True, 0.0, 0.0), None, None, 0
    for each in (one for item in stream for one in batches_of(stream, item)):
        x, y = torch.cat([each.inputs["pixel_values"], x_hard]), torch.cat([each.labels, y_hard])
        for step in range(2):
            losses = F.cross_entropy(plain(pixel_values=x).logits, y, reduction="none")
            if step == 0:
                window = [*window, losses.mean().item()][-2:]
            loss = losses.mean()
            if omega is not None:
                loss = loss + 1.5 * sum((o * (p - a) ** 2).sum() for o, p, a in zip(omega, parameters, anchor))
            descend(parameters, loss)
        hardest = losses.detach().argsort(descending=True)[:6]
        x_hard, y_hard = x[hardest], y[hardest]
        if len(window) == 2:
            said = plateau(torch.tensor(window, dtype=torch.float64), said, 10.0, 10.0)
            if said.found:
                found += 1
                now = importances(plain, x_hard)
                old = omega or [torch.zeros_like(p) for p in parameters]
                omega = [n / found + (1 - 1 / found) * o for n, o in zip(now, old)]
                anchor = [p.detach().clone() for p in parameters]
    assert found == method.plateaus.item() >= 1
    assert_same_parameters(method.model, plain, 1e-9)
    names = [name for name, _ in method.model.named_parameters()]
    for name, expected, parameter in zip(names, omega, parameters):
        torch.testing.assert_close(method.importance.like(name, parameter), expected, rtol=1e-7, atol=1e-9)
    kept = sorted(method.memory.everything().inputs["pixel_values"].flatten(1).sum(1).tolist())
    assert kept == pytest.approx(sorted(x_hard.flatten(1).sum(1).tolist()))


def test_it_takes_stock_when_the_loss_settles_and_again_after_it_rose():
    """The second item shows other images: its loss rises before it settles."""
    stream = domain_stream(2)
    method = TaskFree(model_for(stream), memory=Hardest(8), window=3, mean_below=0.3, variance_below=0.05)
    at = []
    take = method.take_stock
    method.take_stock = lambda: (at.append(method.steps.item()), take())
    run(method, stream, steps=40, lr=0.3)
    assert at[0] < 40 < at[1]
    assert method.watched() == {"plateaus/found": method.plateaus}
    assert method.plateaus == len(at)


def test_without_a_plateau_nothing_is_held():
    stream = domain_stream()
    method = TaskFree(model_for(stream), mean_below=0.0)
    run(method, stream)
    assert not method.importance
    assert method.plateaus == 0


def test_what_the_hard_buffer_holds_is_not_forgotten():
    """The second item shows nearly the same images with other labels: fine-tuning alone forgets the first."""
    first, second = tiny_data(24, seed=0), tiny_data(24, seed=1)
    second["pixel_values"] = 0.8 * first["pixel_values"] + 0.6 * second["pixel_values"]
    second["labels"] = (first["labels"] + 1) % 3
    items = [SingleTask(data, evaluation=data, name=f"t{k}") for k, data in enumerate((first, second))]
    stream, found = TaskStream(items, kind="domain"), []
    for cls, config in ((TaskFree, {"memory": Hardest(48), "mean_below": 0.0}), (SequentialFineTune, {})):
        method = cls(model_for(stream), **config)
        found.append(run(method, stream, steps=60, lr=0.3).evaluate()["t0/accuracy"])
    assert found == [1, 0]


def test_a_stream_that_needs_the_task_is_refused():
    stream = task_stream()
    with pytest.raises(ValueError, match="cannot know which head an example is for"):
        run(TaskFree(model_for(stream)), stream)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"gradient_steps": 0}, "gradient_steps must be at least 1"),
        ({"strength": -1.0}, "strength must be at least 0"),
        ({"memory": 30}, "memory must be a kind of memory"),
        ({"windw": 3}, "did you mean 'window'"),
    ],
)
def test_bad_hyper_parameters_are_named(bad, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TaskFree(model_for(domain_stream()), **bad)
