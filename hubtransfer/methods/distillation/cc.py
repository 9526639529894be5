"""Correlation congruence (Peng et al., 2019)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.relations import congruence_distance
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.pooled_pair import pooled_pair
from hubtransfer.methods.update import Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput


@dataclass(frozen=True, kw_only=True)
class CCConfig:
    """Hyper-parameters of `CC`.

    Attributes:
        weight: Factor on the term. The standard benchmark's 0.02 belongs to another formula.
        kernel: "rbf", the Gaussian kernel by its Taylor series, or "bilinear", the inner product.
        gamma: Inverse squared width of the Gaussian kernel.
        order: Of the Taylor series.
    """

    weight: float = 100.0
    kernel: Literal["rbf", "bilinear"] = "rbf"
    gamma: float = 0.4
    order: int = 2

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, got {self.weight}")
        if self.kernel not in ("rbf", "bilinear"):
            raise ValueError(f"kernel must be 'rbf' or 'bilinear', got {self.kernel!r}")
        if self.gamma <= 0:
            raise ValueError(f"gamma must be positive, got {self.gamma}")
        if self.order < 1:
            raise ValueError(f"order must be at least 1, got {self.order}")


class CC(Distillation, name="cc", config=CCConfig, scenario=SingleTask):
    r"""The correlations between the examples of a batch shall be the same for student and teacher.

    .. math:: L = CE + \frac{w}{b^2} \sum_{ij} \big(k(s_i, s_j) - k(t_i, t_j)\big)^2

    .. math:: k(x, y) = x^\top y \quad \text{or} \quad
       k(x, y) = \sum_{p=0}^{P} e^{-2\gamma} \frac{(2\gamma)^p}{p!} (x^\top y)^p \approx
       e^{-\gamma \lVert x - y \rVert^2}

    with pooled features of unit length, s (b, d) of the student and t (b, other d) of the teacher. A batch of one has
    a term whose gradient is zero.

    Args:
        model: The student.
        teacher: A frozen model of any classes. Its pooled features are cached when inputs are not augmented.
        task: Task of the student (default: the active one).

    Differs from the paper: this is the correlation term alone (add `KD` for the paper's sum); batches are shuffled,
    not sampled by class or cluster; the bilinear kernel too takes features of unit length.

    Source: https://arxiv.org/abs/1904.01802, the sections on correlation congruence and on its kernels.
    """

    paper = "Peng 2019"
    source = "https://arxiv.org/abs/1904.01802"
    citation = """@inproceedings{peng2019correlation,
  title = {Correlation Congruence for Knowledge Distillation},
  author = {Peng, Baoyun and Jin, Xiao and Liu, Jiaheng and Zhou, Shunfeng and Wu, Yichao and Liu, Yu and Li, Dongsheng
    and Zhang, Zhaoning},
  booktitle = {International Conference on Computer Vision},
  year = {2019}
}"""

    over_batch: ClassVar[bool] = True  # the loss compares examples of one process's batch

    def __init__(self, model: TransferModel, teacher: Teacher, task: str | None = None, **config: Any) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        self.teacher = self.one_teacher()
        self.gamma = self.config.gamma if self.config.kernel == "rbf" else None

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns the distance of the correlations, already weighted: the scalar `correlation`."""
        features = pooled_pair(self.teacher, student, batch)
        return {"correlation": self.config.weight * congruence_distance(*features, self.gamma, self.config.order)}
