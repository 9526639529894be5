"""What a tensor was computed from."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


def leaves_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the leaves (parameters, mostly) that some tensors were computed from, the nearest first.

    Args:
        outputs: Tensors with their graph; those without one have no leaves.

    >>> import torch
    >>> a, b, c = (torch.ones(1, requires_grad=True) for _ in range(3))
    >>> [leaf is b for leaf in leaves_of([(a.exp() * b).exp()])]
    [True, False]
    """
    found = {node.variable: None for node in _nodes(outputs) if hasattr(node, "variable")}
    return list(found)


def convolution_with(outputs: Sequence[Tensor], weight: Tensor) -> Any:
    """Returns the node of the graph where `weight` is a convolution's, in one group and on two dimensions, or None.

    Args:
        outputs: Tensors with their graph.
        weight: A leaf; None is returned too where it is used more than once.
    """
    users = [
        node for node in _nodes(outputs) for following, _ in node.next_functions
        if following is not None and getattr(following, "variable", None) is weight
    ]  # fmt: skip
    if len(users) != 1 or users[0].name() != "ConvolutionBackward0" or weight.ndim != 4:
        return None
    (node,) = users
    plain = node._saved_groups == 1 and not node._saved_transposed and node.next_functions[1][0].variable is weight
    return node if plain else None


def _nodes(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """Every node of the graph behind some tensors, the nearest first."""
    layer: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(layer)
    while layer:
        below = []
        for node in layer:
            yield node
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    below.append(following)
        layer = below
