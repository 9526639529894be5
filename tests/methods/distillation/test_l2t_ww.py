"""L2T-ww: weights and loss by hand, hypergradients by finite differences, one source forward, a step re-derived."""

import copy

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.backbones import Backbone
from hubtransfer.data import SingleTask
from hubtransfer.methods.distillation.l2t_ww import L2TWW
from hubtransfer.models import ClassificationHead, Teacher, TransferModel
from tests.methods.steps import batches, begin, changed, run, snapshot
from tests.tiny import SHAPE, batch, tiny_data, tiny_network


def mapped(dtype=torch.float32, seed=0, classes=3):
    """A tiny CNN that names its two maps: `act1` (8 channels, 8 x 8) and `act2` (16 channels, 4 x 4)."""
    backbone = Backbone.from_module(
        tiny_network(dtype=dtype, seed=seed), layers=["act1", "act2"], sample=torch.zeros(1, *SHAPE, dtype=dtype)
    )
    model = TransferModel(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        model.add_task("task", ClassificationHead(classes))
    return model


def make(dtype=torch.float32, seed=0, sources=1, **config):
    torch.manual_seed(seed)
    teachers = [Teacher(mapped(dtype, seed + 10 + k, classes=5)) for k in range(sources)]
    return L2TWW(mapped(dtype, seed), teachers, **config)


def example(dtype=torch.float32, seed=0, n=24):
    data = tiny_data(n, seed=seed, dtype=dtype)
    return make(dtype, seed), SingleTask(train=data, evaluation=data)


def test_the_start_is_equal_channels_and_pairs_near_one():
    method = make()
    weights = method.weights(batch([0, 1]))
    assert len(weights) == 4  # two layers with two
    for channels, pair in weights:
        torch.testing.assert_close(channels, torch.full_like(channels, 1 / channels.shape[1]))
        assert pair.shape == (2,)
    with torch.no_grad():
        for g in method.pair_weights:
            g.weight.zero_()
    assert all((pair == 1).all() for _, pair in method.weights(batch([0, 1])))


def test_distance_by_hand():
    """Maps that differ by 2 everywhere: beta * lambda * sum_c w_c 4 = 0.5 * 3 * 4 = 6, whatever the channel weights."""
    method = make(pairs="single", beta=0.5)
    images = batch([0, 1])
    there = method.pairs.teacher_maps(images)[0]
    with torch.no_grad():
        method.match[0].weight.zero_()
        method.match[0].bias.fill_(2.0)
        method.pair_weights[0].weight.zero_()
        method.pair_weights[0].bias.fill_(3.0)
        there.zero_()  # the source's map, kept for this step
        method.channel_weights[0].bias.uniform_(-1, 1)
    assert method.match_loss(images)["match"].item() == pytest.approx(6.0, rel=1e-5)
    with torch.no_grad():
        method.pair_weights[0].bias.fill_(100.0)  # relu6 caps it: 0.5 * 6 * 4
    assert method.match_loss(images)["match"].item() == pytest.approx(12.0, rel=1e-5)
    with torch.no_grad():
        method.pair_weights[0].bias.fill_(-1.0)
    assert method.match_loss(images)["match"].item() == 0


def test_hypergradient_against_finite_differences():
    """d CE(after T matching steps and one CE step) / d(f, g), through momentum and weight decay, in float64."""
    method, scenario = example(dtype=torch.float64)
    runtime, stage = begin(method, scenario)
    one, two = batches(scenario.train_source, 2)
    real, look = stage.updates
    for update in (real, look):  # a first step, so that there is momentum
        update.apply(one, runtime)
    torch.manual_seed(0)
    with torch.no_grad():
        for f in method.channel_weights:
            f.weight.normal_(std=0.5)
    names = runtime.names("student")
    states = runtime.sgd_state("student")
    assert states[0].momentum == 0.9
    assert states[0].weight_decay == 1e-4
    assert states[0].velocity.abs().sum() > 0

    def after():
        """The outer loss as plain torch: detached weights, hand-written SGD."""
        weights = {n: p.detach().clone() for n, p in zip(names, runtime.params("student"))}
        velocity = {n: s.velocity.clone() for n, s in zip(names, states)}
        for loss in [method.match_loss] * 2 + [method.label_loss]:
            leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
            value = sum(torch.func.functional_call(method, leaves, (loss, two)).values())
            gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            for (n, w), g in zip(weights.items(), gradients):
                velocity[n] = 0.9 * velocity[n] + (torch.zeros_like(w) if g is None else g) + 1e-4 * w
                weights[n] = w - 0.1 * velocity[n]
        with torch.no_grad():
            return torch.func.functional_call(method, weights, (method.label_loss, two))["labels"].item()

    def slope(entry, position, h):
        value, found = entry[position].item(), []
        for change in (h, -h):
            entry[position] = value + change
            found.append(after())
        entry[position] = value
        return (found[0] - found[1]) / (2 * h)

    taken = {}
    runtime.step = lambda gradients: taken.update(gradients)
    look.apply(two, runtime)
    found, expected = [], []
    for parameter, gradient in zip(runtime.params("meta"), taken["meta"]):
        for position in (0, parameter.numel() - 1):
            # two central differences whose errors of order h^2 cancel: what remains is of order h^4
            wide, narrow = (slope(parameter.data.view(-1), position, h) for h in (2e-2, 1e-2))
            expected.append((4 * narrow - wide) / 3)
            found.append(gradient.view(-1)[position].item())
    found, expected = torch.tensor(found), torch.tensor(expected)
    assert (expected.abs() > 1e-6).sum() >= 4
    assert (found - expected).norm() / expected.norm() < 1e-6
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_the_look_ahead_leaves_the_student_alone_and_moves_the_meta_networks():
    method, scenario = example()
    runtime, stage = begin(method, scenario)
    real, look = stage.updates
    found = batches(scenario.train_source, 2)
    before = snapshot(method)
    real.apply(found[0], runtime)
    assert all(n.startswith(("model.", "match.")) for n in changed(before, method))
    before = snapshot(method)
    look.apply(found[0], runtime)
    moved = changed(before, method)
    assert moved
    assert all(n.startswith(("channel_weights.", "pair_weights.")) for n in moved)


def test_the_students_step_equals_plain_torch():
    method, scenario = example(dtype=torch.float64)
    runtime, stage = begin(method, scenario)
    student, source = copy.deepcopy(method.model), method.sources[0].model
    match = copy.deepcopy(method.match)
    each = batches(scenario.train_source, 1)[0]
    x = each.inputs["pixel_values"]
    with torch.no_grad():
        theirs = source.backbone(x, ["act1", "act2"]).maps
    features = student.backbone(x, ["act1", "act2"])
    loss = F.cross_entropy(student.heads["task"](features.pooled), each.labels)
    pairs = [(a, b) for a in ("act1", "act2") for b in ("act1", "act2")]
    for (a, b), r, g in zip(pairs, match, method.pair_weights):
        s, t = theirs[a], features.maps[b]
        if s.shape[-1] > t.shape[-1]:
            s = F.avg_pool2d(s, 2)
        elif s.shape[-1] < t.shape[-1]:
            t = F.avg_pool2d(t, 2)
        pair = g(theirs[a].mean((2, 3))).clamp(0, 6).squeeze(1).detach()
        loss = loss + 0.5 * (pair * ((s - r(t)) ** 2).mean((1, 2, 3))).mean()  # equal channel weights
    parameters = [*student.parameters(), *match.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)
    loss.backward()
    optimizer.step()
    stage.updates[0].apply(each, runtime)
    for p, q in zip([*method.model.parameters(), *method.match.parameters()], parameters):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-9)


