"""The few examples whose mean is nearest the mean of many."""

import torch
from torch import Tensor


def herding_order(features: Tensor, count: int) -> Tensor:
    r"""Returns which examples to keep, best first: every beginning of the list has a mean near that of all examples.

    .. math:: p_k = \arg\min_{x \notin \{p_1 \dots p_{k-1}\}}
       \Big\| \mu - \frac{1}{k} \Big( f(x) + \sum_{j<k} f(p_j) \Big) \Big\|_2, \qquad \mu = \frac{1}{n} \sum_x f(x)

    in k products of a matrix and a vector: the least distance is the largest
    :math:`f(x)^\top (k \mu - \sum_{j<k} f(p_j)) - \frac12 \|f(x)\|_2^2`. Of equally good ones
    the first is taken.

    Args:
        features: f, (n, d).
        count: How many; all n in order where there are fewer.

    Returns:
        Rows, int64 (min(count, n),).

    Source: https://arxiv.org/abs/1611.07725, algorithm 4.

    >>> herding_order(torch.tensor([[0.0], [3.0], [4.0], [9.0]]), 2)
    tensor([2, 1])
    """
    features = features.detach().double()
    mean, halves = features.mean(0), features.square().sum(1) / 2
    missing, taken = torch.zeros_like(mean), torch.zeros(len(features), dtype=torch.bool, device=features.device)
    order = []
    for _ in range(min(count, len(features))):
        missing = missing + mean  # k mu - sum of those taken
        best = int(torch.where(taken, -torch.inf, features @ missing - halves).argmax())
        taken[best] = True
        missing = missing - features[best]
        order.append(best)
    return torch.tensor(order, dtype=torch.int64)
