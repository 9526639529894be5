"""A method's schedule as data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hubtransfer.data import Source

if TYPE_CHECKING:
    from hubtransfer.methods.update import Update
    from hubtransfer.training.runtime import Runtime

Hook = Callable[["Runtime"], None]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimiser and its learning rate over a stage. `None` leaves the value to the training arguments.

    Attributes:
        name: A torch or timm optimiser by name, such as "adamw", "sgd", "lamb".
        lr: Peak learning rate.
        weight_decay: Decoupled or L2 decay, whichever the optimiser applies.
        momentum: For optimisers that have one.
        schedule: "constant", "linear", "cosine", "one_cycle" or "step".
        warmup: Steps of linear warm-up; below 1 a share of the stage.
        milestones: For "step": steps at which the rate is multiplied by `decay`; below 1 shares of the stage.
        decay: Factor at each milestone.
        options: Any further keyword of the optimiser, such as betas.
    """

    name: str | None = None
    lr: float | None = None
    weight_decay: float | None = None
    momentum: float | None = None
    schedule: str | None = None
    warmup: float | None = None
    milestones: tuple[float, ...] | None = None
    decay: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def constant_adam(lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> OptimizerConfig:
    """Adam without decay at a constant rate, which many papers ask for beside the model's own optimiser."""
    return OptimizerConfig(name="adam", lr=lr, weight_decay=0.0, schedule="constant", options={"betas": betas})


@dataclass(frozen=True)
class Stage:
    """Runs its updates in order on each batch of its data, between `enter` and `exit`.

    Attributes:
        name: Shown in logs and errors; unique within one run.
        data: One source (losses get a `Batch`) or several by name (losses get a mapping of batches).
        updates: What happens on each batch.
        epochs: Passes over the data; `None` leaves the length to the training arguments.
        steps: Length in batches instead of epochs.
        until: Asked after each epoch; a true answer ends the stage early.
        enter: Runs before the first batch and before the optimisers are made: grow, freeze, copy, measure.
        exit: Runs after the last batch.
        when: Asked before `enter`; a false answer skips the stage.
        optimizers: The method's own choice for a group; the user's `groups` argument goes before it.
        measured: Whether the task's metrics tell how far the stage is. Where it learns something else, such as a
            generator, early stopping leaves it alone.
    """

    name: str
    data: Source | Mapping[str, Source]
    updates: Sequence["Update"]
    epochs: float | None = None
    steps: int | None = None
    until: Callable[["Runtime"], bool] | None = None
    enter: Hook | None = None
    exit: Hook | None = None
    when: Callable[[], bool] | None = None
    optimizers: Mapping[str, OptimizerConfig] = field(default_factory=dict)
    measured: bool = True

    @property
    def shape(self) -> str:
        """What happens on a batch, in words for messages: one update by its class, or how many there are."""
        if len(self.updates) == 1:
            return f"an update of another kind, {type(self.updates[0]).__name__}"
        return f"{len(self.updates)} updates a batch"

    def trains(self) -> tuple[str, ...]:
        """Returns the names of all groups that some update of the stage changes, each once."""
        return tuple(dict.fromkeys(group for update in self.updates for group in update.groups()))
