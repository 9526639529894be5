"""Factor transfer (Kim, Park and Kwak, 2018)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.factors import factor_distance
from hubtransfer.functional.maps import same_size
from hubtransfer.methods.distil import Distillation
from hubtransfer.methods.feature_pairs import PairsConfig
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.update import Descend, Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput


@dataclass(frozen=True, kw_only=True)
class FTConfig(PairsConfig):
    """Hyper-parameters of `FT`.

    Attributes:
        beta: Weight of the term.
        rate: k, a factor's channels over the teacher's.
        paraphrase_epochs: Length of the first stage (default: as long as the second).
        pairs: See `PairsConfig`.
    """

    beta: float = 500.0
    rate: float = 0.5
    paraphrase_epochs: float | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        super().__post_init__()
        if self.rate <= 0:
            raise ValueError(f"rate must be positive, got {self.rate}")
        if self.paraphrase_epochs is not None and self.paraphrase_epochs <= 0:
            raise ValueError(f"paraphrase_epochs must be positive, got {self.paraphrase_epochs}")


class FT(Distillation, name="ft", config=FTConfig, scenario=SingleTask):
    r"""Paraphrases the teacher's maps into factors; then a student's translator learns the same factors, with labels.

    .. math:: L_{rec} = \|x - D(P(x))\|^2, \qquad L = CE(y, z) + \beta \Big\| \frac{F_T}{\|F_T\|_2} -
       \frac{F_S}{\|F_S\|_2} \Big\|_1, \quad F_T = P(x), \; F_S = R(s)

    with the teacher's maps x and the student's s, (batch, channels, height, width), and factors F of `rate` times the
    teacher's channels, flattened for the norms. Paraphraser P, its decoder D and translator R are three 3x3
    convolutions each. Both losses are means over the batch and over entries. The first stage trains P and D alone,
    without labels; the second R and the student. Of texts each token that is no padding counts as an example, its map
    1 x 1 and so are the kernels.

    Args:
        model: The student.
        teacher: A frozen model of any classes, or several.
        task: Task of the student (default: the active one).

    Differs from the paper: no batch normalisation within P, D and R; D ends without activation, as maps may be
    negative. The mean of absolute differences is the authors' code's. Of two factors of unequal size the larger is
    average-pooled to the smaller.

    Source: https://arxiv.org/abs/1802.04977, the sections on the paraphraser and the translator.
    """

    paper = "Kim 2018"
    source = "https://arxiv.org/abs/1802.04977"
    citation = """@inproceedings{kim2018paraphrasing,
  title = {Paraphrasing Complex Network: Network Compression via Factor Transfer},
  author = {Kim, Jangho and Park, SeongUk and Kwak, Nojun},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2018}
}"""

    def __init__(
        self, model: TransferModel, teacher: Teacher | Sequence[Teacher], task: str | None = None, **config: Any
    ) -> None:
        super().__init__(model, teacher, self.configure(config), task=task)
        self.pairs = self.pair(self.config.pairs, texts="tokens")
        side = 1 if model.backbone.modality == "text" else 3
        wide, own = ([getattr(pair, who).channels for pair in self.pairs.pairs] for who in ("theirs", "own"))
        factors = [max(1, round(self.config.rate * channels)) for channels in wide]
        self.paraphrasers = nn.ModuleList(_encoder(c, k, side) for c, k in zip(wide, factors)).to(self.like)
        self.decoders = nn.ModuleList(_decoder(k, c, side) for c, k in zip(wide, factors)).to(self.like)
        self.translators = nn.ModuleList(_encoder(c, k, side) for c, k in zip(own, factors)).to(self.like)

    def own_parameters(self) -> list[nn.Parameter]:
        """Returns the translators' parameters."""
        return list(self.translators.parameters())

    def groups(self) -> dict[str, list[Any]]:
        """Two groups: the student with its translators, and the paraphrasers with their decoders."""
        paraphrasers = [*self.paraphrasers.parameters(), *self.decoders.parameters()]
        return {**super().groups(), "paraphrasers": paraphrasers}

    def reconstruction(self, batch: Batch) -> Terms:
        """Returns how much of the teacher's maps the factors lose: the scalar `reconstruction`."""
        maps = self.pairs.teacher_maps(batch)
        lost = [F.mse_loss(d(p(x)), x) for x, p, d in zip(maps, self.paraphrasers, self.decoders)]
        return {"reconstruction": torch.stack(lost).sum()}

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns the weighted distance of the factors, summed over pairs: the scalar `factors`."""
        assert student.features is not None
        with torch.no_grad():
            theirs = [p(x) for x, p in zip(self.pairs.teacher_maps(batch), self.paraphrasers)]
        maps = self.pairs.own_maps(student.features.maps, batch)
        pairs = [same_size(t, translate(s)) for t, s, translate in zip(theirs, maps, self.translators)]
        return {"factors": self.config.beta * torch.stack([factor_distance(s, t) for t, s in pairs]).sum()}

    def before(self, scenario: SingleTask) -> Iterator[Stage]:
        """The paraphrasers first."""
        learn, epochs = Descend(self.reconstruction, "paraphrasers"), self.config.paraphrase_epochs
        yield Stage("paraphrase", scenario.train_source, [learn], epochs=epochs, measured=False)


def _encoder(wide: int, factor: int, side: int) -> nn.Sequential:
    widths = ((wide, wide), (wide, factor), (factor, factor))
    layers = [m for a, b in widths for m in (nn.Conv2d(a, b, side, padding=side // 2), nn.LeakyReLU(0.1))]
    return nn.Sequential(*layers)


def _decoder(factor: int, wide: int, side: int) -> nn.Sequential:
    widths = ((factor, factor), (factor, wide), (wide, wide))
    layers = [m for a, b in widths for m in (nn.ConvTranspose2d(a, b, side, padding=side // 2), nn.LeakyReLU(0.1))]
    return nn.Sequential(*layers[:-1])
