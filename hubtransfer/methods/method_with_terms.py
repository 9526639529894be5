"""Distillation terms for a method of another family: fine-tuning, adaptation, continual learning and so on."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from hubtransfer.data import Batch
from hubtransfer.methods.aggregate import Sum
from hubtransfer.methods.distil import (
    Distillation,
    all_reads,
    check_parts,
    joint_groups,
    joint_terms,
    joint_watched,
    named,
    parts_of,
    without_model,
)
from hubtransfer.methods.method import Method
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.update import AnyBatch, Descend, Loss, Terms
from hubtransfer.models import TransferModel, TransferModelOutput


class MethodWithTerms(Method):
    r"""A method whose own loss is joined by terms that compare the student with frozen teachers.

    .. math:: L = L_{method} + \sum_k T_k

    Stages, groups and evaluation are the method's own; what the terms train besides the student joins its group
    `model`. The factor on the labels that the terms bring along (such as KD's 1 - alpha) applies only where the method
    has one, an attribute `label_weight`: elsewhere its loss counts in full. The terms read the output of the student's
    forward within the method's loss; where the method makes none on the batch (features from a cache), they make one.

    Args:
        method: Its stages take one `Descend` each, on the sum of its terms, on one stream of batches.
        parts: Distillation methods on the same model and task.

    Raises:
        ValueError: if they train other students or tasks; when training starts, if a stage is of another form.
    """

    method: Any
    parts: Any

    def __init__(self, method: Method, parts: Sequence[Distillation]) -> None:
        check_parts(method, parts)
        super().__init__(method.model, None, task=method.task)
        self.method = without_model(method)
        self.parts = nn.ModuleList(without_model(part) for part in parts)
        self.layers = tuple(dict.fromkeys(layer for part in parts for layer in part.layers))
        self.reads = all_reads(parts)
        self.growth = method.growth
        if hasattr(method, "label_weight"):
            factors = [method.label_weight, *(part.label_weight for part in parts)]
            self.method.label_weight = math.prod(factors)
        everyone = [method, *parts]
        facts = {
            "scenario": method.scenario,
            "name": " + ".join(each.name for each in everyone),
            "paper": " + ".join(dict.fromkeys(each.paper for each in everyone)),
            "source": method.source,
            "citation": "\n\n".join(dict.fromkeys(each.citation for each in everyone)),
        }
        self.__dict__.update(facts)

    def grow(self, operation: str, **kwargs: Any) -> None:
        """Grows the method."""
        self.method.grow(operation, **kwargs)

    def hyper_parameters(self) -> dict[str, Any]:
        """Returns the hyper-parameters of the method and of the terms, under their names."""
        return {name: each.hyper_parameters() for name, each in named([self.method, *self.parts])}

    def watched(self) -> dict[str, Tensor | float]:
        """Returns what the method and the terms watch."""
        return joint_watched([self.method, *self.parts])

    def predict(self, batch: Batch, task: str) -> Tensor:
        """Returns what the method predicts."""
        return self.method.predict(batch, task)

    def groups(self) -> Mapping[str, Any]:
        """The method's groups, and what the terms train besides the student."""
        return joint_groups(self.method, self.parts)

    def stages(self, scenario: Any) -> Iterator[Stage]:
        """The method's stages, each with the terms added to its loss."""
        for part in self.parts:
            if next(part.before(scenario), None) is not None:
                raise ValueError(
                    f"{type(part).__name__} has stages of its own before its terms, which {type(self.method).__name__} "
                    "has no place for; train them one after the other"
                )
        for stage in self.method.stages(scenario):
            yield replace(stage, updates=[self._joined(stage)])

    def _joined(self, stage: Stage) -> Descend:
        where = f"{type(self.method).__name__}, stage {stage.name!r}: distillation terms cannot be added, because "
        if isinstance(stage.data, Mapping):
            raise ValueError(f"{where}it trains on several streams ({', '.join(stage.data)}); terms need one batch")
        (*others, update) = stage.updates
        if others or not isinstance(update, Descend):
            raise ValueError(f"{where}it makes {stage.shape}; terms join a single `Descend`")
        rules = [update.rule(group) for group in update.groups()]
        ruled = [found for rule in rules if (found := rule.weighing()) is not None]
        if ruled:
            raise ValueError(f"{where}{type(ruled[0]).__name__} weighs the gradients of its terms against one another")
        if "model" not in update.groups():
            raise ValueError(f"{where}it trains {', '.join(update.groups())}, not the group 'model'")

        def after(batch: AnyBatch) -> None:
            if update.after is not None:
                update.after(batch)
            for part in self.parts:
                part.after(batch)

        plain = all(type(rule) is Sum for rule in rules)
        return replace(update, loss=self._with_terms(update.loss, first=not plain), after=after)

    def _with_terms(self, loss: Loss, first: bool) -> Loss:
        def joined(batch: Batch) -> Terms:
            with _overheard(self.model, self.task, batch, self.layers) as outputs:
                terms = loss(batch)
            if not outputs:
                outputs.append(self.model(**batch.inputs, task=self.task, layers=self.layers))
            added = joint_terms(self.parts, self.reads, outputs[0], batch)
            return {**added, **terms} if first else {**terms, **added}  # a rule knows penalties as the last terms

        return joined

    def __add__(self, other: Distillation) -> "MethodWithTerms":
        """Adds further terms."""
        if not isinstance(other, Distillation):
            return NotImplemented
        return MethodWithTerms(self.method, [*self.parts, *parts_of(other)])

    __radd__ = __add__


@contextmanager
def _overheard(model: TransferModel, task: str, batch: Batch, layers: Sequence[str]) -> Iterator[list[Any]]:
    """Collects what the model answers for this very batch and task, with further maps in the answers."""
    outputs: list[TransferModelOutput] = []

    def is_meant(keywords: Mapping[str, Any]) -> bool:
        same = all(keywords.get(name) is value for name, value in batch.inputs.items())
        return same and keywords.get("task") in (task, None if model.active_task == task else task)

    def ask(_: nn.Module, args: Any, keywords: dict[str, Any]) -> Any:
        if not is_meant(keywords):
            return None
        return args, {**keywords, "layers": tuple(dict.fromkeys((*keywords.get("layers", ()), *layers)))}

    def hear(_: nn.Module, args: Any, keywords: dict[str, Any], output: TransferModelOutput) -> None:
        if is_meant(keywords):
            outputs.append(output)

    hooks = [
        model.register_forward_pre_hook(ask, with_kwargs=True),
        model.register_forward_hook(hear, with_kwargs=True),
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
