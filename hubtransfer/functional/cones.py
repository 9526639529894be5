"""The nearest vector that lies at no obtuse angle to some others: gradients that may not raise other losses."""

import numpy as np
import torch
from torch import Tensor

_STRETCH = 1 << 14  # long sums in 32 bits lose a digit; 64-bit copies of all vectors would take five times as long


def cone_weights(gram: Tensor, products: Tensor, margin: float = 0.0, ridge: float = 0.0) -> Tensor:
    r"""Returns the weights with which constraint vectors have to be added to a vector, so that it meets them all.

    .. math:: \min_v \tfrac12 v^\top (M + \epsilon I)\, v + p^\top v \quad \text{s.t.}\quad v \ge m

    With :math:`M + \epsilon I = A^\top A` and :math:`u = v - m` this is the non-negative least-squares problem
    :math:`\min_{u \ge 0} \|A u - b\|^2` with :math:`A^\top b = -(p + (M + \epsilon I) m)`, which an active-set method
    solves exactly in finitely many steps, singular matrices included. It runs in 64 bits.

    Args:
        gram: M, inner products of the constraint vectors, (constraints, constraints).
        products: p, inner products of the vector with them, (constraints,).
        margin: m, the least weight of each.
        ridge: epsilon, added to the diagonal.

    Returns:
        v, (constraints,) in 64 bits.

    Raises:
        ValueError: if the shapes do not fit.

    >>> cone_weights(torch.tensor([[4.0]]), torch.tensor([-2.0]))
    tensor([0.5000], dtype=torch.float64)
    """
    count = len(products)
    if gram.shape != (count, count):
        raise ValueError(f"gram must have shape ({count}, {count}) for {count} products, got {tuple(gram.shape)}")
    matrix = gram.detach().cpu().double().numpy()
    matrix = (matrix + matrix.T) / 2 + ridge * np.eye(count)
    right = -(products.detach().cpu().double().numpy() + matrix.sum(1) * margin)
    # Unit diagonal: a short constraint vector counts as much as a long one when it comes to what is singular.
    size = np.sqrt(matrix.diagonal().clip(min=0))
    size[size == 0] = 1.0
    factor, target = _square_root(matrix / np.outer(size, size), right / size)
    # The columns of the factor have unit length, so weights scale with the target alone.
    scale = np.abs(target).max(initial=0.0)
    if scale == 0:
        return torch.full((count,), margin, dtype=torch.float64)
    from scipy.optimize import nnls  # 0.4 s, which nobody else should wait for

    u, _ = nnls(factor, target / scale, maxiter=100 * count)
    return torch.from_numpy(u * scale / size + margin)


def project_to_cone(vector: Tensor, constraints: Tensor, margin: float = 0.0, ridge: float = 0.0) -> Tensor:
    r"""Returns the nearest vector that has no negative inner product with any of the constraint vectors.

    .. math:: \min_{\tilde g} \tfrac12 \|g - \tilde g\|^2 \quad\text{s.t.}\quad G \tilde g \ge 0, \qquad
       \tilde g = g + G^\top v

    with the dual's solution v (see `cone_weights`). A margin above 0 raises the dual's bound from v >= 0 and
    moves the answer further inside the cone. A vector that meets all constraints is returned as it is, whatever the
    margin.

    Args:
        vector: g, (n,).
        constraints: G, (constraints, n).
        margin: Least weight of each constraint, where some constraint is not met.
        ridge: Added to the diagonal of G G^T.

    Returns:
        (n,) in the dtype of `vector`.

    Raises:
        ValueError: if the shapes do not fit or a value is not finite.

    >>> project_to_cone(torch.tensor([-1.0, 1.0]), torch.tensor([[1.0, 0.0]]))
    tensor([0., 1.])
    """
    if constraints.ndim != 2 or constraints.shape[1:] != vector.shape:
        raise ValueError(
            f"constraints must have shape (constraints, {len(vector)}) for a vector of that length, "
            f"got {tuple(constraints.shape)}"
        )
    gram, products = _inner_products(vector, constraints)
    if not (gram.isfinite().all() and products.isfinite().all()):
        raise ValueError("the vectors hold values that are not finite")
    if (products >= 0).all():
        return vector
    weights = cone_weights(gram, products, margin, ridge)
    return vector + (weights.to(vector) @ constraints.to(vector))


def _inner_products(vector: Tensor, constraints: Tensor) -> tuple[Tensor, Tensor]:
    """G G^T and G g: short stretches in the vectors' own precision, summed up in 64 bits."""
    count, length = constraints.shape
    gram = torch.zeros(count, count, dtype=torch.float64, device=vector.device)
    products = torch.zeros(count, dtype=torch.float64, device=vector.device)
    for start in range(0, length, _STRETCH):
        rows = constraints[:, start : start + _STRETCH]
        gram += rows @ rows.T
        products += rows @ vector[start : start + _STRETCH]
    return gram, products


def _square_root(matrix: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A with A^T A = matrix, and b with A^T b = right: triangular, or from eigenvalues where it is singular."""
    from scipy.linalg import cho_factor, solve_triangular

    try:
        factor, _ = cho_factor(matrix, lower=False)
        factor = np.triu(factor)
        if factor.diagonal().min(initial=1.0) > 1e-5:  # below that triangular solves lose the digits
            return factor, solve_triangular(factor, right, trans="T")
    except np.linalg.LinAlgError:
        pass
    values, vectors = np.linalg.eigh(matrix)
    kept = values > values.max(initial=0.0) * len(values) * np.finfo(float).eps
    roots = np.sqrt(values[kept])
    return roots[:, None] * vectors[:, kept].T, (vectors[:, kept].T @ right) / roots
