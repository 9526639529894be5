"""The one-pass step: what rules see equals plain autograd, and every method that weighs gradients costs one forward."""

import gc
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hubtransfer.backbones import Backbone
from hubtransfer.data import MultiTask
from hubtransfer.methods.balance import Balance, Balancing, TaskGradients
from hubtransfer.methods.multitask.fixed_weights import FixedWeights
from hubtransfer.methods.multitask.grad_norm import GradNorm
from hubtransfer.methods.multitask.uncertainty import Uncertainty
from hubtransfer.methods.registry import load_all
from hubtransfer.models import ClassificationHead, TransferModel
from hubtransfer.patches import ScaleBiasConfig
from tests.methods.multitask.tasks import (
    batch_of,
    flat_gradient,
    model_with,
    scenario,
    shared_data,
    streams,
    two_headed,
)
from tests.methods.steps import batches, begin, changed, run, snapshot
from tests.tiny import SHAPE, tiny_backbone

TASKS = ("left", "right", "size", "map")
BALANCING = [c for c in load_all().values() if issubclass(c, Balancing)]
WEIGHING = [*BALANCING, FixedWeights, Uncertainty]
balancing = pytest.mark.parametrize("cls", BALANCING, ids=lambda cls: cls.name)
weighing = pytest.mark.parametrize("cls", WEIGHING, ids=lambda cls: cls.name)


class Probe(Balancing):
    """Hands the tasks' gradients to the test."""

    def combine(self, gradients: TaskGradients):
        self.seen = gradients
        return {"shared": gradients.shared(self.weights), "heads": gradients.own()}


def seen_by_a_rule(model, data, tasks=TASKS):
    """The tasks' gradients on the first batch, and the batch. The rule has not asked for rows yet."""
    method = Probe(model, tasks)
    runtime, stage = begin(method, data)
    batch = batches(stage.data, 1)[0]
    cut = runtime.call(stage.updates[0].losses, batch)
    return TaskGradients(cut, method, runtime, "shared", "heads"), batch, runtime


def plain_losses(model, batch):
    """Every task's loss from one plain forward pass, and the trunk's outputs: pooled features and the deepest map."""
    inputs = batch.inputs["pixel_values"]
    features = model.backbone(inputs, ("act2",))
    logits = {t: model.heads[t](features.pooled) for t in ("left", "right", "size")}
    pixels = model.heads["map"](features.maps["act2"], tuple(inputs.shape[-2:]))
    losses = {
        "left": F.cross_entropy(logits["left"], batch.labels["left"]),
        "right": F.cross_entropy(logits["right"], batch.labels["right"]),
        "size": F.mse_loss(logits["size"][:, 0], batch.labels["size"]),
        "map": F.cross_entropy(pixels, batch.labels["map"]),
    }
    return losses, features


def test_rules_see_what_plain_autograd_finds_for_heads_of_every_kind():
    model = model_with(TASKS, torch.float64)
    found, batch, runtime = seen_by_a_rule(model, scenario(dtype=torch.float64, tasks=TASKS))
    losses, features = plain_losses(model, batch)
    shared, own = runtime.params("shared"), runtime.params("heads")
    rows = torch.stack([flat_gradient(losses[t], shared) for t in TASKS])
    pooled, maps = features.pooled, features.maps["act2"]  # a head reads one of them, and z is both
    parts = [(flat_gradient(losses[t], [maps if t == "map" else pooled]), t == "map") for t in TASKS]
    at_z = torch.stack([F.pad(g, (pooled.numel(), 0) if second else (0, maps.numel())) for g, second in parts])
    assert found.one_pass
    torch.testing.assert_close(found.losses, torch.stack([losses[t].detach() for t in TASKS]))
    torch.testing.assert_close(found.feature_gram(), at_z @ at_z.T)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    one_backward = torch.cat([g.flatten() for g in found.shared(weights)])
    torch.testing.assert_close(one_backward, weights.double() @ rows)
    found, _, _ = seen_by_a_rule(model, scenario(dtype=torch.float64, tasks=TASKS))  # that backward freed the graph
    kernel = model.backbone.trunk.get_parameter("block.weight")
    lengths = [torch.autograd.grad(losses[t], kernel, retain_graph=True)[0].norm() for t in TASKS]
    torch.testing.assert_close(found.norms(kernel), torch.stack(lengths))
    torch.testing.assert_close(found.gram(), rows @ rows.T)
    torch.testing.assert_close(torch.stack([torch.cat([g.flatten() for g in row]) for row in found.rows()]), rows)
    torch.testing.assert_close(torch.cat([g.flatten() for g in found.shared(weights)]), weights.double() @ rows)
    heads = flat_gradient(sum(losses.values()), own)
    torch.testing.assert_close(torch.cat([g.flatten() for g in found.own()]), heads)
    scaled = flat_gradient(sum(w * losses[t] for w, t in zip(weights.tolist(), TASKS)), own)
    torch.testing.assert_close(torch.cat([g.flatten() for g in found.own(weights)]), scaled)


