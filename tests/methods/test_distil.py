"""Distillation methods add up: terms, labels, forwards, groups, checkpoints, recipes, and what cannot be added."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hubtransfer import recipe
from hubtransfer.data import SingleTask
from hubtransfer.methods.aggregate import Sum
from hubtransfer.methods.distil import Distillation, SumOfTerms
from hubtransfer.methods.distillation.kd import KD
from hubtransfer.methods.distillation.l2t_ww import L2TWW
from hubtransfer.methods.finetuning.fine_tune import FineTune
from hubtransfer.methods.finetuning.l2_sp import L2SP
from hubtransfer.methods.method import Method
from hubtransfer.methods.method_with_terms import MethodWithTerms
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.update import Descend
from hubtransfer.models import Teacher
from hubtransfer.patches import ScaleBiasConfig
from hubtransfer.training import Checkpoints, Trainer
from tests.contract.methods import NAMES, cls_of, example
from tests.methods.steps import assert_same_parameters, batches, changed, clone, run, settings, snapshot
from tests.tiny import batch, linear_model, teacher_with_logits, tiny_data, tiny_model


class Follow(Distillation):
    """A toy: mean squared distance of a projected map of the student to the teacher's, times `weight`."""

    name = "follow"

    def __init__(self, model, teacher, task=None, weight=1.0, layer="act2"):
        super().__init__(model, teacher, None, task=task)
        self.pairs = self.pair([(layer, layer)])
        width = self.pairs.pairs[0].own.channels
        self.project = nn.Conv2d(width, width, 1).to(next(model.parameters()))
        self.weight = weight

    def terms(self, student, batch):
        (there,), (here,) = self.pairs.teacher_maps(batch), self.pairs.own_maps(student.features.maps, batch)
        return {"map": self.weight * F.mse_loss(self.project(here), there)}

    def watched(self):
        return {"weight/map": self.weight}


class Staged(Follow):
    """The toy with a stage of its own before."""

    def before(self, scenario) -> Iterator[Stage]:
        yield Stage("hint", scenario.train_source, [Descend(self.hint)], steps=1)

    def hint(self, batch):
        return {"zero": sum(p.square().sum() for p in self.own_parameters())}


def networks(dtype=torch.float32, seed=0, **options):
    return tiny_model(dtype=dtype, seed=seed, **options), Teacher(tiny_model(dtype=dtype, seed=seed + 10))


def data(n=24, dtype=torch.float32):
    return SingleTask(train=tiny_data(n, dtype=dtype), evaluation=tiny_data(n, dtype=dtype))


def count(module):
    """Counts a module's forwards."""
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append(1))
    return seen


# ------------------------------------------------------------------------------------------ the sum of distillations


def test_terms_add_and_label_weights_multiply():
    model, teacher = networks()
    kd, again, follow = KD(model, teacher, alpha=0.6), KD(model, teacher, alpha=0.5), Follow(model, teacher, weight=3.0)
    both = kd + follow + again
    images = batch([0, 1, 2])
    terms, alone = both.loss(images), [each.loss(batch([0, 1, 2])) for each in (kd, follow, again)]
    assert set(terms) == {"kd.0/teacher", "follow/map", "kd.1/teacher", "labels"}
    torch.testing.assert_close(terms["kd.0/teacher"], alone[0]["teacher"])
    torch.testing.assert_close(terms["follow/map"], alone[1]["map"])
    torch.testing.assert_close(terms["kd.1/teacher"], alone[2]["teacher"])
    torch.testing.assert_close(terms["labels"], 0.4 * 0.5 * alone[1]["labels"])
    assert isinstance(both, SumOfTerms)
    assert len(both.parts) == 3  # flat, not nested
    assert (both.name, both.paper) == ("kd + follow + kd", kd.paper + " + ")
    assert both.hyper_parameters()["kd.1"]["alpha"] == 0.5


def test_steps_equal_a_plain_loop():
    model, teacher = networks(torch.float64)
    follow = Follow(model, teacher, weight=2.0)
    student, source, project = clone(model), clone(teacher.model).eval(), clone(follow.project)
    scenario = data(dtype=torch.float64)
    run(KD(model, teacher, alpha=0.75) + follow, scenario)
    for each in batches(scenario.train_source):
        x = each.inputs["pixel_values"]
        own, theirs = (net(pixel_values=x, layers=("act2",)) for net in (student, source))
        kl = F.kl_div((own.logits / 4).log_softmax(1), (theirs.logits / 4).softmax(1), reduction="batchmean")
        apart = project(own.features.maps["act2"]) - theirs.features.maps["act2"]
        loss = 0.25 * F.cross_entropy(own.logits, each.labels) + 0.75 * 16 * kl + 2 * apart.square().mean()
        parameters = [*student.parameters(), *project.parameters()]
        with torch.no_grad():
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters)):
                p.sub_(0.05 * g)
    assert_same_parameters(model, student, 1e-12)
    assert_same_parameters(follow.project, project, 1e-12)


