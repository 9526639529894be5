"""Penalties beside other methods: terms add up, hooks run around each task, rules see their own terms alone."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import SingleTask, TaskStream
from hubtransfer.methods import Accumulate, Aggregator, Descend, Stage
from hubtransfer.methods.continual.l2 import L2
from hubtransfer.methods.continual.si import SI
from hubtransfer.methods.continual_method import ContinualMethod
from hubtransfer.methods.distillation.kd import KD
from hubtransfer.methods.finetuning.fine_tune import FineTune
from hubtransfer.methods.penalty import MethodWithPenalties
from hubtransfer.models import Teacher
from tests.methods.continual.streams import class_stream, domain_stream, model_for, task_stream
from tests.methods.steps import (
    assert_resumes_anywhere,
    assert_same_parameters,
    batches,
    batches_of,
    changed,
    clone,
    run,
    snapshot,
)
from tests.tiny import tiny_data, tiny_model


class Rehearsal(ContinualMethod):
    """Keeps the last batch and repeats it beside the next one."""

    def __init__(self, model):
        super().__init__(model)
        self.kept, self.calls = None, []

    def loss(self, batch):
        terms = super().loss(batch)
        if self.kept is not None:
            terms["replay"] = super().loss(self.kept)["labels"]
        return terms

    def after_step(self, batch):
        self.kept = batch


class Halved(Aggregator):
    """A rule that is no sum: half of the first row."""

    def aggregate(self, jacobian):
        self.rows = len(jacobian)
        return jacobian[0] / 2


class Ruled(Rehearsal):
    rule = Halved()

    def updates(self):
        return [Descend(self.loss, combine=self.rule, after=self.after_step)]


class Twice(ContinualMethod):
    def updates(self):
        return [Descend(self.loss), Descend(self.loss)]


class Apart(ContinualMethod):
    def stages(self, scenario):
        yield Stage("t0", {"a": scenario[0].train_source, "b": scenario[1].train_source}, [Descend(self.loss)])


class Skipped(ContinualMethod):
    def stages(self, scenario):
        yield Stage("t0/learn", scenario[0].train_source, [Descend(self.loss)])
        yield Stage("t0/settle", scenario[0].train_source, [Descend(self.loss)], when=lambda: False)


class Counting(ContinualMethod):
    def updates(self):
        return [Accumulate(self.loss)]


class Elsewhere(ContinualMethod):
    def stages(self, scenario):
        yield Stage("something", SingleTask(tiny_data(8)).train_source, [Descend(self.loss)])


def loop(model, stream, *, replay=False, rule=lambda own, first: own, strength=0.5, observed=None):
    """Tasks in a row with the L2 penalty in straight lines."""
    parameters, anchor, kept = list(model.parameters()), None, None
    for item in stream:
        for each in batches_of(stream, item):

            def ce(b):
                return F.cross_entropy(model.heads["task"](model.backbone.trunk(b.inputs["pixel_values"])), b.labels)

            first = torch.autograd.grad(ce(each), parameters)
            own = first
            if replay and kept is not None:
                own = [a + b for a, b in zip(first, torch.autograd.grad(ce(kept), parameters))]
            own = rule(own, first)
            if observed is not None:
                observed.append([g.clone() for g in own])
            with torch.no_grad():
                for k, p in enumerate(parameters):
                    pull = 0 if anchor is None else strength * (p - anchor[k])
                    p.sub_(0.05 * (own[k] + pull))
            kept = each
        anchor = [p.detach().clone() for p in parameters]


def test_the_terms_join_the_loss_of_another_method():
    stream = domain_stream(dtype=torch.float64)
    model = model_for(stream, dtype=torch.float64)
    plain = clone(model)
    method = Rehearsal(model) + L2(model, strength=0.5)
    assert isinstance(method, MethodWithPenalties)
    assert set(dict(method.named_parameters())) == {f"model.{name}" for name, _ in model.named_parameters()}
    run(method, stream)
    loop(plain, stream, replay=True)
    assert_same_parameters(model, plain, 1e-12)


class Watching(Rehearsal):
    def watched(self):
        return {"kept/rows": 0.0 if self.kept is None else float(len(self.kept)), "weight/labels": 1.0}


class WatchedL2(L2):
    def watched(self):
        return {"weight/labels": 2.0, "weight/penalty": 3.0}


def test_the_log_has_what_the_method_and_every_penalty_watch():
    """A name that the method has already gets the penalty's in front; the method's numbers are those of the moment."""
    stream = domain_stream()
    model = model_for(stream)
    method = Watching(model) + WatchedL2(model)
    penalty = {"l2: weight/labels": 2.0, "weight/penalty": 3.0}
    assert method.watched() == {"kept/rows": 0.0, "weight/labels": 1.0} | penalty
    run(method, stream)
    assert method.watched() == {"kept/rows": 8.0, "weight/labels": 1.0} | penalty
    assert (L2(model) + WatchedL2(model)).watched() == {"weight/labels": 2.0, "weight/penalty": 3.0}


def test_the_order_of_the_sum_does_not_matter():
    stream = domain_stream(dtype=torch.float64)
    one, two = model_for(stream, dtype=torch.float64), model_for(stream, dtype=torch.float64)
    run(Rehearsal(one) + L2(one), stream)
    run(L2(two) + Rehearsal(two), stream)
    assert_same_parameters(one, two, 0)


def test_a_rule_sees_its_own_terms_and_the_penalty_is_added():
    stream = domain_stream(dtype=torch.float64)
    model = model_for(stream, dtype=torch.float64)
    plain = clone(model)
    run(Ruled(model) + L2(model, strength=0.5), stream)
    assert Ruled.rule.rows == 2
    loop(plain, stream, replay=True, rule=lambda own, first: [g / 2 for g in first])
    assert_same_parameters(model, plain, 1e-12)


def test_who_observes_gradients_sees_them_without_any_penalty():
    stream = domain_stream(dtype=torch.float64)
    model = model_for(stream, dtype=torch.float64)
    plain, seen, expected = clone(model), [], []
    spy = SI(model, strength=0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    spy.observe = lambda gradients: seen.append({names[id(p)]: g.clone() for p, g in gradients.items()})
    run(Rehearsal(model) + L2(model, strength=0.5) + spy, stream)
    loop(plain, stream, replay=True, observed=expected)
    assert_same_parameters(model, plain, 1e-12)
    for found, right in zip(seen, expected):
        for (name, _), g in zip(plain.named_parameters(), right):
            torch.testing.assert_close(found[name], g)


def test_penalties_alone_add_up_on_fine_tuning():
    stream = domain_stream(dtype=torch.float64)
    model = model_for(stream, dtype=torch.float64)
    plain = clone(model)
    method = L2(model, strength=0.2) + L2(model, strength=0.3)
    assert method.name == "l2 + l2"
    assert method.hyper_parameters() == {"l2.0": {"strength": 0.2}, "l2.1": {"strength": 0.3}}
    assert "Kirkpatrick" in method.citation
    run(method, stream)
    loop(plain, stream, strength=0.5)
    assert_same_parameters(model, plain, 1e-12)


def test_hooks_run_around_each_task_the_method_first():
    stream, calls = domain_stream(), []
    model = model_for(stream)
    first, second = Rehearsal(model), L2(model)
    for who, each in (("method", first), ("penalty", second)):
        each.before_task = lambda item, runtime, who=who: calls.append((who, "before", item.name))
        each.after_task = lambda item, runtime, who=who: calls.append((who, "after", item.name))
    run(first + second, stream)
    expected = [(who, when, t) for t in ("t0", "t1") for when in ("before", "after") for who in ("method", "penalty")]
    assert calls == expected


def test_a_distillation_term_may_join_too():
    stream = domain_stream()
    model = model_for(stream)
    method = (Rehearsal(model) + L2(model)) + KD(model, Teacher(tiny_model(kind="mlp", seed=5)), alpha=0.5)
    stage = next(iter(method.stages(stream)))
    terms = stage.updates[0].loss(batches(stream[0].train_source)[0])
    assert set(terms) == {"labels", "kd/teacher"}
    run(method, stream)
    assert set(stage.updates[0].loss(batches(stream[0].train_source)[0])) == {
        "labels",
        "replay",
        "l2/penalty",
        "kd/teacher",
    }


@pytest.mark.parametrize("make", [domain_stream, task_stream, class_stream])
def test_a_sum_cut_anywhere_resumes_with_the_same_bits(make, tmp_path):
    stream = make()

    def method():
        model = model_for(stream)
        return SI(model, strength=0.5) + L2(model, strength=0.5), stream

    assert len(assert_resumes_anywhere(method, tmp_path)) >= 4


def test_combinations_that_mean_nothing_are_refused():
    stream = domain_stream()
    model = model_for(stream)
    with pytest.raises(ValueError, match="FineTune trains on SingleTask, which has no tasks in a row"):
        FineTune(model) + L2(model)
    with pytest.raises(ValueError, match="different models or tasks"):
        Rehearsal(model) + L2(model_for(stream))
    with pytest.raises(TypeError, match="Rehearsal and Ruled each decide what a step is"):
        Rehearsal(model) + Ruled(model)
    for cls, words in ((Twice, "2 updates"), (Apart, "several streams"), (Elsewhere, "belongs to no task")):
        with pytest.raises(ValueError, match=f"{cls.__name__}, stage .*: penalties cannot be added, because .*{words}"):
            run(cls(model) + L2(model), stream)


def test_a_task_that_is_counted_or_whose_last_stage_may_be_skipped_takes_no_penalty():
    stream = domain_stream()
    for cls, words in ((Skipped, "stage 't0/settle' may be skipped"), (Counting, "nothing is trained by gradients")):
        model = model_for(stream)
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"{cls.__name__}, task 't0': penalties cannot be added, because {words}"):
            run(cls(model) + L2(model), stream)
        assert not changed(before, model)


def test_a_missing_head_is_named_before_work_starts():
    stream = task_stream()
    model = model_for(TaskStream(stream.items[:1], kind="task"))
    with pytest.raises(ValueError, match=r"'t1'.*model.add_task\('t1'"):
        run(L2(model), stream)
