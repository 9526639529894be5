"""Sobolev training (Czarnecki et al., 2017)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.distributions import softened_kl
from hubtransfer.functional.projections import derivative_distance, unit_directions
from hubtransfer.functional.second_order import twice_differentiable
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.evaluating import evaluating
from hubtransfer.methods.update import Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput


@dataclass(frozen=True, kw_only=True)
class SobolevConfig:
    """Hyper-parameters of `Sobolev`.

    Attributes:
        value: Weight of the outputs' distance.
        derivative: Weight of the distance of their derivatives.
        projections: Random directions v for each example and step; each costs a backward pass through both networks.
    """

    value: float = 1.0
    derivative: float = 1.0
    projections: int = 1

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.value < 0:
            raise ValueError(f"value must not be negative, got {self.value}")
        if self.derivative < 0:
            raise ValueError(f"derivative must not be negative, got {self.derivative}")
        if self.projections < 1:
            raise ValueError(f"projections must be at least 1, got {self.projections}")


class Sobolev(Distillation, name="sobolev", config=SobolevConfig, scenario=SingleTask):
    r"""The student shall have the teacher's outputs and their derivatives in the input.

    .. math:: L = CE + w_0\, KL(p \| q) + \frac{w_1}{b} \sum_i E_v
       \lVert D_x \langle v, \log q(x_i) \rangle - D_x \langle v, \log p(x_i) \rangle \rVert^2

    with class probabilities q of the student and p of the teacher, (batch, classes), inputs x (batch, channels,
    height, width) and directions v drawn anew from the unit sphere for each example and step: one vector-Jacobian
    product a network stands for the whole Jacobian. Both networks are in evaluation mode for the derivatives, for
    batch statistics would mix the examples.

    Args:
        model: The student, of images.
        teacher: A frozen model with the same classes. Its logits are cached when inputs are not augmented; its
            derivatives, which hang on v, are not.
        task: Task of the student (default: the active one).

    Differs from the paper: the loss of labels comes on top; derivatives are of log-probabilities for all tasks, the
    paper's policy distillation among them.

    Source: https://arxiv.org/abs/1706.04859, the section on Sobolev training, its stochastic form.
    """

    paper = "Czarnecki 2017"
    source = "https://arxiv.org/abs/1706.04859"
    citation = """@inproceedings{czarnecki2017sobolev,
  title = {Sobolev Training for Neural Networks},
  author = {Czarnecki, Wojciech Marian and Osindero, Simon and Jaderberg, Max and Swirszcz, Grzegorz
    and Pascanu, Razvan},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2017}
}"""

    over_batch: ClassVar[bool] = True  # each process draws its own directions

    def __init__(self, model: TransferModel, teacher: Teacher, task: str | None = None, **config: Any) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        self.teacher = self.one_teacher().same_classes_as(model, self.task)
        if model.backbone.modality == "text":
            raise ValueError(
                "Sobolev compares derivatives in the input, and a text's token ids have none; use a student of images"
            )

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns the terms whose weight is not zero, already weighted: the scalars `value` and `derivative`."""
        assert isinstance(student.logits, Tensor)
        c, found = self.config, {}
        logits = self.teacher(batch).logits
        if c.value:
            found["value"] = c.value * softened_kl(logits, student.logits, 1.0)
        if c.derivative:
            found["derivative"] = c.derivative * self._derivatives(batch)
        return found

    def _derivatives(self, batch: Batch) -> Tensor:
        with torch.enable_grad(), evaluating(self.model), twice_differentiable():
            x = batch.inputs["pixel_values"].detach().requires_grad_()
            inputs = {**batch.inputs, "pixel_values": x}
            own = self.model(**inputs, task=self.task).logits.log_softmax(1)
            there = self.teacher.model(**self.teacher.inputs(inputs), task=self.teacher.task).logits.log_softmax(1)
            directions = unit_directions(self.config.projections, own)
            return derivative_distance(there, own, x, directions)
