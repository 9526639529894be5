"""Weights of tasks by how fast they train: gradient normalisation's objective and its constraint."""

import torch
from torch import Tensor


def grad_norm_slopes(
    weights: Tensor, norms: Tensor, losses: Tensor, initial: Tensor, there: Tensor, alpha: float
) -> Tensor:
    r"""Returns the derivative of GradNorm's objective by each weight.

    .. math:: L_{grad} = \sum_t \big| w_t n_t - c_t \big|, \quad c_t = \overline{w n}\; r_t^\alpha, \quad
       \frac{\partial L_{grad}}{\partial w_t} = \operatorname{sign}(w_t n_t - c_t)\, n_t

    with norms n, relative inverse training rates :math:`r_t = (L_t / L_t(0)) / \overline{L / L(0)}`, means over the
    tasks that are there, and constant targets c.

    Args:
        weights: (tasks,).
        norms: Of each task's unweighted gradient, (tasks,).
        losses: Now, (tasks,); a negative one counts as zero.
        initial: Losses that progress is measured from, (tasks,); a task where it is not positive has rate 1.
        there: Which tasks count, bool (tasks,); the others' derivative is zero.
        alpha: Strength of the pull on slow tasks.

    Returns:
        (tasks,).

    Source: https://arxiv.org/abs/1711.02257, equations 1 and 2.

    >>> one = torch.ones(2)  # both norms are 1; task 0 still has its first loss, task 1 half of it: r = (4/3, 2/3)
    >>> grad_norm_slopes(one, one, torch.tensor([1.0, 0.5]), one, one > 0, 1.0)
    tensor([-1.,  1.])
    """
    known = there & (initial > 0)
    progress = torch.where(known, losses.clamp(min=0) / initial.where(known, 1.0), 0.0)
    mean = progress.sum() / known.sum().clamp(min=1)
    rates = torch.where(known & (mean > 0), progress / mean.where(mean > 0, 1.0), 1.0)
    weighted = weights * norms
    targets = torch.where(there, weighted, 0.0).sum() / there.sum().clamp(min=1) * rates**alpha
    return torch.where(there, torch.sign(weighted - targets) * norms, 0.0)


def rescaled(weights: Tensor, before: Tensor, there: Tensor) -> Tensor:
    """Returns weights that are not negative and whose sum is their number.

    Args:
        weights: (tasks,), as a step has left them; where all that count are zero or less they become equal.
        before: Before the step, (tasks,), with the right sum.
        there: Which tasks count, bool (tasks,); the others keep their weight from before.

    >>> rescaled(torch.tensor([-1.0, 1.0, 3.0]), torch.ones(3), torch.tensor([True, True, True]))
    tensor([0.0000, 0.7500, 2.2500])
    """
    moved = torch.where(there, weights.clamp(min=0), 0.0)
    left = len(weights) - torch.where(there, 0.0, before).sum()
    total = moved.sum()
    shares = torch.where(total > 0, moved / total.where(total > 0, 1.0), 1 / there.sum().clamp(min=1))
    return torch.where(there, left * shares, before)
