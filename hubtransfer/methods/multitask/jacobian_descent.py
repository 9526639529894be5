"""Jacobian descent with TorchJD's aggregators: UPGrad (Quinton and Rey, 2024), PCGrad, CAGrad, Nash-MTL and others."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hubtransfer.config import unknown_name
from hubtransfer.methods.aggregate import Aggregator, Gradients, GramAggregator
from hubtransfer.methods.balance import Balancing, TaskGradients, over_labelled
from hubtransfer.models import TransferModel


@dataclass(frozen=True, kw_only=True)
class JacobianDescentConfig:
    """Hyper-parameters of `JacobianDescent`.

    Attributes:
        aggregator: Name of a class of `torchjd.aggregation`: "UPGrad", "AlignedMTL", "CAGrad", "ConFIG", "DualProj",
            "FairGrad", "GradDrop", "GradVac", "IMTLG", "Krum", "MGDA", "NashMTL", "PCGrad", "TrimmedMean" ...
        options: Its keywords, such as `{c: 0.4}` for CAGrad; lists become tensors.
    """

    aggregator: str = "UPGrad"
    options: Mapping[str, Any] = field(default_factory=dict)


class GramianRule(GramAggregator):
    """A TorchJD aggregator that looks at inner products alone."""

    def __init__(self, aggregator: Any) -> None:
        self.weighting = aggregator.gramian_weighting

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Returns TorchJD's weights, (terms,)."""
        if not gram.isfinite().all():
            return torch.ones_like(losses) / len(losses)  # the training loop names the loss that is not finite
        return self.weighting(gram)


class JacobianRule(Aggregator):
    """A TorchJD aggregator that looks at the whole Jacobian."""

    def __init__(self, aggregator: Any) -> None:
        self.aggregator = aggregator

    def aggregate(self, jacobian: Tensor) -> Tensor:
        """Returns TorchJD's combination of the rows of (terms, parameters)."""
        return self.aggregator(jacobian) if jacobian.isfinite().all() else jacobian.mean(0)


class JacobianDescent(Balancing, name="jacobian_descent", config=JacobianDescentConfig):
    r"""UPGrad and every other aggregator of TorchJD (PCGrad, CAGrad, IMTL-G, Nash-MTL ...) for the trunk's gradient.

    .. math:: \theta \leftarrow \theta - \eta\, A(J), \quad J = (\nabla_\theta L_1, \dots, \nabla_\theta L_T)^\top,
       \quad A_{UPGrad}(J) = \frac{1}{T} \sum_t \operatorname{proj}_{C}(J_t), \quad C = \{v : J v \ge 0\}

    with the Jacobian J, (tasks, trunk parameters), of all tasks' losses. UPGrad projects each task's gradient on the
    cone of directions that conflict with no task, and averages; A may be any class of `torchjd.aggregation`. Those that
    look at inner products alone get the Gram matrix (tasks, tasks); no Jacobian is then flattened. Heads follow their
    own gradients. Needs TorchJD: `pip install 'hubtransfer[multitask]'`; some aggregators ask for more, and say so.

    Args:
        model: A model with a head for every task.
        tasks: Names of the tasks that learn together (default: all of the model's).

    Raises:
        ImportError: if TorchJD is not installed.
        ValueError: if it has no such aggregator, or that has no such option.

    Differs from the paper: aggregators that remember earlier steps (Nash-MTL, GradVac, PCD, ExcessMTL) start afresh
    when a run is resumed. Where aggregators draw random numbers, process 0 draws for all.

    Source: https://arxiv.org/abs/2406.16232, definition of UPGrad in section 2, algorithm 1.
    """

    paper = "Quinton & Rey 2024"
    source = "https://arxiv.org/abs/2406.16232"
    citation = """@article{quinton2024jacobian,
  title = {Jacobian Descent for Multi-Objective Optimization},
  author = {Quinton, Pierre and Rey, Val{\\'e}rian},
  journal = {arXiv preprint arXiv:2406.16232},
  year = {2024}
}"""

    def __init__(self, model: TransferModel, tasks: Sequence[str] | None = None, **config: Any) -> None:
        super().__init__(model, tasks, **config)
        aggregator = make_aggregator(self.config.aggregator, self.config.options)
        by_gram = hasattr(aggregator, "gramian_weighting")
        self.rule = GramianRule(aggregator) if by_gram else JacobianRule(aggregator)

    def combine(self, gradients: TaskGradients) -> Mapping[str, Gradients]:
        """The aggregator's combination for the trunk, plain gradients for the heads.

        Raises:
            ValueError: if the aggregator cannot do without the tasks that have no label in this batch.
        """
        absent = [repr(task) for task, there in zip(self.tasks, gradients.labelled.tolist()) if not there]
        try:
            return self._combined(gradients)
        except (ValueError, RuntimeError) as error:
            if not absent:
                raise
            raise ValueError(
                f"JacobianDescent: {', '.join(absent)} has no label in this batch, and aggregator "
                f"{self.config.aggregator!r} with options {dict(self.config.options)} cannot combine the others alone: "
                f"{error}. Take larger batches, or options that do not depend on the number of tasks"
            ) from error

    def _combined(self, gradients: TaskGradients) -> Mapping[str, Gradients]:
        own = gradients.own()
        if isinstance(self.rule, GramianRule):
            weights = gradients.agreed(over_labelled(self.rule.weights, gradients.gram(), gradients))
            return {"shared": gradients.shared(self.keep(weights, gradients)), "heads": own}
        rows = [row for row, there in zip(gradients.rows(), gradients.labelled.tolist()) if there]
        shared = self.rule.from_rows(rows, gradients.losses) if rows else gradients.rows()[0]
        return {"shared": [gradients.agreed(gradient) for gradient in shared], "heads": own}

    def watched(self) -> Mapping[str, Tensor | float]:
        """The weight of each task, of aggregators that give one."""
        return super().watched() if isinstance(self.rule, GramianRule) else {}


def make_aggregator(name: str, options: Mapping[str, Any]) -> Any:
    """Makes a TorchJD aggregator.

    Raises:
        ImportError: if TorchJD, or what the aggregator asks for, is not installed.
        ValueError: if there is no such aggregator or option.
    """
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise ImportError("JacobianDescent needs TorchJD: pip install 'hubtransfer[multitask]'") from error
    abstract = (aggregation.Aggregator, aggregation.WeightedAggregator, aggregation.GramianWeightedAggregator)
    classes = {n: c for n, c in vars(aggregation).items() if inspect.isclass(c) and issubclass(c, abstract[0])}
    known = {n: c for n, c in classes.items() if c not in abstract}
    if name not in known:
        raise ValueError(unknown_name("aggregator", name, known, "torchjd.aggregation"))
    taken = list(inspect.signature(known[name].__init__).parameters)[1:]
    for option in options:
        if option not in taken:
            raise ValueError(unknown_name("option", option, taken, f"aggregator {name!r}"))
    try:
        return known[name](**{k: torch.tensor(v) if isinstance(v, list | tuple) else v for k, v in options.items()})
    except TypeError as error:  # an option without default is missing
        raise ValueError(f"aggregator {name!r} takes the options {', '.join(taken)}: {error}") from error
