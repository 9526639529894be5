"""Choosing some of many."""

import numpy as np
import torch
from torch import Tensor


def least_similar(similarity: Tensor, count: int, start: Tensor | None = None) -> Tensor:
    r"""Returns which elements to keep so that they are as unlike one another as can be.

    .. math:: \min_w\; w^\top S\, w \quad\text{s.t.}\quad w \in \{0, 1\}^n, \quad 1^\top w = k

    an integer quadratic program. From all elements the one most like the others goes, one after another, unless there
    is a choice to start from; then pairs (one in, one out) change places, the best pair first, while that lowers the
    sum. The result cannot be made better by any one exchange; that no other subset is better cannot be promised.

    Args:
        similarity: S, symmetric, (n, n), for instance cosines.
        count: k, at most n.
        start: A first choice, bool (n,) with k elements.

    Returns:
        w as bool (n,), on the CPU.

    Raises:
        ValueError: if there are fewer than k elements, S is not square, or the first choice is not one of k.

    >>> least_similar(torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, -0.1], [0.0, -0.1, 1.0]]), 2)
    tensor([False,  True,  True])
    """
    size = len(similarity)
    if similarity.shape != (size, size):
        raise ValueError(f"similarity must be square, got {tuple(similarity.shape)}")
    if not 0 <= count <= size:
        raise ValueError(f"{count} cannot be chosen of {size}")
    if start is not None and (start.shape != (size,) or int(start.sum()) != count):
        raise ValueError(f"start must choose {count} of {size}, but it chooses {int(start.sum())} of {len(start)}")
    s = similarity.detach().double().cpu().numpy()
    s = (s + s.T) / 2
    kept = np.ones(size, dtype=bool) if start is None else start.cpu().numpy().astype(bool)
    sums, own = s @ kept, s.diagonal()
    for _ in range(int(kept.sum()) - count):  # w'Sw falls by 2 sums - own when an element leaves
        gone = np.where(kept, 2 * sums - own, -np.inf).argmax()
        kept[gone] = False
        sums -= s[gone]
    inside, outside = np.flatnonzero(kept), np.flatnonzero(~kept)
    while len(inside) and len(outside):
        change = 2 * sums[outside] + own[outside] - (2 * sums[inside] - own[inside])[:, None]
        change -= 2 * s[np.ix_(inside, outside)]
        row, column = divmod(int(change.argmin()), len(outside))
        if change[row, column] >= -1e-9:  # rounding may not make two elements change places for ever
            break
        sums += s[outside[column]] - s[inside[row]]
        inside[row], outside[column] = outside[column], inside[row]
    kept[inside], kept[outside] = True, False
    return torch.from_numpy(kept)
