"""Distillation of activation boundaries (Heo et al., 2019)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.boundaries import boundary_distance
from hubtransfer.functional.layer_pairs import Pairs
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.feature_pairs import PairsConfig
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.update import Descend, Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput


@dataclass(frozen=True, kw_only=True)
class ABConfig(PairsConfig):
    """Hyper-parameters of `AB`.

    Attributes:
        pairs: See `PairsConfig`.
        margin: mu > 0, by which a neuron has to be on the right side.
        beta: Factor on the loss, which is a sum over all neurons.
        epochs: Length of the first stage; the training arguments' by default.
    """

    pairs: Pairs = "one_to_one"
    margin: float = 1.0
    beta: float = 3e-3
    epochs: float | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        super().__post_init__()
        if self.margin <= 0:
            raise ValueError(f"margin must be positive, got {self.margin}")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"epochs must be positive, got {self.epochs}")


class AB(Distillation, name="ab", config=ABConfig, scenario=SingleTask):
    r"""Brings a student's neurons to the teacher's side of zero first, then trains it on its labels.

    .. math:: L_{AB} = \beta \sum_{i=1}^{L} 2^{i-L} \frac{1}{B} \sum \max\big(0,\, \mu - \rho(T_i)\, r_i(S_i)\big)^2

    with the teacher's maps T, (batch, channels, height, width), rho their sign (+1 where positive, else -1), the
    student's maps S and connectors r, a 1x1 convolution to the teacher's channels and batch normalisation. The first
    stage trains trunk and connectors on L_AB, the second the whole student on its own loss: `AB(...) + KD(...)` makes
    that loss Hinton's, as in the paper. Of texts each token that is no padding counts as an example.

    Args:
        model: The student.
        teacher: A frozen model of any classes, or several.
        task: Task of the student (default: the active one).

    Differs from the paper: a layer's output is compared, not what enters its activation. For the teacher this is the
    same wherever the activation keeps the sign (ReLU, GELU, SiLU, tanh); the student's goes through the connector. Maps
    of unlike size: the student's is pooled, or repeated, to the teacher's. Weights double from pair to
    pair of a teacher.

    Source: https://arxiv.org/abs/1811.03233, the section on the activation transfer loss; weights of layers and beta
    as in the common benchmark's code.
    """

    paper = "Heo 2019"
    source = "https://arxiv.org/abs/1811.03233"
    citation = """@inproceedings{heo2019knowledge,
  title = {Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons},
  author = {Heo, Byeongho and Lee, Minsik and Yun, Sangdoo and Choi, Jin Young},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year = {2019}
}"""
    over_batch: ClassVar[bool] = True  # the connectors' batch normalisation sees one process's batch

    def __init__(
        self, model: TransferModel, teacher: Teacher | Sequence[Teacher], task: str | None = None, **config: Any
    ) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        self.pairs = self.pair(self.config.pairs, texts="tokens")
        self.layers, self.reads = (), ()  # the second stage reads no maps
        widths = [(pair.own.channels, pair.theirs.channels) for pair in self.pairs.pairs]
        self.connectors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(own, wide, 1, bias=False), nn.BatchNorm2d(wide)) for own, wide in widths
        ).to(self.like)

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """`model`: the student, and `boundary`: the student without its head, and the connectors."""
        head = {id(p) for p in self.model.heads[self.task].parameters()}
        own = {id(p) for p in self.own_parameters()}
        student, boundary = [], []
        for group in super().groups()["model"]:
            student.append({**group, "params": [p for p in group["params"] if id(p) not in own]})
            boundary.append({**group, "params": [p for p in group["params"] if id(p) not in head]})
        return {name: [g for g in kept if g["params"]] for name, kept in (("model", student), ("boundary", boundary))}

    def boundary_loss(self, batch: Batch) -> Terms:
        """Returns the scalar `boundary`, already weighted."""
        output = self.model(**batch.inputs, task=self.task, layers=self.pairs.layers)
        both = zip(self.pairs.teacher_maps(batch), self.pairs.own_maps(output.features.maps, batch), self.connectors)
        distances: list[Tensor] = []
        for there, here, connector in both:
            found = F.adaptive_avg_pool2d(connector(here), (there.shape[2], there.shape[3]))
            distances.append(boundary_distance(there, found, self.config.margin))
        numbers = [pair.teacher for pair in self.pairs.pairs]
        weights = [0.5 ** numbers[k + 1 :].count(number) for k, number in enumerate(numbers)]
        return {"boundary": self.config.beta * torch.stack([w * d for w, d in zip(weights, distances)]).sum()}

    def before(self, scenario: SingleTask) -> Iterator[Stage]:
        """The stage of the boundaries."""
        learn = [Descend(self.boundary_loss, "boundary")]
        yield Stage("boundaries", scenario.train_source, learn, epochs=self.config.epochs, measured=False)

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Nothing: the second stage is the labels'."""
        return {}
