"""Probabilistic knowledge transfer (Passalis and Tefas, 2018)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.relations import neighbour_divergence
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.pooled_pair import pooled_pair
from hubtransfer.methods.update import Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput


@dataclass(frozen=True, kw_only=True)
class PKTConfig:
    """Hyper-parameters of `PKT`.

    Attributes:
        weight: Factor on the term; 30000 as in the standard benchmark, for a mean over all pairs.
    """

    weight: float = 30000.0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, got {self.weight}")


class PKT(Distillation, name="pkt", config=PKTConfig, scenario=SingleTask):
    r"""The probability that one example is the neighbour of another shall be the same for student and teacher.

    .. math:: L = CE + \frac{w}{b^2} \sum_{ij} p_{ij} \log \frac{p_{ij}}{q_{ij}}, \quad
       p_{ij} = \frac{\cos(t_i, t_j) + 1}{\sum_k \cos(t_i, t_k) + 1}

    with pooled features t (b, d) of the teacher and, for q, those of the student (b, other d). A batch of one has the
    term zero.

    Args:
        model: The student.
        teacher: A frozen model of any classes. Its pooled features are cached when inputs are not augmented.
        task: Task of the student (default: the active one).

    Differs from the paper: as in the authors' code an example counts among its own neighbours, the sum over pairs is
    a mean, and 1e-7 is added inside the logarithm.

    Source: https://arxiv.org/abs/1803.10837, the section on probabilistic knowledge transfer.
    """

    paper = "Passalis 2018"
    source = "https://arxiv.org/abs/1803.10837"
    citation = """@inproceedings{passalis2018learning,
  title = {Learning Deep Representations with Probabilistic Knowledge Transfer},
  author = {Passalis, Nikolaos and Tefas, Anastasios},
  booktitle = {European Conference on Computer Vision},
  year = {2018}
}"""

    over_batch: ClassVar[bool] = True  # the loss compares examples of one process's batch

    def __init__(self, model: TransferModel, teacher: Teacher, task: str | None = None, **config: Any) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        self.teacher = self.one_teacher()

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns the divergence of the neighbourhoods, already weighted: the scalar `neighbours`."""
        features = pooled_pair(self.teacher, student, batch)
        return {"neighbours": self.config.weight * neighbour_divergence(*features)}
