"""Inputs of earlier tasks that are drawn anew instead of kept."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hubtransfer.data.noise import Noise
from hubtransfer.models.generators import GeneratorConfig


class GenerativeMemory(nn.Module):
    r"""A generator that learns, and the one of the task before, which is frozen and draws what is recalled.

    .. math:: L_G = r\, E_{x \sim D_t} \ell(x) + (1 - r)\, E_{x' \sim G_{t-1}} \ell(x')

    with l the loss of each of the generator's parts (its players), and r the share of new data. All is state: resumed
    training draws what the training that went on would have drawn.

    Args:
        config: The kind of generator.
        shape: Of one input.

    Attributes:
        generator: What learns.
        before: What draws.
        noise: The numbers that both use up; its seed is the method's to set.
        span: Lowest and highest number of an input as the model gets it, (2,), between which inputs are scaled to
            [0, 1]; what lies beyond is cut off.
    """

    span: Tensor

    def __init__(self, config: GeneratorConfig, shape: Sequence[int]) -> None:
        super().__init__()
        self.generator, self.before = config.build(shape), config.build(shape)
        self.before.requires_grad_(False)
        self.noise = Noise()
        self.register_buffer("span", torch.tensor([0.0, 1.0]))

    def recall(self, count: int, like: Tensor) -> Tensor:
        """Returns inputs as the model gets them, (count, *shape), of the type and on the device of `like`."""
        low, high = self.span.to(like)
        return low + (high - low) * self._draw(count, like)

    def loss(self, name: str, inputs: Tensor, share: float) -> Tensor:
        """Returns the loss of one of the generator's parts, a scalar.

        Args:
            name: Of the part, as `generator.players()` calls it.
            inputs: New ones, as the model gets them, (batch, *shape).
            share: r in [0, 1].
        """
        low, high = self.span.to(inputs)
        parts = [(((inputs - low) / (high - low)).clamp(0, 1), share)] if share > 0 else []
        parts += [(self._draw(len(inputs), inputs), 1 - share)] if share < 1 else []
        mixed = torch.stack([x for x, _ in parts], 1).flatten(0, 1)  # in turns: a process has a share of both
        weights = inputs.new_tensor([part / len(inputs) for _, part in parts]).repeat(len(inputs))
        return self.generator.players()[name].loss(mixed, weights, self.noise)

    def hold(self) -> None:
        """From now on what has been learned so far is what is recalled."""
        self.before.load_state_dict(self.generator.state_dict())

    @torch.no_grad()
    def _draw(self, count: int, like: Tensor) -> Tensor:
        codes = self.noise.normal(count, self.before.config.latent, like=like)
        return self.before.draw(codes).to(codes)
