"""Where a loss has settled: the moments at which a learner without task boundaries takes stock."""

from typing import NamedTuple

from torch import Tensor


class Plateau(NamedTuple):
    """What a window of losses says.

    Attributes:
        found: Whether the loss has settled for the first time since it last rose.
        armed: Whether the next settling counts.
        mean: Of the window at the last plateau that was found.
        variance: The like.
    """

    found: bool
    armed: bool
    mean: float
    variance: float


def plateau(window: Tensor, before: Plateau, mean_below: float, variance_below: float) -> Plateau:
    r"""Looks for a plateau in the newest losses.

    .. math:: \mu(W) < \tau_\mu \;\wedge\; \sigma^2(W) < \tau_\sigma

    counts once; then not again before the loss has risen, :math:`\mu(W) > \mu_{old} + \sigma_{old}`, with the mean and
    deviation of the window in which the last plateau was found.

    Source: https://arxiv.org/abs/1812.03596, section 3 (detecting plateaus and peaks).

    Args:
        window: The newest losses, (count,).
        before: What was said one step earlier.
        mean_below: tau_mu.
        variance_below: tau_sigma.
    """
    mean, variance = float(window.mean()), float(window.var(correction=0))
    armed = before.armed or mean > before.mean + before.variance**0.5
    if armed and mean < mean_below and variance < variance_below:
        return Plateau(True, False, mean, variance)
    return Plateau(False, armed, before.mean, before.variance)
