"""What each of the two processes runs: every method for a few steps, in float64. Started by `torchrun`."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save_file

from hubtransfer.data.memory import Memory
from hubtransfer.training import Trainer, TrainingArguments
from tests.contract.methods import BY_EXAMPLE, cls_of, example, settings
from tests.methods.multitask.tasks import model_with, shared_data, two_headed
from tests.tiny import tiny_data
from tests.training.toys import Explicit, Growing, LookAhead, Plain, Ranked, TwoPlayers, make

SETTINGS = {
    "grad_norm static": ("grad_norm", {"static": True}),
    "mgda l2": ("mgda", {"normalization": "l2"}),
    "mgda loss+": ("mgda", {"normalization": "loss+"}),
}
OWN_DATA = ("fixed_weights", "mgda", "grad_norm")
SOME_LABELS = ("fixed_weights", "uncertainty", "mgda_ub", "grad_norm", "ensemble")
TASKS = ("left", "right", "size")


def own_data():
    """A data set a task."""
    from hubtransfer.data import MultiTask

    return MultiTask(
        datasets={
            "left": tiny_data(24, 3, dtype=torch.float64),
            "right": tiny_data(16, 2, seed=1, dtype=torch.float64),
        }
    )


def some_labels():
    """Shared inputs of which few have labels: so few of "right" that the processes rarely know equally many."""
    from hubtransfer.data import MultiTask

    data = shared_data(32, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    for task, share, marker in (("left", 0.6, -100), ("right", 0.15, -100), ("size", 0.4, float("nan"))):
        data[task] = torch.where(torch.rand(32, generator=generator) < share, data[task], marker)
    return MultiTask(train={n: data[n] for n in ("pixel_values", *TASKS)}, labels={t: t for t in TASKS})


def multi_task_cases():
    """Several tasks with labels that some processes lack, with data of their own, and under further settings."""
    cases = {label: (cls_of(n)(two_headed(torch.float64), **c), example(n, dtype=torch.float64)[1])
             for label, (n, c) in SETTINGS.items()}  # fmt: skip
    for name in OWN_DATA:
        cases[f"{name} own data"] = (cls_of(name)(two_headed(torch.float64)), own_data())
    for name in SOME_LABELS:
        torch.manual_seed(0)  # an ensemble draws further heads
        cases[f"{name} some labels"] = (cls_of(name)(model_with(TASKS, torch.float64)), some_labels())
    return cases


MULTI_TASK = [*SETTINGS, *(f"{n} own data" for n in OWN_DATA), *(f"{n} some labels" for n in SOME_LABELS)]


def tensors(method: nn.Module) -> dict[str, torch.Tensor]:
    """Returns every parameter and buffer of the method."""
    named = [*method.named_parameters(), *method.named_buffers()]
    return {name: value.detach().clone().contiguous() for name, value in named}


def memories(method: nn.Module) -> list[Memory]:
    """Returns the memories of examples that a method has."""
    return [module for module in method.modules() if isinstance(module, Memory)]


REMEMBERING = [name for name in BY_EXAMPLE if memories(example(name)[0])]


def noted(method: nn.Module) -> dict[str, torch.Tensor]:
    """Has a method's memory, if any, note its whole state after each addition, as `<number>.<what>`."""
    states: dict[str, torch.Tensor] = {}
    for memory in memories(method):

        def add(*batch: Any, add: Any = memory.add, memory: Memory = memory, **kept: Any) -> None:
            add(*batch, **kept)
            number = sum(key.endswith(".facts") for key in states)
            for key, value in memory.state_dict().items():
                states[f"{number}.{key}"] = value.detach().clone().contiguous()

        memory.add = add  # type: ignore[method-assign]
    return states


def run(folder: Path, batch_size: int) -> None:
    """Trains every method and toy; writes its final state as `<name>.safetensors`, and what each process remembers."""
    from hubtransfer.data import SingleTask, TaskStream

    torch.set_num_threads(1)
    cases = {name: example(name, dtype=torch.float64) for name in BY_EXAMPLE}
    data = tiny_data(32, dtype=torch.float64)
    for cls in (Plain, Explicit, Ranked, TwoPlayers, LookAhead):
        cases[f"toy_{cls.__name__}"] = (make(cls, torch.float64), SingleTask(data))
    stream = [SingleTask(tiny_data(16, seed=s, dtype=torch.float64), name=f"t{s}") for s in (1, 2)]
    cases["toy_Growing"] = (make(Growing, torch.float64), TaskStream(stream, kind="domain"))
    cases |= multi_task_cases()
    for name, (method, scenario) in cases.items():
        method.double()
        options = settings(name, folder / "runs" / name, batch_size=batch_size, steps=4, lr=0.02)
        trainer, states = Trainer(method, scenario, TrainingArguments(**options)), noted(method)
        trainer.train()
        if states:
            save_file(states, folder / f"{name} remembers {trainer.runtime.rank}.safetensors")
        if trainer.runtime.is_main:
            save_file(tensors(method), folder / f"{name}.safetensors")
            (folder / "world").write_text(str(trainer.runtime.world))
        trainer.runtime.wait()
    bank(folder, batch_size)


def bank(folder: Path, batch_size: int) -> None:
    """Trains the method with a memory of all examples and writes what each process remembers."""
    method, scenario = example("crd", dtype=torch.float64)
    trainer = Trainer(
        method, scenario, TrainingArguments(**settings("crd", folder / "runs" / "bank", batch_size=batch_size))
    )
    trainer.train()
    save_file(
        {name: t.contiguous() for name, t in method.bank.state_dict().items()},
        folder / f"bank{trainer.runtime.rank}.safetensors",
    )
    trainer.runtime.wait()


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
