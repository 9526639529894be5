"""Learning without forgetting as transfer (Li and Hoiem, 2016), as a baseline of L2T's tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.distributions import softened_cross_entropy, softened_kl
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.update import Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput


@dataclass(frozen=True, kw_only=True)
class LwFTransferConfig:
    """Hyper-parameters of `LwFTransfer`.

    Attributes:
        temperature: T >= 1.
        beta: Weight of the sources' answers.
        form: "cross_entropy", the paper's, or "kl", zero when both agree. Gradients are the same.
    """

    temperature: float = 2.0
    beta: float = 1.0
    form: str = "cross_entropy"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.temperature < 1:
            raise ValueError(f"temperature must be at least 1, got {self.temperature}")
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")
        if self.form not in ("kl", "cross_entropy"):
            raise ValueError(f"form must be 'kl' or 'cross_entropy', got {self.form!r}")


class LwFTransfer(Distillation, name="lwf_transfer", config=LwFTransferConfig, scenario=SingleTask):
    r"""Trains a student to answer, beside its own labels, as a source's head does on the same inputs.

    .. math:: L = CE(y, q) - \beta \sum_c p'_c \log q'_c, \quad
       p' = \mathrm{softmax}(v / T), \quad q' = \mathrm{softmax}((W h + b) / T)

    with logits v of the source's own classes, (batch, source classes), and a second head W on the student's pooled
    features h, (batch, dim), which learns along and is dropped at export. Student and source need no class in common.
    The source's logits are those from before training, for it never trains; inputs that are not augmented ask it once.

    Args:
        model: The student.
        teacher: A frozen source with a head, or several: a second head for each.
        task: Task of the student (default: the active one).

    Differs from the paper: the student need not be a copy of the source, as in L2T's tables; its second head starts
    from random weights and not from the source's, and trains from the first step on (no warm-up of the new head).

    Source: https://arxiv.org/abs/1606.09282, the section on the method and its distillation loss; as transfer:
    https://arxiv.org/abs/1905.05901, the rows LwF of its tables.
    """

    paper = "Li 2016"
    source = "https://arxiv.org/abs/1606.09282"
    citation = """@inproceedings{li2016learning,
  title = {Learning without Forgetting},
  author = {Li, Zhizhong and Hoiem, Derek},
  booktitle = {European Conference on Computer Vision},
  year = {2016}
}"""

    def __init__(
        self, model: TransferModel, teacher: Teacher | Sequence[Teacher], task: str | None = None, **config: Any
    ) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        heads = [nn.Linear(model.backbone.dim, each.classes()) for each in self.teachers]
        self.second_heads = nn.ModuleList(heads).to(self.like)

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns the distance of the second heads' answers from the sources', weighted: the scalar `source`."""
        assert student.features is not None
        soft = softened_kl if self.config.form == "kl" else softened_cross_entropy
        distances = []
        for each, head in zip(self.teachers, self.second_heads):
            logits = each(batch).logits
            assert isinstance(logits, Tensor)
            distances.append(soft(logits, head(student.features.pooled), self.config.temperature))
        return {"source": self.config.beta * torch.stack(distances).sum()}
