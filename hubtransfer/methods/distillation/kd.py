"""Knowledge distillation (Hinton, Vinyals and Dean, 2015)."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.distributions import softened_cross_entropy, softened_kl
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.update import Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput


@dataclass(frozen=True, kw_only=True)
class KDConfig:
    """Hyper-parameters of `KD`.

    Attributes:
        temperature: T >= 1; larger values also transfer the ranking of unlikely classes.
        alpha: Share of the soft targets, in [0, 1]; with 1 the data need no labels.
        form: "kl", zero when student and teacher agree, or the paper's "cross_entropy". Gradients are the same.
    """

    temperature: float = 4.0
    alpha: float = 0.9
    form: Literal["kl", "cross_entropy"] = "kl"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.temperature < 1:
            raise ValueError(f"temperature must be at least 1, got {self.temperature}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}")
        if self.form not in ("kl", "cross_entropy"):
            raise ValueError(f"form must be 'kl' or 'cross_entropy', got {self.form!r}")


class KD(Distillation, name="kd", config=KDConfig, scenario=SingleTask):
    r"""Trains a student on the teacher's softened outputs beside the labels.

    .. math:: L = (1-\alpha)\, CE(y, q) + \alpha T^2\, KL(p_T \| q_T)

    with student q and teacher p, (batch, classes), softened by T. The factor T^2 keeps the gradient of the soft term of
    the same size for every T (section 2.1). Both terms are means over the batch.

    Args:
        model: The student.
        teacher: A frozen model with the same classes. Its logits are cached when inputs are not augmented.
        task: Task of the student (default: the active one).

    Differs from the paper: KL in place of cross-entropy, unless `form="cross_entropy"`; gradients are equal, values
    differ by the teacher's entropy.

    Source: https://arxiv.org/abs/1503.02531, equations 1 to 4.
    """

    paper = "Hinton 2015"
    source = "https://arxiv.org/abs/1503.02531"
    citation = """@article{hinton2015distilling,
  title = {Distilling the Knowledge in a Neural Network},
  author = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  journal = {arXiv preprint arXiv:1503.02531},
  year = {2015}
}"""

    def __init__(self, model: TransferModel, teacher: Teacher, task: str | None = None, **config: Any) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        self.teacher = self.one_teacher().same_classes_as(model, self.task)
        self.label_weight = 1 - self.config.alpha

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns the softened term, already weighted: the scalar `teacher`."""
        assert isinstance(student.logits, Tensor)
        temperature = self.config.temperature
        soft = softened_kl if self.config.form == "kl" else softened_cross_entropy
        distance = soft(self.teacher(batch).logits, student.logits, temperature)
        return {"teacher": self.config.alpha * temperature**2 * distance}
