"""Ensembles: independent networks, averaged logits, one head in the end; with one member single-task networks."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import Batch, Mixing, MultiTask
from hubtransfer.methods.multitask.ensemble import Ensemble
from hubtransfer.models import ClassificationHead, DenseHead, TransferModel
from hubtransfer.training import Trainer
from tests.methods.steps import batches, begin, changed, clone, run, settings, snapshot
from tests.tiny import tiny_backbone, tiny_data


def model_of(dtype=torch.float32, seed=0):
    model = TransferModel(tiny_backbone(dtype=dtype, seed=seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        for task, classes in (("left", 3), ("right", 2)):
            model.add_task(task, ClassificationHead(classes))
    return model


def scenario(n=24, seed=0, dtype=torch.float32):
    left = tiny_data(n, 3, seed=seed, dtype=dtype)
    data = {"pixel_values": left["pixel_values"], "left": left["labels"], "right": (torch.arange(n) // 3) % 2}
    return MultiTask(train=data, labels={"left": "left", "right": "right"}, evaluation=data)


def example(dtype=torch.float32, seed=0, n=24):
    torch.manual_seed(seed)
    return Ensemble(model_of(dtype, seed)), scenario(n, seed, dtype)


@pytest.mark.parametrize("members", [1, 2])
def test_every_network_learns_as_if_it_were_alone(members):
    method = Ensemble(model_of(), members=members)
    data = scenario()
    runtime, stage = begin(method, data)
    alone = {}
    for k, task in enumerate(method.tasks):
        networks = method.model.backbone.networks(task)
        assert len(networks) == members
        alone[task] = [(clone(n.trunk), clone(h)) for n, h in zip(networks, method.heads[k])]
    for batch in batches(data.train_source):
        stage.updates[0].apply(batch, runtime)
        for task, pairs in alone.items():
            for trunk, head in pairs:
                optimizer = torch.optim.SGD([*trunk.parameters(), *head.parameters()], lr=0.05, fused=True)
                F.cross_entropy(head(trunk(batch.inputs["pixel_values"])), batch.labels[task]).backward()
                optimizer.step()
                optimizer.zero_grad()
    for k, (task, pairs) in enumerate(alone.items()):
        for network, head, (trunk, single) in zip(method.model.backbone.networks(task), method.heads[k], pairs):
            assert all(torch.equal(a, b) for a, b in zip(network.trunk.parameters(), trunk.parameters()))
            assert torch.equal(head.weight, single.weight)


def test_networks_start_apart():
    method = Ensemble(model_of())
    before = clone(method.model)
    begin(method, scenario())
    first, second = method.model.backbone.networks("left")
    assert torch.equal(first.trunk.stem.weight, before.backbone.trunk.stem.weight)
    assert not torch.equal(second.trunk.stem.weight, first.trunk.stem.weight)
    assert torch.equal(method.heads[0][0].weight, before.heads["left"].weight)


def test_the_models_logits_are_the_mean_of_its_networks():
    method, data = example(dtype=torch.float64)
    run(method, data)
    (batch,) = batches(data.train_source, 1)
    method.eval()
    for task in method.tasks:
        logits = method.member_logits(batch, task)
        assert not torch.allclose(logits[0], logits[1])
        expected = (logits[0] + logits[1]) / 2
        torch.testing.assert_close(method.model(**batch.inputs, task=task).logits, expected)
        torch.testing.assert_close(method.predict(batch, task), expected)


def test_the_best_model_is_saved_with_its_trained_heads(tmp_path):
    """Saved in the middle of the run, `best` predicts as well as the run said."""
    torch.manual_seed(0)
    data = scenario()
    options = {"output_dir": str(tmp_path), "steps": None, "epochs": 4, "lr": 0.5, "weight_decay": 0.1}
    watch = {"evaluate": "epoch", "best_metric": "left/accuracy", "save": "epoch"}
    trainer = Trainer(Ensemble(model_of()), data, settings(**options, **watch))
    trainer.train()
    best = TransferModel.from_pretrained(tmp_path / "best", backbone=model_of().backbone).eval()
    guesses = best(data.train["pixel_values"], task="left").logits.argmax(1)
    right = (guesses == data.train["left"]).double().mean().item()
    assert right == pytest.approx(trainer.cursor.best)
    assert right > 0.5  # of three classes


@pytest.mark.parametrize("mixing", [None, Mixing(), Mixing(batches="mixed")])
def test_tasks_may_have_data_of_their_own(mixing):
    data = {"left": tiny_data(24, 3), "right": tiny_data(16, 2, seed=1)}
    method = Ensemble(model_of())
    runtime, _ = begin(method, MultiTask(data))
    before = snapshot(method.model.backbone)
    runtime.end()
    run(method, MultiTask(data, evaluation=data, mixing=mixing), steps=8, evaluate="stage")
    assert changed(before, method.model.backbone) == set(before)


def test_frozen_parts_stay_as_they_are():
    model = model_of()
    model.backbone.trunk.stem.requires_grad_(False)
    method = Ensemble(model)
    runtime, stage = begin(method, scenario())
    before = snapshot(method.model.backbone)
    stage.updates[0].apply(batches(scenario().train_source, 1)[0], runtime)
    frozen = {name for name in before if ".stem." in name}
    assert frozen
    assert changed(before, method.model.backbone) == set(before) - frozen


def test_in_a_step_that_mixes_tasks_an_absent_task_has_a_loss_of_zero():
    """Every process then has the same terms; one may have drawn no example of a task."""
    method = Ensemble(model_of())
    left = tiny_data(4, 3)
    begin(method, scenario())
    only = Batch(inputs={"pixel_values": left["pixel_values"]}, labels=left["labels"])
    mixed = method.loss({"left": only.replace(share=0.5)})
    assert list(mixed) == ["left", "right"]
    assert mixed["right"].item() == 0 < mixed["left"].item()
    assert list(method.loss({"left": only})) == ["left"]  # the tasks take turns: all processes have this one


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="members must be at least 1"):
        Ensemble(model_of(), members=0)
    with pytest.raises(ValueError, match="plain fine-tuning"):
        Ensemble(model_of(), tasks=["left"], members=1)
    pixels = TransferModel(tiny_backbone()).add_task("a", DenseHead(2))
    with pytest.raises(ValueError, match="task 'a' is a PixelHead"):
        Ensemble(pixels)
