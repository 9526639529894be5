"""Runs a method as the trainer does, and gives a test the very batches it saw, to re-derive its steps."""

import copy
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hubtransfer.data import Loader
from hubtransfer.methods import Method
from hubtransfer.training import Runtime, Trainer, TrainingArguments

QUIET: Mapping[str, Any] = {"progress": False, "plots": False, "evaluate": "no", "save": "no", "schedule": "constant"}


def settings(**changes: Any) -> TrainingArguments:
    """Plain SGD with a constant rate of 0.05 for 3 steps of 8 examples."""
    chosen = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.0, "steps": 3, "batch_size": 8, "output_dir": "none"}
    return TrainingArguments(**(chosen | dict(QUIET) | changes))


def run(method: Method, scenario: Any, **changes: Any) -> Trainer:
    """Trains a method through every stage."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(method, scenario, settings(output_dir=folder, **changes))
        trainer.train()
    return trainer


def batches(data: Any, steps: int = 3, batch_size: int = 8, processor: Any = None, stage: int = 0) -> list[Any]:
    """The first batches of a stage's data in the order of training."""
    loader = Loader(data, processor=processor, batch_size=batch_size, seed=0, stage=stage)
    found: list[Any] = []
    epoch = 0
    while len(found) < steps:
        found += list(loader.batches(epoch))
        epoch += 1
    return found[:steps]


def begin(method: Method, scenario: Any, stage: int = 0, **changes: Any) -> tuple[Runtime, Any]:
    """Readies one stage of a method and returns the runtime and the stage, for tests that apply updates one by one."""
    runtime = Runtime(method, settings(**changes))
    chosen = list(method.stages(scenario))[stage]
    if chosen.enter is not None:
        chosen.enter(runtime)
    runtime.begin(chosen, 100)
    runtime.set_step(0)
    return runtime, chosen


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: value.detach().clone() for name, value in _tensors(module).items()}


def changed(before: Mapping[str, Tensor], module: nn.Module) -> set[str]:
    """Names of the parameters and buffers that differ from a snapshot."""
    return {name for name, value in _tensors(module).items() if not torch.equal(before[name], value)}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def assert_same_parameters(one: nn.Module, two: nn.Module, tolerance: float = 1e-6) -> None:
    """Compares the parameters of two modules by name."""
    other = dict(two.named_parameters())
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(
            parameter, other[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def clone(module: nn.Module) -> Any:
    """A deep copy."""
    return copy.deepcopy(module)


def batches_of(stream: Any, item: Any, **how: Any) -> list[Any]:
    """The first batches of an item of a stream, where a method makes one stage of each item."""
    return batches(item.train_source, stage=list(stream).index(item), **how)
