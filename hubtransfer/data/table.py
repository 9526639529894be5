"""One face over every kind of map-style data set."""

from __future__ import annotations

import difflib
import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubtransfer.data.seeds import seeded

Values = Tensor | list[Any]
"""Values of one column for some rows: a tensor where they have one shape, else a list (texts, images of many sizes)."""

Dataset = Any
"""A ``datasets.Dataset``, a map-style torch data set, or a mapping from column names to tensors, arrays or lists."""


FULL_HASH_BYTES = 2**30
"""Arrow tables above this size are hashed by a sample of their rows."""


class Table(ABC):
    """Rows and named columns; reading is always by a tensor of row numbers.

    Attributes:
        columns: names of the columns.
        fixed: whether a row always holds the same values. False when somebody's own code computes them at each
            reading (a torch data set, a ``datasets`` transform): it may be random, so nothing is kept. A torch data
            set that has an attribute ``fixed = True`` promises that it is not.
        in_memory: whether reading a row costs no more than copying it.
    """

    columns: tuple[str, ...]
    fixed: bool = True
    in_memory: bool = False

    @staticmethod
    def of(dataset: Dataset, where: str = "data set") -> Table:
        """Wrap a data set; a table is returned as it is.

        Raises:
            TypeError: this is no map-style data set.
            ValueError: it is empty, has no columns, or has columns of unequal lengths.
        """
        table = _wrap(dataset, where)
        if not table.columns:
            raise ValueError(f"{where}: no columns")
        if len(table) == 0:
            raise ValueError(f"{where} is empty (columns: {', '.join(table.columns)})")
        return table

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def gather(self, index: Tensor, columns: Sequence[str] | None = None) -> dict[str, Values]:
        """Values of the rows ``index`` (int64 ``(count,)``), for some columns or all."""

    @abstractmethod
    def column(self, name: str) -> Values | None:
        """A whole column, or None where that would mean computing every example."""

    @abstractmethod
    def _content(self, digest: Any) -> None:
        """Feed everything that distinguishes this table from another to ``digest``."""

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"{type(self).__name__} {len(self)}".encode())
        self._content(digest)
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the content; equal for equal content, in whatever order the columns were given.

        Of data that are not in memory (Arrow files above 1 GiB, somebody's own code) it covers the number of rows
        and a sample spread evenly over them.
        """
        return self._fingerprint

    def labels(self, name: str) -> Tensor | None:
        """All labels of one column, or None where they cannot be had without computing every example."""
        self.require(name)
        values = self.column(name)
        return None if values is None else as_labels(values, name)

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """Names of a label column's classes, where the data set knows them."""
        return None

    def require(self, name: str, where: str = "data set") -> None:
        """Raise ValueError naming the columns there are unless ``name`` is one of them."""
        require_column(name, self.columns, where)


class ArrayTable(Table):
    """Columns that are in memory already."""

    in_memory = True

    def __init__(self, data: Mapping[str, Any], where: str = "data set"):
        self.values: dict[str, Values] = {str(name): as_values(value) for name, value in data.items()}
        self.columns = tuple(self.values)
        self.classes: Sequence[str] = getattr(data, "classes", ())
        sizes = {name: len(value) for name, value in self.values.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{where} has columns of unequal lengths: {sizes}")

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def gather(self, index: Tensor, columns: Sequence[str] | None = None) -> dict[str, Values]:
        """Rows of the columns in memory."""
        return {name: take(self.values[name], index) for name in columns or self.columns}

    def column(self, name: str) -> Values:
        """The column itself."""
        return self.values[name]

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """Names that the mapping keeps as ``classes``."""
        return tuple(self.classes) or None

    def _content(self, digest: Any) -> None:
        for name in sorted(self.columns):
            digest.update(name.encode())
            hash_values(digest, self.values[name])


class HubTable(Table):
    """A ``datasets.Dataset``: columns are read from Arrow, image columns are decoded when they are read."""

    def __init__(self, data: Any, where: str = "data set"):
        self.where = where
        self.data = data.with_format(None)
        self.columns = tuple(data.column_names)
        self.images = {name for name, kind in data.features.items() if type(kind).__name__ == "Image"}

    def __len__(self) -> int:
        return len(self.data)

    def gather(self, index: Tensor, columns: Sequence[str] | None = None) -> dict[str, Values]:
        """Rows from Arrow; images come decoded."""
        names = list(columns or self.columns)
        pictures, plain = [n for n in names if n in self.images], [n for n in names if n not in self.images]
        found: dict[str, Values] = {}
        rows = index.tolist()
        if pictures:
            found |= {n: as_pixels(v) for n, v in self.data.select_columns(pictures)[rows].items()}
        if plain:
            found |= {n: as_values(v) for n, v in self.data.with_format("numpy", columns=plain)[rows].items()}
        return {name: found[name] for name in names}

    def column(self, name: str) -> Values | None:
        """The whole column, except images."""
        if name in self.images:
            return None
        return as_values(self.data.with_format("numpy", columns=[name])[:][name])

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """Names kept by a ``ClassLabel`` column."""
        names = getattr(self.data.features.get(name), "names", None)
        return tuple(names) if names else None

    def _content(self, digest: Any) -> None:
        data = self.data
        for name in sorted(self.images):
            feature = data.features[name]
            data = data.cast_column(name, type(feature)(decode=False))  # the encoded bytes are enough
        if self.data.data.nbytes > FULL_HASH_BYTES:
            data = data.select(spread(len(data), 8192))
        for name in sorted(self.columns):
            digest.update(f"{name} {self.data.features[name]}".encode())
            for rows in data.select_columns([name]).with_format("numpy").iter(1024):
                hash_values(digest, as_values(rows[name]))


class ItemTable(Table):
    """A map-style torch data set: ``data[i]`` gives a mapping, or a tuple of inputs and labels."""

    def __init__(self, data: Any, where: str = "data set"):
        self.data, self.where = data, where
        self.fixed = getattr(data, "fixed", False) is True
        self.columns: tuple[str, ...] = ()
        if len(data):
            with seeded(0):  # somebody's random transform must not move our generators
                self.columns = tuple(as_item(data[0], where))

    def __len__(self) -> int:
        return len(self.data)

    def gather(self, index: Tensor, columns: Sequence[str] | None = None) -> dict[str, Values]:
        """Computes the rows one by one, or together where the data set can."""
        fetch = getattr(self.data, "__getitems__", None)
        rows = index.tolist()
        items = fetch(rows) if callable(fetch) else [self.data[row] for row in rows]
        return collate([as_item(item, self.where) for item in items], columns or self.columns, self.where)

    def column(self, name: str) -> Values | None:
        """The labels that the data set keeps beside its examples; nothing else."""
        if name != "labels":
            return None
        values = _targets(self.data)
        return None if values is None else as_values(values)

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """Names that the data set keeps as ``classes``."""
        names = getattr(self.data, "classes", None)
        return tuple(map(str, names)) if name in ("labels", "label") and isinstance(names, (list, tuple)) else None

    def _content(self, digest: Any) -> None:
        own = getattr(self.data, "fingerprint", None)
        if callable(own):
            digest.update(str(own()).encode())
            return
        with seeded(0):
            for row in spread(len(self), 16):
                item = as_item(self.data[row], self.where)
                for name in sorted(item):
                    digest.update(name.encode())
                    hash_values(digest, as_values([item[name]]))


def require_column(name: str, columns: Sequence[str], where: str) -> None:
    """Raise ValueError naming the columns there are, and the nearest, unless ``name`` is one of them."""
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where} has no column {name!r}; it has: {', '.join(columns)}{hint}")


def _wrap(dataset: Dataset, where: str) -> Table:
    if isinstance(dataset, Table):
        return dataset
    hub = sys.modules.get("datasets")  # not imported: then the object cannot be one of its data sets
    if hub is not None:
        if isinstance(dataset, hub.DatasetDict):
            raise TypeError(f"{where} is a DatasetDict; pass one split of: {', '.join(dataset)}")
        if isinstance(dataset, hub.Dataset):
            return (ItemTable if dataset.format["type"] == "custom" else HubTable)(dataset, where)
    if isinstance(dataset, Mapping):
        return ArrayTable(dataset, where)
    if isinstance(dataset, torch.utils.data.TensorDataset):
        names = ["pixel_values", "labels"] if len(dataset.tensors) == 2 else _tuple_names(len(dataset.tensors))
        return ArrayTable(dict(zip(names, dataset.tensors)), where)
    if isinstance(dataset, (Tensor, np.ndarray, str, bytes)):
        raise TypeError(f"{where} is a {type(dataset).__name__}; pass a mapping from column names to such values")
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return ItemTable(dataset, where)
    raise TypeError(
        f"{where} is a {type(dataset).__name__}; expected a datasets.Dataset, a torch data set with __len__ and "
        "__getitem__, or a mapping from column names to tensors (an iterable data set goes into a DataStream)"
    )


def as_item(item: Any, where: str) -> dict[str, Any]:
    """One example as a mapping: tuples are ``(inputs, labels)``, a lone value is the input."""
    if isinstance(item, Mapping):
        return dict(item)
    if not isinstance(item, (tuple, list)):
        item = (item,)
    if not item:
        raise ValueError(f"{where}: an example is an empty {type(item).__name__}")
    names = _tuple_names(len(item))
    if isinstance(item[0], str):
        names[0] = "text"
    return dict(zip(names, item))


def _tuple_names(count: int) -> list[str]:
    return ["pixel_values", "labels", *(f"column_{i}" for i in range(2, count))][:count]


def collate(items: Sequence[Mapping[str, Any]], columns: Sequence[str], where: str) -> dict[str, Values]:
    """Columns of a list of examples; every example must have every column."""
    for item in items:
        missing = [name for name in columns if name not in item]
        if missing:
            raise ValueError(f"{where}: an example lacks {missing[0]!r}; it has: {', '.join(item)}")
    return {name: as_values([item[name] for item in items]) for name in columns}


def as_values(values: Any) -> Values:
    """A tensor where the values are numbers of one shape, else a list."""
    if isinstance(values, Tensor):
        return values
    if isinstance(values, np.ndarray):
        if values.dtype.kind in "biuf" and values.dtype != np.uint64:
            if values.dtype == np.float64:  # numpy's default, nobody's choice; a torch float64 tensor stays one
                values = values.astype(np.float32)
            return torch.from_numpy(values if values.flags.writeable else values.copy())
        return list(values) if values.dtype.kind == "O" else values.tolist()
    values = list(values)
    first = values[0] if values else None
    if isinstance(first, Tensor):
        return torch.stack(values) if all(v.shape == first.shape for v in values) else values
    if isinstance(first, np.ndarray):
        same = all(v.shape == first.shape and v.dtype == first.dtype for v in values)
        return as_values(np.stack(values)) if same else values
    if hasattr(first, "getbands"):  # a PIL image
        return as_pixels(values)
    if isinstance(first, (bool, int, float, list, np.generic)):
        try:
            array = np.asarray(values)
        except ValueError:  # lists of unequal lengths
            return values
        return as_values(array) if array.dtype.kind in "biuf" else values
    return values


def as_pixels(images: Sequence[Any]) -> Values:
    """PIL images as one uint8 tensor ``(n, h, w)`` or ``(n, h, w, 3)`` when their sizes agree, else as a list."""
    modes = {image.mode for image in images}
    if modes != {"L"}:
        # Palettes, alpha and ink channels would otherwise be read as colours
        images = [image if image.mode == "RGB" else image.convert("RGB") for image in images]
    if len({image.size for image in images}) > 1:
        return list(images)
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def as_labels(values: Values, name: str) -> Tensor:
    """Labels as a tensor: integers and booleans as int64, reals as float32.

    Raises:
        ValueError: labels are texts, or differ in shape.
    """
    if not isinstance(values, Tensor):
        if values and isinstance(values[0], str):
            raise ValueError(
                f"labels in column {name!r} are texts such as {values[0]!r}; number the classes first, "
                f"for a datasets.Dataset with class_encode_column({name!r})"
            )
        raise ValueError(f"labels in column {name!r} are no numbers of one shape, but e.g. {values[0]!r}")
    return values.float() if values.is_floating_point() else values.long()


def spread(size: int, count: int) -> list[int]:
    """At most ``count`` row numbers, evenly over ``size``, the first and the last among them."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).round().astype(int)).tolist()


def take(values: Values, index: Tensor) -> Values:
    """Rows of a column."""
    return values.index_select(0, index) if isinstance(values, Tensor) else [values[i] for i in index.tolist()]


def hash_values(digest: Any, values: Values) -> None:
    """Feed dtype, shape and bytes of values to a hash."""
    if isinstance(values, Tensor):
        digest.update(f"{values.dtype} {tuple(values.shape)}".encode())
        raw = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy())
        return
    for value in values:
        if hasattr(value, "getbands"):
            digest.update(f"{value.mode} {value.size}".encode() + value.tobytes())
        elif isinstance(value, (Tensor, np.ndarray)):
            hash_values(digest, torch.as_tensor(value))
        else:
            text = repr(value).encode()
            digest.update(f"{len(text)} ".encode() + text)


def _targets(data: Any) -> Any:
    """Labels that a torch data set keeps beside its examples (the torchvision convention), through subsets too."""
    if isinstance(data, torch.utils.data.Subset):
        values = _targets(data.dataset)
        return None if values is None else take(as_values(values), torch.as_tensor(data.indices))
    if getattr(data, "target_transform", None) is not None:
        return None
    values = getattr(data, "targets", None)
    return values if values is not None and len(values) == len(data) else None
