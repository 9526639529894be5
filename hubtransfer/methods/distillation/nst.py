"""Neuron selectivity transfer (Huang and Wang, 2017)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.map_statistics import channel_mmd
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.feature_pairs import PairsConfig
from hubtransfer.methods.update import Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput


@dataclass(frozen=True, kw_only=True)
class NSTConfig(PairsConfig):
    """Hyper-parameters of `NST`.

    Attributes:
        beta: lambda, twice the weight of the term; the standard benchmark weighs it by 50, for it leaves out the half.
        pairs: See `PairsConfig`.
    """

    beta: float = 100.0


class NST(Distillation, name="nst", config=NSTConfig, scenario=SingleTask):
    r"""Trains a student whose channels are active in patterns distributed as the teacher's, beside the labels.

    .. math:: L = CE(y, z) + \frac{\beta}{2} \sum_j \frac{1}{C_S^2} \sum_{ii'} k(s_i, s_{i'})
       + \frac{1}{C_T^2} \sum_{ii'} k(t_i, t_{i'}) - \frac{2}{C_S C_T} \sum_{ii'} k(s_i, t_{i'}),
       \qquad k(a, b) = \Big(\frac{a^\top b}{\|a\|_2 \|b\|_2}\Big)^2

    over pairs j of layers with maps (batch, channels, height, width) of any channels, whose channels are vectors over
    positions; the mean over the batch. Of two maps of unequal size the larger is average-pooled to the smaller. The
    tokens of a text are its positions, padding not among them.

    Args:
        model: The student.
        teacher: A frozen model of any classes, or several.
        task: Task of the student (default: the active one).

    Differs from the paper: the squared polynomial kernel alone, its best one; computed from Gram matrices.

    Source: https://arxiv.org/abs/1707.01219, the sections on maximum mean discrepancy and on the transfer's loss.
    """

    paper = "Huang 2017"
    source = "https://arxiv.org/abs/1707.01219"
    citation = """@article{huang2017like,
  title = {Like What You Like: Knowledge Distill via Neuron Selectivity Transfer},
  author = {Huang, Zehao and Wang, Naiyan},
  journal = {arXiv preprint arXiv:1707.01219},
  year = {2017}
}"""

    def __init__(
        self, model: TransferModel, teacher: Teacher | Sequence[Teacher], task: str | None = None, **config: Any
    ) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        self.pairs = self.pair(self.config.pairs, texts="sequences")

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns the weighted sum over pairs: the scalar `selectivity`."""
        distances = [channel_mmd(here, there) for there, here in self.pairs.maps(student, batch)]
        return {"selectivity": self.config.beta / 2 * torch.stack(distances).sum()}
