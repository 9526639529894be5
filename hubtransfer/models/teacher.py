"""Teachers: models that are asked and never change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubtransfer.backbones import Features
from hubtransfer.models.cache import OutputCache
from hubtransfer.models.model import TransferModel
from hubtransfer.models.output import TransferModelOutput

if TYPE_CHECKING:
    from hubtransfer.data import Batch


class Teacher(nn.Module):
    """A frozen model: no gradients, always in evaluation mode, in no state dict, checkpoint or DDP bucket.

    What it answers is kept by example number when the inputs do not change (`batch.origin` is set): then it runs once
    for each example and not once each epoch. Inputs change where they are augmented, unless the augmentation is stored
    (`Augment(variants=...)`), and where they are streamed: the reason is logged. Maps of texts, which are as long as a
    batch's longest text, are computed at each step.

    A teacher sees images as it was trained to: when its processor standardises or sizes them otherwise than the
    student's, the batch is converted first (`check_student`). Students that see images otherwise than one another need
    a `Teacher(model)` each.

    Attributes:
        model: The teacher's model. It moves along with `.to(...)`, but is not a registered sub-module.
        task: Whose patch and head answer.
        layers: Maps returned when a call names none.
        cache: What it has answered so far, or none.
    """

    model: TransferModel

    def __init__(
        self,
        model: TransferModel,
        task: str | None = None,
        cache: bool | OutputCache = True,
        layers: Sequence[str] = (),
    ) -> None:
        """Freezes `model` (give a `copy.deepcopy` of one that goes on learning).

        Args:
            model: A model of its own.
            task: The model's active one by default.
            cache: Whether to keep outputs, or the cache to keep them in.
            layers: Maps returned when a call names none.

        Raises:
            TypeError: if `model` is no `TransferModel`.
            ValueError: if it has no such task.
        """
        super().__init__()
        if not isinstance(model, TransferModel):
            raise TypeError(
                f"a teacher is a TransferModel, got {type(model).__name__}; wrap it in Backbone.from_module"
            )
        self.task = model.task_name(task)
        self.layers = tuple(layers)
        self.cache = OutputCache() if cache is True else cache if isinstance(cache, OutputCache) else None
        self._convert: Callable[[Tensor], Tensor] | None = None
        self._seen: list[tuple[Any, ...] | None] = []  # how the students' images are made
        object.__setattr__(self, "model", model)  # around nn.Module's registration
        model.requires_grad_(False)
        self.train(False)

    def forward(self, batch: Batch, layers: Sequence[str] = ()) -> TransferModelOutput:
        """Answers for a batch, without gradients; an answer of the same step that has the layers is given again.

        Args:
            batch: Its inputs are the model's keyword arguments.
            layers: Maps to return; by default the teacher's own `layers`.
        """
        wanted = tuple(layers) or self.layers
        given: list[TransferModelOutput] = batch.once(("teacher", id(self)), list)
        for answer in given:
            assert answer.features is not None
            maps = answer.features.maps
            if list(maps) == list(wanted):
                return answer
            if all(name in maps for name in wanted):
                chosen = Features(answer.features.pooled, {name: maps[name] for name in maps if name in wanted})
                return TransferModelOutput(logits=answer.logits, features=chosen)
        given.append(self._answer(batch, wanted))
        return given[-1]

    @torch.no_grad()
    def _answer(self, batch: Batch, layers: tuple[str, ...]) -> TransferModelOutput:
        if self.model.training:
            self.train(False)  # somebody else who holds the model put it into training mode
        if self.cache is None or (layers and self.model.backbone.modality == "text"):
            return self.model(**self.inputs(batch.inputs), task=self.task, layers=layers)

        def compute(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            output = self.model(**self.inputs(inputs), task=self.task, layers=layers)
            return (output.logits, output.features.pooled, *(output.features.maps[name] for name in layers))

        logits, pooled, *maps = self.kept(batch, ",".join(layers), compute)
        return TransferModelOutput(logits=logits, features=Features(pooled, dict(zip(layers, maps))))

    def kept(
        self, batch: Batch, of: str, compute: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Returns what is computed of a batch's inputs, from the cache where it knows all examples.

        Args:
            batch: A batch.
            of: Names what is computed.
            compute: Maps inputs to tensors (batch, ...), each row from its own example alone, never changing.
        """
        return compute(batch.inputs) if self.cache is None else self.cache.outputs(batch, compute, of)

    def inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the student's inputs as the teacher wants them."""
        if self._convert is None or "pixel_values" not in inputs:
            return dict(inputs)
        return {**inputs, "pixel_values": self._convert(inputs["pixel_values"])}

    def classes(self) -> int:
        """Returns the number of classes, one answer for each of which it gives an example.

        Raises:
            ValueError: if its task has no head of classes, so that there is nothing to soften.
        """
        head = self.model.tasks[self.task].head
        if head is None or head.predicts != "classification":
            raise ValueError(
                f"the teacher's task {self.task!r} predicts {_say(head)}: softened answers need a head of classes; "
                "compare pooled features or maps instead"
            )
        return head.width

    def same_classes_as(self, model: TransferModel, task: str | None = None) -> Self:
        """Returns the teacher itself if it predicts the same classes as a task of the student.

        Raises:
            ValueError: if the number or the names of the classes differ, if the heads are of another kind than
                classification, or `check_student` refuses.
        """
        student = model.task_name(task)
        own, other = self.model.tasks[self.task].head, model.tasks[student].head
        widths = [None if head is None else head.width for head in (own, other)]
        if widths[0] != widths[1] or type(own) is not type(other):
            raise ValueError(
                f"the teacher's task {self.task!r} predicts {_say(own)}, the student's task {student!r} {_say(other)}; "
                "they must have the same classes (Teacher(model, task=...) chooses the teacher's task)"
            )
        self.classes()
        if own is not None and other is not None and own.labels and other.labels and own.labels != other.labels:
            k = next(k for k, (a, b) in enumerate(zip(own.labels, other.labels)) if a != b)
            raise ValueError(
                f"class {k} is {own.labels[k]!r} for the teacher and {other.labels[k]!r} for the student; give both "
                "the classes in the same order"
            )
        return self.check_student(model)

    def check_student(self, model: TransferModel) -> Self:
        """Returns the teacher itself if it can teach this model, and notes how the student's inputs are made.

        Raises:
            ValueError: if both share parameters, take other kinds of inputs, or the teacher has a student already whose
                images are made otherwise.
        """
        own = {p.data_ptr() for p in self.model.parameters() if p.numel()}
        shared = next((n for n, p in model.named_parameters() if p.numel() and p.data_ptr() in own), None)
        if shared is not None or model is self.model:
            raise ValueError(
                f"teacher and student share the parameter {shared!r}, so the teacher would change while it teaches; "
                "use Teacher(copy.deepcopy(model))"
            )
        mine, theirs = self.model.backbone, model.backbone
        if "text" in (mine.modality, theirs.modality) and mine.modality != theirs.modality:
            raise ValueError(f"the teacher takes {mine.modality} inputs, the student {theirs.modality} inputs")
        if mine.modality == "text":
            _check_tokens(self.model.processor, model.processor)
        convert, facts = _conversion(model.processor, self.model.processor), _facts(model.processor)
        if self._seen and self._seen != [facts] and (self._convert or convert):
            raise ValueError(
                f"the teacher has a student whose images are made with mean, std and size {self._seen[0]}, and this "
                f"one's are made with {facts}; make a second Teacher(model) for it"
            )
        self._convert, self._seen = convert, self._seen or [facts]
        return self

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, whatever is asked."""
        self.training = False
        self.model.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.model._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _say(head: Any) -> str:
    return "nothing (it has no head)" if head is None else f"{head.width} outputs of kind {head.kind}"


def _check_tokens(teacher: Any, student: Any) -> None:
    ours, theirs = (getattr(processor, "tokenizer", None) for processor in (teacher, student))
    if ours is not None and theirs is not None and ours.get_vocab() != theirs.get_vocab():
        raise ValueError(
            f"teacher and student have other tokenizers ({len(ours)} and {len(theirs)} tokens): the student's "
            "input_ids mean other words to the teacher; choose a student of the same vocabulary"
        )


def _facts(processor: Any) -> tuple[Any, ...] | None:
    """Mean, standard deviation and size that an image processor gives its images, or none."""
    facts = tuple(getattr(processor, fact, None) for fact in ("mean", "std", "size"))
    return facts if all(isinstance(fact, tuple) for fact in facts) else None


def _conversion(source: Any, target: Any) -> Callable[[Tensor], Tensor] | None:
    r"""From images made by one image processor to what another would have made of them, or none if they agree.

    .. math:: x' = \frac{x \sigma + \mu - \mu'}{\sigma'}
    """
    if _facts(source) is None or _facts(target) is None:
        return None
    mean, std, new_mean, new_std = (
        torch.tensor(v)[:, None, None] for v in (source.mean, source.std, target.mean, target.std)
    )
    if len(mean) != len(new_mean):
        raise ValueError(f"the student's images have {len(mean)} channels, the teacher's {len(new_mean)}")
    size = tuple(target.size) if tuple(source.size) != tuple(target.size) else None
    if size is None and torch.equal(mean, new_mean) and torch.equal(std, new_std):
        return None

    def convert(images: Tensor) -> Tensor:
        scale, shift = (std / new_std).to(images), ((mean - new_mean) / new_std).to(images)
        images = images * scale + shift
        if size is not None and tuple(images.shape[-2:]) != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        return images

    return convert
