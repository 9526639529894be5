"""What a person chooses about a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from hubtransfer.functional.schedules import check_schedule
from hubtransfer.methods.stage import OptimizerConfig

When = Literal["epoch", "stage", "no"] | int


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """How long, how fast, how often to look and to save.

    Attributes:
        output_dir: Folder of the run: log, checkpoints, plots, the trained model.
        epochs: Passes over the data of each stage that does not set its own length (3 if `steps` is not given either).
        steps: Optimiser steps of each such stage instead of epochs.
        batch_size: Examples a batch on each process.
        eval_batch_size: Examples a batch in evaluation (default: twice `batch_size`).
        accumulation: Batches whose gradients are averaged before one optimiser step.
        precision: "fp32", "bf16" or "fp16" autocast; weights stay in fp32.
        clip_norm: Largest L2 norm of the gradient of a group.
        optimizer: A torch or timm optimiser by name.
        lr: Peak learning rate.
        weight_decay: Weight decay.
        momentum: For optimisers that have one.
        schedule: "constant", "linear", "cosine", "one_cycle" or "step".
        warmup: Steps of linear warm-up; below 1 a share of the stage.
        milestones: Steps (below 1: shares of the stage) at which the "step" schedule drops.
        decay: Factor of each drop.
        options: Further keywords of the optimiser.
        groups: For a group of the method by name, whatever differs: `{"critic": {"lr": 1e-4}}`.
        seed: Seed of every random number of the run.
        evaluate: When to evaluate: after each "epoch", each "stage", every n steps, or "no".
        save: When to write a checkpoint, likewise.
        keep: Checkpoints kept, the newest ones.
        best_metric: Metric by which `best/` is chosen (default: the first one the evaluation gives). Along a stream
            `best/` starts afresh with each task, so that in the end it is the best of the last task's evaluations.
        best_mode: Whether larger ("max") or smaller ("min") is better.
        early_stopping: Evaluations without improvement within a stage after which it ends. Stages of which metrics
            tell nothing (`Stage.measured`: a generator's, a hint's) run their whole length.
        resume: "auto" goes on from the newest whole checkpoint, a path from that one.
        logging_steps: Steps between rows of the log.
        tracker: Name of an Accelerate tracker, such as "tensorboard" or "wandb".
        progress: Whether to show a progress bar.
        plots: Whether to draw learning curves and confusion matrices (needs matplotlib).
        workers: Worker processes for data that does not fit into memory.
    """

    output_dir: str = "runs/latest"
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 64
    eval_batch_size: int | None = None
    accumulation: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    clip_norm: float | None = None
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup: float = 0.0
    milestones: tuple[float, ...] = ()
    decay: float = 0.1
    options: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, OptimizerConfig] = field(default_factory=dict)
    seed: int = 0
    evaluate: When = "epoch"
    save: When = "epoch"
    keep: int = 2
    best_metric: str | None = None
    best_mode: Literal["max", "min"] = "max"
    early_stopping: int | None = None
    resume: str | None = None
    logging_steps: int = 10
    tracker: str | None = None
    progress: bool = True
    plots: bool = True
    workers: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the argument and what it may be.
        """
        for name in ("batch_size", "accumulation", "logging_steps", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("epochs", "steps", "clip_norm", "early_stopping", "eval_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"give epochs or steps, not both: got epochs={self.epochs} and steps={self.steps}")
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"precision must be 'fp32', 'bf16' or 'fp16', got {self.precision!r}")
        for name in ("evaluate", "save"):
            value = getattr(self, name)
            if value not in ("epoch", "stage", "no") and not (isinstance(value, int) and value > 0):
                raise ValueError(f"{name} must be 'epoch', 'stage', 'no' or a number of steps, got {value!r}")
        check_schedule(self.schedule)
        groups = {k: v if isinstance(v, OptimizerConfig) else OptimizerConfig(**v) for k, v in self.groups.items()}
        object.__setattr__(self, "groups", groups)

    def optimizer_for(self, group: str, stage_choice: OptimizerConfig | None) -> OptimizerConfig:
        """Returns the full optimiser configuration of a group: the user's word, then the stage's, then the defaults."""
        chosen = OptimizerConfig(
            name=self.optimizer,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            schedule=self.schedule,
            warmup=self.warmup,
            milestones=self.milestones,
            decay=self.decay,
            options=self.options,
        )
        for layer in (stage_choice, self.groups.get(group)):
            if layer is not None:
                given = {f.name: getattr(layer, f.name) for f in fields(layer)}
                options = given.pop("options")
                if given["name"] not in (None, chosen.name):
                    chosen = replace(chosen, options={})  # keywords of another optimiser do not carry over
                given = {k: v for k, v in given.items() if v is not None}
                chosen = replace(chosen, **given, options={**chosen.options, **options})
        return chosen


def due(when: When, step: int) -> bool:
    """Whether something that is wanted every so many steps is wanted after this one."""
    return isinstance(when, int) and step % when == 0