@pytest.mark.parametrize("shortcut", [True, False])
def test_norms_at_a_convolution_are_the_same_without_its_gradients(shortcut, monkeypatch):
    """Heads that read pooled features and one that reads the map: the shortcut starts at the convolution's output."""
    monkeypatch.setattr("hubtransfer.methods.balance.worth_it", lambda *args: shortcut)
    model = model_with(TASKS, torch.float64)
    found, batch, _ = seen_by_a_rule(model, scenario(dtype=torch.float64, tasks=TASKS))
    losses, _ = plain_losses(model, batch)
    for name in ("block.weight", "stem.weight"):
        kernel = model.backbone.trunk.get_parameter(name)
        lengths = [torch.autograd.grad(losses[t], kernel, retain_graph=True)[0].norm() for t in TASKS]
        torch.testing.assert_close(found.norms(kernel), torch.stack(lengths))


def streams_in(dtype):
    """The data set of each task, in another precision."""
    parts = streams().datasets
    return MultiTask(
        datasets={t: {k: v.to(dtype) if v.is_floating_point() else v for k, v in d.items()} for t, d in parts.items()}
    )


@pytest.mark.parametrize(
    ("kind", "tasks", "patched"),
    [
        ("streams", ("left", "right"), ()),
        ("patches", ("left", "right"), ("left", "right")),
        ("patches", ("left", "right", "size"), ("right",)),
    ],
)
def test_tasks_that_do_not_share_a_pass_have_their_own_gradients(kind, tasks, patched):
    """A data set each, or patches: every row, and every head's and patch's gradient, is that of its own pass."""
    model = model_with(tasks, torch.float64, **{task: ScaleBiasConfig() for task in patched})
    data = streams_in(torch.float64) if kind == "streams" else scenario(dtype=torch.float64, tasks=tasks)
    found, batch, runtime = seen_by_a_rule(model, data, tasks)
    shared, own = runtime.params("shared"), runtime.params("heads")
    parts = {t: batch[t] if kind == "streams" else batch.replace(labels=batch.labels[t]) for t in tasks}
    losses = [model(**parts[t].inputs, labels=parts[t].labels, task=t).loss for t in tasks]
    rows = torch.stack([flat_gradient(loss, shared) for loss in losses])
    assert not found.one_pass
    with pytest.raises(ValueError, match="cannot be compared"):
        found.feature_gram()
    torch.testing.assert_close(found.gram(), rows @ rows.T)
    weights = torch.tensor([0.3, 0.7, 0.2])[: len(tasks)]
    torch.testing.assert_close(torch.cat([g.flatten() for g in found.shared(weights)]), weights.double() @ rows)
    torch.testing.assert_close(torch.cat([g.flatten() for g in found.own()]), flat_gradient(sum(losses), own))
    scaled = flat_gradient(sum(w * loss for w, loss in zip(weights.tolist(), losses)), own)
    torch.testing.assert_close(torch.cat([g.flatten() for g in found.own(weights)]), scaled, atol=1e-7, rtol=1e-6)


