"""How much each parameter matters for a task, measured over the task's data once it is learned."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hubtransfer.data.seeds import seed_of
from hubtransfer.functional.fisher import FisherKind, likelihood_roots
from hubtransfer.functional.missing import known_classes
from hubtransfer.methods.continual_method import ContinualMethod
from hubtransfer.methods.evaluating import evaluating
from hubtransfer.methods.item_batches import item_loader
from hubtransfer.models import ClassificationHead
from hubtransfer.models.example_gradients import Example, Power, sum_over_examples

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


def fisher_diagonal(
    method: ContinualMethod, item: Any, runtime: "Runtime", kind: FisherKind, samples: int | None
) -> dict[str, Tensor]:
    """Returns the diagonal of the Fisher information of what the current task trains (see `likelihood_roots`)."""

    def roots(logits: Tensor, labels: Tensor, uniform: Tensor) -> Tensor:
        return likelihood_roots(logits, kind, labels, uniform)

    return mean_over_examples(method, item, runtime, roots, 2, samples, labelled=kind == "label")


def mean_over_examples(
    method: ContinualMethod,
    item: Any,
    runtime: "Runtime",
    values: Callable[[Tensor, Tensor, Tensor], Tensor],
    power: Power,
    samples: int | None,
    *,
    labelled: bool = False,
) -> dict[str, Tensor]:
    """Returns the mean of squares (power 2) or magnitudes (1) of single examples' gradients, by parameter's name.

    The model is in evaluation mode, images are not augmented, and processes share the examples.

    Args:
        method: Whose current task is measured.
        item: The task's item of the stream.
        runtime: Where it runs.
        values: From logits, labels and numbers in [0, 1) (batch,) to scalars (batch, k) whose gradients count.
        power: 1 or 2.
        samples: Number of examples, drawn at random, or the first ones of data without an end; None takes all.
        labelled: Whether `values` needs labels: then examples without one are left out.

    Raises:
        ValueError: if the data are a stream without an end and no number is given.
    """
    need_samples(method, [item], samples)
    loader = item_loader(method.model, item, runtime, shuffle=samples is not None)

    def examples() -> Iterator[Example]:
        generator = torch.Generator().manual_seed(seed_of(runtime.arguments.seed, "importance", item.name))
        left = samples
        for batch in loader.batches(0):
            if labelled:
                batch = batch.rows(known_classes(method.labels(batch)))
            if left is not None and len(batch) > left:
                batch = batch.rows(torch.arange(left))
            if len(batch):
                uniform = torch.rand(len(batch), generator=generator, dtype=torch.float64).to(runtime.device)
                yield batch.inputs, (method.labels(batch), uniform)
            left = None if left is None else left - len(batch)
            if left is not None and left <= 0:
                return

    with evaluating(method.model):
        own = islice(examples(), runtime.rank, None, runtime.world)
        learned = method.learned()
        totals, count = sum_over_examples(method.model, method.current, own, values, learned, power)
    first = next(iter(learned.values()))
    number = runtime.reduce(torch.tensor(float(count), device=first.device), "sum").clamp(min=1)
    flat = runtime.reduce(torch.cat([total.flatten() for total in totals.values()]), "sum") / number
    pieces = flat.split([total.numel() for total in totals.values()])
    return {name: piece.view_as(total) for (name, total), piece in zip(totals.items(), pieces)}


def need_samples(method: ContinualMethod, items: list[Any], samples: int | None) -> list[Any]:
    """Returns the items of a stream if each can be measured: on all its data, or on a number of examples.

    Raises:
        ValueError: naming data that are a stream without an end, where no number is given.
    """
    for item in items:
        if item.train_source.iterable and samples is None:
            where = item.train_source.where
            raise ValueError(f"{type(method).__name__}: {where} has no end; say on how many samples to measure")
    return items


def need_classes(method: ContinualMethod, items: list[Any], what: str) -> list[Any]:
    """Returns the items of a stream if all their heads predict classes.

    Raises:
        ValueError: naming the task whose head does not.
    """
    for task in dict.fromkeys(item.task or method.task for item in items):
        head = method.model.tasks[task].head
        if not isinstance(head, ClassificationHead):
            kind = "no head" if head is None else f"a head of kind {head.kind!r}"
            raise ValueError(f"{type(method).__name__}: {what} needs class probabilities, but task {task!r} has {kind}")
    return items
