"""Variational autoencoders (Kingma and Welling, 2014)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hubtransfer.data.noise import Noise
from hubtransfer.functional.generative import negative_evidence_bound
from hubtransfer.models.generators.generator import Generator, GeneratorConfig, Player, weighted


@dataclass(frozen=True, kw_only=True)
class VAE(GeneratorConfig):
    """Networks that encode inputs as Gaussians over codes and decode codes to Bernoulli probabilities.

    It descends on the negative evidence lower bound (see `hubtransfer.functional.generative`), one code an example.

    Source: https://arxiv.org/abs/1312.6114.
    """

    kind: ClassVar[str] = "vae"

    def build(self, shape: Sequence[int]) -> Generator:
        """Makes the generator."""
        return _VAE(self, shape)


class _VAE(Generator):
    def __init__(self, config: VAE, shape: Sequence[int]) -> None:
        super().__init__(config, shape)
        self.encoder = config.encoder(shape, 2 * config.latent, nn.ReLU)
        self.decoder = config.decoder(shape, nn.ReLU)

    def draw(self, codes: Tensor) -> Tensor:
        return self.decoder(codes).sigmoid()

    def players(self) -> dict[str, Player]:
        return {"generator": Player(self, self.loss, self.config.lr)}

    def loss(self, inputs: Tensor, weights: Tensor, noise: Noise) -> Tensor:
        mean, log_variance = self.encoder(inputs).chunk(2, 1)
        codes = mean + (log_variance / 2).exp() * noise.normal(*mean.shape, like=mean)
        return weighted(negative_evidence_bound(inputs, self.decoder(codes), mean, log_variance), weights)
