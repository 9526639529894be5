"""A look at the data of one item of a stream, in order and as they are."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from hubtransfer.data import Batch, Loader

if TYPE_CHECKING:
    from hubtransfer.methods.method import Method
    from hubtransfer.training.runtime import Runtime


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
    source, arguments = item.train_source, runtime.arguments
    if source.iterable:
        raise ValueError(f"{type(method).__name__} has to look at all of {source.where}, but it has no end")
    loader = Loader(
        source if source.augment is None else replace(source, augment=None),
        method.model.processor,
        batch_size=arguments.eval_batch_size or 2 * arguments.batch_size,
        seed=arguments.seed,
        shuffle=False,
        trim=False,
        workers=arguments.workers,
        device=runtime.device,
    )
    rank, world = (runtime.rank, runtime.world) if shared else (0, 1)
    yield from islice(loader.batches(0), rank, None, world)
