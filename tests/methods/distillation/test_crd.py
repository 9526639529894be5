"""CRD: the numbers by hand, the naive forms, the draws, the bank and its checkpoint, and bad input."""

import math

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import SingleTask, TaskStream
from hubtransfer.functional import contrast
from hubtransfer.functional.contrast import bank_contrast, batch_contrast, critic_loss, draw_others
from hubtransfer.methods.continual.er import ER
from hubtransfer.methods.continual.sequential import SequentialFineTune
from hubtransfer.methods.distillation.crd import CRD
from hubtransfer.methods.distillation.kd import KD
from hubtransfer.methods.embedding_bank import EmbeddingBank
from hubtransfer.models import Teacher
from tests.methods.distillation.relations import data, make, terms
from tests.methods.steps import batches, clone, run, snapshot
from tests.tiny import batch, tiny_data, tiny_model

SMALL = {"negatives": 12, "dim": 6}


def example(dtype=torch.float32, seed=0, n=24):
    torch.manual_seed(seed)
    return make(CRD, dtype, seed, **SMALL), data(dtype, seed, n)


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=1)


def naive(anchors, partners, others, tau, odds):
    """Equation 10: partners (b, d) and others (b, n, d), h from its definition."""
    total = 0
    for x, y, rest in zip(anchors, partners, others):
        total = total - torch.log(torch.exp(x @ y / tau) / (torch.exp(x @ y / tau) + odds))
        for z in rest:
            total = total - torch.log(1 - torch.exp(x @ z / tau) / (torch.exp(x @ z / tau) + odds))
    return total / len(anchors)


def test_critic_by_hand():
    # c = 2: h(0) = 1/3, h(ln 2) = 1/2. -ln(1/2) - ln(1 - 1/3) = 0.6931 + 0.4055.
    loss = critic_loss(torch.tensor([math.log(2)]), torch.tensor([[0.0]]), math.log(2))
    assert loss.item() == pytest.approx(1.0986, abs=1e-4)


@pytest.mark.parametrize("elements", [1, 40, 1 << 20])
def test_the_bank_form_equals_the_naive_form(elements, monkeypatch):
    monkeypatch.setattr(contrast, "ELEMENTS", elements)
    anchors, bank = unit(5, 4).requires_grad_(), unit(20, 4, seed=1)
    positive, negative = torch.tensor([3, 0, 7, 7, 19]), torch.randint(20, (5, 30))
    one = bank_contrast(anchors, bank, positive, negative, 0.2, math.log(0.7))
    two = naive(anchors, bank[positive], bank[negative], 0.2, 0.7)
    torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)
    gradients = [torch.autograd.grad(value, anchors)[0] for value in (one, two)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


def test_the_batch_form_equals_the_naive_form_with_unbalanced_classes():
    one, two, classes = unit(5, 4).requires_grad_(), unit(5, 4, seed=1), torch.tensor([0, 0, 0, 1, 2])
    expected = []
    for k in range(5):
        others = two[classes != classes[k]]
        expected.append(naive(one[k : k + 1], two[k : k + 1], others[None], 0.2, len(others) * 0.3))
    found, expected = batch_contrast(one, two, classes, 0.2, 0.3), torch.stack(expected).mean()
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    gradients = [torch.autograd.grad(value, one)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


def test_negatives_are_of_other_classes_and_equally_likely():
    torch.manual_seed(0)
    classes = torch.tensor([2, 0, 1, 2, 2, 0, 2, 5])
    ordered, order = classes.sort()
    drawn = draw_others(order, ordered, torch.tensor([2, 5]), 20_000)
    assert not (classes[drawn[0]] == 2).any()
    assert not (classes[drawn[1]] == 5).any()
    for row, allowed in [(0, [1, 2, 5, 7]), (1, [0, 1, 2, 3, 4, 5, 6])]:
        counts = torch.bincount(drawn[row], minlength=8)[allowed] / 20_000
        torch.testing.assert_close(counts, torch.full((len(allowed),), 1 / len(allowed)), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="other than 3"):
        draw_others(torch.tensor([0, 1]), torch.tensor([3, 3]), torch.tensor([3]), 1)


def test_whole_steps_with_the_papers_odds_equal_a_plain_loop(monkeypatch):
    """Every row is a negative of every other class, so that nothing is left to chance."""
    method, scenario = (
        make(CRD, torch.float64, dim=6, negatives=4, normaliser="none", temperature=0.5),
        data(torch.float64),
    )
    drawn = []

    def draw(order, ordered, own, count):
        drawn.append(draw_others(order, ordered, own, count))
        return drawn[-1]

    monkeypatch.setattr("hubtransfer.methods.distillation.crd.draw_others", draw)
    twin = clone(method)
    run(method, scenario)
    rows = EmbeddingBank(6, 0.5, torch.zeros((), dtype=torch.float64))
    rows.reserve(24)
    banks = {"teacher": rows.teacher.clone(), "student": rows.student.clone()}
    parameters = [p for p in twin.parameters() if p.requires_grad]
    for each, others in zip(batches(scenario.train_source), drawn):
        output = twin.model(pixel_values=each.inputs["pixel_values"])
        there = twin.teacher.model(pixel_values=each.inputs["pixel_values"]).features.pooled
        own = F.normalize(twin.embed_student(output.features.pooled), dim=1)
        theirs = F.normalize(twin.embed_teacher(there), dim=1)
        loss = F.cross_entropy(output.logits, each.labels)
        for x, bank in ((own, banks["teacher"]), (theirs, banks["student"])):
            loss = loss + 0.8 * naive(x, bank[each.index], bank[others], 0.5, 4 / 24)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients):
                p.sub_(0.05 * g)
            for x, bank in ((own, banks["student"]), (theirs, banks["teacher"])):
                bank[each.index] = F.normalize(0.5 * bank[each.index] + 0.5 * x, dim=1)
    for (name, one), two in zip(method.named_parameters(), twin.parameters()):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    for name, bank in banks.items():
        torch.testing.assert_close(getattr(method.bank, name), bank, atol=1e-10, rtol=1e-10)


def test_the_normaliser_is_the_mean_of_the_first_batch_and_stays():
    method = make(CRD, form="batch", dim=6)
    theirs, own = torch.randn(4, 16), torch.randn(4, 16)
    terms(method, theirs, own)
    embedded = [F.normalize(e(x), dim=1) for e, x in ((method.embed_student, own), (method.embed_teacher, theirs))]
    expected = (embedded[0] @ embedded[1].T / 0.07).exp().mean()
    torch.testing.assert_close(method.means, expected.expand(2))
    before = method.means.clone()
    terms(method, own, theirs)
    assert torch.equal(method.means, before)


@pytest.mark.parametrize("form", ["bank", "batch"])
def test_it_pulls_an_examples_embeddings_together(form):
    torch.manual_seed(0)
    method, scenario = make(CRD, form=form, weight=0.1, **SMALL), data()
    run(method, scenario, steps=60)
    each = batches(scenario.train_source, 1, 24)[0]
    there = method.teacher(each).features.pooled
    here = method.model(**each.inputs).features.pooled
    scores = F.normalize(method.embed_student(here), dim=1) @ F.normalize(method.embed_teacher(there), dim=1).T
    other = each.labels[:, None] != each.labels[None]
    assert scores.diagonal().mean() > scores[other].mean() + 0.3


def test_the_bank_is_in_the_checkpoint_and_nothing_of_it_in_the_model():
    method, scenario = example()
    run(method, scenario)
    state = method.state_dict()
    assert state["bank.teacher"].shape == (24, 6)
    fresh, _ = example(seed=1)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.bank.student, method.bank.student)
    assert torch.equal(fresh.bank.classes, method.bank.classes)
    assert not any("bank" in name or "embed" in name for name in method.model.state_dict())
    assert {id(p) for p in method.own_parameters()} >= {id(p) for p in method.embed_teacher.parameters()}


