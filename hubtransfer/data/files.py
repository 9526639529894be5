"""Arrays in files of other people's making, read without running anybody's code."""

from __future__ import annotations

import gzip
import importlib.util
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def need(module: str, package: str, install: str | None = None) -> Any:
    """The spec of an installed module; ImportError names the package that holds it, and how to install it."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        install = install or f"pip install {package} (or hubtransfer[offline])"
        raise ImportError(f"this data set is in the package {package}: {install}")
    return spec


def package_file(module: str, package: str, path: str, install: str | None = None) -> Path:
    """A file of an installed package, found without running the package's code."""
    for place in need(module, package, install).submodule_search_locations or ():
        if (Path(place) / path).is_file():
            return Path(place) / path
    raise ImportError(f"the installed {package} has no {path}; install another version of it")


def stored_array(file: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The one array in a file of Python objects, taken as bytes: opening such a file the usual way runs its code."""
    raw = gzip.decompress(file.read_bytes())
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    start = raw.find(b"B" + struct.pack("<I", size))  # "bytes of this length follow"
    if start < 0 or len(raw) < start + 5 + size:
        raise ValueError(f"{file.name} does not hold an array {shape} of {np.dtype(dtype)}")
    return np.frombuffer(raw, np.dtype(dtype).newbyteorder("<"), int(np.prod(shape)), start + 5).reshape(shape).copy()


def idx_pair(folder: Path, part: str) -> dict[str, Tensor]:
    """Images and labels of MNIST's ``part``, "train" or "t10k", from a folder of idx files, gzipped or not.

    Raises:
        ValueError: a file is missing, cut short, or another format.
    """
    images, labels = (_idx(_idx_file(folder, part, kind)) for kind in ("images", "labels"))
    return {"pixel_values": images, "labels": labels.long()}


def _idx(file: Path) -> Tensor:
    state = file.stat()
    return _read_idx(file, (state.st_mtime_ns, state.st_size))


def _idx_file(folder: Path, part: str, kind: str) -> Path:
    found = sorted(folder.glob(f"{part}-{kind}*idx?-ubyte*"))
    if not found:
        raise ValueError(f"{folder} has no {part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte(.gz)")
    return found[0]


@lru_cache(maxsize=8)  # a grid reads the same files in every cell
def _read_idx(file: Path, version: tuple[int, int]) -> Tensor:
    """An idx file: two zero bytes, type 8 (unsigned byte), number of axes, their big-endian lengths, the values."""
    raw = file.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{file.name} is no idx file of unsigned bytes")
    axes = raw[3]
    shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
    if len(raw) != 4 + 4 * axes + int(np.prod(shape)):
        raise ValueError(f"{file.name} is cut short: {len(raw)} bytes for shape {shape}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())
