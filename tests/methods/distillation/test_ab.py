"""AB: two stages, the weights of the layers, steps re-derived, sizes that differ, KD beside it, bad input."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import SingleTask
from hubtransfer.methods.distillation.ab import AB
from hubtransfer.methods.distillation.kd import KD
from hubtransfer.models import Teacher
from hubtransfer.patches import ScaleBiasConfig
from tests.methods.steps import assert_same_parameters, batches, begin, changed, clone, run, snapshot
from tests.tiny import batch, tiny_data, tiny_model


def make(dtype=torch.float32, seed=0, classes=5, patch=None, **config):
    torch.manual_seed(seed)
    student = tiny_model(dtype=dtype, seed=seed, patch=patch)
    return AB(student, Teacher(tiny_model(classes, dtype=dtype, seed=9)), **config)


def data(n=24, seed=0, dtype=torch.float32):
    found = tiny_data(n, seed=seed, dtype=dtype)
    return SingleTask(train=found, evaluation=found)


def example(dtype=torch.float32, seed=0, n=24):
    return make(dtype, seed), data(n, seed, dtype)


def test_weights_of_the_pairs_by_hand():
    """Connectors that give 0: each neuron lacks 1. act1 has 8 x 8 x 8 = 512 of them, act2 16 x 4 x 4 = 256."""
    method = make(beta=0.5)
    with torch.no_grad():
        for connector in method.connectors:
            connector[1].weight.zero_()
    # 0.5 * (512 / 2 + 256 * 1) = 256
    assert method.boundary_loss(batch([0, 1]))["boundary"].item() == pytest.approx(256)
    with torch.no_grad():
        for connector in method.connectors:
            connector[1].bias.fill_(1.0)  # right for every neuron that is on, wrong by 2 for those that are off
    maps = method.teachers[0](batch([0, 1]), layers=("act1", "act2")).features.maps
    off = [(m <= 0).sum().item() / 2 for m in maps.values()]
    expected = 0.5 * 4 * (off[0] / 2 + off[1])
    assert method.boundary_loss(batch([0, 1]))["boundary"].item() == pytest.approx(expected)


def test_teachers_count_alike():
    """Connectors that give 0, as above: (512 / 2 + 256) neurons that lack 1, from each of two teachers."""
    teachers = [Teacher(tiny_model(5, seed=9)) for _ in range(2)]
    method = AB(tiny_model(), teachers, beta=0.5)
    with torch.no_grad():
        for connector in method.connectors:
            connector[1].weight.zero_()
    assert method.boundary_loss(batch([0, 1]))["boundary"].item() == pytest.approx(0.5 * 2 * (512 / 2 + 256))


def test_the_first_stage_equals_plain_torch():
    method, scenario = example(torch.float64)
    student, teacher = clone(method.model), clone(method.teachers[0].model).eval()
    connectors = clone(method.connectors).train()
    runtime, stage = begin(method, scenario)
    assert stage.name == "boundaries"
    for each in batches(scenario.train_source, 2):
        stage.updates[0].apply(each, runtime)
        x = each.inputs["pixel_values"]
        theirs, own = teacher.backbone(x, ["act1", "act2"]).maps, student.backbone(x, ["act1", "act2"]).maps
        loss = 0.0
        for weight, name, connector in zip((0.5, 1.0), ("act1", "act2"), connectors):
            t, s = theirs[name], connector(own[name])
            wrong = torch.where(t > 0, (s - 1) ** 2 * (s <= 1), (s + 1) ** 2 * (s > -1))
            loss = loss + 3e-3 * weight * wrong.sum() / len(x)
        parameters = [*student.backbone.parameters(), *connectors.parameters()]
        with torch.no_grad():
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters)):
                p.sub_(0.05 * g)
    assert_same_parameters(method.model, student, 1e-12)
    assert_same_parameters(method.connectors, connectors, 1e-12)


def test_the_head_rests_first_and_the_connectors_afterwards():
    method, scenario = example()
    before = snapshot(method)
    runtime, stage = begin(method, scenario)
    one, two = batches(scenario.train_source, 2)
    stage.updates[0].apply(one, runtime)
    moved = changed(before, method)
    assert any(name.startswith("connectors") for name in moved)
    assert not any(name.startswith("model.heads") for name in moved)
    runtime.end()
    runtime, stage = begin(method, scenario, stage=1)
    before = snapshot(method)
    seen = []
    method.teachers[0].model.backbone.trunk.register_forward_pre_hook(lambda m, args: seen.append(1))
    assert set(stage.updates[0].apply(two, runtime)) == {"labels"}
    moved = changed(before, method)
    assert any(name.startswith("model.heads") for name in moved)
    assert not any(name.startswith("connectors") for name in moved)
    assert not seen  # the labels' stage asks no teacher


def test_the_second_stage_takes_further_terms():
    method = make(classes=3)
    both = method + KD(method.model, method.teachers[0], alpha=0.6)
    names = [stage.name for stage in both.stages(data())]
    assert names == ["ab/boundaries", "distil"]
    assert set(both.loss(batch([0, 1]))) == {"kd/teacher", "labels"}
    assert list(both.groups()) == ["model", "boundary"]
    run(both, data())
    assert next(make(epochs=0.5).stages(data())).epochs == 0.5


def test_it_brings_neurons_to_the_teachers_side():
    method, scenario = example()
    images = batches(scenario.train_source, 1)[0]

    def share():
        with torch.no_grad():
            own = method.model.backbone(images.inputs["pixel_values"], ["act2"]).maps["act2"]
            there = method.pairs.teacher_maps(images)[-1]
            return ((method.connectors[-1](own) > 0) == (there > 0)).float().mean().item()

    before = share()
    run(method, scenario, steps=40)
    assert share() > before + 0.1


def test_maps_of_unlike_size_meet_at_the_teachers():
    down, up = make(pairs=(("act2", "act1"),)), make(pairs=(("act1", "act2"),))
    assert down.boundary_loss(batch([0, 1]))["boundary"].isfinite()
    loss = up.boundary_loss(batch([0, 1]))["boundary"]
    x = batch([0, 1]).inputs["pixel_values"]
    own = up.connectors[0](up.model.backbone(x, ["act2"]).maps["act2"])
    own = F.interpolate(own, scale_factor=2, mode="nearest")
    there = up.pairs.teacher_maps(batch([0, 1]))[0]
    wrong = torch.where(there > 0, (1 - own).relu(), (1 + own).relu()).square().sum() / 2
    torch.testing.assert_close(loss, 3e-3 * wrong)


def test_a_patched_student_keeps_its_trunk():
    method = make(patch=ScaleBiasConfig())
    before = snapshot(method.model.backbone)
    run(method, data())
    assert not changed(before, method.model.backbone)


@pytest.mark.parametrize("bad", [{"margin": 0.0}, {"beta": -1.0}, {"epochs": 0}, {"pairs": ()}])
def test_bad_hyper_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(**bad)


def test_unknown_layers_and_missing_teachers_are_named():
    with pytest.raises(ValueError, match=r"'act3'.*act2"):
        make(pairs=(("act3", "act2"),))
    with pytest.raises(TypeError, match="AB needs a frozen teacher"):
        AB(tiny_model(), tiny_model(seed=1))
