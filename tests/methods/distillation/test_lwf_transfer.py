"""LwF as transfer: the number by hand, steps re-derived, sources with classes of their own, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import SingleTask
from hubtransfer.methods.distillation.lwf_transfer import LwFTransfer
from hubtransfer.models import RegressionHead, Teacher
from tests.methods.steps import assert_same_parameters, batches, clone, run
from tests.tiny import batch, linear_model, teacher_with_logits, tiny_data, tiny_model


def make(dtype=torch.float32, seed=0, sources=1, **config):
    torch.manual_seed(seed)
    teachers = [Teacher(tiny_model(5 + k, dtype=dtype, seed=9 + k)) for k in range(sources)]
    return LwFTransfer(tiny_model(dtype=dtype, seed=seed), teachers, **config)


def example(dtype=torch.float32, seed=0, n=24):
    data = tiny_data(n, seed=seed, dtype=dtype)
    return make(dtype, seed), SingleTask(train=data, evaluation=data)


def test_loss_by_hand():
    # T = 2: the source's logits (2, 0) soften to p = (0.7311, 0.2689); a second head that answers (0, 0) has q = 1/2:
    # cross-entropy ln 2, and KL = 0.1109 as in KD's test.
    for form, expected in (("cross_entropy", math.log(2)), ("kl", 0.1109)):
        method = LwFTransfer(linear_model([0.0, 0.0, 0.0]), teacher_with_logits([2.0, 0.0]), form=form, beta=3.0)
        with torch.no_grad():
            method.second_heads[0].weight.zero_()
            method.second_heads[0].bias.zero_()
        terms = method.loss(batch([0, 1]))
        assert terms["source"].item() == pytest.approx(3 * expected, abs=3e-4)
        assert terms["labels"].item() == pytest.approx(math.log(3))


def test_steps_equal_a_plain_loop_with_two_sources():
    method = make(torch.float64, sources=2, beta=0.5)
    data = tiny_data(24, dtype=torch.float64)
    scenario = SingleTask(train=data)
    student, heads = clone(method.model), clone(method.second_heads)
    sources = [clone(each.model).eval() for each in method.teachers]
    run(method, scenario)
    for each in batches(scenario.train_source):
        x = each.inputs["pixel_values"]
        pooled = student.backbone(x).pooled
        loss = F.cross_entropy(student.heads["task"](pooled), each.labels)
        for source, head in zip(sources, heads):
            p = (source(pixel_values=x).logits.detach() / 2).softmax(1)
            loss = loss + 0.5 * F.cross_entropy(head(pooled) / 2, p)
        parameters = [*student.parameters(), *heads.parameters()]
        with torch.no_grad():
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters)):
                p.sub_(0.05 * g)
    assert_same_parameters(method.model, student, 1e-12)
    assert_same_parameters(method.second_heads, heads, 1e-12)


def test_the_source_answers_once_for_each_example():
    method, scenario = example()
    seen = []
    method.teachers[0].model.backbone.trunk.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    run(method, scenario, steps=None, epochs=3)
    assert sum(seen) == 24


@pytest.mark.parametrize("bad", [{"temperature": 0.5}, {"beta": -1.0}, {"form": "mse"}])
def test_bad_hyper_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(**bad)


def test_a_source_without_classes_is_named():
    source = tiny_model(seed=4)
    source.add_task("size", RegressionHead(1))
    with pytest.raises(ValueError, match="'size' predicts 1 outputs of kind regression.*head of classes"):
        LwFTransfer(tiny_model(), Teacher(source, task="size"))
    with pytest.raises(TypeError, match="LwFTransfer needs a frozen teacher"):
        LwFTransfer(tiny_model(), source)
