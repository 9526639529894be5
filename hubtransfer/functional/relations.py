"""Relations between the examples of a batch, and how far those of two networks are apart.

Features of the two networks may differ in width: only examples are compared with examples. All of it is computed in
float32 at least, also under autocast; no gradient flows to what is passed as the teacher's.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ELEMENTS = 1 << 16
"""Cosines of triplets held at once by `angle_distance`: what fits a core's cache."""

LARGE = 1 << 20
"""Numbers from which the gradient of a Gram matrix is worth a form of its own."""


def gram(features: Tensor) -> Tensor:
    """Returns the inner products of all pairs of examples.

    Args:
        features: (batch, ...), flattened to (batch, d).

    Returns:
        (batch, batch), float32 or float64.

    >>> gram(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    tensor([[1., 1.],
            [1., 5.]])
    """
    flat = _wide(features)
    if flat.numel() < LARGE and not torch.is_autocast_enabled(flat.device.type):
        return flat @ flat.T  # two products backward, but no detour through Python
    return _Gram.apply(flat)


class _Gram(torch.autograd.Function):
    """x x^T whose gradient is one matrix product, (g + g^T) x, instead of two; `precise` adds up in float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, precise: bool = False) -> Tensor:
        ctx.save_for_backward(x)
        wide = x.double() if precise else x
        with torch.autocast(x.device.type, enabled=False):
            return (wide @ wide.T).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return (grad + grad.T) @ x, None


def cosines(features: Tensor) -> Tensor:
    """Returns the cosines of all pairs of examples, (batch, batch); those with a row of zeros are zero.

    Args:
        features: (batch, ...), flattened to (batch, d).
    """
    flat = _wide(features)
    inverse = torch.linalg.vector_norm(flat, dim=1).clamp(min=1e-12).reciprocal()  # more exact than the diagonal
    return gram(flat) * inverse[:, None] * inverse  # scales batch * batch numbers, not batch * d


def pair_distances(features: Tensor) -> Tensor:
    """Returns the Euclidean distances of all pairs; equal rows have distance zero and no gradient.

    Args:
        features: (batch, ...), flattened to (batch, d).

    >>> pair_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    tensor([[0., 5.],
            [5., 0.]])
    """
    return _distances(_centred_gram(features))


def gram_distance(teacher: Tensor, student: Tensor) -> Tensor:
    r"""Returns the distance of two matrices of similarities with rows of length one.

    .. math:: \frac{1}{b^2} \lVert \tilde G_T - \tilde G_S \rVert_F^2, \quad
       \tilde G_i = G_i / \lVert G_i \rVert_2, \quad G = Q Q^\top

    Args:
        teacher: Activations (batch, ...), flattened to Q.
        student: Activations (batch, ...).

    Returns:
        A scalar; zero for a batch of one.

    Teacher's rows (1, 0), (0, 1); the student's two equal rows become (0.7071, 0.7071): (4 - 4 * 0.7071) / 4.

    >>> gram_distance(torch.eye(2), torch.ones(2, 3))
    tensor(0.2929)
    """
    theirs, own = (F.normalize(gram(x), dim=1) for x in (teacher.detach(), student))
    return (own - theirs).square().mean()


def neighbour_divergence(teacher: Tensor, student: Tensor, eps: float = 1e-7) -> Tensor:
    r"""Returns the divergence of the probabilities that examples are neighbours, a mean over all pairs.

    .. math:: \frac{1}{b^2} \sum_{ij} p_{ij} \log \frac{p_{ij} + \epsilon}{q_{ij} + \epsilon}, \quad
       p_{ij} = \frac{K_{ij}}{\sum_k K_{ik}}, \quad K_{ij} = \tfrac12 (\cos(x_i, x_j) + 1)

    Args:
        teacher: Features (batch, d) that give p.
        student: Features (batch, other d) that give q.
        eps: Keeps the logarithm of opposite rows finite.

    Returns:
        A scalar in nats; zero for a batch of one.

    Teacher's rows (2/3, 1/3), student's (1/2, 1/2): (2/3 ln 4/3 + 1/3 ln 2/3) / 2 = 0.0283.

    >>> neighbour_divergence(torch.eye(2), torch.ones(2, 2))
    tensor(0.0283)
    """
    kernels = (cosines(x) + 1 for x in (teacher.detach(), student))  # the half cancels
    p, q = (kernel / kernel.sum(1, keepdim=True) for kernel in kernels)
    return (p * ((p + eps) / (q + eps)).log()).mean()  # a difference of logarithms would lose digits


def taylor_kernel(cosine: Tensor, gamma: float, order: int) -> Tensor:
    r"""Returns the Gaussian kernel of unit vectors, expanded to some order in their cosine c.

    .. math:: e^{-\gamma \lVert x - y \rVert^2} = e^{-2\gamma} e^{2 \gamma c}
       \approx \sum_{p=0}^{P} e^{-2\gamma} \frac{(2\gamma)^p}{p!} c^p

    Args:
        cosine: Any shape.
        gamma: Inverse squared width of the kernel.
        order: P.

    e^-1 (1 + 1 + 1/2) = 0.9197:

    >>> taylor_kernel(torch.tensor(1.0), gamma=0.5, order=2)
    tensor(0.9197)
    """
    factors = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]
    total = torch.full_like(cosine, factors[-1])
    for factor in reversed(factors[:-1]):
        total = total * cosine + factor
    return total


def congruence_distance(teacher: Tensor, student: Tensor, gamma: float | None = None, order: int = 2) -> Tensor:
    r"""Returns the mean squared difference of two networks' correlations between examples.

    .. math:: \frac{1}{b^2} \sum_{ij} \big(k(s_i, s_j) - k(t_i, t_j)\big)^2

    Args:
        teacher: Features t (batch, d), brought to unit length.
        student: Features s (batch, other d), brought to unit length.
        gamma: None: k is the inner product. Otherwise the Gaussian kernel of `taylor_kernel`.
        order: Of the expansion.

    Two of four products differ by 1: 2 / 4.

    >>> congruence_distance(torch.eye(2), torch.ones(2, 3))
    tensor(0.5000)
    """
    theirs, own = cosines(teacher.detach()), cosines(student)
    if gamma is not None:
        theirs, own = taylor_kernel(theirs, gamma, order), taylor_kernel(own, gamma, order)
    return (own - theirs).square().mean()


def distance_distance(teacher: Tensor, student: Tensor) -> Tensor:
    r"""Returns the smooth L1 distance of pairwise distances, each over the mean of its network's positive ones.

    .. math:: \frac{1}{b^2} \sum_{ij} \ell\Big(\frac{\lVert s_i - s_j \rVert}{\mu_S},
       \frac{\lVert t_i - t_j \rVert}{\mu_T}\Big)

    with l the Huber loss of threshold 1. Equal rows have distance zero and no gradient.

    Args:
        teacher: Features t (batch, d).
        student: Features s (batch, other d).

    Returns:
        A scalar; zero for a batch of one.

    Teacher's distances 1, 1, 2 over 4/3: 0.75, 0.75, 1.5; student's 1, 2, 3 over 2: 0.5, 1, 1.5; squares of a half,
    2 (0.03125 + 0.03125) / 9 = 0.0139.

    >>> distance_distance(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [3.0]]))
    tensor(0.0139)
    """
    theirs, own = (_over_mean(pair_distances(x)) for x in (teacher.detach(), student))
    return F.smooth_l1_loss(own, theirs)


def angle_distance(teacher: Tensor, student: Tensor) -> Tensor:
    r"""Returns the smooth L1 distance of the angles that all triplets form, in O(batch^2) memory.

    .. math:: \frac{1}{b^3} \sum_{ijk} \ell(\cos \angle s_j s_i s_k, \cos \angle t_j t_i t_k)

    With G the inner products and d the distances, the cosine at i is
    :math:`(G_{jk} - G_{ij} - G_{ik} + G_{ii}) / (d_{ij} d_{ik})`; it is computed for a few i at a time together with
    its gradient in G, so neither triplets nor a graph are kept. An angle with an arm of length zero has cosine zero
    and no gradient. The gradient cannot be differentiated again.

    Args:
        teacher: Features t (batch, d).
        student: Features s (batch, other d).

    Returns:
        A scalar; zero for a batch of one.

    The teacher's triangle has cosines 0, 1/sqrt 2, 1/sqrt 2 at its corners, the student's line 1, 1, -1, each twice:
    2 (1/2 + 0.0429 + 1.2071) / 27 = 0.1296 (the last difference, 1.7071, exceeds 1 and counts 1.7071 - 1/2).

    >>> angle_distance(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0], [2.0], [1.0]]))
    tensor(0.1296)
    """
    return _Angles.apply(_centred_gram(student), _centred_gram(teacher.detach()))


class _Angles(torch.autograd.Function):
    """The mean smooth L1 distance of cosines and, at the same go, its gradient in the student's Gram matrix."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, theirs: Tensor) -> Tensor:
        theirs = theirs.to(own)
        needed = ctx.needs_input_grad[0]
        count = len(own)
        (r, u), (r_theirs, u_theirs) = _arms(own), _arms(theirs)
        grad, row, slope = (torch.zeros_like(own) for _ in range(3)) if needed else (None, None, None)
        total = own.new_zeros(())
        step = max(1, ELEMENTS // max(count * count, 1))
        for k in range(0, count, step):
            at = slice(k, k + step)
            cosine = _cosines_at(own, r[at], u[at])
            gap = cosine - _cosines_at(theirs, r_theirs[at], u_theirs[at])
            h = gap.clamp(-1, 1)  # derivative of the smooth L1 distance, which is h (gap - h / 2)
            flat = h.view(-1)
            total += torch.dot(flat, gap.view(-1)) - torch.dot(flat, flat) / 2
            if grad is not None and row is not None and slope is not None:
                arm = r[at]
                slope[at] = torch.mul(h, cosine, out=cosine).sum(2)
                row[at] = arm * torch.bmm(h, arm[:, :, None]).squeeze(2)
                h.mul_(arm[:, :, None]).mul_(arm[:, None, :])
                grad += h[0] if len(h) == 1 else h.sum(0)
        if grad is not None and row is not None and slope is not None:
            squares = -slope * r.square()  # in the squared distances G_ii + G_jj - 2 G_ij
            grad -= 2 * (row + squares)
            grad.diagonal().add_(row.sum(1) + squares.sum(1) + squares.sum(0))
            ctx.save_for_backward(grad / count**3)
        return total / count**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


def _arms(gram: Tensor) -> tuple[Tensor, Tensor]:
    """r_ij = 1 / d_ij (zero for equal rows) and u_ij = r_ij (G_ii / 2 - G_ij)."""
    distances = _distances(gram)
    r = torch.where(distances > 0, 1 / distances, 0)
    return r, r * (gram.diagonal()[:, None] / 2 - gram)


def _cosines_at(gram: Tensor, r: Tensor, u: Tensor) -> Tensor:
    """Cosines (chunk, batch, batch) at the corners of a chunk: r_j r_k G_jk + u_j r_k + r_j u_k."""
    scaled = (gram * r[:, :, None]).mul_(r[:, None, :])
    return scaled.baddbmm_(torch.stack([u, r], 2), torch.stack([r, u], 1))


def _centred_gram(features: Tensor) -> Tensor:
    """The Gram matrix around the mean: differences of rows are the same, rounding is smaller.

    What is left of distances after inner products cancel has the products' rounding, so these are added up in float64
    where that costs little.
    """
    flat = _wide(features)
    return _Gram.apply(flat - flat.mean(0), flat.numel() < LARGE)


def _wide(features: Tensor) -> Tensor:
    flat = features if features.ndim == 2 else features.flatten(1)
    return flat if flat.dtype.itemsize >= 4 else flat.float()


def _distances(gram: Tensor) -> Tensor:
    """Distances, exactly zero (without gradient) on the diagonal and where squares are nothing but rounding."""
    norms = gram.diagonal()
    both = norms[:, None] + norms
    squares = torch.sub(both, gram, alpha=2)  # on the diagonal 2 a - 2 a, which is 0
    positive = squares > 8 * torch.finfo(gram.dtype).eps * both.detach()
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)


def _over_mean(distances: Tensor) -> Tensor:
    count = (distances > 0).sum()
    mean = distances.sum() / count.clamp(min=1)
    return distances / torch.where(count > 0, mean, 1)
