"""VID: the bound by hand, where it starts, what its variances learn, steps re-derived, texts and vectors, bad input."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import SingleTask
from hubtransfer.methods.distillation.vid import VID
from hubtransfer.models import Teacher
from tests.methods.steps import assert_same_parameters, batches, changed, clone, run, snapshot
from tests.tiny import batch, tiny_data, tiny_model


def make(dtype=torch.float32, seed=0, **config):
    torch.manual_seed(seed)
    student, teacher = tiny_model(dtype=dtype, seed=seed), tiny_model(5, dtype=dtype, seed=9)
    return VID(student, Teacher(teacher), **config)


def example(dtype=torch.float32, seed=0, n=24):
    data = tiny_data(n, seed=seed, dtype=dtype)
    return make(dtype, seed), SingleTask(train=data, evaluation=data)


@pytest.mark.parametrize("where", ["maps", "pooled", "logits"])
def test_every_variance_starts_as_said_and_learns(where):
    method = make(where=where, variance=3.0)
    for variance in method.variances():
        torch.testing.assert_close(variance, torch.full_like(variance, 3.0))
    before = snapshot(method)
    run(method, example()[1])
    moved = changed(before, method)
    assert {name for name in before if name.startswith(("rho.", "means."))} <= moved
    assert [len(v) for v in method.variances()] == {"maps": [8, 16], "pooled": [16], "logits": [5]}[where]


def test_steps_equal_a_plain_loop():
    method, scenario = make(torch.float64, beta=0.5), example(torch.float64)[1]
    student, teacher, means = clone(method.model), clone(method.teachers[0].model), clone(method.means)
    rho = [p.detach().clone().requires_grad_() for p in method.rho]
    run(method, scenario)
    for each in batches(scenario.train_source):
        x = each.inputs["pixel_values"]
        output, maps = student(pixel_values=x, layers=["act1", "act2"]), teacher.backbone(x, ["act1", "act2"]).maps
        loss = F.cross_entropy(output.logits, each.labels)
        for layer, mean, r in zip(("act1", "act2"), means, rho):
            variance = (1 + r.exp()).log()[None, :, None, None] + 1e-5
            squares = (maps[layer] - mean(output.features.maps[layer])) ** 2
            loss = loss + 0.5 * (variance.sqrt().log() + squares / (2 * variance)).mean()
        parameters = [*student.parameters(), *means.parameters(), *rho]
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients):
                p.sub_(0.05 * g)
    assert_same_parameters(method.model, student, 1e-12)
    assert_same_parameters(method.means, means, 1e-12)
    for one, two in zip(method.rho, rho):
        torch.testing.assert_close(one.detach(), two.detach(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("where", ["pooled", "logits"])
def test_vectors_need_no_layers(where):
    method = make(where=where)
    assert method.layers == ()
    features = SimpleNamespace(pooled=torch.zeros(3, 16), maps={})
    images = batch()
    with torch.no_grad():
        method.means[0].weight.zero_()
        method.means[0].bias.fill_(1.0)
    output = method.teachers[0](images)
    there = output.logits if where == "logits" else output.features.pooled
    # every variance is 5: (ln 5 + (t - 1)^2 / 5) / 2
    expected = 0.5 * (math.log(5) + (there - 1).square().mean().item() / 5)
    terms = method.terms(SimpleNamespace(features=features), images)
    assert terms["information"].item() == pytest.approx(expected, rel=1e-5)


def test_several_teachers_and_unequal_maps():
    torch.manual_seed(0)
    teachers = [Teacher(tiny_model(5, seed=8)), Teacher(tiny_model(4, seed=9))]
    method = VID(tiny_model(), teachers, pairs=(("1:act1", "act2"), ("0:act2", "act1")))
    assert str(method.pairs) == "1:act1 -> act2, 0:act2 -> act1"
    assert method.loss(batch())["information"].isfinite()


@pytest.mark.parametrize("bad", [{"beta": -1.0}, {"where": "head"}, {"variance": 0.0}, {"pairs": "middle"}])
def test_bad_hyper_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(**bad)


def test_a_teacher_without_a_head_has_no_logits():
    teacher = tiny_model(seed=9)
    teacher.add_task("bare", None)
    with pytest.raises(ValueError, match="'bare' has none"):
        VID(tiny_model(), Teacher(teacher, task="bare"), where="logits")
