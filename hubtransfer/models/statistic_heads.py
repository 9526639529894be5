"""Heads whose tensors are statistics of features: filled by counting, exact in any order, and ready for more.

A saved model has the statistics, so that whoever loads it can go on: with more examples, or with classes that nobody
thought of (`TransferModel.extend_head`). A class without an example is never predicted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubtransfer.backbones import Backbone
from hubtransfer.config import unknown_name
from hubtransfer.functional.ridge import best_penalty, ridge
from hubtransfer.models.heads import ClassificationHead

UNSEEN = -1e30
"""Logit of a class without an example: finite, so that a loss stays a number."""


class StatisticHead(nn.Module, ABC):
    """What a head of statistics does besides predicting: (batch, in_features) -> logits (batch, out_features).

    Attributes:
        in_features: Width of the pooled features.
        out_features: Number of classes.
    """

    in_features: int
    out_features: int
    counts: Tensor

    def exactly(self) -> AbstractContextManager[None]:
        """While this lasts sums are sums, in the head's own precision, mixed precision or not."""
        return torch.autocast(self.counts.device.type, enabled=False)

    @abstractmethod
    def add(self, pooled: Tensor, labels: Tensor, held_out: Tensor) -> Tensor:
        """Counts examples.

        Args:
            pooled: Features, (batch, in_features).
            labels: Classes, (batch,), none of them missing.
            held_out: Which examples choose hyper-parameters, if there are any to choose: bool (batch,).

        Returns:
            How far the examples are from what the head says, a scalar to be watched.
        """

    def fit(self) -> None:
        """Makes what predicts from the statistics, where that costs more than at each prediction."""

    @abstractmethod
    def resized(self, dim: int, width: int, zero_init: bool = False) -> Self:
        """Returns a head of more classes with the statistics so far."""


class ClassMeans(StatisticHead):
    """Sums of features, by class and by group within the class, and how many there were.

    Attributes:
        sums: (classes, prototypes, features).
        counts: (classes, prototypes).
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, dim: int, width: int, prototypes: int, cosine: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.cosine = dim, width, cosine
        self.register_buffer("sums", torch.zeros(width, prototypes, dim))
        self.register_buffer("counts", torch.zeros(width, prototypes))

    @torch.no_grad()
    def add(self, pooled: Tensor, labels: Tensor, held_out: Tensor, group: int = 0) -> Tensor:
        """Counts examples of one group; returns their mean distance to their own means, these examples included."""
        pooled = pooled.to(self.sums)
        self.sums[:, group].index_add_(0, labels, pooled)
        self.counts[:, group].index_add_(0, labels, torch.ones_like(labels, dtype=self.counts.dtype))
        own = (self.sums[:, group] / self.counts[:, group, None].clamp(min=1))[labels]
        if self.cosine:
            return (1 - F.cosine_similarity(pooled, own)).mean()
        return (pooled - own).square().sum(1).mean()

    def likenesses(self, pooled: Tensor) -> Tensor:
        """Returns how near each mean is: cosines, or half the negative squared distance; (batch, classes, prototypes).

        Distances lack half of the example's own square, which is the same for all means.
        """
        pooled, means = pooled.to(self.sums), self.sums / self.counts.clamp(min=1)[..., None]
        with self.exactly():
            if self.cosine:
                found = torch.einsum("bd,cpd->bcp", F.normalize(pooled, dim=1), F.normalize(means, dim=2))
            else:
                found = torch.einsum("bd,cpd->bcp", pooled, means) - means.square().sum(2) / 2
        return found.masked_fill(self.counts == 0, UNSEEN)

    def forward(self, pooled: Tensor) -> Tensor:
        """Maps features (batch, in_features) to each class's likeness at its nearest mean, (batch, out_features)."""
        return self.likenesses(pooled).amax(2)

    def resized(self, dim: int, width: int, zero_init: bool = False, prototypes: int | None = None) -> ClassMeans:
        """Returns a head of more classes, or of more groups, with the sums so far."""
        classes, groups = self.counts.shape
        new = ClassMeans(self.in_features, width, prototypes or groups, self.cosine).to(self.sums)
        new.sums[:classes, :groups] = self.sums
        new.counts[:classes, :groups] = self.counts
        return new


