"""Cross-stitch: steps by hand, networks that stay apart, units with their own rate, and what cannot be stitched."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.backbones import Backbone
from hubtransfer.data import Mixing, MultiTask
from hubtransfer.methods.multitask.cross_stitch import CrossStitch
from hubtransfer.models import ClassificationHead, TransferModel, stitched_model
from tests.methods.steps import batches, begin, changed, clone, run, snapshot
from tests.tiny import tiny_backbone, tiny_data, tiny_model


def model_of(tasks=("left", "right"), dtype=torch.float32, seed=0):
    model = TransferModel(tiny_backbone(dtype=dtype, seed=seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        for k, task in enumerate(tasks):
            model.add_task(task, ClassificationHead(3 - k % 2))
    return model


def scenario(n=24, seed=0, dtype=torch.float32):
    left = tiny_data(n, 3, seed=seed, dtype=dtype)
    data = {"pixel_values": left["pixel_values"], "left": left["labels"], "right": (torch.arange(n) // 3) % 2}
    return MultiTask(train=data, labels={"left": "left", "right": "right"}, evaluation=data)


def example(dtype=torch.float32, seed=0, n=24):
    return CrossStitch(model_of(dtype=dtype, seed=seed), unit_lr=10.0), scenario(n, seed, dtype)


@pytest.mark.parametrize("tasks", [("left", "right"), ("left", "right", "third")])
def test_steps_equal_a_plain_loop(tasks):
    method, data = CrossStitch(model_of(tasks, torch.float64), unit_lr=10.0), scenario(dtype=torch.float64)
    if len(tasks) == 3:
        columns = {**data.train, "third": (torch.arange(24) // 2) % 3}
        data = MultiTask(train=columns, labels={task: task for task in tasks})
    plain, count = clone(method.model), len(tasks)
    run(method, data, weight_decay=0.1)
    nets = [clone(plain.backbone.trunk) for _ in tasks]
    heads = [plain.heads[task] for task in tasks]
    starts = {2: [[0.9, 0.1], [0.1, 0.9]], 3: [[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]]}
    start = torch.tensor(starts[count], dtype=torch.float64)
    alphas = [start[..., None].repeat(1, 1, c) for c in (8, 16)]
    for alpha in alphas:
        alpha.requires_grad_(True)
    weights = [p for module in (*nets, *heads) for p in module.parameters()]
    for batch in batches(data.train_source):
        h = [torch.tanh(net.norm1(net.stem(batch.inputs["pixel_values"]))) for net in nets]
        h = [sum(alphas[0][i, j][:, None, None] * h[j] for j in range(count)) for i in range(count)]
        h = [torch.tanh(net.norm2(net.block(z))) for net, z in zip(nets, h)]
        h = [sum(alphas[1][i, j][:, None, None] * h[j] for j in range(count)) for i in range(count)]
        loss = sum(F.cross_entropy(head(z.mean((2, 3))), batch.labels[task]) for head, z, task in zip(heads, h, tasks))
        gradients = torch.autograd.grad(loss, [*weights, *alphas])
        with torch.no_grad():
            for p, g in zip(weights, gradients):
                p.sub_(0.05 * (g + 0.1 * p))
            for p, g in zip(alphas, gradients[len(weights) :]):  # ten times the rate, and no decay
                p.sub_(0.5 * g)
    trunk = method.model.backbone.trunk
    for unit, alpha in zip(trunk.units, alphas):
        torch.testing.assert_close(unit.alpha, alpha, atol=1e-10, rtol=0)
    for tower, net in zip(trunk.towers, nets):
        for one, two in zip(tower.trunk.parameters(), net.parameters()):
            torch.testing.assert_close(one, two, atol=1e-10, rtol=0)


def test_apart_each_network_learns_as_if_it_were_alone():
    """The first stage is bit for bit single-task training of each network, on the same batches."""
    method = CrossStitch(model_of(), single_task_epochs=1)
    data = scenario()
    runtime, stage = begin(method, data)
    assert stage.name == "apart"
    alone = {task: clone(model_of()) for task in method.tasks}
    for batch in batches(data.train_source):
        stage.updates[0].apply(batch, runtime)
        for task, model in alone.items():
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
            model(**batch.inputs, labels=batch.labels[task], task=task).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for k, (task, model) in enumerate(alone.items()):
        tower = method.model.backbone.trunk.towers[k]
        assert all(torch.equal(a, b) for a, b in zip(tower.parameters(), model.backbone.parameters()))
        assert torch.equal(method.model.heads[task].weight, model.heads[task].weight)


def test_the_second_stage_starts_at_the_papers_alpha():
    method = CrossStitch(model_of(), single_task_epochs=1)
    data = scenario()
    runtime, _ = begin(method, data, stage=0)
    runtime.end()
    before = snapshot(method.model)
    _, stage = begin(method, data, stage=1)
    assert stage.name == "stitched"
    for unit in method.model.backbone.units:
        assert unit.alpha[0, 0].unique().tolist() == unit.alpha[1, 1].unique().tolist() == [pytest.approx(0.9)]
        assert unit.alpha[0, 1].unique().tolist() == [pytest.approx(0.1)]
    assert changed(before, method.model) == {f"backbone.trunk.units.{k}.alpha" for k in (0, 1)}
    assert method.watched() == {"own/act1": pytest.approx(0.9), "own/act2": pytest.approx(0.9)}


def test_units_have_their_own_rate_and_no_decay():
    runtime, _ = begin(CrossStitch(model_of(), unit_lr=1000.0), scenario(), weight_decay=0.01, lr=0.002)
    units, networks = (runtime.optimizers[name].param_groups[0] for name in ("units", "networks"))
    assert (units["lr"], units["weight_decay"]) == (pytest.approx(2.0), 0.0)
    assert (networks["lr"], networks["weight_decay"]) == (0.002, 0.01)


def test_it_starts_from_trained_networks():
    singles = {task: tiny_model(3, task, seed=k) for k, task in enumerate(("left", "right"))}
    method = CrossStitch(stitched_model(singles, ["act1"]), layers=("act1",))
    begin(method, scenario())
    for k, single in enumerate(singles.values()):
        own = method.model.backbone.trunk.towers[k].state_dict()
        assert all(torch.equal(own[name], value) for name, value in single.backbone.state_dict().items())


def test_trained_units_go_on_from_where_they_are():
    method = CrossStitch(model_of(), unit_lr=1000.0)
    run(method, scenario())
    trained = [unit.alpha.detach().clone() for unit in method.model.backbone.units]
    assert all((alpha[0, 1] - 0.1).abs().max() > 0.01 for alpha in trained)
    begin(CrossStitch(method.model), scenario())
    assert all(torch.equal(unit.alpha, alpha) for unit, alpha in zip(method.model.backbone.units, trained))
    begin(CrossStitch(method.model, single_task_epochs=1), scenario(), stage=1)  # here networks were apart before
    assert all(torch.allclose(unit.alpha[0, 1], torch.tensor(0.1)) for unit in method.model.backbone.units)


def test_networks_of_unlike_depth_learn_together():
    """One step moves both networks and every unit: each network's part in each mixture."""
    torch.manual_seed(0)
    singles = {}
    for task, name in (("left", "timm/resnet10t"), ("right", "timm/resnet18")):
        backbone = Backbone.from_pretrained(name, pretrained=False, image_size=32)
        singles[task] = TransferModel(backbone).add_task(task, ClassificationHead(2))
    method = CrossStitch(stitched_model(singles, ["layer1", "layer3"]))
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 2
    data = MultiTask(train={"pixel_values": x, "left": y, "right": 1 - y}, labels={"left": "left", "right": "right"})
    before = snapshot(method.model)
    run(method, data, steps=1)
    moved = changed(before, method.model)
    for number, name in enumerate(("layer1", "layer3")):
        alpha, start = method.model.backbone.units[number].alpha, before[f"backbone.trunk.units.{number}.alpha"]
        assert (alpha != start).any(-1).all(), f"after {name}: {(alpha != start).float().mean(-1)}"
    for number in range(2):
        for part in ("conv1", "layer1", "layer2", "layer3", "layer4"):
            assert any(key.startswith(f"backbone.trunk.towers.{number}.trunk.{part}.") for key in moved), part


