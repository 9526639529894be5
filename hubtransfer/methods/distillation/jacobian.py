"""Jacobian matching (Srinivas and Fleuret, 2018)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.attention import attention, attention_distance
from hubtransfer.functional.jacobians import direction_distance, input_gradient
from hubtransfer.functional.layer_pairs import Pairs, check_pairs
from hubtransfer.functional.precision import in_full_precision
from hubtransfer.functional.second_order import twice_differentiable
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.evaluating import evaluating
from hubtransfer.methods.update import Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput


@dataclass(frozen=True, kw_only=True)
class JacobianConfig:
    """Hyper-parameters of `Jacobian`; a term of weight 0 is not computed.

    Attributes:
        activations: Weight of the squared distance of maps, the student's through a 1x1 convolution.
        attention: Weight of the distance of attention maps, as in `AttentionTransfer` (`form="code"`).
        jacobians: Weight of the distance of Jacobians.
        pairs: See `PairsConfig`.
    """

    activations: float = 0.0
    attention: float = 1000.0
    jacobians: float = 1.0
    pairs: Pairs = "single"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        weights = {name: getattr(self, name) for name in ("activations", "attention", "jacobians")}
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name} must not be negative, got {weight}")
        if not any(weights.values()):
            raise ValueError("activations, attention and jacobians must not all be 0: nothing would be matched")
        check_pairs(self.pairs)


class Jacobian(Distillation, name="jacobian", config=JacobianConfig, scenario=SingleTask):
    r"""Trains a student whose most active place depends on the image as the teacher's does.

    .. math:: L = CE(y, z) + \lambda_a \|r(A_S) - A_T\|^2 + \lambda_q\, d(Q_S, Q_T) + \lambda_J \Big\|
       \frac{J_S}{\|J_S\|_2} - \frac{J_T}{\|J_T\|_2} \Big\|_2^2, \qquad
       J = \frac{\partial}{\partial x} \max_{hw} Q_{hw}, \quad Q = \sum_c A_c^2

    summed over pairs of layers with maps A, (batch, channels, height, width), r a 1x1 convolution; J has the shape of
    the image x. Means over the batch. The student's J comes from a second forward in evaluation mode (batch
    statistics would mix the examples) and keeps its graph: that is what trains the student.

    Args:
        model: The student, of images.
        teacher: A frozen model of any classes, or several.
        task: Task of the student (default: the active one).

    Differs from the paper: each network's largest attention value is its own; attention as in the authors of
    attention transfer's code; activations are compared where the attention is.

    Source: https://arxiv.org/abs/1803.00443, the sections on distillation and on transfer learning.
    """

    paper = "Srinivas 2018"
    source = "https://arxiv.org/abs/1803.00443"
    citation = """@inproceedings{srinivas2018knowledge,
  title = {Knowledge Transfer with {Jacobian} Matching},
  author = {Srinivas, Suraj and Fleuret, Francois},
  booktitle = {International Conference on Machine Learning},
  year = {2018}
}"""

    def __init__(
        self, model: TransferModel, teacher: Teacher | Sequence[Teacher], task: str | None = None, **config: Any
    ) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        self.pairs = self.pair(self.config.pairs)
        self.match = self.pairs.regressors(self.like) if self.config.activations else nn.ModuleList()

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns those of `activations`, `attention` and `jacobians` that have a weight, each summed over pairs."""
        config, terms = self.config, {}
        both = self.pairs.maps(student, batch) if config.activations or config.attention else []
        if config.activations:
            squares = [F.mse_loss(match(here), there) for (there, here), match in zip(both, self.match)]
            terms["activations"] = config.activations * torch.stack(squares).sum()
        if config.attention:
            distances = [attention_distance(here, there) for there, here in both]
            terms["attention"] = config.attention * torch.stack(distances).sum()
        if config.jacobians:
            theirs = batch.once(("jacobians", id(self)), lambda: self.teacher_jacobians(batch))
            apart = [direction_distance(s, t) for s, t in zip(self.own_jacobians(batch), theirs)]
            terms["jacobians"] = config.jacobians * torch.stack(apart).sum()
        return terms

    @torch.enable_grad()
    def own_jacobians(self, batch: Batch) -> list[Tensor]:
        """Returns the student's Jacobian of each pair, (batch, channels, height, width), with its graph."""
        images = batch.inputs["pixel_values"].detach().requires_grad_()
        with evaluating(self.model), twice_differentiable():
            output = self.model(**{**batch.inputs, "pixel_values": images}, task=self.task, layers=self.pairs.layers)
        maps = {p.own.name: m for p, m in zip(self.pairs.pairs, self.pairs.own_maps(output.features.maps, batch))}
        found = {name: input_gradient(_peak(each), images, create_graph=True) for name, each in maps.items()}
        return [found[pair.own.name] for pair in self.pairs.pairs]

    def teacher_jacobians(self, batch: Batch) -> list[Tensor]:
        """Returns the teacher's Jacobian of each pair, with respect to the student's image; kept where inputs stay."""
        found = []
        for k, (teacher, layers) in enumerate(zip(self.pairs.teachers, self.pairs.teacher_layers)):
            compute = partial(self._jacobians_of, k, layers)
            each = teacher.kept(batch, f"jacobians of {', '.join(layers)}", compute) if layers else ()
            found.append(dict(zip(layers, each)))
        return self.pairs.by_pair(found)

    @torch.enable_grad()
    def _jacobians_of(self, number: int, layers: Sequence[str], inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        teacher, images = self.pairs.teachers[number], inputs["pixel_values"].detach().requires_grad_()
        inputs = {**inputs, "pixel_values": images}
        answer = teacher.model(**teacher.inputs(inputs), task=teacher.task, layers=layers)  # it answers without graph
        maps = self.pairs.grids(number, answer.features.maps, inputs)
        return tuple(input_gradient(_peak(maps[layer]), images) for layer in layers)


@in_full_precision
def _peak(maps: Tensor) -> Tensor:
    return attention(maps).flatten(1).amax(1)
