"""Evaluation of a method's model on named data sets, on one process or many."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object

from hubtransfer.data import Batch, Loader, Source
from hubtransfer.evaluation import evaluate_outputs, first_metric
from hubtransfer.training.runtime import Runtime
from hubtransfer.training.sharding import is_sharded

Metrics = dict[str, float]
Tables = dict[str, dict[str, Any]]


@torch.no_grad()
def evaluate(
    runtime: Runtime, sets: Mapping[str, tuple[Source, str | None]], data: "EvaluationSets", brief: bool = False
) -> tuple[Metrics, Tables]:
    """Returns metrics, prefixed by the data set's name where there are several, and tables by data set.

    Every process takes every n-th batch; the outputs meet on all of them. Under sharding all processes take every
    batch, for each forward pass needs all of them. Nothing of the training state changes: neither modes nor buffers.

    Args:
        runtime: The run's.
        sets: Name -> source and task.
        data: Gives their batches.
        brief: Give the first metric of each set alone, and no tables.
    """
    method = runtime.method
    was_training = method.training
    rank, world = (0, 1) if is_sharded(method) else (runtime.rank, runtime.world)
    method.eval()
    metrics: Metrics = {}
    tables: Tables = {}
    try:
        for name, (source, named_task) in sets.items():
            task = named_task or method.task
            head = method.model.tasks[task].head
            if head is None:
                continue
            outputs, labels = [], []
            for number, batch in islice(enumerate(data.batches(name, source)), rank, None, world):
                with runtime.accelerator.autocast():
                    logits = method(partial(method.predict, task=task), batch)  # `forward` gathers sharded parameters
                target = batch.labels[task] if isinstance(batch.labels, Mapping) else batch.labels
                assert target is not None, "evaluation sets have labels"
                outputs.append((number, logits.float().cpu()))
                labels.append((number, target.cpu()))
            if world > 1:
                outputs, labels = gather_object(outputs), gather_object(labels)
            logits = torch.cat([value for _, value in sorted(outputs, key=lambda pair: pair[0])])
            target = torch.cat([value for _, value in sorted(labels, key=lambda pair: pair[0])])
            names = getattr(head, "labels", None)
            try:
                found = (first_metric if brief else evaluate_outputs)(head.predicts, logits, target, names=names)
            except ValueError as error:  # such as no label at all, in data that cannot be looked through before
                raise ValueError(f"evaluation of task {task!r} on {name!r}: {error}") from error
            prefix = f"{name}/" if len(sets) > 1 else ""
            metrics |= {prefix + key: value for key, value in found.metrics.items()}
            tables[name] = found.tables
    finally:
        method.train(was_training)
    return metrics, tables


class EvaluationSets:
    """Batches of named evaluation sets. What is cheap to keep is kept from the second look on.

    Along a stream all tasks are evaluated after each: twenty times as much reading as there are examples.

    Args:
        make: Makes the loader of a set.
        limit: Bytes that may be kept.
    """

    def __init__(self, make: Callable[[Source], Loader], limit: int = 2**30) -> None:
        self.make, self.room = make, limit
        self._loaders: dict[str, Loader] = {}
        self._kept: dict[str, list[Batch] | None] = {}

    def batches(self, name: str, source: Source) -> Iterable[Batch]:
        """Returns the batches of a set, in order."""
        if name not in self._loaders:
            self._loaders[name] = self.make(source)
            return self._loaders[name].batches(0)
        if name not in self._kept:
            self._kept[name] = self._keep(self._loaders[name], source)
        kept = self._kept[name]
        return self._loaders[name].batches(0) if kept is None else kept

    def _keep(self, loader: Loader, source: Source) -> list[Batch] | None:
        """All batches, if the set is in memory, always the same, and there is room."""
        if source.iterable or not source.table.in_memory or not source.table.fixed or source.augment is not None:
            return None
        kept: list[Batch] = []
        for batch in loader.batches(0):
            self.room -= sum(value.numel() * value.element_size() for value in batch.inputs.values())
            if self.room < 0:
                return None
            kept.append(batch)
        return kept
