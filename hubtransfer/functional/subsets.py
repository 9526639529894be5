"""Choosing some of many."""

import torch
from torch import Tensor


def least_similar(similarity: Tensor, count: int) -> Tensor:
    r"""Returns which elements to keep so that they are as unlike one another as can be.

    .. math:: \min_w\; w^\top S\, w \quad\text{s.t.}\quad w \in \{0, 1\}^n, \quad 1^\top w = k

    an integer quadratic program. From all elements the one most like the others goes, one after another; then pairs
    (one in, one out) change places, the best pair first, while that lowers the sum. The result cannot be made better by
    any one exchange; that no other subset is better cannot be promised.

    Args:
        similarity: S, symmetric, (n, n), for instance cosines.
        count: k, at most n.

    Returns:
        w as bool (n,).

    Raises:
        ValueError: if there are fewer than k elements, or S is not square.

    >>> least_similar(torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, -0.1], [0.0, -0.1, 1.0]]), 2)
    tensor([False,  True,  True])
    """
    size = len(similarity)
    if similarity.shape != (size, size):
        raise ValueError(f"similarity must be square, got {tuple(similarity.shape)}")
    if not 0 <= count <= size:
        raise ValueError(f"{count} cannot be chosen of {size}")
    s = similarity.detach().double().cpu()
    s = (s + s.T) / 2
    kept = torch.ones(size, dtype=torch.bool)
    sums, own = s.sum(1), s.diagonal()
    for _ in range(size - count):  # w'Sw falls by 2 sums - own when an element leaves
        gone = int(torch.where(kept, 2 * sums - own, -torch.inf).argmax())
        kept[gone] = False
        sums = sums - s[gone]
    while True:
        inside, outside = kept.nonzero().flatten(), (~kept).nonzero().flatten()
        if not len(inside) or not len(outside):
            return kept
        leaves, comes = 2 * sums[inside] - own[inside], 2 * sums[outside] + own[outside]
        change = comes[None] - leaves[:, None] - 2 * s[inside][:, outside]
        best = int(change.argmin())
        if change.flatten()[best] >= -1e-9:  # rounding may not make two elements change places for ever
            return kept
        out, into = inside[best // len(outside)], outside[best % len(outside)]
        kept[out], kept[into] = False, True
        sums = sums - s[out] + s[into]
