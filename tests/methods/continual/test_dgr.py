"""DGR: both losses re-derived, the earlier scholar is the one that was, resume, what is refused."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import SingleTask, TaskStream
from hubtransfer.data.noise import Noise
from hubtransfer.methods.continual.dgr import DGR
from hubtransfer.methods.continual.sequential import SequentialFineTune
from hubtransfer.methods.continual.si import SI
from hubtransfer.models import RegressionHead
from hubtransfer.models.generators import VAE, WGANGP
from tests.methods.continual.streams import domain_stream, model_for, task_stream
from tests.methods.steps import assert_resumes_anywhere, batches, clone, run
from tests.tiny import tiny_data, tiny_model

SMALL = VAE(hidden=(16,), latent=4)
CONVOLUTIONAL = VAE(hidden=(8,), channels=(4,), latent=4)


def example(dtype=torch.float32, seed=0, n=24, generator=CONVOLUTIONAL):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    return _seeded(model_for(stream, dtype=dtype, seed=seed), seed, generator=generator), stream


def _seeded(model, seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DGR(model, **options)


def learned(stream, **options):
    """A method that has learned a stream of float64."""
    method = _seeded(model_for(stream, dtype=torch.float64), generator=SMALL, **options).double()
    run(method, stream)
    return method


def recalled(method, count=8):
    """The inputs, in [0, 1], that the method is about to replay."""
    noise = Noise(seed=0)
    noise.drawn = method.past.noise.drawn
    with torch.no_grad():
        return method.past.before.draw(noise.normal(count, 4, like=torch.zeros(1, dtype=torch.float64)))


@pytest.mark.parametrize("make", [domain_stream, task_stream])
def test_the_solvers_loss_is_that_of_equation_1(make):
    stream = make(3, dtype=torch.float64)
    method = learned(stream)
    (each,) = batches(stream[2].train_source, steps=1)
    low, high = stream[0].train["pixel_values"].min(), stream[0].train["pixel_values"].max()
    replayed = low + (high - low) * recalled(method)
    old = clone(method.model)
    old.load_state_dict(method.solver_before.kept.tensors())
    losses = []
    for head in ["t0", "t1"] if stream.kind == "task" else ["task"]:
        answers = old.heads[head](old.backbone.trunk(replayed)).argmax(1)
        losses.append(F.cross_entropy(method.model.heads[head](method.model.backbone.trunk(replayed)), answers))
    logits = method.model.heads[method.current](method.model.backbone.trunk(each.inputs["pixel_values"]))
    terms = method.loss(each)
    torch.testing.assert_close(terms["labels"], F.cross_entropy(logits, each.labels) / 3)
    torch.testing.assert_close(terms["replayed"], torch.stack(losses).mean() * 2 / 3)


@pytest.mark.parametrize("make", [domain_stream, task_stream])
def test_with_a_temperature_the_earlier_probabilities_are_imitated(make):
    stream = make(2, dtype=torch.float64)
    method = learned(stream, temperature=2.0)
    (each,) = batches(stream[1].train_source, steps=1)
    low, high = stream[0].train["pixel_values"].min(), stream[0].train["pixel_values"].max()
    replayed = low + (high - low) * recalled(method)
    old, head = clone(method.model), "t0" if stream.kind == "task" else "task"
    old.load_state_dict(method.solver_before.kept.tensors())
    then, now = (m.heads[head](m.backbone.trunk(replayed)) for m in (old, method.model))
    p, q = torch.softmax(then / 2, 1), torch.softmax(now / 2, 1)
    expected = 4 * (p * (p / q).log()).sum(1).mean() / 2
    found = method.loss(each)["replayed"]
    assert found > 1e-6
    torch.testing.assert_close(found, expected)


def test_the_generator_learns_the_same_mixture():
    stream = domain_stream(2, dtype=torch.float64)
    method = learned(stream, new=0.25)
    (each,) = batches(stream[1].train_source, steps=1)
    low, high = stream[0].train["pixel_values"].min(), stream[0].train["pixel_values"].max()
    new, old = ((each.inputs["pixel_values"] - low) / (high - low)).clamp(0, 1), recalled(method)
    mixed = torch.stack([row for pair in zip(new, old) for row in pair])
    weights = torch.tensor([0.25 / 8, 0.75 / 8] * 8, dtype=torch.float64)
    noise = Noise(seed=0)
    noise.drawn = method.past.noise.drawn + 1
    expected = method.past.generator.loss(mixed, weights, noise)
    torch.testing.assert_close(method.generator_loss("generator", each)["generator"], expected)


def test_the_earlier_scholar_is_the_one_that_learned_the_task_before():
    stream = domain_stream(2, dtype=torch.float64)
    method = learned(stream)
    first = learned(TaskStream([stream[0]], kind="domain"))
    kept = method.solver_before.kept.tensors()
    assert all(torch.equal(kept[name], value) for name, value in first.model.state_dict().items())
    before = method.past.before.state_dict()
    assert all(torch.equal(before[name], value) for name, value in first.past.generator.state_dict().items())
    assert not all(torch.equal(before[name], value) for name, value in method.past.generator.state_dict().items())


def test_it_remembers_what_does_not_come_again():
    """The second task shows the same images, brighter and under other labels."""
    data = tiny_data(48, seed=7)
    other = {"pixel_values": data["pixel_values"] + 1, "labels": (data["labels"] + 1) % 3}
    sets = {"t0": data, "t1": other}
    stream = TaskStream([SingleTask(one, evaluation=one, name=name) for name, one in sets.items()], kind="domain")

    def accuracy(make):
        return run(make(model_for(stream)), stream, steps=150, lr=0.1).evaluate()["t0/accuracy"]

    assert accuracy(SequentialFineTune) < 0.1
    assert accuracy(lambda model: _seeded(model, generator=VAE(hidden=(64,), latent=8))) > 0.9


def test_a_scholar_that_starts_anew_learns_from_the_one_before_alone():
    """With r = 0 the second task's examples are nothing to it, neither inputs nor labels."""
    stream, other = domain_stream(2, dtype=torch.float64), domain_stream(2, dtype=torch.float64)
    spoiled = {k: v.flip(0) for k, v in other[1].train.items()}
    other = TaskStream([other[0], SingleTask(spoiled, name="t1")], kind="domain")
    one, two = (learned(each, new=0.0, restart=True) for each in (stream, other))
    assert all(torch.equal(value, two.model.state_dict()[name]) for name, value in one.model.state_dict().items())
    kept = learned(stream, new=0.0)
    first = "backbone.trunk.first.weight"
    assert not torch.allclose(one.model.state_dict()[first], kept.model.state_dict()[first], atol=0.1)


