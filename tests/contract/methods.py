"""Finds each registered method's test file and in it `example(dtype, seed, n) -> (method, scenario)`."""

import importlib
from collections.abc import Callable
from typing import Any

from hubtransfer.methods import Method
from hubtransfer.methods.registry import load_all

NAMES = [name for name, cls in load_all().items() if cls.__module__.startswith("hubtransfer.methods.")]

CONTINUAL = [name for name in NAMES if ".continual." in load_all()[name].__module__]

# Losses that compare the examples of one process's batch (`over_batch`) see other pairs in two halves of a batch: only
# losses that are means over examples are the same on one process and on two.
BY_EXAMPLE = [name for name in NAMES if not load_all()[name].over_batch]


def cls_of(name: str) -> type[Method]:
    """Returns a method's class."""
    return load_all()[name]


def example(name: str, **options: Any) -> tuple[Method, Any]:
    """Returns a fresh tiny method and its scenario."""
    family = cls_of(name).__module__.split(".")[2]
    module = importlib.import_module(f"tests.methods.{family}.test_{name}")
    make: Callable[..., tuple[Method, Any]] = module.example
    return make(**options)


def settings(name: str, folder: Any, **changes: Any) -> dict[str, Any]:
    """Returns short, quiet training arguments that every method accepts."""
    chosen = {"output_dir": str(folder), "steps": 3, "batch_size": 8, "optimizer": "sgd", "lr": 0.05}
    quiet = {"progress": False, "plots": False, "evaluate": "no", "save": "no"}
    return chosen | quiet | changes