class RandomRidge(StatisticHead):
    """A frozen random layer, the second moments of its outputs, and the ridge regression that follows from them.

    Attributes:
        projection: The random layer, (features, projection).
        gram: Second moments of the examples that weights are fitted on and of those held out, (2, projection,
            projection).
        cross: Sums of the layer's outputs by class, of both, (2, projection, classes).
        counts: Number of examples of both, (2, classes).
        weight: (classes, projection), of the last `fit`.
        penalty: lambda of the last `fit`.
    """

    projection: Tensor
    gram: Tensor
    cross: Tensor
    counts: Tensor
    weight: Tensor
    penalty: Tensor

    def __init__(self, dim: int, width: int, projection: int, seed: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.seed = dim, width, seed
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("projection", torch.randn(dim, projection, generator=generator))
        self.register_buffer("gram", torch.zeros(2, projection, projection))
        self.register_buffer("cross", torch.zeros(2, projection, width))
        self.register_buffer("counts", torch.zeros(2, width))
        self.register_buffer("weight", torch.zeros(width, projection))
        self.register_buffer("penalty", torch.zeros(()))

    def hidden(self, pooled: Tensor) -> Tensor:
        """Returns the random layer's outputs, (batch, projection)."""
        return (pooled.to(self.projection) @ self.projection).relu()

    @torch.no_grad()
    def add(self, pooled: Tensor, labels: Tensor, held_out: Tensor) -> Tensor:
        """Counts examples; returns the mean squared error on them of the weights so far."""
        with self.exactly():
            hidden = self.hidden(pooled)
            targets = F.one_hot(labels, self.out_features).to(hidden)
            for part, rows in enumerate((~held_out, held_out)):
                self.gram[part].addmm_(hidden[rows].T, hidden[rows])
                self.cross[part].addmm_(hidden[rows].T, targets[rows])
                self.counts[part] += targets[rows].sum(0)
            return (hidden @ self.weight.T - targets).square().mean()

    @torch.no_grad()
    def fit(self) -> None:
        """Chooses the penalty on what was held out, then solves for the weights of all examples."""
        fitted, held_out = ((self.gram[part], self.cross[part]) for part in range(2))
        known = self.counts.sum(1).tolist()
        penalty = best_penalty(fitted, held_out, known[1]) if all(known) else 1.0
        weights = ridge(self.gram.double().sum(0), self.cross.double().sum(0), penalty)
        if weights is None:
            raise ValueError(f"the Gram matrix of {sum(known):.0f} examples is singular with a penalty of {penalty}")
        self.weight.copy_(weights.T)
        self.penalty.fill_(penalty)

    def forward(self, pooled: Tensor) -> Tensor:
        """Maps features (batch, in_features) to the regression's answers, (batch, out_features)."""
        with self.exactly():
            answers = self.hidden(pooled) @ self.weight.T
        return answers.masked_fill(self.counts.sum(0) == 0, UNSEEN)

    def resized(self, dim: int, width: int, zero_init: bool = False) -> RandomRidge:
        """Returns a head of more classes with the statistics so far."""
        new = RandomRidge(self.in_features, width, self.projection.shape[1], self.seed).to(self.projection)
        old = self.out_features
        for name in ("projection", "gram", "penalty"):
            getattr(new, name).copy_(getattr(self, name))
        new.cross[:, :, :old], new.counts[:, :old], new.weight[:old] = self.cross, self.counts, self.weight
        return new


@dataclass(frozen=True)
class _Counted(ClassificationHead):
    """A head of classes without anything that gradients would train."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("zero_init", "dropout", "label_smoothing"):
            if getattr(self, name):
                raise ValueError(f"{type(self).__name__} is filled by counting, without gradients: it has no {name}")

    def _like(self, module: StatisticHead, backbone: Backbone) -> nn.Module:
        """On the backbone's device and in its precision, but sums in no less than 32 bits."""
        like = next((p for p in backbone.trunk.parameters() if p.is_floating_point()), None)
        return module if like is None else module.to(like.device, torch.promote_types(like.dtype, torch.float32))


@dataclass(frozen=True)
class NearestMeanHead(_Counted):
    r"""The class whose mean feature is nearest.

    .. math:: z_c = \max_p \cos(f, \mu_{cp}) \quad\text{or}\quad
       z_c = \max_p f^\top \mu_{cp} - \tfrac{1}{2} \|\mu_{cp}\|^2, \qquad
       \mu_{cp} = \frac{1}{n_{cp}} \sum_{i \in (c, p)} f_i

    with features f, (dim,), and one mean a class, or several: of each of `prototypes` groups of its examples.

    Attributes:
        metric: "cosine" or "euclidean".
        prototypes: Means a class has.
    """

    kind: ClassVar[str] = "nearest_mean"
    _: KW_ONLY
    metric: Literal["cosine", "euclidean"] = "cosine"
    prototypes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in ("cosine", "euclidean"):
            raise ValueError(unknown_name("metric", self.metric, ("cosine", "euclidean"), "NearestMeanHead"))
        if self.prototypes < 1:
            raise ValueError(f"prototypes must be at least 1, got {self.prototypes}")

    def build(self, backbone: Backbone, dim: int | None = None) -> nn.Module:
        """Makes the module, without an example yet."""
        means = ClassMeans(dim or backbone.dim, self.num_classes, self.prototypes, self.metric == "cosine")
        return self._like(means, backbone)


@dataclass(frozen=True)
class RidgeHead(_Counted):
    r"""Ridge regression on a frozen random layer with ReLU.

    .. math:: z = W^\top h, \quad h = \max(0, P^\top f), \quad
       W = \Big(\sum_i h_i h_i^\top + \lambda I\Big)^{-1} \sum_i h_i y_i^\top

    with features f, (dim,), and P of N(0, 1), (dim, projection). The sums are part of the head:
    2 (projection^2 + projection classes) numbers.

    Attributes:
        projection: Width of the random layer.
        seed: Of its weights.
    """

    kind: ClassVar[str] = "ridge"
    _: KW_ONLY
    projection: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projection < 1:
            raise ValueError(f"projection must be at least 1, got {self.projection}")

    def build(self, backbone: Backbone, dim: int | None = None) -> nn.Module:
        """Makes the module, without an example yet."""
        return self._like(RandomRidge(dim or backbone.dim, self.num_classes, self.projection, self.seed), backbone)