class Noisy(nn.Sequential):
    """A trunk with batch normalisation and dropout."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )


def noisy_model():
    torch.manual_seed(0)
    model = TransferModel(Backbone.from_module(Noisy(), dim=8, sample=torch.zeros(2, *SHAPE)))
    return model.add_task("left", ClassificationHead(3)).add_task("right", ClassificationHead(2))


@balancing
def test_one_forward_pass_a_step(cls):
    """The trunk runs once: batch statistics move once, dropout is drawn once."""
    model = noisy_model()
    method = cls(model)
    runtime, stage = begin(method, scenario())
    forwards, masks = [], []
    trunk = model.backbone.trunk
    trunk.register_forward_pre_hook(lambda module, args: forwards.append(1))
    trunk.get_submodule("3").register_forward_hook(lambda module, args, out: masks.append(1))
    stage.updates[0].apply(batches(stage.data, 1)[0], runtime)
    assert (len(forwards), len(masks), int(trunk.get_submodule("1").num_batches_tracked)) == (1, 1, 1)


@weighing
def test_one_patch_does_not_keep_the_other_tasks_from_sharing_a_pass(cls):
    """Two forward passes for three tasks; the patch has statistics of its own, so the trunk's move once."""
    model = noisy_model().add_task("third", ClassificationHead(2), patch=ScaleBiasConfig())
    data = shared_data()
    data = {"pixel_values": data["pixel_values"], "left": data["left"], "right": data["right"], "third": data["right"]}
    runtime, stage = begin(cls(model), MultiTask(train=data, labels={t: t for t in ("left", "right", "third")}))
    forwards, trunk = [], model.backbone.trunk
    trunk.register_forward_pre_hook(lambda module, args: forwards.append(1))
    stage.updates[0].apply(batches(stage.data, 1)[0], runtime)
    assert (len(forwards), int(trunk.get_submodule("1").num_batches_tracked)) == (2, 1)


@pytest.mark.parametrize(("name", "passes"), [("mgda_ub", 1), ("grad_norm", 1), ("mgda", 4), ("jacobian_descent", 4)])
def test_backward_passes_of_the_trunk(name, passes):
    """Of four tasks: one where gradients are compared at the heads, four where they are compared in the trunk."""
    model = model_with(TASKS)
    runtime, stage = begin(load_all()[name](model), scenario(tasks=TASKS))
    seen = []

    def watch(module, args, output):
        output.register_hook(lambda gradient: seen.append(1))

    model.backbone.trunk.get_submodule("stem").register_forward_hook(watch)
    stage.updates[0].apply(batches(stage.data, 1)[0], runtime)
    assert len(seen) == passes


def graphs_kept(*roots):
    """Names of the attributes, at any depth, that hold a tensor with a graph: it would keep all that it came from."""
    found, seen, left = set(), set(), [("", root) for root in roots]
    while left:
        name, value = left.pop()
        if id(value) in seen or isinstance(value, type):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found |= {name} if value.grad_fn is not None else set()
        elif isinstance(value, dict):
            left += [(str(key), each) for key, each in value.items()]
        elif isinstance(value, list | tuple | set):
            left += [(name, each) for each in value]
        elif isinstance(value, nn.Module) or type(value).__module__.startswith(("hubtransfer.methods", "torchjd")):
            left += vars(value).items()
    return found


class Leaky(GradNorm):
    """Adds up what it sees, and its graph with it: no tensor more is alive, as nodes of a graph are not tensors."""

    total = 0

    def combine(self, gradients):
        self.total = self.total + self.weights.sum().exp()
        return super().combine(gradients)


