"""Losses of several tasks: shared inputs, a stream each, turns, mixtures; and labels that are missing."""

import math

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import Loader, Mixing, MultiTask
from hubtransfer.methods import Descend, Method, Stage
from hubtransfer.methods.balance import TaskGradients
from hubtransfer.methods.multitask.fixed_weights import FixedWeights
from hubtransfer.methods.multitask.mgda import MGDA
from hubtransfer.methods.task_losses import task_losses, task_names, task_sources, task_streams
from hubtransfer.models import ClassificationHead, DenseHead, MultiLabelHead, RegressionHead, TransferModel
from hubtransfer.patches import ScaleBiasConfig
from hubtransfer.training import Trainer
from tests.methods.steps import begin, changed, clone, run, settings, snapshot
from tests.tiny import tiny_backbone, tiny_data

NAN = math.nan
HEADS = {
    "kind": ClassificationHead(3),
    "flags": MultiLabelHead(2),
    "value": RegressionHead(),
    "pixels": DenseHead(2),
}
MARKERS = {"kind": -100, "flags": NAN, "value": NAN, "pixels": 255}


class Together(Method, scenario=MultiTask):
    """The sum of all tasks' losses, for any kind of data."""

    def __init__(self, model, tasks=None):
        super().__init__(model, task=next(iter(model.tasks)))
        self.tasks = task_names(model, tasks, "Together")

    def loss(self, batch):
        return task_losses(self.model, self.tasks, batch)

    def stages(self, scenario):
        yield Stage("together", task_streams(scenario, self.tasks, "Together"), [Descend(self.loss)])


def four_headed(dtype=torch.float32, **patches):
    model = TransferModel(tiny_backbone(dtype=dtype))
    torch.manual_seed(1)
    for task, head in HEADS.items():
        model.add_task(task, head, patch=patches.get(task))
    return model


def labels_of(task, n, classes, generator):
    if task == "kind":
        return classes
    if task == "flags":
        return torch.stack([classes == 0, classes == 1], 1).float()
    if task == "value":
        return classes.float() / 3
    return torch.randint(0, 2, (n, 8, 8), generator=generator)


def shared(n=24, dtype=torch.float32, missing=()):
    """Inputs with labels for four tasks; the rows named in `missing` have none for their task."""
    data, generator = tiny_data(n, 3, dtype=dtype), torch.Generator().manual_seed(5)
    columns = {task: labels_of(task, n, data["labels"], generator) for task in HEADS}
    for task, rows in dict(missing).items():
        columns[task][rows] = MARKERS[task]
    return {"pixel_values": data["pixel_values"], **columns}


def scenario(data, evaluation=None):
    return MultiTask(train=data, labels={t: t for t in HEADS}, evaluation=evaluation)


def streams(mixing=None, sizes=(24, 16, 12, 8), dtype=torch.float32, hidden=0.0):
    """A data set a task, of whose examples a part is without a label."""
    made = {}
    for k, (task, n) in enumerate(zip(HEADS, sizes)):
        data = tiny_data(n, 3, seed=k, dtype=dtype)
        generator = torch.Generator().manual_seed(k)
        labels = labels_of(task, n, data["labels"], generator)
        labels[torch.rand(n, generator=generator) < hidden] = MARKERS[task]
        made[task] = {"pixel_values": data["pixel_values"], "labels": labels}
    return MultiTask(made, evaluation=made, mixing=mixing)


def test_heads_of_four_kinds_learn_from_one_input_and_are_measured():
    data = shared(24, missing={"kind": slice(0, 8), "flags": slice(8, 16), "value": slice(4, 20), "pixels": slice(20)})
    method = Together(four_headed())
    before = snapshot(method.model)
    trainer = run(method, scenario(data, data), steps=3, evaluate="stage")
    assert changed(before, method.model) == set(before)
    metrics = trainer.evaluate()
    assert {"kind/accuracy", "flags/mean_average_precision", "value/r2", "pixels/mean_iou"} <= set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_missing_label_is_masked_in_its_own_task_alone():
    """The loss equals a plain sum in which each task has a mean over the examples that it has labels for."""
    missing = {"kind": [0, 5], "flags": [1], "value": [0, 2, 4], "pixels": [3]}
    data = shared(6, missing=missing)
    model = four_headed()
    batch = next(Loader(scenario(data).train_source, batch_size=6, shuffle=False).batches(0))
    found = task_losses(model, tuple(HEADS), batch)
    kept = {task: [i for i in range(6) if i not in rows] for task, rows in missing.items()}
    pooled = model.backbone.trunk(data["pixel_values"])
    logits = {task: model.heads[task](pooled) for task in ("kind", "flags", "value")}
    expected = {
        "kind": F.cross_entropy(logits["kind"][kept["kind"]], data["kind"][kept["kind"]]),
        "flags": F.binary_cross_entropy_with_logits(logits["flags"][kept["flags"]], data["flags"][kept["flags"]]),
        "value": F.mse_loss(logits["value"][kept["value"], 0], data["value"][kept["value"]]),
    }
    for task, value in expected.items():
        torch.testing.assert_close(found[task], value)


