"""How a loader augments: with random numbers that belong to a place in training, or to an example."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from hubtransfer.data.batch import Batch
from hubtransfer.data.seeds import seed_of
from hubtransfer.data.source import Source

STREAMED = "the examples come from a stream and have no numbers"
UNSETTLED = "the data set's own code computes its rows anew (`fixed = True` promises that it does not)"


class Augmented:
    """Applies a source's augmentation with random numbers that belong to (seed, epoch, step).

    An augmentation with ``variants`` is stored: its random numbers belong to (seed, example, epoch modulo variants),
    so an example comes back the same and what frozen networks say of it can be kept.

    Attributes:
        changing: why an example of the source may be another input at each epoch; None if it is not.

    Raises:
        ValueError: a stored augmentation of a stream.
    """

    changing: str | None

    def __init__(self, source: Source, seed: int, name: str):
        augment = source.augment
        self.steps: list[Any] = [] if augment is None else [augment] if callable(augment) else list(augment)
        if any(hasattr(step, "for_labels") for step in self.steps) and not source.iterable:
            column = source.fields.labels
            labels = source.table.labels(column) if isinstance(column, str) else None
            self.steps = [step.for_labels(labels) if hasattr(step, "for_labels") else step for step in self.steps]
        self.seed, self.name = seed, name
        stored = [step for step in self.steps if _variants(step)]
        anew = [type(step).__name__ for step in self.steps if not _variants(step)]
        self.size = 0 if source.iterable else len(source.table)
        self._drawn: dict[tuple[int, int], dict[str, Tensor]] = {}
        if source.iterable:
            if stored:
                raise ValueError(
                    f"{source.where}: a stored augmentation ({type(stored[0]).__name__} with variants) needs numbered "
                    "examples, and a stream has none; leave out variants"
                )
            self.changing = STREAMED
        elif not source.table.fixed:
            self.changing = UNSETTLED
        elif anew:
            self.changing = f"inputs are augmented anew in each epoch ({', '.join(anew)}; Augment can store variants)"
        else:
            self.changing = None

    def origin(self, origin: str, epoch: int) -> str | None:
        """Key of what the examples of a data set of key ``origin`` are in an epoch; None where they change."""
        if self.changing is not None:
            return None
        if not self.steps:
            return origin
        turns = [epoch % _variants(step) for step in self.steps]
        return sha256(repr((origin, self.seed, self.name, self.steps, turns)).encode()).hexdigest()

    def __call__(self, batch: Batch, epoch: int, step: int, total: int, offset: int) -> Batch:
        """Augment rows ``[offset, offset + len(batch))`` of a global batch of (when it is full) ``total``."""
        for number, augment in enumerate(self.steps):
            facts = {"origin": batch.origin, "size": batch.size, "changing": batch.changing}
            if variants := _variants(augment):
                assert batch.index is not None
                drawn = {k: v[batch.index] for k, v in self._stored(number, epoch % variants).items()}
                batch = augment.apply(batch, drawn)
            else:
                generator = torch.Generator().manual_seed(seed_of(self.seed, "augment", self.name, epoch, step, number))
                draw = getattr(augment, "draw", None)
                if draw is not None:  # draws for all processes' rows: the same whichever process has a row
                    drawn = {key: value[offset : offset + len(batch)] for key, value in draw(total, generator).items()}
                    batch = augment.apply(batch, drawn)
                else:
                    generator.manual_seed(seed_of(generator.initial_seed(), offset))
                    batch = augment(batch, generator)
            batch = batch.replace(**facts)
        return batch

    def _stored(self, number: int, variant: int) -> dict[str, Tensor]:
        """Random numbers of every example for one variant of one augmentation."""
        key = (number, variant)
        if key not in self._drawn:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "variant", self.name, number, variant))
            self._drawn[key] = self.steps[number].draw(self.size, generator)
        return self._drawn[key]


def _variants(step: Any) -> int:
    return getattr(step, "variants", None) or 0