def test_a_graph_that_is_kept_is_found():
    method = Leaky(two_headed())
    runtime, stage = begin(method, scenario())
    assert not graphs_kept(method, stage)
    stage.updates[0].apply(batches(stage.data, 1)[0], runtime)
    assert graphs_kept(method, stage) == {"total"}


@weighing
def test_memory_does_not_grow(cls):
    """No graph survives its step: none can be reached, and after 200 steps there are as many tensors as after 5."""
    model = TransferModel(tiny_backbone("mlp"))
    model.add_task("left", ClassificationHead(3)).add_task("right", ClassificationHead(2))
    method = cls(model)
    runtime, stage = begin(method, scenario())
    batch = batches(stage.data, 1, batch_size=2)[0]

    def tensors(steps):
        for _ in range(steps):
            stage.updates[0].apply(batch, runtime)
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    assert tensors(5) == tensors(195)
    assert not graphs_kept(method, stage)


@weighing
def test_one_task_is_plain_training(cls):
    """With one task the weight is 1 (with uncertainty: 1 at the first step), so the first step is that of its loss."""
    model = model_with(("left",), torch.float64)
    method, plain = cls(model), model_with(("left",), torch.float64)
    method.double()
    run(method, scenario(dtype=torch.float64, tasks=("left",)), steps=1)
    batch = batches(scenario(dtype=torch.float64, tasks=("left",)).train_source, 1)[0]
    plain(**batch.inputs, labels=batch.labels["left"], task="left").loss.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p, q - 0.05 * q.grad, msg=lambda m, n=name: f"{n}: {m}")


@balancing
def test_two_tasks_with_the_same_gradient_move_along_it(cls):
    """Any convex weights give the common direction; GradNorm's weights sum to 2."""
    model = two_headed(torch.float64)
    model.remove_task("right").add_task("right", ClassificationHead(3))
    model.heads["right"].load_state_dict(model.heads["left"].state_dict())
    data = shared_data(dtype=torch.float64)
    data = {"pixel_values": data["pixel_values"], "left": data["left"], "right": data["left"]}
    both = MultiTask(train=data, labels={"left": "left", "right": "right"})
    method = cls(model).double()
    before = snapshot(model)
    trunk = list(model.backbone.trunk.parameters())
    batch = batches(both.train_source, 1)[0]
    common = flat_gradient(model(**batch.inputs, labels=batch.labels["left"], task="left").loss, trunk)
    run(method, both, steps=1)
    names = [n for n, _ in model.named_parameters() if n.startswith("backbone")]
    moved = torch.cat([(before[n] - dict(model.named_parameters())[n].detach()).flatten() for n in names])
    factor = 2 if cls.name == "grad_norm" else 1
    torch.testing.assert_close(moved, 0.05 * factor * common, atol=1e-9, rtol=1e-6)


@weighing
def test_a_task_without_labels_in_the_batch_does_not_count(cls):
    """The step is that of the other tasks alone, and the absent task's weight stays."""
    data = shared_data(8, dtype=torch.float64)
    absent = {**data, "right": torch.full_like(data["right"], -100)}
    two = {"left": "left", "size": "size"}
    model, fewer = (model_with(tasks, torch.float64) for tasks in (("left", "size", "right"), ("left", "size")))
    fewer.load_state_dict({k: v for k, v in model.state_dict().items() if "right" not in k})
    method, other = cls(model).double(), cls(fewer).double()
    before = method.watched().get("weight/right")
    before = None if before is None else before.clone()
    for each, labels in ((method, {**two, "right": "right"}), (other, two)):
        columns = {"pixel_values": absent["pixel_values"], **{column: absent[column] for column in labels.values()}}
        runtime, stage = begin(each, MultiTask(train=columns, labels=labels))
        terms = stage.updates[0].apply(batch_of(columns), runtime)
        assert all(term.isfinite() for term in terms.values())
    for name, parameter in fewer.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, msg=lambda m, n=name: f"{n}: {m}")
    if before is not None:
        torch.testing.assert_close(method.watched()["weight/right"], before)


