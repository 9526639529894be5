"""One short loop over stages and batches. It names no method."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from hubtransfer.data import Loader, Memory, Source
from hubtransfer.data.loader import in_groups
from hubtransfer.methods.method import Method
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.update import AnyBatch, Terms
from hubtransfer.models import OutputCache, card
from hubtransfer.models.record import attach
from hubtransfer.training import checkpoint
from hubtransfer.training.arguments import TrainingArguments, due
from hubtransfer.training.callbacks import Callback, JsonLines, Plots, Progress, Tracker
from hubtransfer.training.check import check_data, check_scenario
from hubtransfer.training.evaluate import EvaluationSets, Tables, evaluate
from hubtransfer.training.history import TaskHistory, item_of, kept_bytes
from hubtransfer.training.progress import Cursor, Window
from hubtransfer.training.record import run_record
from hubtransfer.training.runtime import Runtime
from hubtransfer.training.state import RunState
from hubtransfer.training.views import Views

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """What a run gave.

    Attributes:
        metrics: Metrics of the last evaluation.
        tables: Confusion matrix, per-class table and the like, by data set.
        steps: Optimiser steps of all stages.
        seconds: Wall-clock time of this call.
        output_dir: Folder of the run; the trained model is in `output_dir/model`.
        record: What really ran, as written to `output_dir/results.json`.
    """

    metrics: dict[str, float]
    tables: Tables
    steps: int
    seconds: float
    output_dir: Path
    record: dict[str, Any] = field(repr=False)


class Trainer:
    """Trains a method on a scenario.

    Args:
        method: What to train.
        scenario: The data.
        arguments: How long, how fast, how often to look and to save.
        callbacks: Observers besides the progress bar, the log and the plots.

    Raises:
        TypeError: if the method does not train on this kind of scenario.
    """

    def __init__(
        self,
        method: Method,
        scenario: Any,
        arguments: TrainingArguments | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.method, self.scenario = method, scenario
        self.arguments = arguments if arguments is not None else TrainingArguments()
        check_scenario(method, scenario)
        self.runtime = Runtime(method, self.arguments)
        self.cursor = Cursor()
        self.trained: set[str] = set()  # parameters that learn in some stage, by name
        self.loader: Loader | None = None
        self._evaluated: tuple[int, dict[str, float], Tables] | None = None
        self._owed = False  # a look that was due at the stage's last step
        self.folder = Path(self.arguments.output_dir)
        self.history = TaskHistory.of(scenario)
        self.state = RunState(self)
        self.callbacks = [*self._default_callbacks(), *callbacks] if self.runtime.is_main else []
        self._window = Window(self.runtime)
        self._evaluation = EvaluationSets(self._evaluation_loader)

    # ---------------------------------------------------------------- the loop

    def train(self, resume: str | None = None) -> TrainingResult:
        """Runs every stage.

        Args:
            resume: "auto" goes on from the newest whole checkpoint in the run's folder, if there is one; a path goes
                on from that checkpoint; `None` asks the training arguments.

        Returns:
            Metrics, tables and a record of what ran.

        Raises:
            ValueError: for data, labels or checkpoints that do not fit, before any step is taken.
            NotFiniteError: if a loss is infinite or not a number; the last checkpoint stays as it was.
        """
        began = time.monotonic()
        set_seed(self.arguments.seed, device_specific=True)
        for module in self.method.modules():
            if isinstance(module, Memory):
                module.set_seed(self.arguments.seed)
        check_data(self.method, self.scenario)
        self.state.load(resume or self.arguments.resume)
        result = None
        try:
            self._tell("on_train_begin")
            if self.history is not None and self.history.baseline is None and self.arguments.evaluate != "no":
                self.history.begin(self._metrics(brief=True)[0])
            remaining = self._remaining()
            now = next(remaining, None)
            while now is not None:
                self._run(*now)
                following = next(remaining, None)
                self._close(now[1], following)
                now = following
            result = self._finish(began)
        finally:
            self._tell("on_train_end", result)
        return self._publish(result)

    def _remaining(self) -> Iterator[tuple[int, Stage]]:
        """Yields the stages still to run, numbered among all; each is made when the one before has done its work."""
        for number, stage in enumerate(self.method.stages(self.scenario)):
            resumed = self.cursor.entered and number == self.cursor.stage
            if number >= self.cursor.stage and (resumed or stage.when is None or stage.when()):
                yield number, stage

    def _run(self, number: int, stage: Stage) -> None:
        self._owed = False
        if not self.cursor.entered:
            while self.cursor.stage < number:  # over those that are skipped
                self.cursor.next_stage()
            self._evaluated = None
            if stage.enter is not None:
                stage.enter(self.runtime)
            self.cursor.entered = True
        loader = self.loader = self._loader(stage)
        per_epoch, total = self._length(stage, loader)
        self.runtime.begin(stage, total)
        self.trained |= {name for name, p in self.method.model.named_parameters() if p.requires_grad}
        self.state.restore_stage()
        self._tell("on_stage_begin", stage, total)
        if self.history is not None:
            self.history.start()
        try:
            self._steps(stage, loader, per_epoch, total, self._where(stage))
        finally:
            self.runtime.end()
        if stage.exit is not None:
            stage.exit(self.runtime)
            self._evaluated = None
        if self.history is not None:
            self.history.stop()

    def _close(self, stage: Stage, following: tuple[int, Stage] | None) -> None:
        """Looks and saves after a stage; along a stream it looks where a task is learned, which gives a row."""
        wanted = self.arguments.evaluate == "stage"
        if self.history is not None and self.arguments.evaluate != "no":
            wanted = following is None or item_of(stage, self.scenario) != item_of(following[1], self.scenario)
        fresh = self._evaluated is not None and self._evaluated[0] == self.cursor.total
        if self._owed or (wanted and not fresh):
            self._evaluate(stage)
        self.cursor.next_stage()
        if self.arguments.save != "no":
            self._save(self._where(stage))

    def _steps(self, stage: Stage, loader: Loader, per_epoch: int, total: int, where: str) -> None:
        cursor, accumulation = self.cursor, self.arguments.accumulation
        while cursor.step < total:
            epoch, offset = divmod(cursor.step, per_epoch)
            batches = loader.batches(epoch, start=offset * accumulation)
            for micro_batches in islice(in_groups(batches, accumulation), total - cursor.step):
                self.runtime.set_step(cursor.step)
                terms: Terms = {}
                for number, batch in enumerate(micro_batches):
                    self.runtime.set_micro_batch(number, len(micro_batches))
                    terms = self._step(stage, batch)
                cursor.step += 1
                cursor.total += 1
                self._window.add(cursor.step, terms)
                if cursor.step % self.arguments.logging_steps == 0:
                    self._log(stage, per_epoch, where)
                if due(self.arguments.evaluate, cursor.step):
                    self._look(stage, total)
                # What an epoch's end decides (evaluation, stopping) has to be in the checkpoint made there.
                if due(self.arguments.save, cursor.step) and cursor.step % per_epoch and cursor.step < total:
                    self._save(where, stage, per_epoch)
            self._log(stage, per_epoch, where)
            self._share_outputs()
            if loader.steps_per_epoch is None and cursor.step < total:
                if cursor.step == 0:
                    raise ValueError(f"{where}: the stream gave no batch; give an example for each process")
                log.warning("%s: the stream ended after %d of %d steps", where, cursor.step, total)
                return
            if self.arguments.evaluate == "epoch":
                self._look(stage, total)
            if stage.until is not None and stage.until(self.runtime):
                return
            patience = self.arguments.early_stopping if stage.measured else None
            if patience is not None and cursor.waits >= patience:
                log.info("%s: no improvement for %d evaluations, stopping early", where, cursor.waits)
                return
            saves = self.arguments.save == "epoch" or due(self.arguments.save, cursor.step)
            if saves and cursor.step < total:
                self._save(where)

    def _share_outputs(self) -> None:
        """Tells the other processes what this one had a frozen network compute, for in the next epoch it is theirs."""
        for module in self.method.modules():
            if isinstance(module, OutputCache):
                module.share()

    def _step(self, stage: Stage, batch: AnyBatch) -> Terms:
        if len(stage.updates) == 1:
            return stage.updates[0].apply(batch, self.runtime)
        terms: Terms = {}
        for update in stage.updates:
            prefix = "+".join(update.groups())
            terms |= {f"{prefix}/{name}": term for name, term in update.apply(batch, self.runtime).items()}
        return terms

    # ---------------------------------------------------------------- data

    def _loader(self, stage: Stage) -> Loader:
        return Loader(
            stage.data,
            processor=self.method.model.processor,
            batch_size=self.arguments.batch_size,
            seed=self.arguments.seed,
            stage=self.cursor.stage,
            rank=self.runtime.rank,
            world=self.runtime.world,
            workers=self.arguments.workers,
            device=self.runtime.device,
        )

    def _length(self, stage: Stage, loader: Loader) -> tuple[int, int]:
        """Returns optimiser steps an epoch and of the stage."""
        batches = loader.steps_per_epoch
        steps, epochs = stage.steps, stage.epochs
        if steps is None and epochs is None:
            steps, epochs = self.arguments.steps, self.arguments.epochs
        if batches is None:
            if steps is None:
                raise ValueError(f"stage {stage.name!r} reads a stream without an end: set steps instead of epochs")
            return steps, steps
        per_epoch = -(-batches // self.arguments.accumulation)
        return per_epoch, steps if steps is not None else max(1, round((3 if epochs is None else epochs) * per_epoch))

    # ---------------------------------------------------------------- looking

    def evaluate(self) -> dict[str, float]:
        """Returns the metrics of the scenario's evaluation sets; names them where there are several.

        Raises:
            ValueError: if the scenario has none.
        """
        metrics, _ = self._metrics(brief=False)
        if not metrics:
            raise ValueError(f"{type(self.scenario).__name__} has no evaluation set; give it evaluation=<data set>")
        return metrics

    def _metrics(self, brief: bool) -> tuple[dict[str, float], Tables]:
        state = checkpoint.rng_state()  # worker processes draw a seed; training must not notice
        try:
            return evaluate(self.runtime, self.scenario.evaluations(), self._evaluation, brief)
        finally:
            checkpoint.set_rng_state(state)

    def _evaluation_loader(self, source: Source) -> Loader:
        return Loader(
            source,
            processor=self.method.model.processor,
            batch_size=self.arguments.eval_batch_size or 2 * self.arguments.batch_size,
            seed=self.arguments.seed,
            shuffle=False,
            workers=self.arguments.workers,
            device=self.runtime.device,
        )

    def _look(self, stage: Stage, total: int) -> None:
        """Evaluates within a stage; after its last step that waits for what the stage's end does to the model."""
        if self.history is not None and stage.exit is not None and self.cursor.step == total:
            self._owed = True
        else:
            self._evaluate(stage)

    def _evaluate(self, stage: Stage) -> None:
        if self.history is not None:
            self.history.stop()
        metrics, tables = self._metrics(brief=self.history is not None)
        if self.history is not None:
            self.history.note(stage, self.scenario, metrics, kept_bytes(self.method), self.cursor.total)
            metrics = self.history.metrics(metrics) | metrics
            self.history.start()
        self._evaluated = (self.cursor.total, metrics, tables)
        if not metrics:
            return
        watched = self.arguments.best_metric or next(iter(metrics))
        if watched not in metrics:
            raise ValueError(f"best_metric {watched!r} is not among the metrics: {', '.join(metrics)}")
        sign = 1 if self.arguments.best_mode == "max" else -1
        improved = self.cursor.judge(metrics[watched], sign, 0 if self.history is None else len(self.history.rows))
        wanted = self.arguments.best_metric is not None or self.arguments.early_stopping is not None
        if improved and wanted:
            model = self.runtime.plain_method().model
            if self.runtime.is_main:
                model.save_pretrained(self.folder / "best")
        position = {"stage": stage.name, "step": self.cursor.step, "total": self.cursor.total}
        self._tell("on_evaluate", {**position, "metrics": metrics})

    def _log(self, stage: Stage, per_epoch: int, where: str) -> None:
        if not self._window.steps:
            return
        losses = self._window.flush(where)
        rates = {name: optimizer.param_groups[-1]["lr"] for name, optimizer in self.runtime.optimizers.items()}
        watched = self.runtime.mean_of(self.method.watched())
        row = {
            "stage": stage.name,
            "step": self.cursor.step,
            "total": self.cursor.total,
            "epoch": round(self.cursor.step / per_epoch, 4),
            "losses": losses,
            "lr": rates,
        }
        self._tell("on_log", row | ({"watched": watched} if watched else {}))

    # ---------------------------------------------------------------- saving

    def _save(self, where: str, stage: Stage | None = None, per_epoch: int = 1) -> None:
        if self._window.steps:  # nothing that is not finite may reach a checkpoint
            if stage is not None:
                self._log(stage, per_epoch, where)
            else:
                self._window.flush(where)
        folder = self.state.save()
        if folder is not None:
            self._tell("on_save", folder)

    def _finish(self, began: float) -> TrainingResult:
        if self._evaluated is None or self._evaluated[0] != self.cursor.total:
            metrics, tables = self._metrics(brief=self.history is not None)
            metrics = metrics if self.history is None else self.history.metrics(metrics) | metrics
            self._evaluated = (self.cursor.total, metrics, tables)
        _, metrics, tables = self._evaluated
        seconds = time.monotonic() - began
        record = run_record(self, metrics, seconds)
        return TrainingResult(metrics, tables, self.cursor.total, seconds, self.folder, record)

    def _publish(self, result: TrainingResult) -> TrainingResult:
        """Writes the results file and the model with its card."""
        model = self.runtime.plain_method().model
        if self.runtime.is_main and self.arguments.save != "no":
            result.record["plots"] = [file.name for file in sorted(self.folder.glob("*.png"))]
            draft = self.folder / ".results.json"
            draft.write_text(json.dumps(result.record, indent=1))
            os.replace(draft, self.folder / "results.json")
            attach(model, result.record)
            folder = model.save_pretrained(self.folder / "model")
            for name in result.record["plots"]:
                shutil.copyfile(self.folder / name, folder / name)
            card.write(folder, model, run=result.record)  # once more, now that the pictures lie beside it
        self.runtime.wait()
        return result

    # ---------------------------------------------------------------- helpers

    def arguments_as_dict(self) -> dict[str, Any]:
        """Returns the training arguments as plain data."""
        return asdict(self.arguments)

    def _where(self, stage: Stage) -> str:
        return f"{type(self.method).__name__}, stage {stage.name!r}"

    def _default_callbacks(self) -> list[Callback]:
        arguments = self.arguments
        chosen: list[Callback] = [JsonLines()]
        chosen += [Progress()] if arguments.progress else []
        chosen += [Tracker()] if arguments.tracker else []
        return chosen + ([Plots(), Views()] if arguments.plots else [])

    def _tell(self, event: str, *facts: Any) -> None:
        for callback in self.callbacks:
            call: Callable[..., None] = getattr(callback, event)
            call(self, *facts)
