"""DER: a whole run re-derived with a memory kept by hand; old logits are held; heads of other widths."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import Reservoir, SingleTask, TaskStream
from hubtransfer.methods.continual.der import DER
from hubtransfer.methods.replay_method import Part, mean
from hubtransfer.models import ClassificationHead, TransferModel
from tests.methods.continual.streams import domain_stream, model_for
from tests.methods.continual.test_er import conflicting, logits_of
from tests.methods.steps import assert_same_parameters, batches, batches_of, clone, descend, run, watch_draws
from tests.tiny import tiny_backbone, tiny_data


def example(dtype=torch.float32, seed=0, n=24):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    return DER(model_for(stream, dtype=dtype, seed=seed), alpha=0.7, memory=Reservoir(12)), stream


def test_whole_tasks_equal_a_plain_loop():
    stream = domain_stream(2, dtype=torch.float64)
    method = DER(model_for(stream, dtype=torch.float64), alpha=0.7, memory=Reservoir(100), replay_batch=5)
    plain, slots = clone(method.model), watch_draws(method.memory)
    run(method, stream)
    pixels, logits = torch.empty(0, 3, 8, 8, dtype=torch.float64), torch.empty(0, 3, dtype=torch.float64)
    for each, drawn in zip([e for item in stream for e in batches_of(stream, item)], slots, strict=True):
        answers = logits_of(plain, each.inputs["pixel_values"])
        loss = F.cross_entropy(answers, each.labels)
        if drawn is not None:
            distance = (logits_of(plain, pixels[drawn]) - logits[drawn]) ** 2
            loss = loss + 0.7 * distance.sum() / (5 * 3)
        descend(plain.parameters(), loss)
        pixels, logits = torch.cat([pixels, each.inputs["pixel_values"]]), torch.cat([logits, answers.detach()])
    assert_same_parameters(method.model, plain, 1e-12)
    torch.testing.assert_close(method.memory.everything().kept["logits"], logits, atol=1e-12, rtol=0)


def test_a_large_alpha_holds_old_answers():
    """With the labels of a second task in conflict, logits of the first stay nearer the larger alpha is."""
    moved = []
    for alpha in (0.0, 0.1, 3.0):
        method = DER(model_for(conflicting()), alpha=alpha, memory=Reservoir(24))
        run(method, TaskStream(conflicting().items[:1], kind="domain"), steps=30, lr=0.1)
        kept = method.memory.everything()
        run(method, conflicting(), steps=10, lr=0.1)
        with torch.no_grad():
            now = logits_of(method.model, kept.inputs["pixel_values"])
        moved.append((now - kept.kept["logits"]).square().mean().item())
    assert moved[0] > 1.5 * moved[1]
    assert moved[1] > 1.5 * moved[2]


def test_heads_of_other_widths_keep_their_own_logits():
    sets = {"two": tiny_data(16, 2), "four": tiny_data(16, 4, seed=1)}
    stream = TaskStream([SingleTask(data, name=name) for name, data in sets.items()], kind="task")
    model = TransferModel(tiny_backbone("mlp"))
    for name, classes in (("two", 2), ("four", 4)):
        model.add_task(name, ClassificationHead(classes))
    method = DER(model, alpha=1.0, memory=Reservoir(32))
    run(method, stream, steps=2)
    kept = method.memory.everything()
    assert kept.kept["logits"].shape == (32, 4)
    assert (kept.kept["logits"][:16, 2:] == 0).all()
    (each,) = batches(stream[1].train_source, steps=1)
    _, parts = method.run(each, kept.rows(torch.tensor([0, 20, 1])))
    assert [(part.task, tuple(part.logits.shape)) for part in parts] == [("two", (2, 2)), ("four", (1, 4))]
    expected = []
    for row in (0, 20, 1):
        name, width = ("two", 2) if row < 16 else ("four", 4)
        now = logits_of(model, kept.inputs["pixel_values"][row : row + 1], name)
        expected.append((now - kept.kept["logits"][row, :width]).square().mean())
    torch.testing.assert_close(method.dark(parts)["logits"], torch.stack(expected).mean())


def test_the_mean_over_parts_is_that_over_examples():
    parts = [Part("a", torch.ones(3, 2), torch.zeros(3), {}), Part("b", torch.full((1, 2), 5.0), torch.zeros(1), {})]
    assert mean(parts, lambda part: part.logits.mean()).item() == pytest.approx((3 * 1 + 5) / 4)


def test_bad_hyper_parameters_are_named():
    with pytest.raises(ValueError, match="alpha must not be negative"):
        DER(model_for(domain_stream()), alpha=-1.0)
