"""A look at the data of one item of a stream, as they are."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hubtransfer.data import Batch, Loader
from hubtransfer.data.table_views import Rows
from hubtransfer.models import TransferModel

if TYPE_CHECKING:
    from hubtransfer.methods.method import Method
    from hubtransfer.training.runtime import Runtime


def item_loader(
    model: TransferModel,
    item: Any,
    runtime: "Runtime",
    *,
    rows: Tensor | None = None,
    batch_size: int | None = None,
    shuffle: bool = False,
    stage: int = 0,
) -> Loader:
    """Returns what reads the training data of an item without augmentation, all of them on every process.

    Args:
        model: Its processor makes the inputs.
        item: Of the stream.
        runtime: Where it runs.
        rows: Only these, int64 (rows,).
        batch_size: Examples of a batch; by default as many as in evaluation.
        shuffle: Whether in random order, which the run's seed fixes.
        stage: Another number, another order.
    """
    source, arguments = item.train_source, runtime.arguments
    source = source if source.augment is None else replace(source, augment=None)
    return Loader(
        source if rows is None else replace(source, dataset=Rows(source.table, rows)),
        model.processor,
        batch_size=batch_size or arguments.eval_batch_size or 2 * arguments.batch_size,
        seed=arguments.seed,
        stage=stage,
        shuffle=shuffle,
        workers=arguments.workers,
        device=runtime.device,
    )


def need_ends(method: "Method", items: list[Any]) -> list[Any]:
    """Returns items of a stream, all of whose training data can be looked at.

    Raises:
        ValueError: naming data that are a stream, of which nobody knows the end, and what to give instead.
    """
    for item in items:
        if item.train_source.iterable:
            where = item.train_source.where
            raise ValueError(
                f"{type(method).__name__} has to look at all of {where}, but it has no end; give data of known length, "
                "such as a list or a table of so many of its examples"
            )
    return items


def item_batches(method: "Method", item: Any, runtime: "Runtime", *, shared: bool = False) -> Iterator[Batch]:
    """Yields the training data of an item once, in order and without augmentation.

    Args:
        method: Whose model reads them.
        item: Of the stream.
        runtime: Where it runs.
        shared: Whether processes share the batches; otherwise each gets all of them.

    Raises:
        ValueError: if the data are a stream without an end.
    """
    need_ends(method, [item])
    rank, world = (runtime.rank, runtime.world) if shared else (0, 1)
    yield from islice(item_loader(method.model, item, runtime).batches(0), rank, None, world)
