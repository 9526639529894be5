"""Multiple-gradient descent on an upper bound (Sener and Koltun, 2018)."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from hubtransfer.data import MultiTask
from hubtransfer.methods.balance import TaskGradients
from hubtransfer.methods.multitask.mgda import MGDA
from hubtransfer.methods.stage import Stage

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime

log = logging.getLogger(__name__)


class MGDAUB(MGDA, name="mgda_ub"):
    r"""Multiple-gradient descent that compares the tasks where their heads start: one backward pass of the trunk.

    .. math:: \theta \leftarrow \theta - \eta \sum_t \alpha_t \nabla_\theta L_t, \quad
       \alpha = \arg\min_{\alpha \ge 0,\, \sum \alpha_t = 1} \Big\|\sum_t \alpha_t \nabla_Z L_t\Big\|_2^2

    with the trunk's output Z for the whole batch, (batch, ...), all that the heads read of it, so that a gradient
    :math:`\nabla_Z L_t` is one vector of that many numbers. As :math:`\nabla_\theta L_t = (\partial Z / \partial
    \theta)^\top \nabla_Z L_t`, its norm bounds that of `MGDA` up to a constant; where the Jacobian of Z is invertible
    both have the same stationary points. Heads follow their own gradients. Tasks that do not read the same Z (a data
    set each, patches, networks of their own) are balanced as by `MGDA`, one backward pass a task; the log says so.

    Args:
        model: A model with a head for every task.
        tasks: Names of the tasks that learn together (default: all of the model's).

    Differs from the paper: as in `MGDA` the exact solution in place of Frank-Wolfe, and with a normalisation the
    weights are divided by it too. Unlike the authors' code: one forward pass in place of two, heads not scaled.

    Source: https://arxiv.org/abs/1810.04650, section 3.3, problem (MGDA-UB), theorem 1.
    """

    def gram(self, gradients: TaskGradients) -> Tensor:
        """Inner products at the trunk's output, or, where tasks read different ones, of the trunk's gradients."""
        return gradients.feature_gram() if gradients.one_pass else super().gram(gradients)

    def stages(self, scenario: MultiTask) -> Iterator[Stage]:
        """One stage; where the bound cannot be had, the log says why when it starts."""
        reasons = [f"task {task!r} {why}" for task, why in self.alone().items()]
        reasons += [] if scenario.shared else ["each has its own data"]

        def tell(runtime: "Runtime") -> None:
            if reasons and runtime.is_main:
                log.warning(
                    "MGDAUB: the tasks do not read the same output of the trunk (%s); they are balanced by their "
                    "gradients of the trunk's parameters instead, as by MGDA: one backward pass a task", reasons[0]
                )  # fmt: skip

        for stage in super().stages(scenario):
            yield replace(stage, enter=tell)
