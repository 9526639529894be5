"""Tables seen in another way, without a copy: some rows, pixels in another order or in noise, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hubtransfer.data.seeds import row_bytes
from hubtransfer.data.table import Table, Values, as_labels, hash_values


class _View(Table):
    """Another way to see a table; what a subclass leaves alone is the table's own."""

    def __init__(self, base: Table):
        self.base = base
        self.columns, self.fixed, self.in_memory = base.columns, base.fixed, base.in_memory

    def __len__(self) -> int:
        return len(self.base)

    def column(self, name: str) -> Values | None:
        """A whole column, or None where that would mean computing every example."""
        return self.base.column(name)

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """Names of a label column's classes, where the data set knows them."""
        return self.base.class_names(name)

    def _content(self, digest: Any) -> None:
        digest.update(self.base.fingerprint().encode())


class Rows(_View):
    """Some rows of a table, possibly with other labels.

    Args:
        base: the table.
        index: row numbers, int64 ``(rows,)``.
        labels: column of labels to change.
        numbers: new number of each old label, int64 ``(old labels,)``; -1 for labels that do not occur.
        names: of the new labels.

    Raises:
        ValueError: there are no rows.
    """

    def __init__(
        self,
        base: Table,
        index: Tensor,
        labels: str | None = None,
        numbers: Tensor | None = None,
        names: Sequence[str] | None = None,
    ):
        super().__init__(base)
        if not len(index):
            raise ValueError(f"no rows chosen of a table that has {len(base)}")
        self.index, self.labelled, self.numbers, self.names = index, labels, numbers, names

    def __len__(self) -> int:
        return len(self.index)

    def gather(self, index: Tensor, columns: Sequence[str] | None = None) -> dict[str, Values]:
        """The base's rows, with the new labels."""
        found = self.base.gather(self.index[index], columns)
        return {name: self._renumbered(name, values) for name, values in found.items()}

    def column(self, name: str) -> Values | None:
        """Rows of the base's column, with the new labels."""
        values = self.base.column(name)
        if values is None:
            return None
        chosen = values[self.index] if isinstance(values, Tensor) else [values[i] for i in self.index.tolist()]
        return self._renumbered(name, chosen)

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """Names of the new labels, or those of the base."""
        if name != self.labelled or self.numbers is None:
            return self.base.class_names(name)
        return None if self.names is None else tuple(self.names)

    def _renumbered(self, name: str, values: Values) -> Values:
        if name != self.labelled or self.numbers is None:
            return values
        return self.numbers[as_labels(values, name)]

    def _content(self, digest: Any) -> None:
        super()._content(digest)
        hash_values(digest, self.index)
        if self.numbers is not None:
            hash_values(digest, self.numbers)


class Rearranged(_View):
    """Images whose pixels lie elsewhere: permuted, rotated, shifted; the channels of a pixel stay together.

    Args:
        base: a table with a column of images ``(rows, height, width)``, ``(rows, height, width, channels)`` or
            ``(rows, channels, height, width)``.
        column: the images.
        origin: for each pixel of the result the number of the pixel it comes from, row by row, int64
            ``(height * width,)``; -1 gives zeros.

    Raises:
        ValueError: the images are not that large.
    """

    def __init__(self, base: Table, column: str, origin: Tensor):
        super().__init__(base)
        height, width = image_size(base, column)
        if height * width != len(origin):
            raise ValueError(f"images of {height} x {width} pixels cannot be rearranged by {len(origin)} numbers")
        self.rearranged, self.origin = column, origin
        self.outside = (origin < 0).nonzero().flatten()
        self.places = origin.clamp(min=0).int()  # 32 bits: indexing is nearly twice as fast

    def gather(self, index: Tensor, columns: Sequence[str] | None = None) -> dict[str, Values]:
        """The base's rows, their pixels in the new order."""
        found = self.base.gather(index, columns)
        images = found.get(self.rearranged)
        return found if images is None else found | {self.rearranged: self.rearrange(images)}

    def rearrange(self, images: Values) -> Values:
        """Moves the pixels of images (n, height, width, ...)."""
        if not isinstance(images, Tensor):
            raise ValueError(f"images in column {self.rearranged!r} are not of one size")
        first = _channels_first(images)
        flat = images.flatten(-2) if first else images.reshape(len(images), len(self.origin), -1)
        axis = flat.ndim - 1 if first else 1
        if flat.dtype == torch.uint8:
            # NumPy moves single bytes six times faster than index_select does. Its `take` leaves rows whole in memory,
            # which indexing does not: all that follows would go through the batch in strides.
            moved = torch.from_numpy(flat.numpy().take(self.places.numpy(), axis))
        else:
            moved = flat.index_select(axis, self.places)
        if len(self.outside):
            moved.index_fill_(axis, self.outside, 0)
        return moved.reshape(images.shape)

    def column(self, name: str) -> Values | None:
        """A whole column, except the images."""
        return None if name == self.rearranged else self.base.column(name)

    def _content(self, digest: Any) -> None:
        super()._content(digest)
        digest.update(self.rearranged.encode())
        hash_values(digest, self.origin)


