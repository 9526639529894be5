"""Checks that cost nothing beside training, made before any work starts."""

from collections.abc import Mapping
from typing import Any

import torch

from hubtransfer.data import DataStream, Loader, MultiTask, SingleTask, Source, TaskStream
from hubtransfer.methods.method import Method


def check_scenario(method: Method, scenario: Any) -> None:
    """Checks that a method trains on this kind of scenario.

    Raises:
        TypeError: naming both kinds.
    """
    if not isinstance(scenario, method.scenario):
        how = f"the data as ht.{method.scenario.__name__}(...)"
        if issubclass(method.scenario, TaskStream) and isinstance(scenario, SingleTask | DataStream):
            how = "it as ht.TaskStream([scenario], kind='domain')"
        raise TypeError(
            f"{type(method).__name__} trains on {method.scenario.__name__}, got {type(scenario).__name__}; wrap {how}"
        )


def check_data(method: Method, scenario: Any) -> None:
    """Checks every data set of a scenario: columns, size, labels against heads, one example through the trunk.

    Labels may be missing, but not all of a task in data that several tasks learn from or that are evaluated.

    Raises:
        ValueError: naming the data set, what is wrong, and the remedy.
    """
    evaluated = {id(source) for source, _ in scenario.evaluations().values()}
    for name, source in scenario.sources().items():
        source.check()
        if not source.iterable:
            _check_labels(method, name, source, id(source) in evaluated or isinstance(scenario, MultiTask))
            _check_inputs(method, name, source)


def _check_labels(method: Method, name: str, source: Source, needed: bool) -> None:
    columns = source.fields.labels
    if columns is None:
        return
    named = columns if isinstance(columns, Mapping) else {source.task or method.task: columns}
    for task, column in named.items():
        spec = method.model.tasks.get(task)
        labels = source.table.labels(column)
        if spec is None or spec.head is None or labels is None:
            continue
        try:
            spec.head.check(labels)
        except ValueError as error:
            raise ValueError(f"{type(method).__name__}: labels of {name!r} for task {task!r}: {error}") from error
        if needed and not spec.head.known(labels).any():
            raise ValueError(
                f"{type(method).__name__}: no example of {name!r} has a label for task {task!r} (column {column!r}); "
                "label some, or leave the task out"
            )


@torch.no_grad()
def _check_inputs(method: Method, name: str, source: Source) -> None:
    loader = Loader(source, processor=method.model.processor, batch_size=1, shuffle=False)
    batch = next(iter(loader.batches(0)))
    device = method.model.device
    was_training = method.training
    method.eval()
    try:
        method.model.features({key: value.to(device) for key, value in batch.inputs.items()})
    except (RuntimeError, AssertionError, IndexError) as error:
        shapes = {key: f"{tuple(value.shape)} {value.dtype}" for key, value in batch.inputs.items()}
        raise ValueError(
            f"{type(method).__name__}: the backbone cannot read {name!r}, one example of which is {shapes}: {error}"
        ) from error
    finally:
        method.train(was_training)
