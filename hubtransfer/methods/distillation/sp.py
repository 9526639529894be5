"""Similarity-preserving knowledge distillation (Tung and Mori, 2019)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.layer_pairs import Pairs, check_pairs
from hubtransfer.functional.relations import gram_distance
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.pooled_pair import pooled_pair
from hubtransfer.methods.update import Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput


@dataclass(frozen=True, kw_only=True)
class SPConfig:
    """Hyper-parameters of `SP`.

    Attributes:
        weight: Factor on the term, gamma; 3000 as in the paper.
        pairs: "pooled" compares the classifier's inputs; "single" (last layers), "one_to_one" (stages of equal size),
            "all_to_all", or pairs (teacher's layer, student's layer) by name compare maps, whatever their sizes.
    """

    weight: float = 3000.0
    pairs: Literal["pooled"] | Pairs = "pooled"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, got {self.weight}")
        check_pairs(self.pairs, "pooled")


class SP(Distillation, name="sp", config=SPConfig, scenario=SingleTask):
    r"""Inputs that activate the teacher alike shall activate the student alike.

    .. math:: L = CE + \gamma \sum_{(l, l')} \frac{1}{b^2} \lVert \tilde G_T^{l} - \tilde G_S^{l'} \rVert_F^2,
       \quad G = Q Q^\top, \quad \tilde G_i = G_i / \lVert G_i \rVert_2

    with Q the activations of a batch, (b, d) or maps flattened to (b, channels * height * width); teacher and student
    may differ in every size but b. A batch of one has the term zero.

    Args:
        model: The student.
        teacher: A frozen model of any classes. Its pooled features are cached when inputs are not augmented.
        task: Task of the student (default: the active one).

    Differs from the paper: by default it compares pooled features, which need no maps; `pairs="single"` compares the
    maps of the last layers as the paper's experiments do.

    Source: https://arxiv.org/abs/1907.09682, the section on similarity-preserving knowledge distillation.
    """

    paper = "Tung 2019"
    source = "https://arxiv.org/abs/1907.09682"
    citation = """@inproceedings{tung2019similarity,
  title = {Similarity-Preserving Knowledge Distillation},
  author = {Tung, Frederick and Mori, Greg},
  booktitle = {International Conference on Computer Vision},
  year = {2019}
}"""

    over_batch: ClassVar[bool] = True  # the loss compares examples of one process's batch

    def __init__(self, model: TransferModel, teacher: Teacher, task: str | None = None, **config: Any) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        self.teacher = self.one_teacher()
        self.pairs = None if self.config.pairs == "pooled" else self.pair(self.config.pairs)

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns the distance of the similarities, already weighted: the scalar `similarity`."""
        if self.pairs is None:
            both = [pooled_pair(self.teacher, student, batch)]
        else:
            assert student.features is not None
            both = list(zip(self.pairs.teacher_maps(batch), self.pairs.own_maps(student.features.maps, batch)))
        return {"similarity": self.config.weight * torch.stack([gram_distance(*pair) for pair in both]).sum()}
