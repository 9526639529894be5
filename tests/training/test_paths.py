"""The two gradient paths are one: Accelerate's engine and explicit gradients give the same parameters."""

import copy

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import SingleTask
from hubtransfer.training import Runtime, Trainer, TrainingArguments
from tests.tiny import tiny_data
from tests.training.toys import Explicit, LookAhead, Plain, Ranked, TwoPlayers, make

SETTINGS = {"batch_size": 8, "optimizer": "sgd", "lr": 0.1, "schedule": "constant", "save": "no", "evaluate": "no"}


def train(method, data, tmp_path, **changes):
    arguments = {**SETTINGS, "output_dir": str(tmp_path), "progress": False, "plots": False, "steps": 6} | changes
    Trainer(method, SingleTask(data), TrainingArguments(**arguments)).train()
    return torch.cat([p.detach().flatten() for p in method.parameters()])


def batches(data, tmp_path, steps=6, size=8):
    """The very batches the trainer draws, through its own loader."""
    from hubtransfer.data import Loader

    loader = Loader(SingleTask(data).train_source, processor=None, batch_size=size, seed=0)
    found = []
    epoch = 0
    while len(found) < steps:
        found += list(loader.batches(epoch))
        epoch += 1
    return found[:steps]


def test_both_paths_equal_a_hand_written_loop(tmp_path):
    data = tiny_data(24, dtype=torch.float64)
    plain, explicit = make(Plain, torch.float64), make(Explicit, torch.float64)
    by_hand = copy.deepcopy(plain.model)
    for parameter in by_hand.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    for batch in batches(data, tmp_path):
        logits = by_hand(**batch.inputs).logits
        loss = F.cross_entropy(logits, batch.labels) + 0.01 * logits.pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in by_hand.parameters()])
    torch.testing.assert_close(train(plain, data, tmp_path), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(train(explicit, data, tmp_path), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("cls", "asked"), [(Explicit, 0), (Ranked, 6)])
def test_values_of_terms_are_averaged_over_processes_only_for_a_rule_that_asks(cls, asked, tmp_path, monkeypatch):
    """A rule that is not the plain sum gets them at each of 6 steps; gradients on one process need no average."""
    averaged, plain = [], Runtime.reduce

    def reduce(self, tensor, how="mean"):
        averaged.extend([how] * (len(tensor) == 2))  # the terms are two; the log reads three steps at a time
        return plain(self, tensor, how)

    monkeypatch.setattr(Runtime, "reduce", reduce)
    train(make(cls), tiny_data(24), tmp_path)
    assert len(averaged) == asked


def test_accumulation_equals_one_large_batch(tmp_path):
    data = tiny_data(32, dtype=torch.float64)
    small = train(make(Plain, torch.float64), data, tmp_path, batch_size=4, accumulation=4, steps=2)
    large = train(make(Plain, torch.float64), data, tmp_path, batch_size=16, steps=2)
    torch.testing.assert_close(small, large, rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", [{"accumulation": 2}, {"precision": "fp16"}])
def test_the_explicit_path_refuses_what_only_the_engine_can_do(changes, tmp_path):
    with pytest.raises(ValueError, match="cannot (accumulate|scale).*(batch_size|bf16)"):
        train(make(Explicit), tiny_data(), tmp_path, **changes)


def test_clipping_bounds_the_step_on_both_paths(tmp_path):
    data = tiny_data(24, dtype=torch.float64)
    for cls in (Plain, Explicit):
        method = make(cls, torch.float64)
        before = torch.cat([p.detach().flatten().clone() for p in method.parameters()])
        after = train(method, data, tmp_path, steps=1, lr=1.0, momentum=0.0, clip_norm=0.01)
        assert (after - before).norm() == pytest.approx(0.01, rel=1e-3)  # SGD: step = lr x clipped gradient


def test_repeats_and_after_hooks_run_as_often_as_they_say(tmp_path):
    method = make(TwoPlayers)
    train(method, tiny_data(), tmp_path, steps=5)
    assert method.after_calls == 5


def test_an_update_changes_only_its_group(tmp_path):
    method = make(Ranked)
    rival = make(TwoPlayers)
    model_before = copy.deepcopy(rival.model.state_dict())
    rival.stages = lambda scenario, original=rival.stages: (
        stage.__class__(stage.name, stage.data, stage.updates[:1]) for stage in original(scenario)
    )
    train(rival, tiny_data(), tmp_path, steps=3)
    assert all(torch.equal(model_before[k], v) for k, v in rival.model.state_dict().items())
    train(method, tiny_data(), tmp_path, steps=1)


def test_an_aggregator_sees_one_row_a_term(tmp_path):
    """Keeping the first row alone equals training on the first term alone."""

    class Alone(Plain):
        def loss(self, batch):
            return {"labels": super().loss(batch)["labels"]}

    data = tiny_data(24, dtype=torch.float64)
    ranked, alone = make(Ranked, torch.float64), make(Alone, torch.float64)
    torch.testing.assert_close(train(ranked, data, tmp_path), train(alone, data, tmp_path), rtol=0, atol=1e-12)


def test_hypergradient_against_finite_differences(tmp_path):
    """d outer / d weight through two SGD steps with momentum, weight decay and a warm velocity."""
    from hubtransfer.training import Runtime

    data = tiny_data(8, dtype=torch.float64)
    method = make(LookAhead, torch.float64)
    arguments = TrainingArguments(**SETTINGS, output_dir=str(tmp_path), weight_decay=0.01)
    runtime = Runtime(method, arguments)
    scenario = SingleTask(data)
    (stage,) = method.stages(scenario)
    runtime.begin(stage, 10)
    batch = batches(data, tmp_path, 1)[0]
    stage.updates[0].apply(batch, runtime)  # the optimiser has momentum from here on

    def ahead(value: float) -> float:
        """The outer loss after the look-ahead, straight-line."""
        model = copy.deepcopy(method.model)
        params = list(model.parameters())
        states = runtime.sgd_state("model")
        velocities = [s.velocity.clone() for s in states]
        for step in range(2):
            if step == 0:
                loss = torch.tensor(value, dtype=torch.float64).exp() * model.heads["task"].weight.pow(2).sum()
            else:
                loss = F.cross_entropy(model(**batch.inputs).logits, batch.labels)
            gradients = torch.autograd.grad(loss, params, allow_unused=True)
            with torch.no_grad():
                for k, (p, g) in enumerate(zip(params, gradients)):
                    g = (torch.zeros_like(p) if g is None else g) + 0.01 * p
                    velocities[k] = 0.9 * velocities[k] + g
                    p -= 0.1 * velocities[k]
        return F.cross_entropy(model(**batch.inputs).logits, batch.labels).item()

    seen = {}
    runtime.step = lambda gradients: seen.update(gradients)
    before = copy.deepcopy(method.state_dict())
    stage.updates[1].apply(batch, runtime)
    here, h = method.weight.item(), 1e-5
    expected = (ahead(here + h) - ahead(here - h)) / (2 * h)
    assert seen["meta"][0].item() == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(before[k], v) for k, v in method.state_dict().items()), "the look-ahead left a trace"
    runtime.end()


def test_looking_ahead_needs_sgd(tmp_path):
    with pytest.raises(ValueError, match="needs optimizer 'sgd'.*AdamW"):
        train(make(LookAhead), tiny_data(), tmp_path, optimizer="adamw")


@pytest.mark.parametrize("cls", [Plain, TwoPlayers])
def test_bf16_keeps_fp32_weights(cls, tmp_path):
    method = make(cls)
    flat = train(method, tiny_data(), tmp_path, precision="bf16", optimizer="adamw", lr=1e-3)
    assert flat.dtype == torch.float32
    assert flat.isfinite().all()
    assert "forward" not in vars(method), "the autocast wrapper stayed on the method"
