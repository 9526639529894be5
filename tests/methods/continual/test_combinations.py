"""Strategies added up: steps in straight lines, the form in a recipe, and the reason where two cannot be added."""

import re

import pytest
import torch
import torch.nn.functional as F

import hubtransfer as ht
from hubtransfer import recipe
from hubtransfer.data import Reservoir
from hubtransfer.methods.continual.der_plus_plus import DERPlusPlus
from hubtransfer.methods.continual.er import ER
from hubtransfer.methods.continual.ewc import EWC
from hubtransfer.methods.continual.gem import GEM
from hubtransfer.methods.continual.l2 import L2
from hubtransfer.methods.continual.lwf import LwF
from hubtransfer.methods.continual.ncm import NCM
from hubtransfer.methods.continual.si import SI
from hubtransfer.methods.distillation.kd import KD
from hubtransfer.models import NearestMeanHead, Teacher
from tests.contract.methods import CONTINUAL, example
from tests.methods.continual.streams import domain_stream, model_for, task_stream
from tests.methods.continual.test_ewc import fisher
from tests.methods.steps import (
    assert_resumes_anywhere,
    assert_same_parameters,
    batches,
    batches_of,
    clone,
    descend,
    gradients_of,
    move,
    run,
    watch_draws,
)
from tests.tiny import tiny_model

REFUSED = {
    "penalty": {
        "cn_dpm": "stage 't0/0 asleep, inputs' may be skipped",
        "den": "stage 't1/expand' may be skipped",
        "fdr": "makes 2 updates a batch",
        "hal": "TrialStep",
        "joint": "the stage belongs to no task of the stream",
        "ncm": "nothing is trained by gradients there",
        "patch_per_task": "of earlier tasks nothing moves",
        "ranpac": "nothing is trained by gradients there",
    },
    "teacher": {
        "a_gem": "AGEMProjection weighs the gradients of its terms",
        "cn_dpm": "Accumulate; terms join a single `Descend`",
        "den": "it trains head, not the group 'model'",
        "dgr": "it trains generator, not the group 'model'",
        "fdr": "makes 2 updates a batch",
        "gem": "GEMProjection weighs the gradients of its terms",
        "hal": "TrialStep",
        "lwf": "stage 't1/warm-up': .* it trains head, not the group 'model'",
        "ncm": "Accumulate; terms join a single `Descend`",
        "patch_per_task": "new head has classes of its own, which no teacher shares",
        "ranpac": "Accumulate; terms join a single `Descend`",
    },
}
"""Strategies that take no further terms, and the reason that they give: all others do."""


def seen_so_far(stream):
    """Steps of three tasks, each with the images and labels that a memory of everything has by then."""
    pixels, labels = [], []
    for number, item in enumerate(stream):
        for each in batches(item.train_source, stage=number):
            yield number, each, torch.cat([*pixels, each.inputs["pixel_values"]]), torch.cat([*labels, each.labels])
            pixels.append(each.inputs["pixel_values"])
            labels.append(each.labels)


@pytest.mark.parametrize("first", ["ewc", "er"])
def test_er_and_ewc_are_the_loss_on_batch_and_memory_and_the_penalties(first):
    """L = mean CE over batch and replay + sum over earlier tasks k of 10 F_k (theta - theta_k)^2."""
    stream = domain_stream(3, dtype=torch.float64)
    model = model_for(stream, dtype=torch.float64)
    plain, er, ewc = clone(model), ER(model, memory=Reservoir(100), replay_batch=5), EWC(model, strength=20.0)
    slots = watch_draws(er.memory)
    both = er + ewc if first == "er" else ewc + er
    run(both, stream)
    past, now = [], 0
    for (number, each, pixels, labels), drawn in zip(seen_so_far(stream), slots, strict=True):
        if number > now:
            importance = fisher(plain.eval(), stream[now].train, "task", "exact")
            past.append((importance, [p.detach().clone() for p in plain.train().parameters()]))
            now = number
        x, y = each.inputs["pixel_values"], each.labels
        if drawn is not None:
            x, y = torch.cat([x, pixels[drawn]]), torch.cat([y, labels[drawn]])
        loss = F.cross_entropy(plain(pixel_values=x).logits, y)
        for importance, anchor in past:
            loss = loss + 10 * sum((f * (p - a) ** 2).sum() for f, p, a in zip(importance, plain.parameters(), anchor))
        descend(plain.parameters(), loss)
    assert_same_parameters(model, plain, 1e-12)


