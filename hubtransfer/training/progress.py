"""Where a run is, and what it has seen since it last looked."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from hubtransfer.methods.update import Terms
from hubtransfer.training.runtime import Runtime


class NotFiniteError(ArithmeticError):
    """A loss became infinite or not a number."""


@dataclass
class Cursor:
    """Position in a run.

    Attributes:
        stage: Number of the stage.
        entered: Whether the stage's `enter` hook has run.
        step: Optimiser steps done in the stage.
        total: Optimiser steps done in all stages.
        best: Best value of the watched metric, `None` before the first evaluation. Along a stream it is the best of
            those that stand for as many learned tasks as the last one: an average over more tasks is another quantity.
        learned: Tasks of a stream of which `best` tells.
        best_here: Best value in the stage.
        waits: Evaluations of the stage since the metric last improved in it.
    """

    stage: int = 0
    entered: bool = False
    step: int = 0
    total: int = 0
    best: float | None = None
    learned: int = 0
    best_here: float | None = None
    waits: int = 0

    def next_stage(self) -> None:
        """Moves to the start of the next stage."""
        self.stage, self.entered, self.step, self.best_here, self.waits = self.stage + 1, False, 0, None, 0

    def judge(self, value: float, sign: int, learned: int) -> bool:
        """Takes up a value of the watched metric and says whether it is the best so far.

        Args:
            value: Just measured.
            sign: 1 if larger is better, -1 if smaller.
            learned: Tasks of a stream learned by now, the one in progress included; 0 elsewhere.
        """
        if self.best_here is None or sign * value > sign * self.best_here:
            self.best_here, self.waits = value, 0
        else:
            self.waits += 1
        if self.best is not None and learned == self.learned and sign * value <= sign * self.best:
            return False
        self.best, self.learned = value, learned
        return True

    def as_dict(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return asdict(self)


@dataclass
class Window:
    """The loss terms of the steps since the last look, kept on the device so that no step waits for the host."""

    runtime: Runtime
    steps: list[int] = field(default_factory=list)
    terms: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, step: int, terms: Terms) -> None:
        """Keeps the terms of one step."""
        self.steps.append(step)
        self.terms.append({name: term.detach() for name, term in terms.items()})

    def flush(self, where: str) -> dict[str, float]:
        """Returns the mean of each term over the window and all processes, and empties it.

        Raises:
            NotFiniteError: naming stage, first bad step and term.
        """
        means: dict[str, float] = {}
        bad: tuple[int, str, float] | None = None
        for name in dict.fromkeys(name for terms in self.terms for name in terms):
            steps = [step for step, terms in zip(self.steps, self.terms) if name in terms]
            values = torch.stack([terms[name].float() for terms in self.terms if name in terms])
            seen = self.runtime.reduce(values).tolist()
            means[name] = sum(seen) / len(seen)
            for step, value in zip(steps, seen):
                if not -float("inf") < value < float("inf") and (bad is None or step < bad[0]):
                    bad = (step, name, value)
        self.steps.clear()
        self.terms.clear()
        if bad is not None:
            step, name, value = bad
            raise NotFiniteError(
                f"{where}: loss term {name!r} is {value} at step {step}. Training stopped; the last checkpoint is "
                "whole. Lower lr, set clip_norm=1.0, or look at the data of that step."
            )
        return means