@pytest.mark.parametrize("task", HEADS)
def test_a_task_without_a_label_in_the_batch_has_no_gradient(task):
    data = shared(6, missing={task: slice(None)})
    model = four_headed()
    batch = next(Loader(scenario(data).train_source, batch_size=6).batches(0))
    loss = task_losses(model, tuple(HEADS), batch)[task]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.heads[task].parameters())


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("where", ["train", "evaluation"])
def test_a_task_without_any_label_in_an_epoch_is_named_before_work_starts(task, where):
    good, bad = shared(12), shared(12, missing={task: slice(None)})
    method = Together(four_headed())
    before = snapshot(method)
    data = scenario(bad, good) if where == "train" else scenario(good, bad)
    with pytest.raises(ValueError, match=f"no example of '.*' has a label for task '{task}'"):
        run(method, data)
    assert not changed(before, method)


@pytest.mark.parametrize("method", [Together, MGDA])
@pytest.mark.parametrize("where", ["train", "evaluation"])
def test_a_data_set_of_its_own_without_any_label_is_named_too(method, where):
    good, bad = streams().datasets, dict(streams().datasets)
    bad["value"] = {**bad["value"], "labels": torch.full((12,), NAN)}
    data = MultiTask(bad, evaluation=good) if where == "train" else MultiTask(good, evaluation=bad)
    method = method(four_headed())
    before = snapshot(method)
    with pytest.raises(ValueError, match="no example of '.*value.*' has a label for task 'value'"):
        run(method, data)
    assert not changed(before, method)


class Lazy(torch.utils.data.Dataset):
    """Examples that are computed one by one: what labels there are is not known before."""

    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["pixel_values"])

    def __getitem__(self, row):
        return {name: values[row] for name, values in self.columns.items()}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("method", [Together, MGDA])
@pytest.mark.parametrize("task", HEADS)
def test_where_labels_are_not_known_before_a_task_without_any_takes_no_part(method, task, own):
    """An epoch ends as without the task: the same trunk and heads, and its own head as it was."""
    others = tuple(name for name in HEADS if name != task)
    columns = shared(12, dtype=torch.float64, missing={task: slice(None)})

    def data(names):
        if own:
            sets = {t: Lazy({"pixel_values": columns["pixel_values"], "labels": columns[t]}) for t in names}
            return MultiTask(sets)
        examples = Lazy({"pixel_values": columns["pixel_values"], **{t: columns[t] for t in names}})
        return MultiTask(train=examples, labels={t: t for t in names})

    every = method(four_headed(torch.float64))
    less = method(clone(every.model), others)
    start = snapshot(every.model.heads[task])
    run(every, data(tuple(HEADS)), steps=None, epochs=1, batch_size=4)
    run(less, data(others), steps=None, epochs=1, batch_size=4)
    assert not changed(start, every.model.heads[task])
    for (name, one), two in zip(every.model.named_parameters(), less.model.parameters()):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.equal(
        every.model.backbone.trunk.stem.weight, four_headed(torch.float64).backbone.trunk.stem.weight
    )


def test_an_evaluation_set_whose_labels_are_not_known_before_is_named_when_it_has_none():
    columns = shared(12, missing={"value": slice(None)})
    with pytest.raises(ValueError, match="evaluation of task 'value' on 'value': regression: no example has a label"):
        run(Together(four_headed()), scenario(shared(12), Lazy(columns)), steps=1, evaluate="stage")