def test_without_class_labels_every_other_example_is_a_negative():
    method, _ = example()
    method.terms(method.model(**batch().inputs), batch(labels=None, index=[0, 1, 2], size=5))
    assert method.bank.classes.tolist() == [0, 1, 2, -1, -1]


def test_it_adds_up_with_another_method():
    method, scenario = example()
    run(method + KD(method.model, method.teacher), scenario)


def test_a_batch_of_one():
    own = torch.randn(1, 16, requires_grad=True)
    value = terms(make(CRD, form="batch", dim=6), torch.randn(1, 16), own)["contrast"]
    assert value.item() == 0
    assert not torch.autograd.grad(value, own)[0].any()
    method, _ = example()
    found = method.terms(method.model(**batch([0]).inputs), batch([0], index=[3], size=5))
    assert found["contrast"].isfinite()


def test_examples_without_numbers_are_named():
    method, _ = example()
    with pytest.raises(ValueError, match="index"):
        method.terms(method.model(**batch().inputs), batch())


def test_a_stream_is_refused_before_any_work_and_the_form_without_a_bank_takes_it():
    rows = tiny_data(24)

    def stream():
        return iter([{"pixel_values": x, "labels": int(y)} for x, y in zip(rows["pixel_values"], rows["labels"])])

    method, _ = example()
    seen = []
    method.model.backbone.trunk.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    with pytest.raises(ValueError, match="streamed data have none"):
        run(method, SingleTask(train=stream))
    assert not seen
    run(make(CRD, form="batch", dim=6), SingleTask(train=stream), steps=2)


@pytest.mark.parametrize(
    "bad",
    [{"weight": -1.0}, {"form": "queue"}, {"negatives": 0}, {"temperature": 0.0}, {"dim": 0}, {"momentum": 1.0},
     {"normaliser": "mean"}],
)  # fmt: skip
def test_bad_hyper_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(CRD, **bad)


@pytest.mark.parametrize("host", [SequentialFineTune, ER])
def test_in_a_stream_of_tasks_the_batchs_form_and_other_terms_work_and_the_bank_is_refused(host):
    """Example numbers begin anew in each task of a stream: rows of the bank would be of two examples."""

    def trained(*term, **options):
        torch.manual_seed(0)
        method = host(tiny_model())
        for each in term:
            method = method + each(method.model, Teacher(tiny_model(seed=9)), **options)
        run(method, TaskStream([tiny_data(24, seed=0), tiny_data(24, seed=1)], kind="domain"), steps=2)
        return snapshot(method.model)

    alone = trained()
    for found in (trained(KD), trained(CRD, form="batch", dim=6)):
        assert any(not torch.equal(alone[name], found[name]) for name in alone)
    with pytest.raises(ValueError, match=r"one data set .* TaskStream has several; use form='batch'"):
        trained(CRD, **SMALL)
