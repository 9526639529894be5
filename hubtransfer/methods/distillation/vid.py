"""Variational information distillation (Ahn et al., 2019)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.layer_pairs import Pairs
from hubtransfer.functional.likelihood import surprise
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.feature_pairs import PairsConfig
from hubtransfer.methods.update import Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput


@dataclass(frozen=True, kw_only=True)
class VIDConfig(PairsConfig):
    """Hyper-parameters of `VID`.

    Attributes:
        beta: Weight of the term.
        where: "maps" (VID-I, layers by `pairs`), "logits" (VID-LP: the teacher's logits from the student's pooled
            features) or "pooled" (the teacher's pooled features from the student's).
        pairs: See `PairsConfig`.
        variance: Variance of every channel at the start.
        eps: Smallest variance.
    """

    beta: float = 1.0
    where: Literal["maps", "pooled", "logits"] = "maps"
    pairs: Pairs = "one_to_one"
    variance: float = 5.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        super().__post_init__()
        if self.where not in ("maps", "pooled", "logits"):
            raise ValueError(f"where must be 'maps', 'pooled' or 'logits', got {self.where!r}")
        if not 0 < self.eps < self.variance:
            raise ValueError(f"variance must be larger than eps > 0, got variance {self.variance} and eps {self.eps}")


class VID(Distillation, name="vid", config=VIDConfig, scenario=SingleTask):
    r"""Maximises a bound on what the student's activations tell about the teacher's, beside the labels.

    .. math:: L = CE(y, z) + \beta \sum_k \frac{1}{C H W} \sum_{chw} \log \sigma_c
       + \frac{(t_{chw} - \mu_{chw}(s))^2}{2 \sigma_c^2}, \qquad \sigma_c^2 = \ln(1 + e^{\rho_c}) + \epsilon

    with the teacher's t and the student's s, (batch, channels, height, width), or (batch, dim) for vectors; the mean
    over the batch. mu: three 1x1 convolutions (linear for vectors); rho, one a channel of the teacher, is learnt. Of
    texts each token that is no padding counts as an example, its map 1 x 1.

    Args:
        model: The student.
        teacher: A frozen model of any classes, or several.
        task: Task of the student (default: the active one).

    Differs from the paper: means in place of sums, and no normalisation within mu, as in the common benchmark's code;
    of two maps of unequal size the larger is average-pooled to the smaller. rho starts at the inverse softplus of
    `variance`, so that sigma^2 starts there.

    Source: https://arxiv.org/abs/1904.05835, the section on the variational bound and its Gaussian form.
    """

    paper = "Ahn 2019"
    source = "https://arxiv.org/abs/1904.05835"
    citation = """@inproceedings{ahn2019variational,
  title = {Variational Information Distillation for Knowledge Transfer},
  author = {Ahn, Sungsoo and Hu, Shell Xu and Damianou, Andreas and Lawrence, Neil D. and Dai, Zhenwen},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2019}
}"""

    def __init__(
        self, model: TransferModel, teacher: Teacher | Sequence[Teacher], task: str | None = None, **config: Any
    ) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        if self.config.where == "maps":
            self.pairs = self.pair(self.config.pairs, texts="tokens")
            widths = [(pair.own.channels, pair.theirs.channels) for pair in self.pairs.pairs]
            self.means = nn.ModuleList(_network(*each) for each in widths).to(self.like)
        else:
            widths = [(model.backbone.dim, _width(each, self.config.where)) for each in self.teachers]
            self.means = nn.ModuleList(nn.Linear(*each) for each in widths).to(self.like)
        rho = math.log(math.expm1(self.config.variance - self.config.eps))  # the inverse of softplus
        self.rho = nn.ParameterList(self.like.new_full((wide,), rho) for _, wide in widths)

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns the weighted sum over pairs: the scalar `information`."""
        assert student.features is not None
        if self.config.where == "maps":
            pairs = self.pairs.maps(student, batch)
        else:
            outputs = [teacher(batch) for teacher in self.teachers]
            there = [each.logits if self.config.where == "logits" else each.features.pooled for each in outputs]
            pairs = [(each, student.features.pooled) for each in there]
        both = zip(pairs, self.means, self.variances())
        surprises = [surprise(t, mean(s), variance) for (t, s), mean, variance in both]
        return {"information": self.config.beta * torch.stack(surprises).sum()}

    def variances(self) -> list[Tensor]:
        """Returns sigma^2 of each pair, (teacher's channels,): large where the student cannot tell."""
        return [F.softplus(rho) + self.config.eps for rho in self.rho]


def _network(own: int, wide: int) -> nn.Sequential:
    layers = [nn.Conv2d(own, wide, 1), nn.ReLU(), nn.Conv2d(wide, wide, 1), nn.ReLU(), nn.Conv2d(wide, wide, 1)]
    return nn.Sequential(*layers)


def _width(teacher: Teacher, where: str) -> int:
    if where == "pooled":
        return teacher.model.backbone.dim
    head = teacher.model.tasks[teacher.task].head
    if head is None:
        raise ValueError(f"VID with where='logits' needs a teacher with a head; its task {teacher.task!r} has none")
    return head.width
