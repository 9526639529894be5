"""What a run along a stream of tasks knew after each of them."""

import time
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hubtransfer.data import TaskStream
from hubtransfer.evaluation.stream_metrics import stream_metrics
from hubtransfer.methods.method import Method
from hubtransfer.methods.stage import Stage

TOGETHER = "average_accuracy"


@dataclass
class TaskHistory:
    """The accuracy matrix of a run, row by row, with what each task cost.

    Attributes:
        columns: Name of each item of the stream -> its evaluation sets.
        rows: After each item: `after`, its name; `values`, one a column; `curve`, pairs of steps so far and the
            item's own value, before it was learned and at each look since; `seconds` of training; `bytes` that the
            method keeps besides the model.
        baseline: Values before anything was learned.
    """

    columns: dict[str, list[str]]
    rows: list[dict[str, Any]] = field(default_factory=list)
    baseline: list[float] | None = None
    seconds: float = 0.0
    _since: float | None = None

    @staticmethod
    def of(scenario: Any) -> "TaskHistory | None":
        """Starts a history, for a stream of tasks each of which has an evaluation set."""
        if not isinstance(scenario, TaskStream):
            return None
        columns: dict[str, list[str]] = {}
        for item in scenario:
            sets, name = list(item.evaluations()), str(item.name)
            if sets:
                columns[name] = [name] if len(sets) == 1 else [f"{name}/{key}" for key in sets]
        return TaskHistory(columns) if len(columns) == len(scenario) else None

    def note(self, stage: Stage, data: TaskStream, metrics: dict[str, float], kept: int, step: int) -> None:
        """Enters what was measured at a step; a later look at the same item takes the place of the row."""
        name = item_of(stage, data)
        values = self._values(metrics)
        row = {"after": name, "values": values, "curve": [], "seconds": round(self.seconds, 3), "bytes": kept}
        before = self.rows[-1] if self.rows else None
        if before is not None and before["after"] == name:
            self.rows.pop()
            row["seconds"] = round(row["seconds"] + before["seconds"], 3)
        row["curve"] = self._curve(name, before, step, values)
        self.rows.append(row)
        self.seconds = 0.0

    def start(self) -> None:
        """Lets the clock of training run."""
        self._since = time.monotonic()

    def stop(self) -> None:
        """Stops it: what follows is no training."""
        if self._since is not None:
            self.seconds, self._since = self.seconds + time.monotonic() - self._since, None

    def begin(self, metrics: dict[str, float]) -> None:
        """Enters what was measured before anything was learned."""
        self.baseline = self._values(metrics)

    def metrics(self, measured: dict[str, float]) -> dict[str, float]:
        """What the matrix tells so far; of a run without one, the average of what was measured."""
        if [row["after"] for row in self.rows] != list(self.columns)[: len(self.rows)] or not self.rows:
            values = self._values(measured)
            return {TOGETHER: sum(values) / len(values)}
        found = stream_metrics([row["values"] for row in self.rows], self.baseline)
        if len(self.columns) == 1:  # one item without boundaries: nothing is before or after
            return {TOGETHER: found[TOGETHER]}
        return found

    def as_dict(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return {"rows": self.rows, "baseline": self.baseline, "seconds": self.seconds}

    def load(self, plain: dict[str, Any]) -> None:
        """Takes up what `as_dict` returned."""
        self.rows, self.baseline, self.seconds = plain["rows"], plain["baseline"], plain["seconds"]

    def record(self) -> dict[str, Any]:
        """What results files and cards hold: tasks, matrix, baseline, seconds and bytes a task.

        Learning curves are among them where a task was looked at while it was learned.
        """
        curves = [[[step, round(value, 6)] for step, value in row["curve"]] for row in self.rows]
        return {
            "tasks": list(self.columns),
            "after": [row["after"] for row in self.rows],
            "accuracy": [[round(value, 6) for value in row["values"]] for row in self.rows],
            "baseline": self.baseline if self.baseline is None else [round(value, 6) for value in self.baseline],
            "seconds": [row["seconds"] for row in self.rows],
            "bytes": [row["bytes"] for row in self.rows],
            **({"curves": curves} if any(len(curve) > 2 for curve in curves) else {}),
        }

    def _curve(self, name: str, before: dict[str, Any] | None, step: int, values: list[float]) -> list[list[float]]:
        """The learning curve of an item that was looked at once more."""
        if name not in self.columns:
            return []
        own = list(self.columns).index(name)
        if before is not None and before["after"] == name:
            curve = [point for point in before["curve"] if point[0] != step]
        elif before is not None:
            curve = [[before["curve"][-1][0], before["values"][own]]] if before["curve"] else []
        else:
            curve = [] if self.baseline is None else [[0, self.baseline[own]]]
        return [*curve, [step, values[own]]]

    def _values(self, metrics: dict[str, float]) -> list[float]:
        """One value an item: the first metric of its sets, averaged over them."""
        found = []
        for sets in self.columns.values():
            firsts = [next((v for k, v in metrics.items() if k.rpartition("/")[0] == name), None) for name in sets]
            if firsts == [None]:  # a stream of one item with one set: metrics have no prefix
                firsts = [next(iter(metrics.values()))]
            known = [value for value in firsts if value is not None]
            found.append(sum(known) / len(known))
        return found


def item_of(stage: Stage, data: TaskStream) -> str:
    """Name of the item of a stream that a stage learns; the stage's own name where it learns several."""
    for item in data:
        name = str(item.name)
        if stage.data is item.train_source or stage.name == name or stage.name.startswith(f"{name}/"):
            return name
    return stage.name


def kept_bytes(method: Method) -> int:
    """Bytes of what a method keeps besides the model: memories, importances, earlier networks."""
    own = {id(tensor) for tensor in _tensors(method.model)}
    kept = {id(tensor): tensor for tensor in _tensors(method) if id(tensor) not in own}
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def _tensors(module: nn.Module) -> list[Any]:
    return [*module.parameters(), *module.buffers()]
