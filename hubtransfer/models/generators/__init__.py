"""Generators: networks that draw inputs like those they have seen."""

from hubtransfer.models.generators.generator import Generator, GeneratorConfig, Player
from hubtransfer.models.generators.vae import VAE
from hubtransfer.models.generators.wgan_gp import WGANGP

__all__ = ["VAE", "WGANGP", "Generator", "GeneratorConfig", "Player"]
