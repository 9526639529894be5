"""Observers of a run: progress bar, log, tracker, plots. They never change what is trained."""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hubtransfer.methods.stage import Stage
    from hubtransfer.training.trainer import Trainer, TrainingResult

log = logging.getLogger(__name__)


class Callback:
    """Observes a run on the main process; override what is of interest."""

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Called once, after a checkpoint was loaded if there was one."""

    def on_stage_begin(self, trainer: "Trainer", stage: "Stage", steps: int) -> None:
        """Called before the first step of a stage that runs."""

    def on_log(self, trainer: "Trainer", row: Mapping[str, Any]) -> None:
        """Called with each row of the log: stage, step, epoch, learning rates, mean loss terms, numbers to watch."""

    def on_evaluate(self, trainer: "Trainer", row: Mapping[str, Any]) -> None:
        """Called with the metrics of each evaluation."""

    def on_save(self, trainer: "Trainer", folder: Path) -> None:
        """Called after a checkpoint is finished."""

    def on_train_end(self, trainer: "Trainer", result: "TrainingResult | None") -> None:
        """Called at the end; the result is `None` when an error ended the run."""


class JsonLines(Callback):
    """Writes `log.jsonl`; rows after the checkpoint that a run resumes from are dropped, so no step stands twice."""

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Cuts the log back to the point the run starts from."""
        self.path = Path(trainer.arguments.output_dir) / "log.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [line for line in _lines(self.path) if json.loads(line)["total"] <= trainer.cursor.total]
        draft = self.path.with_suffix(".draft")
        draft.write_text("".join(rows) if trainer.cursor.total else "")
        os.replace(draft, self.path)

    def on_log(self, trainer: "Trainer", row: Mapping[str, Any]) -> None:
        """Appends a row."""
        with self.path.open("a") as stream:
            stream.write(json.dumps(dict(row)) + "\n")

    on_evaluate = on_log


class Progress(Callback):
    """A bar with losses and remaining time on a terminal, a line each epoch elsewhere."""

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Opens the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        self.metrics = ""
        self.began = time.monotonic()
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.bar.start()

    def on_stage_begin(self, trainer: "Trainer", stage: "Stage", steps: int) -> None:
        """Adds a bar for the stage."""
        self.steps = steps
        self.line = self.bar.add_task(stage.name, total=steps, completed=trainer.cursor.step, facts=self.metrics)

    def on_log(self, trainer: "Trainer", row: Mapping[str, Any]) -> None:
        """Moves the bar."""
        facts = "  ".join(f"{name} {value:.4g}" for name, value in row["losses"].items())
        self.bar.update(self.line, completed=row["step"], facts=f"{facts}  {self.metrics}")
        self.facts = facts

    def on_evaluate(self, trainer: "Trainer", row: Mapping[str, Any]) -> None:
        """Shows the metrics; without a terminal prints one line."""
        shown = list(row["metrics"].items())[:2]
        self.metrics = "  ".join(f"{name} {value:.4g}" for name, value in shown)
        if not self.console.is_terminal:
            passed = time.monotonic() - self.began
            facts = getattr(self, "facts", "")
            print(
                f"{row['stage']} step {row['step']}/{self.steps}  {facts}  {self.metrics}  {passed:.0f} s", flush=True
            )

    def on_train_end(self, trainer: "Trainer", result: "TrainingResult | None") -> None:
        """Closes the bar."""
        self.bar.stop()


class Tracker(Callback):
    """Hands rows to whatever tracker the Accelerator was made with."""

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Opens the tracker under the name of the run's folder."""
        name = Path(trainer.arguments.output_dir).name
        trainer.runtime.accelerator.init_trackers(name, config={"method": trainer.method.name})

    def on_log(self, trainer: "Trainer", row: Mapping[str, Any]) -> None:
        """Logs losses, learning rates and what the method watches."""
        values = {f"loss/{k}": v for k, v in row["losses"].items()} | {f"lr/{k}": v for k, v in row["lr"].items()}
        values |= row.get("watched", {})
        trainer.runtime.accelerator.log(values, step=row["total"])

    def on_evaluate(self, trainer: "Trainer", row: Mapping[str, Any]) -> None:
        """Logs metrics."""
        trainer.runtime.accelerator.log({f"eval/{k}": v for k, v in row["metrics"].items()}, step=row["total"])

    def on_train_end(self, trainer: "Trainer", result: "TrainingResult | None") -> None:
        """Closes the tracker."""
        trainer.runtime.accelerator.end_training()


class Plots(Callback):
    """Draws learning curves, a confusion matrix for each classification task, and what a method watches."""

    def on_train_end(self, trainer: "Trainer", result: "TrainingResult | None") -> None:
        """Draws; without matplotlib it says what to install and goes on."""
        folder = Path(trainer.arguments.output_dir)
        rows = [json.loads(line) for line in _lines(folder / "log.jsonl")]
        if result is None or not rows:
            return
        try:
            from hubtransfer.evaluation import multitask_views, plots

            plots.learning_curves(rows, folder / "learning_curves.png")
            for name, tables in result.tables.items():
                if "confusion" in tables:
                    suffix = f"_{name}" if len(result.tables) > 1 else ""
                    plots.confusion_matrix(tables["confusion"], tables["names"], folder / f"confusion{suffix}.png")
            last: Mapping[str, float] = next((row["watched"] for row in reversed(rows) if row.get("watched")), {})
            if "stream" in result.record:
                from hubtransfer.evaluation import stream_plots

                stream_plots.accuracy_matrix(result.record["stream"], folder / "accuracy_matrix.png")
                stream_plots.retention(result.record["stream"], folder / "retention.png")
            for what, cells in plots.pair_tables(last).items():
                plots.pair_table(cells, folder / f"{what.replace(' ', '_')}.png", what)
            for what in multitask_views.watched_groups(rows):
                multitask_views.over_time(rows, folder / f"{what.replace(' ', '_')}_over_time.png", what)
        except ImportError as error:
            log.warning("no plots: %s", error)


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open() as stream:
        return [line for line in stream if line.endswith("\n")]  # a killed run may leave half a line