@pytest.mark.parametrize("patches", [{}, {"kind": ScaleBiasConfig(), "flags": ScaleBiasConfig()}])
@pytest.mark.parametrize("batches", ["alternating", "mixed"])
def test_streams_of_different_heads_take_turns(batches, patches):
    method = Together(four_headed(**patches))
    before = snapshot(method.model)
    trainer = run(method, streams(Mixing(batches=batches)), steps=None, epochs=2, batch_size=4, evaluate="stage")
    assert changed(before, method.model) == set(before)
    assert trainer.cursor.total == 2 * 15  # 60 examples
    assert {"kind/accuracy", "pixels/mean_iou"} <= set(trainer.evaluate())


def test_a_turn_changes_nothing_of_the_other_tasks():
    method = Together(four_headed())
    data = streams(Mixing())
    trainer = Trainer(method, data, settings(batch_size=4))
    stage = next(method.stages(data))
    trainer.runtime.begin(stage, 4)
    trainer.runtime.set_step(0)
    batch = next(trainer._loader(stage).batches(0))
    (task,) = batch
    before = snapshot(method.model)
    terms = stage.updates[0].apply(batch, trainer.runtime)
    assert list(terms) == [task]
    moved = changed(before, method.model)
    assert {n for n in moved if n.startswith("heads.")} == {n for n in before if n.startswith(f"heads.{task}.")}


def test_a_mixed_step_is_the_mean_over_its_examples_in_one_pass():
    data = streams(Mixing(batches="mixed", weights=dict.fromkeys(HEADS, 1.0)))
    model = four_headed()
    (batch, *_) = Loader(task_streams(data, tuple(HEADS), "x"), batch_size=12).batches(0)
    assert len(batch) == 4
    passes = []
    handle = model.backbone.trunk.register_forward_pre_hook(lambda m, args: passes.append(len(args[0])))
    found = sum(task_losses(model, tuple(HEADS), batch).values())
    handle.remove()
    assert passes == [12]
    losses = []  # example by example
    for task, part in batch.items():
        for i in range(len(part)):
            one = part.rows(torch.tensor([i]))
            losses.append(model(**one.inputs, labels=one.labels, task=task).loss)
    assert len(losses) == 12
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_a_task_that_a_mixed_step_lacks_has_a_loss_of_zero():
    data = streams(Mixing(batches="mixed"))
    model = four_headed()
    steps = list(Loader(task_streams(data, tuple(HEADS), "x"), batch_size=2).batches(0))
    step = next(step for step in steps if len(step) == 1)
    found = task_losses(model, tuple(HEADS), step)
    assert list(found) == list(HEADS)
    assert [t for t in HEADS if found[t].item()] == list(step)
    sum(found.values()).backward()


def test_some_tasks_of_a_mixture():
    data = streams(Mixing(weights={"kind": 1.0, "flags": 2.0, "value": 3.0, "pixels": 4.0}))
    kept = task_streams(data, ("value", "kind"), "x")
    assert list(kept) == ["value", "kind"]
    assert kept.mixing.shares({"value": 1, "kind": 1}) == {"value": 0.75, "kind": 0.25}


def test_methods_that_compare_tasks_refuse_turns():
    with pytest.raises(ValueError, match="MGDA weighs the tasks of one step.*leave it out"):
        task_sources(streams(Mixing()), tuple(HEADS), "MGDA")


@pytest.mark.parametrize("batches", ["alternating", "mixed"])
def test_a_run_that_is_cut_and_resumed_ends_with_the_same_bits(batches, tmp_path):
    data = streams(Mixing(batches=batches, temperature=2.0))
    whole = Together(four_headed())
    cut, again = clone(whole), clone(whole)
    options = {"batch_size": 4, "lr": 0.05, "save": 1, "keep": 100}
    Trainer(whole, data, settings(steps=9, output_dir=str(tmp_path / "whole"), **options)).train()
    Trainer(cut, data, settings(steps=9, output_dir=str(tmp_path / "cut"), **options)).train()
    folder = sorted((tmp_path / "cut" / "checkpoints").glob("step-*"))[4]
    Trainer(again, data, settings(steps=9, output_dir=str(tmp_path / "again"), batch_size=4)).train(str(folder))
    after = snapshot(again)
    assert not changed(after, whole)


