"""What generators are trained on: the evidence bound of a variational autoencoder, the gradient penalty of a critic."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hubtransfer.functional.precision import in_full_precision


@in_full_precision
def negative_evidence_bound(inputs: Tensor, logits: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    r"""Returns each example's negative evidence lower bound, with Bernoulli pixels and a Gaussian code.

    .. math:: -\sum_p \big[x_p \ln \sigma(l_p) + (1 - x_p) \ln (1 - \sigma(l_p))\big] +
       \frac{1}{2} \sum_j \big[\mu_j^2 + e^{v_j} - v_j - 1\big]

    Source: https://arxiv.org/abs/1312.6114, equation 10 and appendices B and C.1.

    Args:
        inputs: x in [0, 1], (batch, ...).
        logits: l, of the same shape.
        mean: mu, (batch, latent).
        log_variance: v, (batch, latent).

    Returns:
        (batch,), in nats.

    One pixel 1 with logit 0 costs ln 2; one code with mean 2 and variance 1 costs 2.

    >>> one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    >>> negative_evidence_bound(one, zero, 2 * one, zero)
    tensor([2.6931])
    """
    pixels = F.binary_cross_entropy_with_logits(logits, inputs, reduction="none").flatten(1).sum(1)
    return pixels + 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1)


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, made: Tensor, share: Tensor) -> Tensor:
    r"""Returns each example's penalty on the slope of a critic between real and made inputs.

    .. math:: (\|\nabla_{\hat x} D(\hat x)\|_2 - 1)^2, \qquad \hat x = \epsilon x + (1 - \epsilon) \tilde x

    Differentiable in the critic's parameters. Source: https://arxiv.org/abs/1704.00028, equation 3 and algorithm 1.

    Args:
        critic: D, from inputs (batch, ...) to values (batch,), each of its own example alone.
        real: x, (batch, ...).
        made: x tilde, of the same shape.
        share: epsilon in [0, 1], (batch,).

    Returns:
        (batch,).

    D(x) = 3 x_1 + 4 x_2 has slope 5 everywhere.

    >>> points = torch.zeros(1, 2)
    >>> gradient_penalty(lambda x: x @ torch.tensor([3.0, 4.0]), points, points, torch.tensor([0.5]))
    tensor([16.])
    """
    share = share.view(-1, *[1] * (real.dim() - 1))
    between = (share * real.detach() + (1 - share) * made.detach()).requires_grad_(True)
    with torch.enable_grad():
        values = critic(between)
        (slopes,) = torch.autograd.grad(values.sum(), between, create_graph=True)
    norms = torch.linalg.vector_norm(
        slopes.flatten(1).float() if slopes.dtype.itemsize < 4 else slopes.flatten(1), dim=1
    )
    return (norms - 1).square()


@in_full_precision
def gaussian_evidence_bound(inputs: Tensor, decoded: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    r"""Returns each example's evidence lower bound, with pixels of unit Gaussians and several Gaussian codes.

    .. math:: -\frac{1}{S} \sum_s \frac{1}{2} \|x - d_s\|^2 - \frac{P}{2} \ln 2 \pi -
       \frac{1}{2} \sum_j \big[\mu_j^2 + e^{v_j} - v_j - 1\big]

    Source: https://arxiv.org/abs/1312.6114, equation 10 and appendices B and C.2.

    Args:
        inputs: x, (batch, pixels).
        decoded: d, the pixels' means for each code, (batch, samples, pixels).
        mean: mu, (batch, latent).
        log_variance: v, (batch, latent).

    Returns:
        (batch,), in nats.

    A pixel that is one off costs a half beyond ln(2 pi) / 2 = 0.9189.

    >>> one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    >>> gaussian_evidence_bound(one, zero[None], zero, zero)
    tensor([-1.4189])
    """
    error = (inputs[:, None] - decoded).square().sum(2).mean(1) / 2
    constant = inputs.shape[1] / 2 * math.log(2 * math.pi)
    return -error - constant - 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1)
