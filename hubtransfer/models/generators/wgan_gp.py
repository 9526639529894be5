"""Wasserstein generative adversarial networks with a gradient penalty (Gulrajani et al., 2017)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from hubtransfer.data.noise import Noise
from hubtransfer.functional.generative import gradient_penalty
from hubtransfer.models.generators.generator import Generator, GeneratorConfig, Player, weighted


@dataclass(frozen=True, kw_only=True)
class WGANGP(GeneratorConfig):
    r"""A network G that draws inputs, against a critic D of slope one.

    .. math:: L_D = E_z D(G(z)) - E_x D(x) + \lambda E_{\hat x} (\|\nabla_{\hat x} D(\hat x)\|_2 - 1)^2, \qquad
       L_G = -E_z D(G(z))

    On each batch the critic takes several steps with new codes, then the generator one.

    Source: https://arxiv.org/abs/1704.00028, algorithm 1; there each of the critic's steps has a batch of its own.

    Attributes:
        penalty: lambda.
        critic_steps: Steps of the critic on each batch.
    """

    kind: ClassVar[str] = "wgan_gp"
    lr: float = 1e-4
    penalty: float = 10.0
    critic_steps: int = 5

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        super().__post_init__()
        if self.penalty < 0:
            raise ValueError(f"penalty must not be negative, got {self.penalty}")
        if self.critic_steps < 1:
            raise ValueError(f"critic_steps must be at least 1, got {self.critic_steps}")

    def build(self, shape: Sequence[int]) -> Generator:
        """Makes generator and critic."""
        return _WGANGP(self, shape)


class _WGANGP(Generator):
    config: WGANGP

    def __init__(self, config: WGANGP, shape: Sequence[int]) -> None:
        super().__init__(config, shape)
        leaky = partial(nn.LeakyReLU, 0.2)
        self.generator, self.critic = config.decoder(shape, leaky), config.encoder(shape, 1, leaky)

    def draw(self, codes: Tensor) -> Tensor:
        return self.generator(codes).sigmoid()

    def judge(self, inputs: Tensor) -> Tensor:
        return self.critic(inputs).squeeze(1)

    def players(self) -> dict[str, Player]:
        betas, config = (0.0, 0.9), self.config
        return {
            "critic": Player(self.critic, self.critic_loss, config.lr, betas, config.critic_steps),
            "generator": Player(self.generator, self.generator_loss, config.lr, betas),
        }

    def critic_loss(self, inputs: Tensor, weights: Tensor, noise: Noise) -> Tensor:
        made = self._made(inputs, noise).detach()
        slope = gradient_penalty(self.judge, inputs, made, noise.uniform(len(inputs), like=inputs))
        return weighted(self.judge(made) - self.judge(inputs) + self.config.penalty * slope, weights)

    def generator_loss(self, inputs: Tensor, weights: Tensor, noise: Noise) -> Tensor:
        return -self.judge(self._made(inputs, noise)).mean()

    def _made(self, inputs: Tensor, noise: Noise) -> Tensor:
        return self.draw(noise.normal(len(inputs), self.config.latent, like=inputs))
