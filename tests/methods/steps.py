"""Runs a method as the trainer does, and gives a test the very batches it saw, to re-derive its steps."""

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hubtransfer.data import Loader
from hubtransfer.data.memory import Memory
from hubtransfer.methods import Method
from hubtransfer.training import Checkpoints, Runtime, Trainer, TrainingArguments

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
    """A copy of every parameter and buffer, and of what else is saved (what a memory has counted)."""
    return {name: value.detach().clone() for name, value in _tensors(module).items()}


def changed(before: Mapping[str, Tensor], module: nn.Module) -> set[str]:
    """Names of what differs from a snapshot, or came since."""
    now = _tensors(module)
    return {name for name, value in now.items() if name not in before or not torch.equal(before[name], value)}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    known = {id(value) for value in named.values()}
    saved = {name: v for name, v in module.state_dict(keep_vars=True).items() if id(v) not in known}
    return named | {name: v for name, v in saved.items() if not name.endswith("_extra_state")}  # caches: no change


def gradients_of(loss: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """One gradient for each parameter, zero where the loss does not depend on it."""
    parameters = list(parameters)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]


@torch.no_grad()
def move(parameters: Iterable[Tensor], gradients: Iterable[Tensor], lr: float = 0.05) -> None:
    """A step of plain SGD by hand."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.sub_(lr * gradient)


def descend(parameters: Iterable[Tensor], loss: Tensor, lr: float = 0.05) -> None:
    """A step of plain SGD on a loss, by hand."""
    parameters = list(parameters)
    move(parameters, gradients_of(loss, parameters), lr)


def watch_draws(memory: Memory) -> list[Tensor | None]:
    """Has a memory note the slots of each draw, `None` where it had none to give, in a list that fills as it draws."""
    slots: list[Tensor | None] = []

    def draws(count: int, times: int, original: Any = memory.draws) -> Any:
        found = original(count, times)
        slots.extend(None if replay is None else replay.slots for replay in found)
        return found

    memory.draws = draws  # type: ignore[method-assign]  # `draw` goes through it
    return slots


def assert_resumes_anywhere(
    make: Callable[[], tuple[Method, Any]], folder: Path, arguments: TrainingArguments | None = None
) -> list[Path]:
    """Checks that training cut after any step and resumed ends with the same bits; returns the checkpoints."""
    arguments = settings(steps=2) if arguments is None else arguments
    whole, scenario = make()
    Trainer(whole, scenario, replace(arguments, output_dir=str(folder / "whole"), save=1, keep=100)).train()
    checkpoints = Checkpoints(folder / "whole" / "checkpoints").all()
    expected = whole.state_dict()
    for checkpoint in checkpoints:
        again, scenario = make()
        Trainer(again, scenario, replace(arguments, output_dir=str(folder / "again"))).train(resume=str(checkpoint))
        found = again.state_dict()
        assert found.keys() == expected.keys()
        different = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not different, f"resumed from {checkpoint.name}: {different}"
    return checkpoints


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
