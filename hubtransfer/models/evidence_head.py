"""A head that says how likely an input is: a small variational autoencoder of one expert's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hubtransfer.backbones import Backbone, Features
from hubtransfer.functional.generative import gaussian_evidence_bound
from hubtransfer.models.generators.networks import perceptron
from hubtransfer.models.heads import HeadConfig, Inputs


class InputDensity(nn.Module):
    """Encodes inputs as Gaussians over codes and decodes codes to the means of unit Gaussians.

    Attributes:
        span: Lowest and highest number of an input, (2,), between which inputs are scaled to [0, 1].
        codes: Fixed standard normal numbers, (samples, latent), with which evidence is measured.
        learned: How many examples it has learned, a scalar: its weight in a mixture, counted by whoever trains it.
    """

    span: Tensor
    codes: Tensor
    learned: Tensor

    def __init__(self, size: int, hidden: tuple[int, ...], latent: int, samples: int) -> None:
        super().__init__()
        self.latent, self.samples = latent, samples
        self.encoder = perceptron((size, *hidden, 2 * latent), nn.ReLU)
        self.decoder = perceptron((latent, *reversed(hidden), size), nn.ReLU)
        self.register_buffer("span", torch.tensor([0.0, 1.0]))
        self.register_buffer("codes", torch.randn(samples, latent, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("learned", torch.zeros(()))

    def forward(self, inputs: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns the evidence lower bound of inputs (batch, ...), (batch,), in nats.

        Args:
            inputs: As the model gets them.
            noise: Standard normal numbers, (batch, samples, latent); by default the same fixed ones for each input.
        """
        low, high = self.span.to(inputs)
        flat = ((inputs.flatten(1) - low) / (high - low)).clamp(0, 1)
        mean, log_variance = self.encoder(flat).chunk(2, 1)
        noise = self.codes.to(mean) if noise is None else noise
        drawn = mean[:, None] + (log_variance / 2).exp()[:, None] * noise
        return gaussian_evidence_bound(flat, self.decoder(drawn).sigmoid(), mean, log_variance)


@dataclass(frozen=True)
class EvidenceHead(HeadConfig):
    r"""The log-likelihood of an input under a variational autoencoder: its evidence lower bound, in nats.

    .. math:: E_{z \sim q(z | x)} \ln N(x; d(z), I) - KL(q(z | x)\, \|\, N(0, I)), \qquad L = -\text{its mean}

    It reads inputs, not features, scaled to [0, 1].

    Attributes:
        size: Numbers of an input.
        hidden: Units of each hidden layer of the encoder; the decoder has them in reverse.
        latent: Numbers of a code.
        samples: Codes drawn for an input.
    """

    kind: ClassVar[str] = "evidence"
    size: int
    _: KW_ONLY
    hidden: tuple[int, ...] = (64, 64)
    latent: int = 16
    samples: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("size", "latent", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must name at least one layer of at least one unit, got {self.hidden}")

    @property
    def width(self) -> int:
        """One number an input."""
        return 1

    def build(self, backbone: Backbone, dim: int | None = None) -> nn.Module:
        """Makes the autoencoder, on the backbone's device and in its precision."""
        module = InputDensity(self.size, self.hidden, self.latent, self.samples)
        like = next((p for p in backbone.trunk.parameters() if p.is_floating_point()), None)
        if like is not None:
            module.to(like.device, like.dtype)
            module.learned = module.learned.to(torch.promote_types(like.dtype, torch.float32))  # a count stays exact
        return module

    def logits(self, module: nn.Module, features: Features, inputs: Inputs | None = None) -> Tensor:
        """Returns the evidence of inputs, (batch, 1).

        Raises:
            ValueError: if there are none.
        """
        images = inputs.get("pixel_values") if isinstance(inputs, Mapping) else inputs
        if images is None:
            raise ValueError("an evidence head reads the inputs themselves: call the model, or logits(..., inputs=x)")
        return module(images)[:, None]

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean of the negative evidence (batch, 1); labels do not matter."""
        return -logits.mean()

    def check(self, labels: Tensor) -> None:
        """Any label will do: none is read."""

    @staticmethod
    def known(labels: Tensor) -> Tensor:
        """All are."""
        return torch.ones(labels.shape[:1], dtype=torch.bool, device=labels.device)
