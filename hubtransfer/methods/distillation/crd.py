"""Contrastive representation distillation (Tian, Krishnan and Isola, 2020)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.contrast import bank_contrast, batch_contrast, draw_others
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.embedding_bank import EmbeddingBank, everywhere
from hubtransfer.methods.pooled_pair import pooled_pair
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.update import Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput

NO_NUMBERS = (
    "CRD finds an example's row of its bank by the example's number, but these batches have no `index` (streamed data "
    "have none); use form='batch' or a data set that is not streamed"
)


@dataclass(frozen=True, kw_only=True)
class CRDConfig:
    """Hyper-parameters of `CRD`.

    Attributes:
        weight: Factor on the term; 0.8 as in the standard benchmark.
        form: "bank": negatives from a memory of all examples; "batch": the other examples of the batch.
        negatives: N, negatives for each example, drawn from the bank.
        temperature: Of the scores.
        dim: Width of the embeddings.
        momentum: Share of a row of the bank that stays when its example is seen.
        normaliser: "estimated": e^score is divided by its mean over the first batch, as in the authors' code; "none".
    """

    weight: float = 0.8
    form: Literal["bank", "batch"] = "bank"
    negatives: int = 16384
    temperature: float = 0.07
    dim: int = 128
    momentum: float = 0.5
    normaliser: Literal["estimated", "none"] = "estimated"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, got {self.weight}")
        for field, known in {"form": ("bank", "batch"), "normaliser": ("estimated", "none")}.items():
            if getattr(self, field) not in known:
                raise ValueError(f"{field} must be one of {known}, got {getattr(self, field)!r}")
        for field in ("negatives", "temperature", "dim"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} must be positive, got {getattr(self, field)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")


class CRD(Distillation, name="crd", config=CRDConfig, scenario=SingleTask):
    r"""A critic shall tell what teacher and student see in one example from what they see in examples of other classes.

    .. math:: L = CE - w \sum_{S, T} \Big( \log h(x, y) + \sum_{n=1}^{N} \log\big(1 - h(x, y_n)\big) \Big), \quad
       h(x, y) = \frac{e^{x^\top y / \tau}}{e^{x^\top y / \tau} + N / M}

    with x the embedding of an example, (batch, dim), by one network (a trained linear map of its pooled features,
    brought to unit length), y that of the same example by the other and y_n of examples of other classes by the other;
    M examples in all; the mean over the batch. Both networks take the part of x. Without class labels every other
    example is a negative.

    Args:
        model: The student.
        teacher: A frozen model of any classes. Its pooled features are cached when inputs are not augmented.
        task: Task of the student (default: the active one).

    Differs from the paper: as in the authors' code e^{x y / tau} is divided by its mean over the first batch, times M
    (`normaliser="none"` leaves that out), and the bank answers for y too. `form="batch"` needs no bank: the negatives
    are the batch's examples of other classes, of which an example may have more or fewer.

    Source: https://arxiv.org/abs/1910.10699, the section on the contrastive loss (the critic with N / M).
    """

    paper = "Tian 2020"
    source = "https://arxiv.org/abs/1910.10699"
    citation = """@inproceedings{tian2020contrastive,
  title = {Contrastive Representation Distillation},
  author = {Tian, Yonglong and Krishnan, Dilip and Isola, Phillip},
  booktitle = {International Conference on Learning Representations},
  year = {2020}
}"""

    over_batch: ClassVar[bool] = True  # each process draws its own negatives, or has those of its batch

    def __init__(self, model: TransferModel, teacher: Teacher, task: str | None = None, **config: Any) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        self.teacher = self.one_teacher()
        self.embed_teacher = nn.Linear(self.teacher.model.backbone.dim, self.config.dim).to(self.like)
        self.embed_student = nn.Linear(model.backbone.dim, self.config.dim).to(self.like)
        self.means: Tensor  # of e^score with the teacher's and with the student's embeddings; 0 until the first batch
        self.register_buffer("means", self.like.new_zeros(2, requires_grad=False))
        with_bank = self.config.form == "bank"
        self.bank = EmbeddingBank(self.config.dim, self.config.momentum, self.like) if with_bank else None

    def before(self, scenario: SingleTask) -> Iterator[Stage]:
        """No stage; refuses data without example numbers, or several data sets, before any work starts."""
        if self.bank is not None and not isinstance(scenario, SingleTask):
            raise ValueError(
                f"CRD's bank holds the examples of one data set by their numbers, and a {type(scenario).__name__} has "
                "several; use form='batch' here"
            )
        if self.bank is not None and scenario.train_source.iterable:
            raise ValueError(NO_NUMBERS)
        return iter(())

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns the critic's loss in both directions, already weighted: the scalar `contrast`."""
        there, here = pooled_pair(self.teacher, student, batch)
        theirs = F.normalize(self.embed_teacher(there).to(self.means.dtype), dim=1)
        own = F.normalize(self.embed_student(here).to(self.means.dtype), dim=1)
        both = self._in_batch if self.bank is None else self._in_bank
        return {"contrast": self.config.weight * both(theirs, own, batch)}

    def _in_batch(self, theirs: Tensor, own: Tensor, batch: Batch) -> Tensor:
        classes = self._classes(batch)
        classes = torch.arange(len(own), device=own.device) if classes is None else classes.to(own.device)
        sizes = self._means(own @ theirs.T, theirs @ own.T, len(own))
        both = ((own, theirs), (theirs, own))
        tau = self.config.temperature
        return torch.stack([batch_contrast(*pair, classes, tau, mean) for pair, mean in zip(both, sizes)]).sum()

    def _in_bank(self, theirs: Tensor, own: Tensor, batch: Batch) -> Tensor:
        if batch.index is None:
            raise ValueError(NO_NUMBERS)
        assert self.bank is not None
        index = batch.index.to(own.device)
        classes = self._classes(batch)
        classes = index if classes is None else classes.to(own.device)
        self.bank.reserve(batch.size or 0)
        self.bank.learn_classes(index, classes)
        others = draw_others(*self.bank.by_class(), classes, self.config.negatives)
        banks = ((own, self.bank.teacher), (theirs, self.bank.student))
        one, two = ((x @ rows.T).gather(1, others) if self._unset() else x for x, rows in banks)
        total = []
        for (x, rows), mean in zip(banks, self._means(one, two, len(self.bank))):
            odds = float(mean.log()) + math.log(self.config.negatives)
            total.append(bank_contrast(x, rows, index, others, self.config.temperature, odds))
        self.bank.update(index, theirs, own)
        return torch.stack(total).sum()

    def _classes(self, batch: Batch) -> Tensor | None:
        labels = batch.labels.get(self.task) if isinstance(batch.labels, dict) else batch.labels
        return None if labels is None or labels.ndim != 1 or labels.is_floating_point() else labels

    def _unset(self) -> bool:
        return self.config.normaliser == "estimated" and not bool(self.means.all())

    @torch.no_grad()
    def _means(self, one: Tensor, two: Tensor, examples: int) -> Tensor:
        """The means of e^score by which the odds are set: 1 / M, or estimated once from scores times tau."""
        if self.config.normaliser == "none":
            return torch.full_like(self.means, 1 / examples)
        if self._unset():
            found = torch.stack([(scores / self.config.temperature).exp().mean() for scores in (one, two)])
            self.means.copy_(everywhere(found[None]).mean(0))
        return self.means