def test_frozen_parts_stay_as_they_are():
    model = model_of()
    model.backbone.trunk.stem.requires_grad_(False)
    stem = model.backbone.trunk.stem.weight.detach().clone()
    method = CrossStitch(model)
    run(method, scenario())
    for tower in method.model.backbone.trunk.towers:
        assert torch.equal(tower.trunk.stem.weight, stem)
        assert not torch.equal(tower.trunk.block.weight, model_of().backbone.trunk.block.weight)


@pytest.mark.parametrize("mixing", [None, Mixing(), Mixing(batches="mixed")])
def test_tasks_may_have_data_of_their_own(mixing):
    data = {"left": tiny_data(24, 3), "right": tiny_data(16, 2, seed=1)}
    method = CrossStitch(model_of())
    run(method, MultiTask(data, evaluation=data, mixing=mixing), steps=6, evaluate="stage")
    alphas = [unit.alpha for unit in method.model.backbone.units]
    assert all((alpha[0, 1] != alpha[0, 1, 0]).any() for alpha in alphas)  # each channel went its own way


def test_what_one_task_lacks_labels_for_the_other_still_learns_from():
    data = scenario().train
    right = data["right"].clone()
    right[3:] = -100
    spoiled = MultiTask(train={**data, "right": right}, labels={"left": "left", "right": "right"})
    method = CrossStitch(model_of())
    trainer = run(method, spoiled, steps=3)
    assert trainer.cursor.total == 3


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="one task \\('left'\\) has nothing to be stitched to"):
        CrossStitch(model_of(("left",)))
    with pytest.raises(ValueError, match="unit_lr must be positive"):
        CrossStitch(model_of(), unit_lr=0)
    with pytest.raises(ValueError, match="no layer 'act9'"):
        run(CrossStitch(model_of(), layers=("act9",)), scenario())
    singles = {task: tiny_model(3, task, seed=k) for k, task in enumerate(("left", "right"))}
    with pytest.raises(ValueError, match=r"after \['act2'\], but .* stitched after \['act1'\] already"):
        CrossStitch(stitched_model(singles, ["act1"]), layers=("act2",))