@pytest.mark.parametrize("order", ["logits first", "maps first"])
@pytest.mark.parametrize("origin", [None, "train"])
def test_student_and_teacher_run_once_a_step(order, origin):
    model, teacher = networks()
    parts = [KD(model, teacher), Follow(model, teacher, layer="act1"), Follow(model, teacher, layer="act2")]
    both = sum(parts[1:], start=parts[0]) if order == "logits first" else parts[2] + parts[1] + parts[0]
    student, source = count(model.backbone.trunk), count(teacher.model.backbone.trunk)
    both.loss(batch([0, 1], index=[0, 1], origin=origin, size=2))
    assert (len(student), len(source)) == (1, 1)


def test_an_answer_with_more_layers_is_given_again():
    _, teacher = networks()
    seen, images = count(teacher.model.backbone.trunk), batch([0, 1])
    whole = teacher(images, layers=("act1", "act2"))
    part = teacher(images, layers=("act2",))
    assert list(part.features.maps) == ["act2"]
    assert part.features.maps["act2"] is whole.features.maps["act2"]
    assert teacher(images).logits is whole.logits
    assert teacher(images).features.maps == {}
    assert len(seen) == 1
    teacher(batch([0, 1]), layers=("act2",))  # another step
    assert len(seen) == 2


def test_several_teachers():
    model, one = networks()
    two = Teacher(tiny_model(seed=20))
    both = KD(model, one, alpha=0.5) + KD(model, two, alpha=0.5) + Follow(model, two)
    seen = [count(each.model.backbone.trunk) for each in (one, two)]
    terms = both.loss(batch([0, 1]))
    assert [len(each) for each in seen] == [1, 1]
    assert terms["kd.0/teacher"] != terms["kd.1/teacher"]


def test_projectors_of_every_part_learn_and_the_model_is_saved_once():
    model, teacher = networks()
    both = Follow(model, teacher) + Follow(model, teacher, layer="act1")
    (group,) = both.groups().values()
    ids = [id(p) for each in group for p in each["params"]]
    assert len(ids) == len(set(ids)) == len(list(both.parameters()))
    assert not [key for key in both.state_dict() if key.startswith("parts") and "model" in key]
    before = snapshot(both)
    run(both, data())
    moved = changed(before, both)
    assert any(name.startswith("parts.0.project") for name in moved)
    assert any(name.startswith("parts.1.project") for name in moved)


def test_a_patched_student_trains_its_patch_alone():
    model, teacher = networks(patch=ScaleBiasConfig())
    before = snapshot(model.backbone)
    run(KD(model, teacher) + Follow(model, teacher), data())
    assert not changed(before, model.backbone)


@pytest.mark.parametrize("host", [False, True])
def test_cut_and_resumed_it_ends_with_the_same_bits(host, tmp_path):
    def make():
        torch.manual_seed(3)
        model, teacher = networks()
        terms = KD(model, teacher) + Follow(model, teacher)
        return L2SP(model) + terms if host else terms

    def train(method, folder, **changes):
        arguments = settings(output_dir=str(folder), momentum=0.9, steps=4, keep=9, **changes)
        trainer = Trainer(method, data(), arguments)
        return trainer

    whole = make()
    train(whole, tmp_path / "whole", save=1).train()
    folders = Checkpoints(tmp_path / "whole" / "checkpoints").all()
    assert len(folders) >= 3
    for folder in folders:
        again = make()
        train(again, tmp_path / "again").train(resume=str(folder))
        one, two = whole.state_dict(), again.state_dict()
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one), folder.name


def test_stages_before_run_part_by_part():
    model, teacher = networks()
    both = KD(model, teacher) + Staged(model, teacher) + Staged(model, teacher)
    names = [stage.name for stage in both.stages(data())]
    assert names == ["follow.0/hint", "follow.1/hint", "distil"]
    run(both, data())


def test_what_happens_after_a_step_happens_for_every_part():
    model, teacher = networks()
    seen = []

    class Remembers(Follow):
        def after(self, batch):
            seen.append(len(batch))

    run(KD(model, teacher) + Remembers(model, teacher), data())
    run(FineTune(model) + Remembers(model, teacher), data())
    assert seen == [8] * 6


