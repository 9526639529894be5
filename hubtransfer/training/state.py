"""What a checkpoint holds of a run, and how a run takes it up again."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtransfer.training import checkpoint, sharding
from hubtransfer.training.progress import Cursor

if TYPE_CHECKING:
    from hubtransfer.training.trainer import Trainer

log = logging.getLogger(__name__)


class RunState:
    """Writes a trainer's state to checkpoints and reads it back.

    A state is whole: method (buffers, memories and frozen networks included), growth logs, optimisers, gradient
    scaler, position, and every process's random numbers and place in its streams. Schedules need none, they are
    functions of the step.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer
        self.checkpoints = checkpoint.Checkpoints(trainer.folder / "checkpoints", trainer.arguments.keep)
        self._method_name = trainer.method.name or type(trainer.method).__name__  # sharding changes the class
        self._pending: dict[str, Any] | None = None

    def save(self) -> Path | None:
        """Writes a checkpoint; every process has to call it, and process 0 gets the folder."""
        trainer, runtime = self.trainer, self.trainer.runtime
        method, step = trainer.method, trainer.cursor.total
        optimizers = runtime.optimizers if trainer.cursor.entered else {}
        state = {
            "identity": self._identity(),
            "tasks": list(method.model.tasks),
            "cursor": trainer.cursor.as_dict(),
            "trained": sorted(trainer.trained),
            "history": trainer.history.as_dict() if trainer.history is not None else None,
            "growth": {"method": list(method.growth), "model": list(method.model.growth)},
            "method": sharding.method_state(method),
            "optimizers": {name: sharding.optimizer_state(method, o) for name, o in optimizers.items()},
            "scaler": runtime.accelerator.scaler.state_dict() if runtime.accelerator.scaler is not None else None,
        }
        if runtime.is_main:
            self.checkpoints.begin(step)
        runtime.wait()
        draft = self.checkpoints.draft(step)
        own = {"rng": checkpoint.rng_state(), "loader": trainer.loader.state_dict() if trainer.loader else {}}
        checkpoint.write_state(draft, f"process-{runtime.rank}", own)
        if runtime.is_main:
            checkpoint.write_state(draft, "state", state)
        runtime.wait()
        final = self.checkpoints.finish(draft) if runtime.is_main else None
        runtime.wait()
        return final

    def load(self, resume: str | None) -> None:
        """Takes up a run: "auto" the newest whole checkpoint if there is one, or the one at a path.

        Raises:
            ValueError: if there is none at the path, it is damaged, or it was made by another method, with other data
                or another number of processes.
        """
        folder = self._find(resume)
        if folder is None:
            return
        trainer, method = self.trainer, self.trainer.method
        state = checkpoint.read_state(folder, "state")
        for key, expected in self._identity().items():
            if state["identity"][key] != expected:
                raise ValueError(
                    f"checkpoint {folder} was made with {key} {state['identity'][key]}, this run has {expected}; "
                    "give the same, or another output_dir to start anew"
                )
        for owner, name in ((method, "method"), (method.model, "model")):
            for operation, keywords in state["growth"][name][len(owner.growth) :]:
                owner.grow(operation, **keywords)
        if state["tasks"] != list(method.model.tasks):  # their numbers are in buffers of methods
            raise ValueError(
                f"checkpoint {folder} was made with tasks {', '.join(state['tasks'])} in the model, this run has "
                f"{', '.join(method.model.tasks)}; add the same in the same order"
            )
        method.to(trainer.runtime.device)
        method.load_state_dict(state["method"])
        trainer.cursor = Cursor(**state["cursor"])
        trainer.trained = set(state["trained"])
        if trainer.history is not None and state["history"] is not None:
            trainer.history.load(state["history"])
        own = checkpoint.read_state(folder, f"process-{trainer.runtime.rank}")
        if trainer.cursor.entered:
            self._pending = {"optimizers": state["optimizers"], "scaler": state["scaler"], **own}
        else:
            checkpoint.set_rng_state(own["rng"])
        log.info("resuming from %s: stage %d, step %d", folder, trainer.cursor.stage, trainer.cursor.step)

    def restore_stage(self) -> None:
        """Gives optimisers, streams and random numbers their state back, once the resumed stage has made them."""
        if self._pending is None:
            return
        runtime = self.trainer.runtime
        if self.trainer.loader is not None:
            self.trainer.loader.load_state_dict(self._pending["loader"])
        for name, optimizer in runtime.optimizers.items():
            sharding.load_optimizer_state(self.trainer.method, optimizer, self._pending["optimizers"][name])
        if self._pending["scaler"] is not None and runtime.accelerator.scaler is not None:
            runtime.accelerator.scaler.load_state_dict(self._pending["scaler"])
        checkpoint.set_rng_state(self._pending["rng"])
        self._pending = None

    def _find(self, resume: str | None) -> Path | None:
        if resume is None or resume == "auto":
            return None if resume is None else self.checkpoints.newest_whole()
        folder = Path(resume)
        if not folder.is_dir():
            there = ", ".join(path.name for path in self.checkpoints.all()) or "none"
            raise ValueError(f"there is no checkpoint {resume}; this run has {there}")
        checkpoint.verify(folder)
        return folder

    def _identity(self) -> dict[str, Any]:
        """What has to be the same in the run that resumes."""
        sources = self.trainer.scenario.sources()
        data = {name: None if source.iterable else source.table.fingerprint() for name, source in sources.items()}
        return {
            "method": self._method_name,
            "processes": self.trainer.runtime.world,
            "data": data,
            "order of data": list(data),
        }
