"""The networks that generators are made of: an encoder of inputs and, as its mirror image, a decoder to inputs."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

Activation = Callable[[], nn.Module]
KERNEL = 4
"""Side of a convolution's kernel, with steps of two and a margin of one: a side of n becomes one of n // 2."""


def perceptron(widths: Sequence[int], activation: Activation) -> nn.Sequential:
    """Linear layers from the first width to the last, with an activation after all but the last."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def encoder(
    shape: Sequence[int], channels: Sequence[int], hidden: Sequence[int], outputs: int, activation: Activation
) -> nn.Sequential:
    """Convolutions that halve height and width, then a perceptron: inputs (count, *shape) -> (count, outputs).

    Args:
        shape: Of one input, (channels, height, width) where there are convolutions.
        channels: Of each convolution, 4 x 4 in steps of two as in DCGAN (https://arxiv.org/abs/1511.06434, section 3).
        hidden: Units of each hidden layer of the perceptron.
        outputs: Numbers that come out.
        activation: After all layers but the last.

    Raises:
        ValueError: if the shape does not suit the convolutions.
    """
    maps = map_shapes(shape, channels)
    layers: list[nn.Module] = []
    for before, after in pairwise(maps):
        layers += [nn.Conv2d(before[0], after[0], KERNEL, stride=2, padding=1), activation()]
    return nn.Sequential(*layers, nn.Flatten(), *perceptron((math.prod(maps[-1]), *hidden, outputs), activation))


def decoder(
    inputs: int, hidden: Sequence[int], channels: Sequence[int], shape: Sequence[int], activation: Activation
) -> nn.Sequential:
    """A perceptron, then transposed convolutions that double height and width: (count, inputs) -> (count, *shape).

    Args:
        inputs: Numbers that go in.
        hidden: Units of each hidden layer of the perceptron, those next to the shape first, as the encoder has them.
        channels: Of the encoder's convolutions.
        shape: Of what comes out; an odd side gets a row more than twice those before it.
        activation: After all layers but the last.

    Raises:
        ValueError: if the shape does not suit the convolutions.
    """
    maps = map_shapes(shape, channels)
    layers = [*perceptron((inputs, *reversed(hidden), math.prod(maps[-1])), activation)]
    if len(maps) > 1:
        layers.append(activation())
    layers.append(nn.Unflatten(1, maps[-1]))
    for before, after in pairwise(reversed(maps)):
        odd = (after[1] % 2, after[2] % 2)
        layers += [nn.ConvTranspose2d(before[0], after[0], KERNEL, 2, padding=1, output_padding=odd), activation()]
    return nn.Sequential(*(layers[:-1] if len(maps) > 1 else layers))


def map_shapes(shape: Sequence[int], channels: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns the shape of an input and that of the maps after each convolution.

    Raises:
        ValueError: if there are convolutions and the shape is not that of images, or of too small ones.

    >>> map_shapes((1, 28, 28), (32, 64))
    [(1, 28, 28), (32, 14, 14), (64, 7, 7)]
    """
    shapes = [tuple(shape)]
    if channels and len(shape) != 3:
        raise ValueError(
            f"a generator with channels={tuple(channels)} draws images (channels, height, width), but an input has the "
            f"shape {tuple(shape)}; leave channels empty"
        )
    for number in channels:
        height, width = shapes[-1][1:]
        if min(height, width) < 2:
            most = min(shape[1:]).bit_length() - 1
            raise ValueError(
                f"images of {shape[1]} x {shape[2]} can be halved {most} times, but channels={tuple(channels)} name "
                f"{len(channels)} convolutions"
            )
        shapes.append((number, height // 2, width // 2))
    return shapes