def test_der_plus_plus_and_a_teacher_are_its_loss_and_the_teachers_answers_to_the_new_images():
    """0.5 CE + 0.5 T^2 KL(teacher, student) on the batch; DER++'s terms on two draws of the memory."""
    stream = domain_stream(2, dtype=torch.float64)
    model = model_for(stream, dtype=torch.float64)
    teacher = Teacher(tiny_model(kind="mlp", dtype=torch.float64, seed=5))
    plain, theirs = clone(model), clone(teacher.model).eval()
    method = DERPlusPlus(model, alpha=0.3, beta=0.7, memory=Reservoir(100), replay_batch=5)
    drawn = watch_draws(method.memory)
    run(method + KD(model, teacher, alpha=0.5, temperature=2.0), stream)
    kept = torch.empty(0, 3, dtype=torch.float64)  # the logits with which each image was first answered
    pairs = zip(drawn[::2], drawn[1::2], strict=True)
    for (_, each, pixels, labels), (one, two) in zip(seen_so_far(stream), pairs, strict=True):
        logits = plain(pixel_values=each.inputs["pixel_values"]).logits
        target = (theirs(pixel_values=each.inputs["pixel_values"]).logits / 2).softmax(1)
        loss = F.cross_entropy(logits, each.labels)
        if one is not None:
            loss = loss + 0.3 * (plain(pixel_values=pixels[one]).logits - kept[one]).square().mean()
            loss = loss + 0.7 * F.cross_entropy(plain(pixel_values=pixels[two]).logits, labels[two])
        taught = (target * (target.log() - (logits / 2).log_softmax(1))).sum(1).mean()
        kept = torch.cat([kept, logits.detach()])
        descend(plain.parameters(), loss + 0.5 * 4 * taught)
    assert_same_parameters(model, plain, 1e-12)


def test_si_measures_with_the_teachers_gradient_and_without_its_own_penalty():
    """L = CE + 0.5 * 4 KL + 0.5 Omega (theta - theta*)^2, of which g is the gradient of the first two terms."""
    stream = domain_stream(2, dtype=torch.float64)
    model = model_for(stream, dtype=torch.float64)
    teacher = Teacher(tiny_model(kind="mlp", dtype=torch.float64, seed=5))
    plain, theirs = clone(model), clone(teacher.model).eval()
    method = SI(model, strength=0.5, damping=0.1) + KD(model, teacher, alpha=0.5, temperature=2.0)
    run(method, stream)
    parameters = list(plain.parameters())
    omega, anchor = [torch.zeros_like(p) for p in parameters], [p.detach().clone() for p in parameters]
    for item in stream:
        path, start = [torch.zeros_like(p) for p in parameters], [p.detach().clone() for p in parameters]
        for each in batches_of(stream, item):
            logits = plain(**each.inputs).logits
            target = (theirs(**each.inputs).logits / 2).softmax(1).detach()
            taught = (target * (target.log() - (logits / 2).log_softmax(1))).sum(1).mean()
            own = gradients_of(F.cross_entropy(logits, each.labels) + 2 * taught, parameters)
            steps = [g + o * (p.detach() - a) for g, o, p, a in zip(own, omega, parameters, anchor)]
            path = [w + g * 0.05 * s for w, g, s in zip(path, own, steps)]
            move(parameters, steps)
        moved = [p.detach() - s for p, s in zip(parameters, start)]
        omega = [o + w.clamp(min=0) / (m.square() + 0.1) for o, w, m in zip(omega, path, moved)]
        anchor = [p.detach().clone() for p in parameters]
    assert_same_parameters(model, plain, 1e-12)
    for (name, p), expected in zip(plain.named_parameters(), omega):
        torch.testing.assert_close(method.method.importance.like(name, p), expected, rtol=1e-9, atol=1e-12)


def test_a_teacher_beside_a_projection_and_a_penalty_names_the_projection():
    stream = domain_stream()
    model = model_for(stream)
    both = GEM(model) + SI(model)
    with pytest.raises(ValueError, match="GEMProjection weighs the gradients of its terms against one another"):
        list((both + KD(model, Teacher(tiny_model(kind="mlp", seed=5)))).stages(stream))


def test_a_patch_a_task_with_old_answers_kept_cut_anywhere_resumes_with_the_same_bits(tmp_path):
    stream = task_stream(3)

    def method():
        model = model_for(stream, kind="cnn", patch=ht.ScaleBiasConfig())
        return ER(model, memory=Reservoir(10)) + LwF(model), stream

    assert len(assert_resumes_anywhere(method, tmp_path)) >= 6