def test_the_pair_weights_of_the_last_batch_are_watched():
    method, scenario = example()
    with torch.no_grad():
        for k, g in enumerate(method.pair_weights):
            g.weight.zero_()
            g.bias.fill_(0.5 * k)
    assert method.watched() == {}
    runtime, stage = begin(method, scenario)
    stage.updates[0].apply(batches(scenario.train_source, 1)[0], runtime)
    names = ["act1 -> act1", "act1 -> act2", "act2 -> act1", "act2 -> act2"]
    assert method.watched() == {f"pair weight/{name}": 0.5 * k for k, name in enumerate(names)}


def test_the_source_runs_once_a_batch():
    method, scenario = example()
    runtime, stage = begin(method, scenario)
    seen = []
    method.sources[0].model.backbone.trunk.register_forward_pre_hook(lambda m, args: seen.append(1))
    each = batches(scenario.train_source, 1)[0]
    for update in stage.updates:
        update.apply(each, runtime)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ("single", "act2 -> act2"),
        ("one_to_one", "act1 -> act1, act2 -> act2"),
        ("all_to_all", "act1 -> act1, act1 -> act2, act2 -> act1, act2 -> act2"),
        ((("act1", "act2"),), "act1 -> act2"),
    ],
)
def test_pairs(pairs, expected):
    assert str(make(pairs=pairs).pairs) == expected


def test_several_sources():
    method = make(sources=2, pairs="single")
    assert str(method.pairs) == "0:act2 -> act2, 1:act2 -> act2"
    assert (
        str(make(sources=2, pairs=(("1:act1", "act2"), ("0:act2", "act2"))).pairs) == "1:act1 -> act2, 0:act2 -> act2"
    )
    before = snapshot(method)
    run(method, example()[1])
    moved = changed(before, method)
    assert any(n.startswith("pair_weights.0") for n in moved)
    assert any(n.startswith("pair_weights.1") for n in moved)


def test_tokens_of_a_teacher_at_its_own_size_become_a_grid():
    """A ViT at 64 pixels (4 x 4 patches of 16 and a class token) teaches a CNN that sees 32 pixels."""
    sizes = {"test_vit": 64, "test_resnet": 32}
    models = []
    for name, size in sizes.items():
        backbone = Backbone.from_pretrained(f"timm/{name}", pretrained=False, image_size=size)
        models.append(TransferModel(backbone).add_task("task", ClassificationHead(3)))
    method = L2TWW(models[1], Teacher(models[0]), pairs="single")
    images = batch([0, 1], pixel_values=torch.randn(2, 3, 32, 32))
    (there,) = method.pairs.teacher_maps(images)
    assert there.shape == (2, models[0].backbone.layers[-1].channels, 4, 4)
    assert method.loss(images)["match"].isfinite()


def test_errors_name_what_is_wrong():
    for bad in ({"pairs": "some"}, {"pairs": ()}, {"beta": -1.0}, {"inner_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            make(**bad)
    with pytest.raises(ValueError, match=r"'act3'.*act2"):
        make(pairs=(("act3", "act2"),))
    with pytest.raises(ValueError, match="'2:act1' names teacher"):
        make(pairs=(("2:act1", "act2"),))
    with pytest.raises(TypeError, match="L2TWW needs frozen sources"):
        L2TWW(mapped(), mapped(seed=3))
    plain = mapped()
    plain.backbone.layers.clear()
    with pytest.raises(ValueError, match="the student .* no feature maps"):
        L2TWW(plain, Teacher(mapped(seed=3)))
    with pytest.raises(ValueError, match="group 'student', which needs optimizer 'sgd'"):
        run(make(), example()[1], groups={"student": {"name": "adam"}})
