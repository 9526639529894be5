"""Learning what and where to transfer (Jang et al., 2019)."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubtransfer.data import Batch, SingleTask
from hubtransfer.functional.maps import same_size
from hubtransfer.methods.feature_pairs import FeaturePairs
from hubtransfer.methods.method import Method
from hubtransfer.methods.stage import OptimizerConfig, Stage
from hubtransfer.methods.update import Descend, Terms, Unrolled
from hubtransfer.models import Teacher, TransferModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class L2TWWConfig:
    """Hyper-parameters of `L2TWW`.

    Attributes:
        pairs: "single" (last layers), "one_to_one" (stages of equal size), "all_to_all" (every stage with every other),
            or pairs (source layer, student layer) by name; with several sources write "1:layer" for source number 1.
        beta: Weight of the matching loss.
        inner_steps: T, look-ahead steps on the matching loss alone.
        pair_init: Bias with which the weight of each pair starts.
    """

    pairs: Literal["single", "one_to_one", "all_to_all"] | tuple[tuple[str, str], ...] = "all_to_all"
    beta: float = 0.5
    inner_steps: int = 2
    pair_init: float = 1.0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        rules = ("single", "one_to_one", "all_to_all")
        if isinstance(self.pairs, str) and self.pairs not in rules:
            raise ValueError(f"pairs must be one of {rules} or pairs of layer names, got {self.pairs!r}")
        if not self.pairs:
            raise ValueError("pairs must not be empty")
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps must be at least 1, got {self.inner_steps}")


class L2TWW(Method, name="l2t_ww", config=L2TWWConfig, scenario=SingleTask):
    r"""Learns which layers of a source, and which of their channels, help the student, while it trains.

    .. math:: L_{match} = \beta \sum_{(m, n)} \lambda^{mn}(x) \sum_c w^{mn}_c(x) \frac{1}{HW} \sum_{ij}
       \big(S^m_{cij}(x) - (r^{mn} T^n(x))_{cij}\big)^2

    with source maps S and student maps T, (batch, channels, height, width), a 1x1 convolution r to the source's
    channels, channel weights w = softmax(f(mean S)), which start equal, and pair weights lambda = relu6(g(mean S)).
    On each batch the student steps on CE + L_match; then f and g step on the CE of the point that the student would
    reach after T steps on L_match and one on CE. Their learning rate, 1e-4, is the authors' for 200 epochs: in a few
    hundred steps f and g stay near their start, so give group "meta" a larger one there.

    Args:
        model: The student.
        teacher: One frozen source or several, of any architecture and classes.
        task: Task of the student (default: the active one).

    Differs from the paper: of two maps of unequal size the larger is average-pooled to the smaller (the authors' code
    resizes the source's); a batch computes source maps once (the code: T + 1 times).

    Source: https://arxiv.org/abs/1905.05901, section 2 and algorithm 1; initial values and optimisers as in the
    authors' code.
    """

    paper = "Jang 2019"
    source = "https://arxiv.org/abs/1905.05901"
    citation = """@inproceedings{jang2019learning,
  title = {Learning What and Where to Transfer},
  author = {Jang, Yunhun and Lee, Hankook and Hwang, Sung Ju and Shin, Jinwoo},
  booktitle = {International Conference on Machine Learning},
  year = {2019}
}"""

    def __init__(
        self, model: TransferModel, teacher: Teacher | Sequence[Teacher], task: str | None = None, **config: Any
    ) -> None:
        super().__init__(model, self.configure(config), task=task)
        teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
        if not teachers or not all(isinstance(each, Teacher) for each in teachers):
            raise TypeError(f"{type(self).__name__} needs frozen sources: wrap each model as Teacher(model)")
        self.sources = nn.ModuleList(each.check_student(model) for each in teachers)
        self.pairs = FeaturePairs(model.backbone, teachers, self.config.pairs)
        log.info("%s compares the layers %s", type(self).__name__, self.pairs)
        like = next(model.heads[self.task].parameters())
        widths = [(pair.theirs.channels, pair.own.channels) for pair in self.pairs.pairs]
        self.match = nn.ModuleList(nn.Conv2d(own, wide, 1) for wide, own in widths).to(like)
        self.channel_weights = nn.ModuleList(nn.Linear(wide, wide) for wide, _ in widths).to(like)
        self.pair_weights = self.pair_networks([wide for wide, _ in widths]).to(like)
        for f in self.channel_weights.parameters():
            nn.init.zeros_(f)
        self._seen: dict[str, Tensor] = {}

    def pair_networks(self, widths: Sequence[int]) -> nn.ModuleList:
        """Returns g for each pair, (batch, width) -> (batch, 1), as it starts."""
        networks = [nn.Linear(width, 1) for width in widths]
        for g in networks:
            nn.init.constant_(g.bias, self.config.pair_init)
        return nn.ModuleList(networks)

    def groups(self) -> dict[str, list[Any]]:
        """Two groups: the student with its 1x1 convolutions, and the meta-networks f and g."""
        student = self.model.trainable("patch" if self.task in self.model.patches else "all", self.task)
        meta = [*self.channel_weights.parameters(), *self.pair_weights.parameters()]
        return {"student": [*student, {"params": list(self.match.parameters())}], "meta": meta}

    def label_loss(self, batch: Batch) -> Terms:
        """Returns the student's own loss: the scalar `labels`."""
        return {"labels": self.model(**batch.inputs, labels=self.labels(batch), task=self.task).loss}

    def match_loss(self, batch: Batch) -> Terms:
        """Returns the weighted distance of the maps, scaled by beta: the scalar `match`."""
        return {"match": self._distance(batch, self._student(batch).features.maps)}

    def loss(self, batch: Batch) -> Terms:
        """Returns `labels` and `match` from one forward."""
        output = self._student(batch)
        labels = self.model.loss(output.logits, self.labels(batch), self.task)
        return {"labels": labels, "match": self._distance(batch, output.features.maps)}

    def stages(self, scenario: SingleTask) -> Iterator[Stage]:
        """One stage: a step of the student, then a step of the meta-networks through its look-ahead."""
        inner = [self.match_loss] * self.config.inner_steps + [self.label_loss]
        yield Stage(
            "transfer",
            scenario.train_source,
            [Descend(self.loss, "student"), Unrolled(inner, self.label_loss, over="student", trains="meta")],
            optimizers={
                "student": OptimizerConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4, schedule="cosine"),
                "meta": OptimizerConfig(name="adam", lr=1e-4, weight_decay=1e-4, schedule="constant"),
            },
        )

    def watched(self) -> dict[str, Tensor]:
        """Returns the mean weight of each pair over the last batch."""
        return {f"pair weight/{name}": weight.mean() for name, weight in self._seen.items()}

    def weights(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Returns for each pair the channel weights (batch, channels) and the pair weight (batch,) of each example."""
        means = [there.mean((2, 3)) for there in self.pairs.teacher_maps(batch)]
        networks = zip(means, self.channel_weights, self.pair_weights)
        return [(f(mean).softmax(1), F.relu6(g(mean)).squeeze(1)) for mean, f, g in networks]

    def _student(self, batch: Batch) -> Any:
        return self.model(**batch.inputs, task=self.task, layers=self.pairs.layers)

    def _distance(self, batch: Batch, maps: dict[str, Tensor]) -> Tensor:
        total = []
        weights = self.weights(batch)
        both = zip(self.pairs.teacher_maps(batch), self.pairs.own_maps(maps, batch))
        for (there, here), match, (channels, pair) in zip(both, self.match, weights):
            there, here = same_size(there, here)
            squares = (there - match(here)).square().mean((2, 3))
            total.append((pair * (channels * squares).sum(1)).mean())
        self._seen = {name: pair.detach() for name, (_, pair) in zip(self.pairs.names, weights)}
        return self.config.beta * torch.stack(total).sum()
