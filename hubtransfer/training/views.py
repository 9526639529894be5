"""Pictures of a student beside its teacher, drawn when a run ends."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hubtransfer.data import Batch, Loader, Source
from hubtransfer.methods.evaluating import evaluating
from hubtransfer.methods.feature_pairs import FeaturePairs
from hubtransfer.methods.method import Method
from hubtransfer.models import Teacher
from hubtransfer.training.callbacks import Callback
from hubtransfer.training.sharding import is_sharded

if TYPE_CHECKING:
    from hubtransfer.training.trainer import Trainer, TrainingResult

log = logging.getLogger(__name__)

IMAGES, EXAMPLES, PAIRS = 4, 512, 4
"""Images whose attention is drawn, examples of which correlations are taken, most pairs of layers that are drawn."""


class Views(Callback):
    """Draws where a student and its (first) teacher look, and how their logits go together, on evaluation images.

    Written are `attention_maps.png`, over the layers that the method compares or, where it compares none or many, over
    stage ends; and `logit_correlations.png` where both predict the same classes. Methods without a teacher, networks
    of texts, data without an evaluation set and sharded models have no such pictures.
    """

    def on_train_end(self, trainer: Trainer, result: TrainingResult | None) -> None:
        """Draws; without matplotlib it says what to install and goes on."""
        method = trainer.method
        teacher = next((part for part in method.modules() if isinstance(part, Teacher)), None)
        if result is None or teacher is None or is_sharded(method):
            return
        sources = [source for source, task in trainer.scenario.evaluations().values() if task in (None, method.task)]
        if not sources:
            return
        folder = Path(trainer.arguments.output_dir)
        try:
            with torch.no_grad(), evaluating(method):
                batches = _some(trainer, sources[0])
                images = batches[0].inputs.get("pixel_values")
                if images is None or images.ndim != 4:
                    return
                _draw_attention(method, teacher, _of_several_classes(batches[0]), folder / "attention_maps.png")
                _draw_correlations(method, teacher, batches, folder / "logit_correlations.png")
        except ImportError as error:
            log.warning("no pictures of teacher and student: %s", error)


def _some(trainer: Trainer, source: Source) -> list[Batch]:
    """The first examples of a random order that is the same in every run."""
    size = trainer.arguments.eval_batch_size or 2 * trainer.arguments.batch_size
    loader = Loader(source, trainer.method.model.processor, batch_size=size, trim=False, device=trainer.runtime.device)
    found: list[Batch] = []
    for batch in loader.batches(0):
        found.append(batch)
        if sum(map(len, found)) >= EXAMPLES:
            break
    return found


def _of_several_classes(batch: Batch) -> Batch:
    """A few examples, of unlike classes as far as there are any."""
    order = list(range(len(batch)))
    if isinstance(batch.labels, Tensor) and batch.labels.ndim == 1:
        labels = batch.labels.tolist()
        order.sort(key=lambda k: labels[:k].count(labels[k]))  # every class's first example comes before any second
    return batch.rows(torch.tensor(order[:IMAGES]))


def _draw_attention(method: Method, teacher: Teacher, batch: Batch, file: Path) -> None:
    from hubtransfer.evaluation import views

    student = method.model.backbone
    if not student.layers or not teacher.model.backbone.layers:
        return
    pairs = _compared(method, teacher)
    if pairs is None or len(pairs) > PAIRS:
        pairs = FeaturePairs(student, [teacher], "one_to_one")
    number, inputs = pairs.teachers.index(teacher), dict(batch.inputs)
    asked = pairs.teacher_layers[number]
    answer = teacher.model(**teacher.inputs(inputs), task=teacher.task, layers=asked)
    theirs = pairs.grids(number, answer.features.maps, inputs)
    own = pairs.own_maps(method.model(**inputs, task=method.task, layers=pairs.layers).features.maps, batch)
    both = [
        (p.theirs.name, theirs[p.theirs.name], p.own.name, m) for p, m in zip(pairs.pairs, own) if p.teacher == number
    ]
    both = [row for row in both if min(row[1].shape[2:]) > 1 and min(row[3].shape[2:]) > 1]  # one place is no map
    if both:
        one, two = _unique([row[0] for row in both]), _unique([row[2] for row in both])
        maps = dict(zip(one, (row[1] for row in both))), dict(zip(two, (row[3] for row in both)))
        views.attention_maps(inputs["pixel_values"], *maps, file)


def _unique(names: list[str]) -> list[str]:
    return [f"{n} ({names[:k].count(n) + 1})" if names.count(n) > 1 else n for k, n in enumerate(names)]


def _compared(method: Any, teacher: Teacher) -> FeaturePairs | None:
    """The pairs of layers that the method, or a part of it, compares with this teacher."""
    for part in method.modules():
        pairs = getattr(part, "pairs", None)
        if isinstance(pairs, FeaturePairs) and any(pairs.teachers[pair.teacher] is teacher for pair in pairs.pairs):
            return pairs
    return None


def _draw_correlations(method: Method, teacher: Teacher, batches: list[Batch], file: Path) -> None:
    from hubtransfer.evaluation import views

    head = method.model.tasks[method.task].head
    if head is None or head.predicts != "classification" or sum(map(len, batches)) < 2:
        return
    try:
        teacher.same_classes_as(method.model, method.task)
    except ValueError:
        return  # other classes: nothing to compare
    own, theirs = [], []
    for batch in batches:
        inputs: Mapping[str, Tensor] = batch.inputs
        own.append(method.predict(batch, method.task))
        theirs.append(teacher.model(**teacher.inputs(inputs), task=teacher.task).logits)
    views.logit_correlations(torch.cat(theirs), {method.name: torch.cat(own)}, file, names=head.labels)
