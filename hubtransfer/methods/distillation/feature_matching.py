"""Feature matching: the plain baseline of transfer between layers (Romero et al., 2015; Jang et al., 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from hubtransfer.data import Batch, SingleTask
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.feature_pairs import PairsConfig
from hubtransfer.methods.update import Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput


@dataclass(frozen=True, kw_only=True)
class FeatureMatchingConfig(PairsConfig):
    """Hyper-parameters of `FeatureMatching`: `beta`, weight of the term, and `pairs` of layers (see `PairsConfig`)."""

    beta: float = 0.5


class FeatureMatching(Distillation, name="feature_matching", config=FeatureMatchingConfig, scenario=SingleTask):
    r"""Trains a student from whose maps the teacher's can be read linearly, beside the labels.

    .. math:: L = CE(y, z) + \beta \sum_{(m, n)} \frac{1}{C H W} \sum_{cij}
       \big(S^m_{cij}(x) - (r^{mn} T^n(x))_{cij}\big)^2

    with source maps S and student maps T, (batch, channels, height, width), and a 1x1 convolution r to the source's C
    channels; the mean over the batch. It is L2T-ww with equal channel weights and every pair weight 1. Of two maps of
    unequal size the larger is average-pooled to the smaller. Of texts each token that is no padding counts as an
    example, its map 1 x 1.

    Args:
        model: The student.
        teacher: A frozen model of any classes, or several.
        task: Task of the student (default: the active one).

    Differs from the paper: of two maps of unequal size the larger is pooled (the authors' code resizes the source's).

    Source: https://arxiv.org/abs/1905.05901, the section on feature matching and the rows FM of its tables.
    """

    paper = "Jang 2019"
    source = "https://arxiv.org/abs/1905.05901"
    citation = """@inproceedings{jang2019learning,
  title = {Learning What and Where to Transfer},
  author = {Jang, Yunhun and Lee, Hankook and Hwang, Sung Ju and Shin, Jinwoo},
  booktitle = {International Conference on Machine Learning},
  year = {2019}
}"""

    def __init__(
        self, model: TransferModel, teacher: Teacher | Sequence[Teacher], task: str | None = None, **config: Any
    ) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        self.pairs = self.pair(self.config.pairs, texts="tokens")
        self.match = self.pairs.regressors(self.like)

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns the weighted sum over pairs: the scalar `match`."""
        both = zip(self.pairs.maps(student, batch), self.match)
        distances = [F.mse_loss(match(here), there) for (there, here), match in both]
        return {"match": self.config.beta * torch.stack(distances).sum()}