ADDABLE = [name for name in NAMES if issubclass(cls_of(name), Distillation)]


@pytest.mark.parametrize("name", ADDABLE)
def test_every_distillation_method_adds_to_kd(name):
    method, scenario = example(name)
    both = method + KD(method.model, Teacher(tiny_model(seed=40)), task=method.task)
    assert "distil" in [stage.name for stage in both.stages(scenario)]
    run(both, scenario, steps=1)


def test_other_students_tasks_and_schedules_are_named():
    model, teacher = networks()
    with pytest.raises(ValueError, match="KD and Follow train different students"):
        KD(model, teacher) + Follow(tiny_model(seed=5), teacher)
    model.add_task("second", model.tasks["task"].head)
    with pytest.raises(ValueError, match="different students or tasks"):
        KD(model, teacher, task="task") + KD(model, teacher, task="second")

    class Scheduled(Follow):
        def stages(self, scenario):
            yield Stage("own", scenario.train_source, [Descend(self.loss)])

    with pytest.raises(ValueError, match="Scheduled has a schedule of its own"):
        KD(model, teacher) + Scheduled(model, teacher)
    with pytest.raises(TypeError, match="unsupported operand"):
        KD(model, teacher) + 1


# -------------------------------------------------------------------------------- terms for a method of another family


def test_a_method_takes_terms_from_either_side():
    model, teacher = networks()
    images = batch([0, 1, 2])
    own, kd = FineTune(model).loss(images)["labels"], KD(model, teacher).loss(images)["teacher"]
    for both in (FineTune(model) + KD(model, teacher), KD(model, teacher) + FineTune(model)):
        assert isinstance(both, MethodWithTerms)
        (stage,) = both.stages(data())
        assert stage.name == "fine-tune"
        terms = stage.updates[0].loss(images)
        assert set(terms) == {"labels", "kd/teacher"}
        torch.testing.assert_close(terms["labels"], own)  # fine-tuning has no factor on the labels
        torch.testing.assert_close(terms["kd/teacher"], kd)
        assert both.name == "fine_tune + kd"
    more = FineTune(model) + KD(model, teacher) + Follow(model, teacher)
    assert len(more.parts) == 2
    assert more.hyper_parameters().keys() == {"fine_tune", "kd", "follow"}
    assert more.watched() == {"weight/map": 1.0}
    twice = Follow(model, teacher) + Follow(model, teacher, weight=2.0)
    assert twice.watched() == {"weight/map": 1.0, "follow.1: weight/map": 2.0}


def test_a_methods_steps_with_terms_equal_a_plain_loop():
    model, teacher = networks(torch.float64)
    follow = Follow(model, teacher)
    student, source, project = clone(model), clone(teacher.model).eval(), clone(follow.project)
    start = [p.detach().clone() for p in student.backbone.parameters()]
    scenario = data(dtype=torch.float64)
    method = L2SP(model, only_weights=False) + follow
    run(method, scenario)
    for each in batches(scenario.train_source):
        x = each.inputs["pixel_values"]
        own, theirs = (net(pixel_values=x, layers=("act2",)) for net in (student, source))
        apart = project(own.features.maps["act2"]) - theirs.features.maps["act2"]
        pull = sum((p - s).square().sum() for p, s in zip(student.backbone.parameters(), start))
        head = sum(p.square().sum() for p in student.heads.parameters())
        loss = F.cross_entropy(own.logits, each.labels) + 0.05 * pull + 0.005 * head + apart.square().mean()
        parameters = [*student.parameters(), *project.parameters()]
        with torch.no_grad():
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters)):
                p.sub_(0.05 * g)
    assert_same_parameters(model, student, 1e-12)
    assert_same_parameters(follow.project, project, 1e-12)
    seen = count(model.backbone.trunk)
    next(method.stages(scenario)).updates[0].loss(batch([0, 1], dtype=torch.float64))
    assert len(seen) == 1


def test_a_probe_from_cached_features_takes_terms_and_trains_its_head_alone():
    model, teacher = networks()
    before = snapshot(model.backbone)
    run(FineTune(model, trains="head") + KD(model, teacher), data())
    assert not changed(before, model.backbone)


