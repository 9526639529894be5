"""Relational knowledge distillation (Park et al., 2019)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.relations import angle_distance, distance_distance
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.pooled_pair import pooled_pair
from hubtransfer.methods.update import Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput


@dataclass(frozen=True, kw_only=True)
class RKDConfig:
    """Hyper-parameters of `RKD`: RKD-D with `angle=0`, RKD-A with `distance=0`, RKD-DA with both.

    Attributes:
        distance: Weight of the distances; 25 as in the standard benchmark (the paper: 1).
        angle: Weight of the angles; 50 as in the standard benchmark (the paper: 2).
    """

    distance: float = 25.0
    angle: float = 50.0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.distance < 0:
            raise ValueError(f"distance must not be negative, got {self.distance}")
        if self.angle < 0:
            raise ValueError(f"angle must not be negative, got {self.angle}")
        if not self.distance and not self.angle:
            raise ValueError("distance and angle must not both be zero")


class RKD(Distillation, name="rkd", config=RKDConfig, scenario=SingleTask):
    r"""The distances and angles that the examples of a batch form shall be the same for student and teacher.

    .. math:: L = CE + \frac{w_D}{b^2} \sum_{ij} \ell\Big(\frac{\lVert s_i - s_j \rVert}{\mu_S},
       \frac{\lVert t_i - t_j \rVert}{\mu_T}\Big)
       + \frac{w_A}{b^3} \sum_{ijk} \ell(\cos \angle s_j s_i s_k, \cos \angle t_j t_i t_k)

    with pooled features s (b, d) of the student and t (b, other d) of the teacher, l the Huber loss and mu the mean of
    the positive distances. Equal rows have distance zero, angle zero and no gradient. A batch of one has terms of zero.

    Args:
        model: The student.
        teacher: A frozen model of any classes. Its pooled features are cached when inputs are not augmented.
        task: Task of the student (default: the active one).

    Differs from the paper: means over all pairs and triplets, those with themselves included, as in the authors' code.
    The angles take memory of order b^2, and their gradient is computed with their value.

    Source: https://arxiv.org/abs/1904.05068, the sections on the distance-wise and on the angle-wise loss.
    """

    paper = "Park 2019"
    source = "https://arxiv.org/abs/1904.05068"
    citation = """@inproceedings{park2019relational,
  title = {Relational Knowledge Distillation},
  author = {Park, Wonpyo and Kim, Dongju and Lu, Yan and Cho, Minsu},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  year = {2019}
}"""

    over_batch: ClassVar[bool] = True  # the loss compares examples of one process's batch

    def __init__(self, model: TransferModel, teacher: Teacher, task: str | None = None, **config: Any) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        self.teacher = self.one_teacher()

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns the terms whose weight is not zero, already weighted: the scalars `distance` and `angle`."""
        features = pooled_pair(self.teacher, student, batch)
        losses = {"distance": distance_distance, "angle": angle_distance}
        weights = {name: getattr(self.config, name) for name in losses}
        return {name: weights[name] * loss(*features) for name, loss in losses.items() if weights[name]}