def test_cut_between_the_steps_of_generator_and_critic(tmp_path):
    adversarial = WGANGP(hidden=(8,), channels=(2, 3), latent=3, critic_steps=2)
    assert len(assert_resumes_anywhere(lambda: example(generator=adversarial), tmp_path)) == 8


def test_penalties_join_the_solver():
    stream = domain_stream()
    model = model_for(stream)
    both = _seeded(model, generator=SMALL) + SI(model, strength=0.5)
    run(both, stream)
    assert any((value > 0).any() for value in both.parts[0].importance.tensors().values())


@pytest.mark.parametrize("bad", [{"new": 1.5}, {"generator_epochs": 0}, {"generator": "vae"}, {"temperature": 0.0}])
def test_bad_hyper_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        DGR(model_for(domain_stream()), **bad)


def test_what_it_cannot_generate_or_answer_is_refused_before_work_starts():
    model = tiny_model()
    model.backbone._sample = {"input_ids": ((2, 5), torch.int64)}
    with pytest.raises(ValueError, match="generates inputs of one size.*input_ids"):
        DGR(model)
    stream = TaskStream([SingleTask(tiny_data(6), name="t0", task="size")], kind="domain")
    model = tiny_model().add_task("size", RegressionHead(1))
    with pytest.raises(ValueError, match="answering replayed inputs needs class probabilities, but task 'size'"):
        run(DGR(model, generator=SMALL), stream)
    with pytest.raises(ValueError, match=r"images of 8 x 8 can be halved 3 times, but channels=\(2, 2, 2, 2\)"):
        DGR(tiny_model(), generator=VAE(channels=(2, 2, 2, 2)))
    flat = {"pixel_values": torch.ones(6, 3, 8, 8), "labels": torch.zeros(6, dtype=torch.long)}
    with pytest.raises(ValueError, match="all numbers in the inputs of .* are 1"):
        run(DGR(tiny_model(), generator=SMALL), TaskStream([SingleTask(flat, name="t0")], kind="domain"))
