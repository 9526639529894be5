"""FitNet: the hint by hand, what each stage changes, both forms re-derived, vectors, sums with KD, bad input."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import SingleTask
from hubtransfer.methods.distillation.fitnet import FitNet
from hubtransfer.methods.distillation.kd import KD
from hubtransfer.models import Teacher
from tests.methods.steps import assert_same_parameters, batches, begin, changed, clone, run, snapshot
from tests.tiny import batch, tiny_data, tiny_model


def make(dtype=torch.float32, seed=0, **config):
    torch.manual_seed(seed)
    return FitNet(tiny_model(dtype=dtype, seed=seed), Teacher(tiny_model(dtype=dtype, seed=9)), **config)


def example(dtype=torch.float32, seed=0, n=24):
    data = tiny_data(n, seed=seed, dtype=dtype)
    return make(dtype, seed), SingleTask(train=data, evaluation=data)


def test_hint_by_hand():
    """The regressor gives 2 everywhere, the teacher's map is 5: (5 - 2)^2 = 9, and beta times that beside labels."""
    two, one, images = make(), make(stages="one", beta=0.5), batch()
    for method in (two, one):
        there = method.pairs.teacher_maps(images)[0]
        with torch.no_grad():
            there.fill_(5.0)
            method.match[0].weight.zero_()
            method.match[0].bias.fill_(2.0)
    assert two.hint(images)["hint"].item() == pytest.approx(9.0, rel=1e-6)
    assert list(two.loss(images)) == ["labels"]
    assert one.loss(images)["hint"].item() == pytest.approx(4.5, rel=1e-6)


def test_the_hint_reaches_the_guided_layer_and_no_further():
    method, scenario = example()
    assert str(method.pairs) == "act1 -> act1"
    runtime, stage = begin(method, scenario)
    before = snapshot(method)
    stage.updates[0].apply(batches(scenario.train_source, 1)[0], runtime)
    moved = changed(before, method)
    assert any("stem" in name for name in moved)
    assert any(name.startswith("match.") for name in moved)
    assert not any("block" in name or "norm2" in name or "heads" in name for name in moved)


def plain(method, scenario, student, match, teacher, losses):
    """Three steps of plain SGD on each loss in turn."""
    for number, (loss, parameters) in enumerate(losses):
        for each in batches(scenario.train_source, stage=number):
            x = each.inputs["pixel_values"]
            output, maps = student(pixel_values=x, layers=["act1", "act2"]), teacher.backbone(x, ["act1", "act2"]).maps
            value = loss(output, maps, match, each.labels)
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            with torch.no_grad():
                for p, g in zip(parameters, gradients):
                    p.sub_(0 if g is None else 0.05 * g)
    assert_same_parameters(method.model, student, 1e-12)
    assert_same_parameters(method.match, match, 1e-12)


def test_two_stages_equal_a_plain_loop():
    method, scenario = example(torch.float64)
    student, teacher, match = clone(method.model), clone(method.teachers[0].model), clone(method.match)
    run(method, scenario)
    own, both = list(student.parameters()), [*student.parameters(), *match.parameters()]
    hint = lambda out, maps, r, y: ((maps["act1"] - r[0](out.features.maps["act1"])) ** 2).mean()  # noqa: E731
    labels = lambda out, maps, r, y: F.cross_entropy(out.logits, y)  # noqa: E731
    plain(method, scenario, student, match, teacher, [(hint, both), (labels, own)])


def test_full_activation_transfer_equals_a_plain_loop():
    method, scenario = make(torch.float64, stages="one", pairs="one_to_one", beta=2.0), example(torch.float64)[1]
    assert str(method.pairs) == "act1 -> act1, act2 -> act2"
    student, teacher, match = clone(method.model), clone(method.teachers[0].model), clone(method.match)
    run(method, scenario)

    def loss(output, maps, regressors, labels):
        pairs = zip(("act1", "act2"), regressors)
        hints = [((maps[name] - r(output.features.maps[name])) ** 2).mean() for name, r in pairs]
        return F.cross_entropy(output.logits, labels) + 2 * sum(hints)

    plain(method, scenario, student, match, teacher, [(loss, [*student.parameters(), *match.parameters()])])


def test_a_student_that_can_tell_the_teachers_map_has_nothing_to_learn():
    method = make(pairs="single")
    teacher = method.teachers[0].model
    method.model.backbone.load_state_dict(teacher.backbone.state_dict())
    with torch.no_grad():
        method.match[0].weight.copy_(torch.eye(16)[:, :, None, None])
        method.match[0].bias.zero_()
    assert method.hint(batch())["hint"].item() == pytest.approx(0, abs=1e-10)


def test_the_papers_second_stage_is_a_sum_with_kd():
    method, scenario = example()
    both = method + KD(method.model, method.teachers[0])
    assert [stage.name for stage in both.stages(scenario)] == ["fitnet/hint", "distil"]
    before = snapshot(method)
    run(both, scenario)
    assert any(name.startswith("match.") for name in changed(before, method))


def test_pooled_features_and_several_teachers():
    torch.manual_seed(0)
    teachers = [Teacher(tiny_model(5, seed=8)), Teacher(tiny_model(4, seed=9))]
    method = FitNet(tiny_model(), teachers, where="pooled", stages="one")
    assert method.layers == ()
    assert method.loss(batch())["hint"].isfinite()
    assert str(FitNet(tiny_model(), teachers).pairs) == "0:act1 -> act1, 1:act1 -> act1"


@pytest.mark.parametrize(
    "bad", [{"stages": "three"}, {"beta": -1.0}, {"hint_epochs": 0}, {"where": "head"}, {"pairs": "some"}]
)
def test_bad_hyper_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(**bad)


def test_two_of_them_are_named_with_the_way_out():
    method = make()
    other = Teacher(tiny_model(seed=8))
    both = method + FitNet(method.model, other)
    with pytest.raises(ValueError, match=r"group 'hint'.*: FitNet\(model, \[a, b\]\)"):
        both.groups()
    assert "hint" in FitNet(method.model, [method.teachers[0], other]).groups()