def test_tasks_with_networks_of_their_own_are_balanced_on_their_own_features():
    """The gradients that a balancing method weighs are those of each task's own network (stitched to the others)."""
    model = four_headed()
    model.grow("towers", tasks=list(HEADS), layers=["act1"])
    method, data = MGDA(model), scenario(shared(8))
    runtime, stage = begin(method, data)
    (batch,) = Loader(data.train_source, batch_size=8).batches(0)
    (update,) = stage.updates
    cut = update.losses(batch)
    found = TaskGradients(cut, method, runtime, "shared", "heads").rows()
    losses = task_losses(model, tuple(HEADS), batch)
    for task, row in zip(HEADS, found):
        expected = torch.autograd.grad(losses[task], runtime.params("shared"), retain_graph=True, allow_unused=True)
        for gradient, wanted in zip(row, expected):
            torch.testing.assert_close(gradient, torch.zeros_like(gradient) if wanted is None else wanted)


def test_the_plain_sum_trains_tasks_that_take_turns():
    method = FixedWeights(four_headed(), weights={"value": 2.0})
    before = snapshot(method.model)
    run(method, streams(Mixing()), steps=None, epochs=2, batch_size=4)
    assert changed(before, method.model) == set(before)


@pytest.mark.parametrize("batches", ["alternating", "mixed"])
def test_the_mean_over_two_processes_is_the_loss_of_one(batches):
    """Gradients are averaged over processes: the losses of their shares of a step must average to the whole step's."""
    data = streams(Mixing(batches=batches))
    model, tasks = four_headed(), tuple(HEADS)
    source = task_streams(data, tasks, "x")
    one = Loader(source, batch_size=8, seed=2).batches(0)
    two = [Loader(source, batch_size=4, seed=2, rank=rank, world=2).batches(0) for rank in (0, 1)]
    for whole, *parts in zip(one, *two):
        found = [sum(task_losses(model, tasks, part).values()) for part in parts]
        terms = [list(task_losses(model, tasks, part)) for part in parts]
        assert terms[0] == terms[1]  # what is logged is gathered term by term
        torch.testing.assert_close(sum(found) / 2, sum(task_losses(model, tasks, whole).values()))


class TwoProcesses:
    """Gives each of two processes, which here run one after the other, what both said: after a first round of each."""

    def __init__(self, monkeypatch):
        self.rank, self.said = 0, {}
        monkeypatch.setattr("hubtransfer.methods.task_losses.world", lambda: 2)
        monkeypatch.setattr("hubtransfer.methods.task_losses.everywhere", self.everywhere)

    def everywhere(self, tensor):
        self.said[self.rank] = tensor
        return torch.cat([self.said.get(rank, tensor) for rank in (0, 1)])

    def run(self, function, parts):
        for _ in range(2):
            found = []
            for self.rank, part in enumerate(parts):
                found.append(function(part))
        return found


@pytest.mark.parametrize("kind", ["one batch", "alternating", "mixed", None])
def test_labels_that_one_process_lacks_count_by_their_number(kind, monkeypatch):
    """Some labels, none on one process, none at all: the mean over processes is the loss of one, task by task."""
    model, tasks = four_headed(torch.float64), tuple(HEADS)
    if kind == "one batch":
        missing = {"kind": [0, 1, 2, 5], "flags": [4, 5, 6, 7], "value": slice(None), "pixels": [2, 3, 4]}
        source = scenario(shared(8, torch.float64, missing)).train_source
    else:
        data = streams(None if kind is None else Mixing(batches=kind), dtype=torch.float64, hidden=0.5)
        source = task_streams(data, tasks, "x")
    whole = {"batch_size": 8, "seed": 2, "shuffle": kind != "one batch"}
    half = whole | {"batch_size": 4}
    one = [task_losses(model, tasks, step) for step in Loader(source, **whole).batches(0)]
    two = zip(*(Loader(source, **half, rank=rank, world=2).batches(0) for rank in (0, 1)))
    uneven = 0
    for expected, parts in zip(one, list(two), strict=True):
        plain = [task_losses(model, tasks, part) for part in parts]
        with monkeypatch.context() as patched:
            found = TwoProcesses(patched).run(lambda part: task_losses(model, tasks, part), parts)
        assert list(found[0]) == list(found[1]) == list(expected)
        for task, value in expected.items():
            torch.testing.assert_close((found[0][task] + found[1][task]) / 2, value, rtol=0, atol=1e-12)
            uneven += not torch.isclose((plain[0][task] + plain[1][task]) / 2, value)
    assert uneven > 1  # shares of the processes alone do not do