@balancing
def test_a_batch_without_any_label_changes_nothing_but_is_no_error(cls):
    data = shared_data(8)
    data = {"pixel_values": data["pixel_values"], "left": torch.full((8,), -100), "right": torch.full((8,), -100)}
    method = cls(two_headed())
    runtime, stage = begin(method, MultiTask(train=data, labels={"left": "left", "right": "right"}))
    before = snapshot(method)
    stage.updates[0].apply(batch_of(data), runtime)
    names = [n for n in changed(before, method) if n not in ("steps", "average")]
    assert not names


@weighing
@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_losses_of_zero_and_below_leave_everything_finite(cls, shift, monkeypatch):
    """A regression that is right already, and one whose loss is below zero, beside a classification: whole steps."""
    model = model_with(("left", "size"), torch.float64)
    for parameter in model.heads["size"].parameters():
        parameter.data.zero_()
    data = shared_data(dtype=torch.float64)
    data = {"pixel_values": data["pixel_values"], "left": data["left"], "size": torch.zeros(24, dtype=torch.float64)}
    plain = TransferModel.loss

    def shifted(model, logits, labels, task=None):
        return plain(model, logits, labels, task) + (shift if task == "size" else 0.0)

    monkeypatch.setattr(TransferModel, "loss", shifted)
    method = cls(model).double()
    before = snapshot(model)
    runtime, stage = begin(method, MultiTask(train=data, labels={"left": "left", "size": "size"}))
    for batch in batches(stage.data, 3):
        terms = stage.updates[0].apply(batch, runtime)
        if cls is not Uncertainty:
            assert terms["size"].item() == shift
    assert all(value.isfinite().all() for value in method.state_dict().values())
    assert all(float(weight) >= 0 for weight in method.watched().values())
    assert "heads.left.weight" in changed(before, model)


@balancing
@pytest.mark.parametrize("patches", [(), ("left",), ("left", "right")])
def test_a_frozen_trunk_is_named(cls, patches):
    model = two_headed(**{task: ScaleBiasConfig() for task in patches})
    model.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match=rf"{cls.__name__} balances .* the trunk is frozen"):
        run(cls(model), scenario())


@balancing
def test_a_partly_frozen_trunk_keeps_its_frozen_part(cls):
    model = two_headed()
    model.backbone.trunk.get_submodule("stem").requires_grad_(False)
    before = snapshot(model)
    run(cls(model), scenario())
    moved = changed(before, model)
    assert "backbone.trunk.block.weight" in moved
    assert not [n for n in moved if "stem" in n]


@balancing
@pytest.mark.parametrize("kind", ["streams", "left has a patch", "towers"])
def test_tasks_with_their_own_data_patches_or_networks_train(cls, kind, caplog):
    model = two_headed(**({"left": ScaleBiasConfig()} if kind == "left has a patch" else {}))
    if kind == "towers":
        model.grow("towers", tasks=["left", "right"], layers=["act1"])
    before = snapshot(model)
    with caplog.at_level(logging.WARNING):
        run(cls(model), streams() if kind == "streams" else scenario())
    assert {n for n in before if n.startswith("heads")} <= changed(before, model)
    assert [n for n in changed(before, model) if n.endswith("block.weight")]
    told = {"streams": "own data", "left has a patch": "'left' has a patch", "towers": "'left' has networks"}[kind]
    assert (told in caplog.text) == (cls.name == "mgda_ub")


@balancing
def test_the_log_has_the_weights(cls):
    method = cls(two_headed())
    run(method, scenario(), steps=2)
    assert set(method.watched()) == {"weight/left", "weight/right"}
    assert all(float(weight) >= 0 for weight in method.watched().values())


def test_groups_of_the_update():
    assert Balance(Probe(two_headed()), lambda gradients: {}, further=("weights",)).groups() == (
        "shared", "heads", "weights",
    )  # fmt: skip
