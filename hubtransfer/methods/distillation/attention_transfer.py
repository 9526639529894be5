"""Attention transfer (Zagoruyko and Komodakis, 2017)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.attention import attention_distance
from hubtransfer.functional.layer_pairs import Pairs
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.feature_pairs import PairsConfig
from hubtransfer.methods.update import Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput


@dataclass(frozen=True, kw_only=True)
class AttentionTransferConfig(PairsConfig):
    """Hyper-parameters of `AttentionTransfer`.

    Attributes:
        beta: Weight of the term. The authors' 1000 belongs to `form="code"`, which is H W times smaller than the
            squared norm; for `form="paper"` begin near 0.1 to 10.
        power: p > 1 of the attention; the larger, the more the most active places count.
        form: "code" (mean square) or "paper" (half the norm).
        pairs: See `PairsConfig`.
    """

    beta: float = 1000.0
    power: float = 2.0
    form: Literal["paper", "code"] = "code"
    pairs: Pairs = "one_to_one"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        super().__post_init__()
        if self.power <= 1:
            raise ValueError(f"power must be larger than 1, got {self.power}")
        if self.form not in ("paper", "code"):
            raise ValueError(f"form must be 'paper' or 'code', got {self.form!r}")


class AttentionTransfer(Distillation, name="attention_transfer", config=AttentionTransferConfig, scenario=SingleTask):
    r"""Trains a student to look where the teacher looks: attention maps beside the labels.

    .. math:: L = CE(y, z) + \frac{\beta}{2} \sum_j \Big\| \frac{Q_S^j}{\|Q_S^j\|_2} - \frac{Q_T^j}{\|Q_T^j\|_2}
       \Big\|_2, \qquad Q = vec \sum_c |A_c|^p

    over pairs j of layers with maps A, (batch, channels, height, width), of any channels; the mean over the batch. Of
    two maps of unequal size the larger is average-pooled to the smaller. Tokens are maps without their prefix; the
    tokens of a text are its positions, padding not among them.

    Args:
        model: The student.
        teacher: A frozen model of any classes, or several.
        task: Task of the student (default: the active one).

    Differs from the paper: `form="code"`, the default, is the authors' code: the sum over j of the mean square over
    batch and positions, times beta (no half).

    Source: https://arxiv.org/abs/1612.03928, the section on activation-based attention transfer.
    """

    paper = "Zagoruyko 2017"
    source = "https://arxiv.org/abs/1612.03928"
    citation = """@inproceedings{zagoruyko2017paying,
  title = {Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via Attention
           Transfer},
  author = {Zagoruyko, Sergey and Komodakis, Nikos},
  booktitle = {International Conference on Learning Representations},
  year = {2017}
}"""

    def __init__(
        self, model: TransferModel, teacher: Teacher | Sequence[Teacher], task: str | None = None, **config: Any
    ) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        self.pairs = self.pair(self.config.pairs, texts="sequences")

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns the weighted sum over pairs: the scalar `attention`."""
        power, form = self.config.power, self.config.form
        both = self.pairs.maps(student, batch)
        places = self.pairs.places(batch)
        distances = [attention_distance(here, there, power, form, places) for there, here in both]
        return {"attention": self.config.beta * (0.5 if form == "paper" else 1.0) * torch.stack(distances).sum()}
