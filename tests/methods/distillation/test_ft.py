"""Factor transfer: factors by hand, what each stage changes, both re-derived, what scale does, bad input."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import SingleTask
from hubtransfer.methods.distillation.ft import FT
from hubtransfer.methods.distillation.kd import KD
from hubtransfer.models import Teacher
from tests.methods.steps import assert_same_parameters, batches, begin, changed, clone, run, snapshot
from tests.tiny import batch, tiny_data, tiny_model


def make(dtype=torch.float32, seed=0, **config):
    torch.manual_seed(seed)
    return FT(tiny_model(dtype=dtype, seed=seed), Teacher(tiny_model(dtype=dtype, seed=9)), **config)


def example(dtype=torch.float32, seed=0, n=24):
    data = tiny_data(n, seed=seed, dtype=dtype)
    return make(dtype, seed), SingleTask(train=data, evaluation=data)


def test_factors_have_a_share_of_the_teachers_channels():
    method, images = make(rate=0.25, beta=1.0), batch()
    x = method.pairs.teacher_maps(images)[0]
    assert method.paraphrasers[0](x).shape == (3, 4, 4, 4)
    assert method.decoders[0](method.paraphrasers[0](x)).shape == x.shape
    with torch.no_grad():
        x.fill_(2.0)
        for p in (*method.decoders.parameters(),):
            p.zero_()
        method.decoders[0][-1].bias.fill_(5.0)
    assert method.reconstruction(images)["reconstruction"].item() == pytest.approx(9.0)  # (5 - 2)^2


def test_each_stage_changes_its_own_networks():
    method, scenario = example()
    each = batches(scenario.train_source, 1)[0]
    for number, own in enumerate((("paraphrasers.", "decoders."), ("model.", "translators."))):
        runtime, stage = begin(method, scenario, stage=number)
        before = snapshot(method)
        stage.updates[0].apply(each.replace(), runtime)
        moved = changed(before, method)
        assert moved == {name for name in before if name.startswith(own)}
        runtime.end()


def test_both_stages_equal_a_plain_loop():
    method, scenario = make(torch.float64, pairs="one_to_one", beta=20.0), example(torch.float64)[1]
    student, teacher = clone(method.model), clone(method.teachers[0].model)
    p, d, r = clone(method.paraphrasers), clone(method.decoders), clone(method.translators)
    run(method, scenario)
    layers = ["act1", "act2"]

    def descend(loss, parameters):
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                parameter.sub_(0.05 * gradient)

    for each in batches(scenario.train_source):
        maps = teacher.backbone(each.inputs["pixel_values"], layers).maps
        loss = sum((d[k](p[k](maps[name])) - maps[name]).pow(2).mean() for k, name in enumerate(layers))
        descend(loss, [*p.parameters(), *d.parameters()])
    for each in batches(scenario.train_source, stage=1):
        x = each.inputs["pixel_values"]
        output, maps = student(pixel_values=x, layers=layers), teacher.backbone(x, layers).maps
        loss = F.cross_entropy(output.logits, each.labels)
        for k, name in enumerate(layers):
            s, t = r[k](output.features.maps[name]).flatten(1), p[k](maps[name]).flatten(1).detach()
            s, t = s / s.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True)
            loss = loss + 20 * (s - t).abs().mean()
        descend(loss, [*student.parameters(), *r.parameters()])
    for one, two in ((method.model, student), (method.paraphrasers, p), (method.translators, r)):
        assert_same_parameters(one, two, 1e-12)


def test_the_paraphrase_needs_no_labels():
    method = make()
    unlabelled = SingleTask(train={"pixel_values": tiny_data()["pixel_values"]}, columns={"labels": None})
    runtime, stage = begin(method, unlabelled)
    assert stage.updates[0].apply(batches(unlabelled.train_source, 1)[0], runtime)["reconstruction"] > 0
    runtime.end()


def test_it_adds_to_kd():
    method, scenario = example()
    both = KD(method.model, method.teachers[0]) + method
    assert [stage.name for stage in both.stages(scenario)] == ["ft/paraphrase", "distil"]
    before = snapshot(method)
    run(both, scenario)
    moved = changed(before, method)
    assert {name.split(".")[0] for name in moved} == {"model", "paraphrasers", "decoders", "translators"}


def test_unequal_sizes_and_several_teachers():
    teachers = [Teacher(tiny_model(5, seed=8)), Teacher(tiny_model(4, seed=9))]
    method = FT(tiny_model(), teachers, pairs=(("1:act1", "act2"), ("0:act2", "act1")))
    assert method.loss(batch())["factors"].isfinite()


@pytest.mark.parametrize("bad", [{"beta": -1.0}, {"rate": 0.0}, {"paraphrase_epochs": 0}, {"pairs": "middle"}])
def test_bad_hyper_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(**bad)
