"""One loss for each of several tasks, and which parameters they share: what every multi-task method starts from."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hubtransfer.data import Batch, Mixture, MultiTask, Source
from hubtransfer.data.processes import everywhere, world
from hubtransfer.methods.update import AnyBatch, Terms
from hubtransfer.models import TransferModel


def task_names(model: TransferModel, tasks: Sequence[str] | None, method: str) -> tuple[str, ...]:
    """Returns the tasks that learn together: those named, else all of the model's.

    Raises:
        ValueError: if there are none, or one is named twice or has no head.
    """
    names = tuple(model.tasks if tasks is None else tasks)
    if not names:
        raise ValueError(f"{method}: the model has no tasks; add them with model.add_task(name, head).")
    if len(set(names)) < len(names):
        raise ValueError(f"{method}: a task is named twice in {list(names)}")
    for name in names:
        if name not in model.heads:
            raise ValueError(f"{method}: the model has no task {name!r} with a head; it has {sorted(model.heads)}.")
    return names


def task_sources(scenario: MultiTask, tasks: Sequence[str], method: str) -> Source | Mapping[str, Source]:
    """Returns the data of a stage whose every step sees every task: one source with all labels, or one a task.

    Raises:
        ValueError: if the scenario lacks a task, or its tasks take turns.
    """
    data = task_streams(scenario, tasks, method)
    if isinstance(data, Mixture):
        raise ValueError(
            f"{method} weighs the tasks of one step against each other, but with mixing (batches: "
            f"{data.mixing.batches}) a step does not see them all; leave it out: every step then has a batch of each"
        )
    return data


def task_streams(scenario: MultiTask, tasks: Sequence[str], method: str) -> Source | Mapping[str, Source]:
    """Returns the data of a stage: the one source with all labels, one a task, or sources that take turns.

    Raises:
        ValueError: if the scenario lacks a task.
    """
    missing = [task for task in tasks if task not in scenario.tasks]
    if missing:
        raise ValueError(
            f"{method} trains task {missing[0]!r}, for which the scenario has no data; it has {list(scenario.tasks)}. "
            "Add it to MultiTask, or name the tasks to train with tasks=[...]."
        )
    if scenario.shared:
        return scenario.train_source
    sources = scenario.train_sources
    return sources.only(tasks) if isinstance(sources, Mixture) else {t: sources[t] for t in tasks}


def shared_and_own(model: TransferModel, tasks: Sequence[str]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Returns the trunk's parameters, which all tasks share, and those of the tasks' heads and patches."""
    own = [p for task in tasks for p in model.heads[task].parameters()]
    own += [p for task in tasks if task in model.patches for p in model.patches[task].parameters()]
    return list(model.backbone.trunk.parameters()), own


def task_losses(model: TransferModel, tasks: Sequence[str], batch: AnyBatch) -> Terms:
    """Returns each task's loss under its name, scalars; over processes, what averages to the loss of one.

    Args:
        model: The model.
        tasks: Which of its tasks.
        batch: One batch with labels by task (the trunk then runs once, and once more for each task with a patch), or a
            batch a task; where tasks take turns, of those whose turn it is: the others have no term, or, in steps that
            mix tasks, a loss of zero, and the terms add up to the mean over the step's examples.
    """
    if not isinstance(batch, Batch):
        if any(batch[t].share is not None for t in batch):
            return _mixed(model, tasks, batch)
        terms = {t: model(**batch[t].inputs, labels=batch[t].labels, task=t).loss for t in tasks if t in batch}
        return over_processes(terms, model, tasks, batch)
    labels = batch.labels
    assert isinstance(labels, dict), "tasks that share inputs need labels by task"
    together = [task for task in tasks if task not in model.patches]
    terms = {}
    if together:
        layers = dict.fromkeys(layer for task in together for layer in model.layers_for(task))
        features = model.features(batch.inputs, layers=tuple(layers), task=together[0])
        terms = {t: model.loss(model.logits(features, t, inputs=batch.inputs), labels[t], t) for t in together}
    terms = {t: terms[t] if t in terms else model(**batch.inputs, labels=labels[t], task=t).loss for t in tasks}
    return over_processes(terms, model, tasks, batch)


