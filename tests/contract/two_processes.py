"""What each of the two processes runs: every method for a few steps, in float64. Started by `torchrun`."""

import sys
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import save_file

from hubtransfer.training import Trainer, TrainingArguments
from tests.contract.methods import BY_EXAMPLE, example, settings
from tests.tiny import tiny_data
from tests.training.toys import Explicit, Growing, LookAhead, Plain, Ranked, TwoPlayers, make


def tensors(method: nn.Module) -> dict[str, torch.Tensor]:
    """Returns every parameter and buffer of the method."""
    named = [*method.named_parameters(), *method.named_buffers()]
    return {name: value.detach().clone().contiguous() for name, value in named}


def run(folder: Path, batch_size: int) -> None:
    """Trains every method and toy and writes its final state as `<name>.safetensors`."""
    from hubtransfer.data import SingleTask, TaskStream

    torch.set_num_threads(1)
    cases = {name: example(name, dtype=torch.float64) for name in BY_EXAMPLE}
    data = tiny_data(32, dtype=torch.float64)
    for cls in (Plain, Explicit, Ranked, TwoPlayers, LookAhead):
        cases[f"toy_{cls.__name__}"] = (make(cls, torch.float64), SingleTask(data))
    stream = [SingleTask(tiny_data(16, seed=s, dtype=torch.float64), name=f"t{s}") for s in (1, 2)]
    cases["toy_Growing"] = (make(Growing, torch.float64), TaskStream(stream, kind="domain"))
    for name, (method, scenario) in cases.items():
        method.double()
        options = settings(name, folder / "runs" / name, batch_size=batch_size, steps=4, lr=0.02)
        trainer = Trainer(method, scenario, TrainingArguments(**options))
        trainer.train()
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
