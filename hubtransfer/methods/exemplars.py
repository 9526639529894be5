"""The few examples that stand for their class: choosing them, reading each once a pass, classifying by their means."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hubtransfer.data import Batch, Memory
from hubtransfer.functional.herding import herding_order
from hubtransfer.methods.evaluating import TOGETHER, evaluating
from hubtransfer.methods.item_batches import item_loader
from hubtransfer.models import TransferModel

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


def unit_features(model: TransferModel, inputs: dict[str, Tensor], task: str) -> Tensor:
    """Returns pooled features of unit length, (batch, features)."""
    features = model(**inputs, task=task).features
    assert features is not None
    return F.normalize(features.pooled, dim=1)


@torch.no_grad()
def herded(model: TransferModel, task: str, item: Any, runtime: "Runtime", classes: Tensor, count: int) -> Batch:
    """Returns the best examples of each class of an item of a stream, best first, the same on all processes.

    Args:
        model: Its features decide, in evaluation mode and without augmentation.
        task: Whose patch the features go through.
        item: The item.
        runtime: Where it runs.
        classes: Which, int64 (classes,); each has examples in the item's training set.
        count: Examples of each.
    """
    source, every = item.train_source, item_loader(model, item, runtime, batch_size=TOGETHER)
    with evaluating(model):
        found = [unit_features(model, batch.inputs, task) for batch in every.batches(0)]
    features, labels = torch.cat(found), source.table.labels(source.fields.labels)
    rows = []
    for label in classes.tolist():
        own = (labels == label).nonzero().flatten()
        rows.append(own[herding_order(features[own.to(features.device)], count)])
    chosen = torch.cat(rows)
    batch = next(iter(item_loader(model, item, runtime, rows=chosen, batch_size=len(chosen)).batches(0)))
    assert isinstance(batch, Batch)
    return batch


def once_a_pass(memory: Memory, number: int, first: int, last: int) -> Tensor:
    """Returns the slots at places first to last of an endless row in which each pass over a memory has its own order.

    Args:
        memory: Its seed decides.
        number: Of the item of the stream that learns.
        first: Place of the first.
        last: Place after the last.
    """
    size, found = len(memory), []
    while first < last:
        turn, start = divmod(first, size)
        stop = min(size, start + last - first)
        order = _order(memory.random("pass", (number << 32) + turn).initial_seed(), size)
        found.append(order[start:stop])
        first += stop - start
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


@lru_cache(maxsize=2)
def _order(seed: int, size: int) -> Tensor:
    """One pass's order, int64 (size,); the last are kept: each step reads on where the one before ended."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def class_means(model: TransferModel, memory: Memory, task: str, width: int) -> Tensor:
    """Returns the mean feature of each class's exemplars, unit length, (width, features); NaN where there are none."""
    sums, counts = None, torch.zeros(width, device=model.device)
    with evaluating(model):
        for slots in torch.arange(len(memory)).split(TOGETHER):
            replay = memory.at(slots)
            features = unit_features(model, replay.inputs, task)
            assert isinstance(replay.labels, Tensor)
            which = F.one_hot(replay.labels.long(), width).to(features)
            sums = which.T @ features + (0 if sums is None else sums)
            counts += which.sum(0)
    assert sums is not None, "the memory holds something"
    means = F.normalize(sums, dim=1)
    return means.masked_fill((counts == 0)[:, None], torch.nan)
