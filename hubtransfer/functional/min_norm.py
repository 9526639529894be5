"""The shortest vector in the convex hull of some vectors."""

import numpy as np
import torch
from torch import Tensor


def min_norm_weights(gram: Tensor) -> Tensor:
    r"""Returns the convex weights of the shortest vector in the hull of vectors with a given Gram matrix.

    .. math:: \min_{\alpha} \alpha^\top G \alpha \quad \text{s.t.}\quad \alpha \ge 0,\; 1^\top \alpha = 1

    With :math:`G = A^\top A` the non-negative least-squares problem
    :math:`\min_{x \ge 0} \|Ax\|^2 + (1^\top x - 1)^2` has its minimum at a multiple of the answer: along a fixed
    direction :math:`\alpha` its best value is :math:`v/(v+1)` with :math:`v = \alpha^\top G \alpha`, which grows with
    v. So the active-set solver for the former solves the latter exactly, singular matrices included.

    Args:
        gram: Inner products of the vectors, (terms, terms), symmetric and positive semi-definite.

    Returns:
        Weights (terms,), non-negative with sum 1, on the device and in the dtype of `gram`. Where all vectors are
        zero every weight is a solution and the equal ones are returned.

    Raises:
        ValueError: if the matrix is not square or holds a value that is not finite.

    >>> min_norm_weights(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))  # orthogonal: inverse to the squared lengths
    tensor([0.7500, 0.2500])
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must be a square matrix, got shape {tuple(gram.shape)}")
    matrix = gram.detach().cpu().double().numpy()
    if not np.isfinite(matrix).all():
        raise ValueError(f"gram holds values that are not finite: diagonal {np.diag(matrix).tolist()}")
    terms = len(matrix)
    if terms == 2:
        share = _share_of_two(*matrix.flatten().tolist())
        return torch.tensor([share, 1 - share], dtype=gram.dtype, device=gram.device)
    scale = matrix.diagonal().mean()  # the solution does not depend on it; it keeps both parts of the problem alike
    if scale <= 0:
        return torch.full((terms,), 1 / terms, dtype=gram.dtype, device=gram.device)
    factor = _factor((matrix + matrix.T) / (2 * scale))
    system = np.concatenate([factor, np.ones((1, terms))])
    from scipy.optimize import nnls  # 0.4 s, which nobody else should wait for

    x, _ = nnls(system, np.concatenate([np.zeros(terms), [1.0]]), maxiter=100 * terms)
    return torch.as_tensor(x / x.sum(), dtype=gram.dtype, device=gram.device)


def _share_of_two(gg: float, gh: float, hg: float, hh: float) -> float:
    """Returns the weight of g, of two vectors g and h: the nearest point to 0 on the segment between them."""
    apart = gg + hh - gh - hg  # |g - h|^2
    if apart <= 0:
        return 0.5
    return min(1.0, max(0.0, (hh - (gh + hg) / 2) / apart))


def _factor(matrix: np.ndarray) -> np.ndarray:
    """Returns A with `A.T @ A == matrix`."""
    try:
        return np.linalg.cholesky(matrix).T
    except np.linalg.LinAlgError:  # singular: four times slower
        values, vectors = np.linalg.eigh(matrix)
        return np.sqrt(values.clip(min=0))[:, None] * vectors.T
