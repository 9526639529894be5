"""DarkRank (Chen, Wang and Zhang, 2018)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.ranking import ranking_loss
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.pooled_pair import pooled_pair
from hubtransfer.methods.update import Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput


@dataclass(frozen=True, kw_only=True)
class DarkRankConfig:
    """Hyper-parameters of `DarkRank`.

    Attributes:
        weight: Factor on the term.
        alpha: Contrast of the scores; 3 as in the paper.
        beta: Power of the distance; 3 as in the paper.
        length: Nearest neighbours that are ranked, at least 2.
        normalise: Whether features are brought to unit length first; if not, their scale is that of the scores.
    """

    weight: float = 1.0
    alpha: float = 3.0
    beta: float = 3.0
    length: int = 4
    normalise: bool = True

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, got {self.weight}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if self.beta < 1:
            raise ValueError(f"beta must be at least 1, got {self.beta}")
        if self.length < 2:
            raise ValueError(f"length must be at least 2, for there is nothing to rank otherwise; got {self.length}")


class DarkRank(Distillation, name="dark_rank", config=DarkRankConfig, scenario=SingleTask):
    r"""The student shall rank an example's neighbours as the teacher does (the hard form).

    .. math:: L = CE - \frac{w}{b} \sum_i \sum_{l=1}^{L} \log \frac{e^{S_i(\pi_l)}}{\sum_{m \ge l} e^{S_i(\pi_m)}},
       \quad S_i(j) = -\alpha \lVert s_i - s_j \rVert^\beta

    with pooled features s (b, d) of the student and pi the L examples of the batch that are nearest to i by the
    teacher's pooled features (b, other d), nearest first. A batch of one or two has the term zero.

    Args:
        model: The student.
        teacher: A frozen model of any classes. Its pooled features are cached when inputs are not augmented.
        task: Task of the student (default: the active one).

    Differs from the paper: the L nearest are ranked among themselves, not all examples of the batch; there is no
    margin or verification loss beside it, only the head's own.

    Source: https://arxiv.org/abs/1707.01220, the section on cross sample similarities transfer (the hard form).
    """

    paper = "Chen 2018"
    source = "https://arxiv.org/abs/1707.01220"
    citation = """@inproceedings{chen2018darkrank,
  title = {DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities Transfer},
  author = {Chen, Yuntao and Wang, Naiyan and Zhang, Zhaoxiang},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year = {2018}
}"""

    over_batch: ClassVar[bool] = True  # the loss compares examples of one process's batch

    def __init__(self, model: TransferModel, teacher: Teacher, task: str | None = None, **config: Any) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        self.teacher = self.one_teacher()

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns the improbability of the teacher's ranking, already weighted: the scalar `ranking`."""
        c = self.config
        loss = ranking_loss(*pooled_pair(self.teacher, student, batch), c.alpha, c.beta, c.length, c.normalise)
        return {"ranking": c.weight * loss}
