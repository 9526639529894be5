"""What a tensor was computed from."""

from collections.abc import Sequence

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
    layer = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(layer)
    found: dict[Tensor, None] = {}
    while layer:
        below = []
        for node in layer:
            if hasattr(node, "variable"):  # where gradients are accumulated
                found[node.variable] = None
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    below.append(following)
        layer = below
    return list(found)
