"""How likely values are under a Gaussian with one variance a channel."""

from torch import Tensor

from hubtransfer.functional.precision import in_full_precision


@in_full_precision
def surprise(target: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    r"""Returns the mean negative log-likelihood of values, without its constant.

    .. math:: \frac{1}{B C P} \sum_{bcp} \log \sigma_c + \frac{(t_{bcp} - \mu_{bcp})^2}{2 \sigma_c^2}

    Squares are averaged before they are divided by their channel's variance: one pass over the values.

    Args:
        target: t, (batch, channels, ...), with P positions.
        mean: mu, the same shape.
        variance: sigma^2, (channels,).

    Differences 2 and 0, variances 4 and 1: ((ln 4 + 4 / 4) / 2 + (ln 1 + 0) / 2) / 2.

    >>> import torch
    >>> surprise(torch.tensor([[2.0, 7.0]]), torch.tensor([[0.0, 7.0]]), torch.tensor([4.0, 1.0]))
    tensor(0.5966)
    """
    squares = (target - mean).square().transpose(0, 1).flatten(1).mean(1)
    return 0.5 * (variance.log() + squares / variance).mean()
