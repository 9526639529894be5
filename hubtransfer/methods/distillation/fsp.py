"""Flow of the solution procedure (Yim et al., 2017)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.layer_pairs import NamedPairs
from hubtransfer.functional.map_statistics import flow
from hubtransfer.functional.maps import same_size
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.feature_pairs import PairsConfig
from hubtransfer.methods.update import Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput


@dataclass(frozen=True, kw_only=True)
class FSPConfig(PairsConfig):
    """Hyper-parameters of `FSP`.

    Attributes:
        beta: Weight of the term.
        pairs: Rule or at least two pairs (teacher's layer, student's layer) by name, shallow to deep, whose consecutive
            ones bound the flows; "1:layer" is a layer of teacher number 1.
    """

    beta: float = 50.0
    pairs: Literal["one_to_one"] | NamedPairs = "one_to_one"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        super().__post_init__()
        if self.pairs in ("single", "all_to_all"):
            raise ValueError(f"pairs must be 'one_to_one' or pairs of layer names in order, got {self.pairs!r}")


class FSP(Distillation, name="fsp", config=FSPConfig, scenario=SingleTask):
    r"""Trains a student whose features change from layer to layer as the teacher's do, beside the labels.

    .. math:: L = CE(y, z) + \beta \sum_k \frac{1}{C_k C_{k+1}} \|G^k_S - G^k_T\|_F^2, \qquad
       G^k_{ij} = \frac{1}{HW} \sum_{hw} A^k_{ihw} A^{k+1}_{jhw}

    over consecutive pairs of layers with maps A^k, (batch, channels, height, width), the larger of the two
    average-pooled to the smaller; the mean over the batch. Where the student has other channels than the teacher, a 1x1
    convolution of its map is compared. Student and teacher may see other sizes: the flows have none. The tokens of a
    text are its positions, padding not among them.

    Args:
        model: The student.
        teacher: A frozen model of any classes, or several.
        task: Task of the student (default: the active one).

    Differs from the paper: the flows are matched together with the labels, where the paper matches them first and then
    learns the task; the mean over entries, as in the common benchmark, where the paper has their sum; average in place
    of max pooling; projections of unequal channels, which the paper does not have.

    Source: https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html, the sections on
    the FSP matrix and its loss.
    """

    paper = "Yim 2017"
    source = "https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html"
    citation = """@inproceedings{yim2017gift,
  title = {A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning},
  author = {Yim, Junho and Joo, Donggyu and Bae, Jihoon and Kim, Junmo},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2017}
}"""

    def __init__(
        self, model: TransferModel, teacher: Teacher | Sequence[Teacher], task: str | None = None, **config: Any
    ) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        self.pairs = self.pair(self.config.pairs, texts="sequences")
        found = list(enumerate(self.pairs.pairs))
        self.parts = [(a, b) for (a, one), (b, two) in pairwise(found) if one.teacher == two.teacher]
        if not self.parts:
            raise ValueError(
                f"FSP needs two pairs of layers of one teacher, a flow's beginning and end; got {self.pairs}"
            )
        projections = [
            nn.Identity() if p.own.channels == p.theirs.channels else nn.Conv2d(p.own.channels, p.theirs.channels, 1)
            for p in self.pairs.pairs
        ]
        self.projections = nn.ModuleList(projections).to(self.like)

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns the weighted sum over flows: the scalar `flow`."""
        assert student.features is not None
        here, places = self.pairs.own_maps(student.features.maps, batch), self.pairs.places(batch)
        projected = [project(maps) for project, maps in zip(self.projections, here)]
        if places is not None:  # a projection's bias is no activation of padding
            real = batch.inputs["attention_mask"][:, None, None]
            projected = [maps * real.to(maps) for maps in projected]
        own = self._flows(projected, places)
        theirs = batch.once(("flows", id(self)), lambda: self._flows(self.pairs.teacher_maps(batch), places))
        return {"flow": self.config.beta * torch.stack([(s - t).square().mean() for s, t in zip(own, theirs)]).sum()}

    def _flows(self, maps: Sequence[Tensor], places: Tensor | None) -> list[Tensor]:
        return [flow(*same_size(maps[top], maps[bottom]), places) for top, bottom in self.parts]
