"""FitNets: hints for thin deep nets (Romero et al., 2015)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.layer_pairs import Pairs, check_pairs
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.feature_pairs import FeaturePairs, Pair
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.update import Descend, Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput


@dataclass(frozen=True, kw_only=True)
class FitNetConfig:
    """Hyper-parameters of `FitNet`.

    Attributes:
        stages: "two" (the hint first, then the task) or "one" (both together).
        beta: Weight of the hint beside the labels, for one stage; the first of two stages has the hint alone.
        hint_epochs: Length of the first of two stages (default: as long as the second).
        where: "maps" or "pooled" features.
        pairs: "middle" (one pair, the paper's), any rule, or pairs (teacher's layer, student's layer) by name.
            "one_to_one" is full activation transfer.
    """

    stages: Literal["one", "two"] = "two"
    beta: float = 100.0
    hint_epochs: float | None = None
    where: Literal["maps", "pooled"] = "maps"
    pairs: Literal["middle"] | Pairs = "middle"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.stages not in ("one", "two"):
            raise ValueError(f"stages must be 'one' or 'two', got {self.stages!r}")
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")
        if self.hint_epochs is not None and self.hint_epochs <= 0:
            raise ValueError(f"hint_epochs must be positive, got {self.hint_epochs}")
        if self.where not in ("maps", "pooled"):
            raise ValueError(f"where must be 'maps' or 'pooled', got {self.where!r}")
        check_pairs(self.pairs, "middle")


class FitNet(Distillation, name="fitnet", config=FitNetConfig, scenario=SingleTask):
    r"""Trains a student's middle layer to predict the teacher's, and then the whole student on its task.

    .. math:: L_{HT} = \frac{1}{C H W} \|u_h(x) - r(v_g(x))\|^2, \qquad L = CE(y, z) \;[+\; \beta L_{HT}
       \text{ with one stage}]

    with the teacher's maps u_h and the student's v_g, (batch, channels, height, width), or (batch, dim) for vectors,
    and a regressor r, a 1x1 convolution (linear for vectors) to the teacher's C channels; the mean over the batch. Of
    texts each token that is no padding counts as an example, its map 1 x 1. Add `KD` for the paper's second stage:
    `FitNet(...) + KD(...)` trains the hint, then the labels and the soft targets.

    Args:
        model: The student.
        teacher: A frozen model of any classes, or several.
        task: Task of the student (default: the active one).

    Differs from the paper: the regressor is a 1x1 convolution after pooling to the same size (the paper's is large
    enough to need no padding); the mean in place of half the sum; the weight of an added KD stays constant.

    Source: https://arxiv.org/abs/1412.6550, the section on hint-based training and the algorithm of its stages.
    """

    paper = "Romero 2015"
    source = "https://arxiv.org/abs/1412.6550"
    citation = """@inproceedings{romero2015fitnets,
  title = {FitNets: Hints for Thin Deep Nets},
  author = {Romero, Adriana and Ballas, Nicolas and Kahou, Samira Ebrahimi and Chassang, Antoine and Gatta, Carlo and
            Bengio, Yoshua},
  booktitle = {International Conference on Learning Representations},
  year = {2015}
}"""

    def __init__(
        self, model: TransferModel, teacher: Teacher | Sequence[Teacher], task: str | None = None, **config: Any
    ) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        self.hint_layers: tuple[str, ...] = ()
        if self.config.where == "maps":
            chosen = self._middle() if self.config.pairs == "middle" else self.config.pairs
            self.pairs = self.pair(chosen, texts="tokens")
            self.hint_layers = self.layers
            self.match = self.pairs.regressors(self.like)
        else:
            dims = [teacher.model.backbone.dim for teacher in self.teachers]
            self.match = nn.ModuleList(nn.Linear(model.backbone.dim, dim) for dim in dims).to(self.like)
        if self.config.stages == "two":
            self.layers, self.reads = (), ()  # what comes after the hint reads no maps

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """The student with its regressors; with two stages the group `hint`, and the student alone for the second."""
        groups = super().groups()
        if self.config.stages == "one":
            return groups
        return {"hint": groups["model"], "model": groups["model"][:-1]}  # the last one is the regressors

    def hint(self, batch: Batch) -> Terms:
        """Returns the distance from the hint: the scalar `hint`."""
        return {"hint": self._distance(self.model(**batch.inputs, task=self.task, layers=self.hint_layers), batch)}

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns the weighted distance from the hint, the scalar `hint`; nothing in the second of two stages."""
        return {} if self.config.stages == "two" else {"hint": self.config.beta * self._distance(student, batch)}

    def before(self, scenario: SingleTask) -> Iterator[Stage]:
        """With two stages: the hint alone, which needs no labels."""
        if self.config.stages == "two":
            learn, epochs = [Descend(self.hint, "hint")], self.config.hint_epochs
            yield Stage("hint", scenario.train_source, learn, epochs=epochs, measured=False)

    def _distance(self, student: TransferModelOutput, batch: Batch) -> Tensor:
        assert student.features is not None
        if self.config.where == "maps":
            pairs = self.pairs.maps(student, batch)
        else:
            pairs = [(teacher(batch).features.pooled, student.features.pooled) for teacher in self.teachers]
        return torch.stack([F.mse_loss(match(s), t) for (t, s), match in zip(pairs, self.match)]).sum()

    def _middle(self) -> list[tuple[str, str]]:
        """For each teacher the pair of layers in the middle of those that belong together."""
        found: dict[int, list[Pair]] = {}
        for pair in FeaturePairs(self.model.backbone, list(self.teachers), "one_to_one", texts="tokens").pairs:
            found.setdefault(pair.teacher, []).append(pair)
        middle = {k: pairs[(len(pairs) - 1) // 2] for k, pairs in found.items()}
        return [(f"{k}:{pair.theirs.name}", pair.own.name) for k, pair in middle.items()]