@pytest.mark.parametrize("other", ["penalty", "teacher"])
@pytest.mark.parametrize("name", CONTINUAL)
def test_every_strategy_takes_terms_or_says_why_not_from_either_side(name, other):
    """What is refused names the strategy and the reason, before a step was made; the order changes nothing."""
    refused = REFUSED[other].get(name)
    outcomes = []
    for turned in (False, True):
        method, stream = example(name)
        model = method.model
        if other == "penalty":
            term = L2(model, task=method.task)
        else:
            term = KD(model, Teacher(clone(model).eval(), task=method.task), task=method.task)
        before = clone(model).state_dict()
        if refused is not None:
            with pytest.raises((TypeError, ValueError), match=f"{type(method).__name__}\\b.*cannot be added") as error:
                list((term + method if turned else method + term).stages(stream))
            assert re.search(refused, str(error.value))
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            outcomes.append(str(error.value))
        else:
            both = term + method if turned else method + term
            run(both, stream, steps=1)
            outcomes.append({part.strip() for part in both.name.split("+")})
    assert outcomes[0] == outcomes[1]


def test_impossible_combinations_say_why():
    stream = domain_stream()
    model = model_for(stream)
    with pytest.raises(TypeError, match="ER and GEM each decide what a step is"):
        ER(model) + GEM(model)
    with pytest.raises(ValueError, match="GEM.*cannot be added, because .* weighs the gradients of its terms"):
        run(GEM(model) + KD(model, Teacher(tiny_model(kind="mlp", seed=5))), stream)
    model.add_task("means", NearestMeanHead(3))
    with pytest.raises(ValueError, match="NCM.*cannot be added, because nothing is trained by gradients there"):
        run(NCM(model, task="means") + L2(model, task="means"), stream)
    with pytest.raises(ValueError, match="different models or tasks"):
        ER(model, task="task") + L2(model, task="means")


# ------------------------------------------------------------------------------------------------------------ recipes


def written(method, **changes):
    model = {"backbone": "plain:mlp", "pretrained": False, "options": {"widths": [8], "input_shape": [1, 8, 8]}}
    data = {"stream": {"permuted": {"name": "digits", "limit": 40, "evaluation": {"limit": 20}, "tasks": 2}}}
    training = {"steps": 2, "batch_size": 8, "progress": False, "plots": False, "save": "no", "evaluate": "no"}
    return {"method": method, "model": model, "data": data, "training": training} | changes


def test_a_recipe_adds_a_penalty_to_a_memory():
    parts = [{"name": "er", "memory": {"kind": "reservoir", "size": 12}}, {"name": "ewc", "strength": 3.0}]
    method, stream, _ = recipe.build(written({"sum": parts}))
    assert method.name == "er + ewc"
    assert method.hyper_parameters()["ewc"]["strength"] == 3.0
    run(method, stream)
    assert len(method.method.memory) == 12
    assert method.parts[0].number == 1


def test_a_recipe_gives_a_teacher_to_dark_experience_replay():
    parts = [{"name": "kd", "alpha": 0.5}, {"name": "der_plus_plus", "alpha": 0.1, "beta": 0.5}]
    section = written({"sum": parts})
    method, stream, _ = recipe.build(section | {"teacher": section["model"]})
    assert method.name == "der_plus_plus + kd"
    run(method, stream)


def test_a_recipe_has_a_patch_a_task_and_keeps_old_answers():
    small = {"backbone": "timm/test_efficientnet", "pretrained": False, "image_size": 32}
    patches = {name: {"patch": "scale_bias"} for name in ("digits", "animals")}
    data = {"stream": [{"name": name, "limit": 40, "evaluation": {"limit": 20}} for name in patches], "kind": "task"}
    method, stream, _ = recipe.build(written({"name": "lwf"}, model=small | {"tasks": patches}, data=data))
    assert set(method.model.patches) == {item.name for item in stream} == set(patches)
    run(method, stream)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["er", "gem"], "method.sum: ER and GEM each decide what a step is"),
        (["ewc", "fine_tune"], "FineTune trains on SingleTask, which has no tasks in a row"),
    ],
)
def test_a_recipe_with_an_impossible_sum_says_why(parts, message):
    with pytest.raises(ValueError, match=message):
        recipe.build(written({"sum": [{"name": name} for name in parts]}))
