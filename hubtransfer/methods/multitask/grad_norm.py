"""Gradient normalisation (Chen, Badrinarayanan, Lee and Rabinovich, 2018)."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hubtransfer.data import MultiTask
from hubtransfer.functional.training_rates import grad_norm_slopes, rescaled
from hubtransfer.methods.aggregate import Gradients
from hubtransfer.methods.balance import Balance, Balancing, TaskGradients
from hubtransfer.methods.stage import OptimizerConfig, Stage
from hubtransfer.methods.task_losses import task_losses, task_sources
from hubtransfer.methods.update import AnyBatch, Descend, Terms
from hubtransfer.models import TransferModel
from hubtransfer.models.heads import HeadConfig

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class GradNormConfig:
    """Hyper-parameters of `GradNorm`.

    Attributes:
        alpha: How strongly slow tasks are pulled along; 0 makes all norms equal.
        lr: Learning rate of the weights' own Adam.
        initial: Losses that progress is measured from: those of the first step ("measured"), or those of guessing
            ("chance": the logarithm of the number of classes; regression heads are measured all the same).
        layer: Name, within the trunk, of the layer at whose weight gradients are measured. Default: of those that all
            tasks depend on, the last by order of definition; in a residual block this may be the shortcut.
        static: Whether the run is only there to find the weights: the model then starts again, with their average.
    """

    alpha: float = 1.5
    lr: float = 0.025
    initial: Literal["measured", "chance"] = "measured"
    layer: str | None = None
    static: bool = False

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.alpha < 0 or self.lr <= 0:
            raise ValueError(f"alpha must not be negative and lr must be positive, got {self.alpha} and {self.lr}")
        if self.initial not in ("measured", "chance"):
            raise ValueError(f"initial must be 'measured' or 'chance', got {self.initial!r}")


class GradNorm(Balancing, name="grad_norm", config=GradNormConfig):
    r"""Learns the tasks' weights so that tasks train at similar rates: who is slow gets larger gradients.

    .. math:: G_t = \| \nabla_W\, w_t L_t \|_2, \quad
       r_t = \frac{L_t / L_t(0)}{\frac{1}{T} \sum_s L_s / L_s(0)}, \quad
       L_{grad} = \sum_t \Big| G_t - \bar{G}\, r_t^\alpha \Big|

    with the weight W of the last shared layer and the mean :math:`\bar{G}` of the norms; the target counts as a
    constant and :math:`L_{grad}` trains the weights alone, which are then clamped to :math:`w_t \ge 0` and scaled to
    the sum T. Trunk and heads descend on :math:`\sum_t w_t L_t`. As W enters only through norms,
    :math:`\partial L_{grad} / \partial w_t = \operatorname{sign}(G_t - \bar{G} r_t^\alpha)\, \| \nabla_W L_t \|`: no
    second derivative is taken, and nothing of :math:`L_{grad}` can reach the network.

    Args:
        model: A model with a head for every task.
        tasks: Names of the tasks that learn together (default: all of the model's).

    Raises:
        ValueError: when training starts, if there is no such layer or no layer that all tasks depend on.

    Differs from the paper: weights stay non-negative. A loss below zero counts as zero progress left; progress is
    measured from the first loss above zero. A task without labels in a batch keeps its weight.

    Source: https://arxiv.org/abs/1711.02257, equations 1 and 2, algorithm 1; "GradNorm Static" in section 5.
    """

    paper = "Chen 2018"
    source = "https://arxiv.org/abs/1711.02257"
    citation = """@inproceedings{chen2018gradnorm,
  title = {{GradNorm}: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks},
  author = {Chen, Zhao and Badrinarayanan, Vijay and Lee, Chen-Yu and Rabinovich, Andrew},
  booktitle = {International Conference on Machine Learning},
  year = {2018}
}"""

    initial: Tensor
    average: Tensor
    steps: Tensor

    def __init__(self, model: TransferModel, tasks: Sequence[str] | None = None, **config: Any) -> None:
        super().__init__(model, tasks, **config)
        count = len(self.tasks)
        del self.weights  # learned, so a parameter in place of a buffer
        self.weights = nn.Parameter(torch.ones(count))
        self.register_buffer("initial", torch.zeros(count))  # 0: not measured yet
        self.register_buffer("average", torch.zeros(count))  # of the weights over all steps
        self.register_buffer("steps", torch.zeros(()))
        if self.config.initial == "chance":
            self.initial.copy_(torch.tensor([chance_loss(model.tasks[task].head) for task in self.tasks]))
        self.start = copy.deepcopy(model).requires_grad_(False) if self.config.static else None
        self._measured: str | None = None  # name of the weight, found at the first step

    def groups(self) -> Mapping[str, Any]:
        """What tasks share, what belongs to one task, and the weights."""
        return {**super().groups(), "weights": [self.weights]}

    def combine(self, gradients: TaskGradients) -> Mapping[str, Gradients]:
        """The weighted sum for the network, the gradient of L_grad for the weights."""
        there, weights = gradients.labelled, self.weights.detach()
        self._before = weights.clone()
        losses = gradients.losses.to(self.initial)
        self.initial.copy_(torch.where((self.initial == 0) & there & (losses > 0), losses, self.initial))
        norms = gradients.norms(self.layer_weight(gradients))
        slopes = grad_norm_slopes(weights, norms.to(weights), losses, self.initial, there, self.config.alpha)
        return {"shared": gradients.shared(weights), "heads": gradients.own(weights), "weights": [slopes]}

    @torch.no_grad()
    def settle(self, gradients: TaskGradients) -> None:
        """Keeps weights non-negative and their sum T, and averages them over the steps."""
        self.weights.copy_(rescaled(self.weights, self._before, gradients.labelled))
        self.steps += 1
        self.average += (self.weights - self.average) / self.steps

    def layer_weight(self, gradients: TaskGradients) -> nn.Parameter:
        """Returns the weight at which gradients are measured."""
        trunk = self.model.backbone.trunk
        if self._measured is None:
            weights = {name: p for name, p in trunk.named_parameters() if p.requires_grad and p.ndim > 1}
            if self.config.layer is not None:
                weights = {n: p for n, p in weights.items() if n.startswith(f"{self.config.layer}.")}
            found = gradients.depended_on(weights)
            if not found:
                where = "" if self.config.layer is None else f" in layer {self.config.layer!r}"
                raise ValueError(f"GradNorm: the trunk has no trainable weight{where} that all tasks depend on")
            self._measured = found[-1]
        return trunk.get_parameter(self._measured)

    def stages(self, scenario: MultiTask) -> Iterator[Stage]:
        """One stage; with `static` a second one, which trains the model anew on the average weights."""
        adam = {"weights": OptimizerConfig(name="adam", lr=self.config.lr, weight_decay=0.0, schedule="constant")}
        yield self.balanced(scenario, Balance(self, self.combine, self.settle, ("weights",)), adam)
        if self.start is not None:
            data = task_sources(scenario, self.tasks, "GradNorm")
            yield Stage("static", data, [Descend(self.static_loss, ("shared", "heads"))], enter=self.restart)

    def restart(self, runtime: "Runtime") -> None:
        """Gives the model its first parameters back, and the tasks their average weights."""
        assert self.start is not None
        self.model.load_state_dict(self.start.state_dict())
        with torch.no_grad():
            self.weights.copy_(self.average)

    def static_loss(self, batch: AnyBatch) -> Terms:
        """Returns each task's loss times its average weight."""
        losses, weights = task_losses(self.model, self.tasks, batch), dict(zip(self.tasks, self.average))
        return {task: weights[task] * loss for task, loss in losses.items()}


def chance_loss(head: HeadConfig | None) -> float:
    """Returns the loss of guessing all classes alike: log C, log 2 for yes or no, 0 where there is no such thing."""
    if head is None or head.kind == "regression":
        return 0.0
    return math.log(2 if head.kind == "multi_label" else head.width)