class Noised(_View):
    """Images before a noisy background: each value is the lighter one of the image's and of noise of the row's own.

    The noise is uniform between black and a share of white. It depends on the seed and the row's number alone and is
    made when a row is read: the same in every epoch and process, and nothing is kept.

    Args:
        base: a table with a column of images, uint8 with white 255 or real numbers with white 1.
        column: the images.
        strength: share of white that the lightest noise has, in steps of 1/256.
        seed: of the noise.

    Raises:
        ValueError: a strength outside 0 to 1, or images of another kind.
    """

    def __init__(self, base: Table, column: str, strength: float, seed: int):
        super().__init__(base)
        if not 0 <= strength <= 1:
            raise ValueError(f"noise has a strength between 0 and 1 (black and white), not {strength}")
        image_size(base, column)
        self.noised, self.level, self.seed = column, round(256 * strength), seed
        self.gather(torch.zeros(1, dtype=torch.int64), [column])

    def gather(self, index: Tensor, columns: Sequence[str] | None = None) -> dict[str, Values]:
        """The base's rows, their images noised."""
        found = self.base.gather(index, columns)
        images = found.get(self.noised)
        if images is None:
            return found
        if not isinstance(images, Tensor) or not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise ValueError(f"images in column {self.noised!r} are neither bytes nor real numbers of one size")
        drawn = row_bytes(self.seed, index, images[0].numel()).reshape(images.shape)
        noise = ((drawn.int() * self.level) >> 8).to(images.dtype)
        return found | {self.noised: torch.maximum(images, noise if images.dtype == torch.uint8 else noise / 255)}

    def column(self, name: str) -> Values | None:
        """A whole column, except the images."""
        return None if name == self.noised else self.base.column(name)

    def _content(self, digest: Any) -> None:
        super()._content(digest)
        digest.update(f"{self.noised} {self.level} {self.seed}".encode())


def image_size(table: Table, column: str) -> tuple[int, int]:
    """Height and width of the images in a column.

    Raises:
        ValueError: there is no such column, or it holds no images of one size.
    """
    table.require(column)
    images = table.gather(torch.zeros(1, dtype=torch.int64), [column])[column]
    if not isinstance(images, Tensor) or images.ndim not in (3, 4):
        raise ValueError(f"column {column!r} holds no images of one size, (n, height, width) with or without channels")
    height, width = images.shape[-2:] if _channels_first(images) else images.shape[1:3]
    return height, width


def _channels_first(images: Tensor) -> bool:
    """Whether images (n, a, b, c) are (n, channels, height, width), as those of real numbers always are."""
    return images.ndim == 4 and (images.is_floating_point() or (images.shape[1] <= 4 < images.shape[3]))


class InARow(Table):
    """Tables with the same columns, one after another.

    Raises:
        ValueError: they have other columns.
    """

    def __init__(self, parts: Sequence[Table]):
        self.parts, self.columns = list(parts), parts[0].columns
        for part in parts:
            if set(part.columns) != set(self.columns):
                raise ValueError(f"tables with columns {self.columns} and {part.columns} cannot be put in a row")
        self.fixed = all(part.fixed for part in parts)
        self.in_memory = all(part.in_memory for part in parts)
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def gather(self, index: Tensor, columns: Sequence[str] | None = None) -> dict[str, Values]:
        """Rows of the parts, in the order asked for."""
        of = torch.bucketize(index, self.ends, right=True)
        order, pieces = [], []
        for number in of.unique().tolist():
            rows = (of == number).nonzero().flatten()
            order.append(rows)
            first = int(self.ends[number]) - len(self.parts[number])
            pieces.append(self.parts[number].gather(index[rows] - first, columns))
        back = torch.cat(order).argsort()
        return {name: _joined([piece[name] for piece in pieces], back) for name in columns or self.columns}

    def column(self, name: str) -> Values | None:
        """The columns of all parts."""
        found = [part.column(name) for part in self.parts]
        values = [one for one in found if one is not None]
        return None if len(values) < len(found) else _joined(values, torch.arange(len(self)))

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """Names of the first part's classes."""
        return self.parts[0].class_names(name)

    def _content(self, digest: Any) -> None:
        for part in self.parts:
            digest.update(part.fingerprint().encode())


def _joined(pieces: Sequence[Values], order: Tensor) -> Values:
    tensors = [piece for piece in pieces if isinstance(piece, Tensor)]
    if len(tensors) == len(pieces) and len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(tensors)[order]
    rows = [row for piece in pieces for row in piece]
    return [rows[i] for i in order.tolist()]
