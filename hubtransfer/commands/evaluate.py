"""``hubtransfer evaluate``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hubtransfer.commands import display
from hubtransfer.config import override
from hubtransfer.data import Loader, Source
from hubtransfer.evaluation import evaluate_outputs
from hubtransfer.models import TransferModel
from hubtransfer.recipe_data import DataSet


def run(
    name: str,
    data: str,
    overrides: Sequence[str],
    task: str | None,
    split: str,
    batch_size: int,
    revision: str | None,
    as_json: bool,
) -> None:
    """Loads a model and prints its metrics on one data set.

    Raises:
        ValueError: the model has no such task or head, or the labels are not the head's.
    """
    display.loud()
    chosen = DataSet.read(override({"name": data, "split": split}, overrides), "data")
    model = TransferModel.from_pretrained(name, revision=revision)
    task = model.task_name(task)
    head = model.tasks[task].head
    if head is None:
        raise ValueError(f"task {task!r} has no head: there is nothing to evaluate")
    source = Source.of(chosen.load(), columns=chosen.columns, task=task, name=data).check()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(model, source, task, batch_size)
    if as_json:
        display.as_json({"model": name, "task": task, "data": data, "split": split, "metrics": found})
        return
    rows = [(metric, f"{value:.4f}") for metric, value in found.items()]
    display.table(f"{name}: {task} on {data} ({split})", ["metric", "value"], rows, right=["value"])


@torch.no_grad()
def measure(model: TransferModel, source: Source, task: str, batch_size: int = 128) -> dict[str, float]:
    """Metrics of one task on one data set."""
    head = model.tasks[task].head
    assert head is not None
    device = next(model.parameters()).device
    loader = Loader(source, processor=model.processor, batch_size=batch_size, shuffle=False, device=device)
    outputs, labels = [], []
    model.eval()
    for batch in loader.batches(0):
        outputs.append(model(**batch.inputs, task=task).logits.float().cpu())
        labels.append(batch.labels.cpu())
    target = torch.cat(labels)
    model.check_labels(target, task)
    return evaluate_outputs(head.predicts, torch.cat(outputs), target, names=head.labels).metrics
