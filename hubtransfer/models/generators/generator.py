"""The contract of a generator: it draws inputs in [0, 1] from codes, and says what trains which of its parts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hubtransfer.data.noise import Noise
from hubtransfer.models.generators.networks import Activation, decoder, encoder


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(ABC):
    """What every kind of generator has; a subclass names its `kind`, which is how recipes refer to it.

    Attributes:
        hidden: Units of each hidden layer, those next to the inputs first.
        channels: Of convolutions between images and hidden layers, each of which halves height and width, those next to
            the images first: (32, 64) makes maps of 7 x 7 of images of 28 x 28 (default: perceptrons).
        latent: Numbers of a code.
        lr: Learning rate of Adam.
    """

    kind: ClassVar[str]
    hidden: tuple[int, ...] = (400, 400)
    channels: tuple[int, ...] = ()
    latent: int = 100
    lr: float = 1e-3

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if min(self.hidden, default=1) < 1 or not self.hidden + self.channels:
            raise ValueError(f"hidden must name at least one layer of at least one unit, got {self.hidden}")
        if min(self.channels, default=1) < 1:
            raise ValueError(f"channels must be at least 1 for each convolution, got {self.channels}")
        if self.latent < 1:
            raise ValueError(f"latent must be at least 1, got {self.latent}")
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")

    @abstractmethod
    def build(self, shape: Sequence[int]) -> "Generator":
        """Makes the generator of inputs of a shape, such as (channels, height, width), with random weights.

        Raises:
            ValueError: if there are convolutions and the inputs are not images, or too small ones.
        """

    def encoder(self, shape: Sequence[int], outputs: int, activation: Activation) -> nn.Sequential:
        """Makes the network from inputs (count, *shape) to (count, outputs)."""
        return encoder(shape, self.channels, self.hidden, outputs, activation)

    def decoder(self, shape: Sequence[int], activation: Activation) -> nn.Sequential:
        """Makes the network from codes (count, latent) to (count, *shape), before a last activation."""
        return decoder(self.latent, self.hidden, self.channels, shape, activation)


@dataclass(frozen=True)
class Player:
    """A part of a generator and what it learns from.

    Attributes:
        part: The module that learns.
        loss: `loss(inputs, weights, noise)`, a scalar, from inputs (count, *shape) in [0, 1] that are to be drawn as
            often as their weights (count,) say, which sum to 1.
        lr: Learning rate of Adam.
        betas: Its decay rates.
        steps: Steps on each batch.
    """

    part: nn.Module
    loss: Callable[[Tensor, Tensor, Noise], Tensor]
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    steps: int = 1


class Generator(nn.Module, ABC):
    """Draws inputs.

    Attributes:
        config: Its numbers.
        shape: Of one input.
    """

    def __init__(self, config: GeneratorConfig, shape: Sequence[int]) -> None:
        super().__init__()
        self.config, self.shape = config, tuple(shape)

    @abstractmethod
    def draw(self, codes: Tensor) -> Tensor:
        """Returns the inputs of codes: (count, latent), standard normal, -> (count, *shape) in [0, 1]."""

    @abstractmethod
    def players(self) -> Mapping[str, Player]:
        """Returns its parts in the order in which they take their steps on a batch."""


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """The sum of values (count,) by weights (count,)."""
    return torch.dot(values, weights.to(values))