def test_a_factor_on_the_labels_is_applied_where_there_is_one():
    class Weighted(Method, scenario=SingleTask):
        name, label_weight = "weighted", 0.5

        def loss(self, batch):
            return {"labels": self.label_weight * self.model(**batch.inputs, labels=batch.labels, task=self.task).loss}

        def stages(self, scenario):
            yield Stage("own", scenario.train_source, [Descend(self.loss)])

    method = Weighted(linear_model([0.0, 0.0]))
    both = method + KD(method.model, teacher_with_logits([2.0, 0.0]), alpha=0.6)
    (stage,) = both.stages(SingleTask(train={"pixel_values": torch.zeros(2, 3, 8, 8), "labels": torch.zeros(2).long()}))
    # 0.5 * (1 - 0.6) * ln 2 = 0.2 * 0.6931
    assert stage.updates[0].loss(batch([0]))["labels"].item() == pytest.approx(0.1386, abs=1e-4)
    assert method.label_weight == 0.5  # the method itself is as it was


def test_what_cannot_take_terms_says_why():
    model, teacher = networks()

    class Weighs(Sum):
        pass

    class Odd(Method, scenario=SingleTask):
        name, updates = "odd", ()

        def stages(self, scenario):
            yield Stage("own", self.streams or scenario.train_source, self.updates)

    def refused(updates, match, streams=None):
        method = Odd(model)
        method.updates, method.streams = updates, streams
        with pytest.raises(ValueError, match=f"Odd, stage 'own': .*{match}"):
            list((method + KD(model, teacher)).stages(data()))

    refused([Descend(len), Descend(len)], "makes 2 updates a batch")
    refused([Descend(len, combine=Weighs())], "Weighs weighs the gradients")
    refused([Descend(len, trains="critic")], "trains critic, not the group 'model'")
    refused([Descend(len)], r"several streams \(source, target\)", {"source": None, "target": None})
    with pytest.raises(ValueError, match="Staged has stages of its own before its terms"):
        list((FineTune(model) + Staged(model, teacher)).stages(data()))
    with pytest.raises(ValueError, match="no group 'model'"):
        (L2TWW(model, teacher) + KD(model, teacher)).groups()
    with pytest.raises(TypeError, match="unsupported operand"):
        FineTune(model) + L2SP(model)
    with pytest.raises(TypeError, match="unsupported operand"):
        L2TWW(model, teacher) + FineTune(model)


# ------------------------------------------------------------------------------------------------------------ recipes


def plain(method, **changes):
    small = {"backbone": "timm/test_efficientnet", "pretrained": False, "image_size": 32}
    section = {"data": {"name": "digits", "limit": 24, "evaluation": {"limit": 16}}, "model": small, "teacher": small}
    return section | {"method": method, "training": {"steps": 2, "batch_size": 8, "progress": False}} | changes


def test_a_recipe_adds_methods_up():
    parts = [{"name": "kd", "alpha": 0.5}, {"name": "kd", "temperature": 2.0, "alpha": 0.2}]
    method, scenario, _ = recipe.build(plain({"sum": parts}))
    assert isinstance(method, SumOfTerms)
    assert method.label_weight == pytest.approx(0.4)
    assert [part.config.temperature for part in method.parts] == [4.0, 2.0]
    assert method.parts[0].teachers[0] is method.parts[1].teachers[0]
    changed = recipe.read(plain({"sum": parts}), ["method.sum.1.alpha=0.7"])
    assert changed.method["sum"][1]["alpha"] == 0.7
    run(method, scenario)


def test_a_recipe_gives_terms_to_another_method():
    method = recipe.build(plain({"sum": [{"name": "fine_tune", "trains": "all"}, {"name": "kd"}]})).method
    assert isinstance(method, MethodWithTerms)
    assert method.task == "digits"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"sum": []}, "method.sum .* at least one"),
        ({"sum": "kd"}, "method.sum"),
        ({"sum": [{"name": "kd"}, {"alpha": 1}]}, r"method.sum\.1 lacks the key 'name'"),
        ({"sum": [{"name": "kd"}, {"name": "kd", "alhpa": 1}]}, "alpha"),
        ({"sum": [{"name": "kd"}, {"name": "l2_sp"}, {"name": "fine_tune"}]}, "unsupported operand"),
        ({"sum": [{"name": "kd"}, {"name": "kd"}], "alpha": 1}, "'alpha'"),
    ],
)
def test_mistakes_in_a_sum_are_named(method, message):
    with pytest.raises(ValueError, match=message):
        recipe.build(plain(method))


def test_a_sum_without_a_teacher_section_is_named():
    with pytest.raises(ValueError, match="needs a 'teacher' section"):
        recipe.build(plain({"sum": [{"name": "kd"}, {"name": "fine_tune"}]}, teacher=None))