def _mixed(model: TransferModel, tasks: Sequence[str], streams: Mapping[str, Batch]) -> Terms:
    """Each task's part of the mean loss over a step's examples, n_t / n L_t; tasks without a patch share one pass."""
    passes: dict[object, list[str]] = {}
    for task, batch in streams.items():
        shapes = tuple((name, value.dtype, value.shape[1:]) for name, value in batch.inputs.items())
        passes.setdefault(task if task in model.patches else shapes, []).append(task)
    terms: Terms = {}
    for names in passes.values():
        inputs = {key: torch.cat([streams[t].inputs[key] for t in names]) for key in streams[names[0]].inputs}
        layers = dict.fromkeys(layer for t in names for layer in model.layers_for(t))
        features, start = model.features(inputs, layers=tuple(layers), task=names[0]), 0
        for t in names:
            own = features.rows(slice(start, start + len(streams[t])))
            labels, share = streams[t].labels, streams[t].share
            assert isinstance(labels, torch.Tensor) and share is not None
            terms[t] = share * model.loss(model.logits(own, t, inputs=streams[t].inputs), labels, t)
            start += len(streams[t])
    return on_every_process(over_processes(terms, model, tasks, streams), tasks, streams)


def known_labels(model: TransferModel, task: str, batch: AnyBatch) -> Tensor | None:
    """Says which labels of a task are known in a batch, true or false for each; None where it has no batch."""
    labels: Any
    if isinstance(batch, Batch):
        labels = batch.labels.get(task) if isinstance(batch.labels, dict) else batch.labels
    else:
        labels = batch[task].labels if task in batch else None
    head = model.tasks[task].head
    return None if labels is None or head is None else head.known(labels)


def over_processes(terms: Terms, model: TransferModel, tasks: Sequence[str], batch: AnyBatch) -> Terms:
    r"""Scales losses so that their mean over processes is the loss of one process that has all the examples.

    A loss is the mean over the labels that are known, and some processes may know more of them than others:

    .. math:: L = \frac{1}{W} \sum_r \frac{W k_r}{\sum_q k_q} L_r

    with the number k of known labels, and of processes W; in steps that mix tasks, :math:`\sum_q s_q / s_r` in place
    of W, with the shares s that are in the terms already. All processes have to call it together.

    Args:
        terms: Those of the tasks that this process has examples of, scalars.
        model: The model, whose heads say what is known.
        tasks: All tasks.
        batch: What the terms came from.
    """
    if world() == 1:
        return terms
    counts = torch.zeros(len(tasks), 2, dtype=torch.float64, device=model.device)
    for row, task in zip(counts, tasks):
        known = known_labels(model, task, batch)
        if known is not None:
            row[0] = known.sum()
            row[1] = 1.0 if isinstance(batch, Batch) or batch[task].share is None else batch[task].share
    own, total = counts.unbind(1), everywhere(counts[None]).sum(0).unbind(1)
    factors = dict(zip(tasks, own[0] * total[1] / (total[0].clamp(min=1) * own[1])))
    return {task: loss * factors[task].to(loss.dtype) for task, loss in terms.items()}


def on_every_process(terms: Terms, tasks: Sequence[str], batch: AnyBatch) -> Terms:
    """Returns the same terms on every process, whoever has examples of which task.

    Args:
        terms: Those of the tasks that this process has examples of.
        tasks: All tasks.
        batch: What they came from: in a step that mixes tasks the others have a loss of zero, else no term.
    """
    if isinstance(batch, Batch) or all(own.share is None for own in batch.values()):
        return terms
    nothing = 0 * next(iter(terms.values()))
    return {t: terms.get(t, nothing) for t in tasks}
