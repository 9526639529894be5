"""Gradient episodic memory (Lopez-Paz and Ranzato, 2017)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hubtransfer.data import Batch, MemoryConfig, Replay, Ring
from hubtransfer.functional.cones import project_to_cone
from hubtransfer.methods.aggregate import Aggregator
from hubtransfer.methods.episodic_memory import EpisodicMemory
from hubtransfer.methods.update import Descend, Terms
from hubtransfer.models import TransferModel

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class GEMConfig:
    """Hyper-parameters of `GEM`.

    Attributes:
        memory: What is kept of finished tasks; `Ring(size, groups=tasks)` gives each the same share from the start.
        margin: Least value of the dual variables; larger values favour old tasks.
        ridge: Added to the diagonal of the dual problem's matrix.
    """

    memory: MemoryConfig = field(default_factory=lambda: Ring(256))
    margin: float = 0.5
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        for name in ("margin", "ridge"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class GEMProjection(Aggregator):
    """The nearest gradient along which, to first order, no memory's loss rises; the first row is the current task's."""

    def __init__(self, margin: float, ridge: float) -> None:
        self.margin, self.ridge = margin, ridge

    def aggregate(self, jacobian: Tensor) -> Tensor:
        """Maps gradients (1 + memories, parameters) to one gradient (parameters,)."""
        current, memories = jacobian[0], jacobian[1:]
        if not jacobian.isfinite().all():
            return current  # the training loop names the loss that is not finite
        return project_to_cone(current, memories, self.margin, self.ridge)


class GEM(EpisodicMemory, name="gem", config=GEMConfig):
    r"""Learns a task under the constraint that the loss on no earlier task's memory rises.

    .. math:: \min_{\tilde g} \tfrac12 \|g - \tilde g\|_2^2 \quad\text{s.t.}\quad \langle \tilde g, g_k \rangle \ge 0
       \;\;\forall k < t; \qquad \tilde g = g + G^\top v, \quad
       v = \arg\min_{v \ge m} \tfrac12 v^\top (G G^\top + \epsilon I) v + g^\top G^\top v

    with the gradient g on the batch and g_k on the memory of task k, (parameters,), the rows of G; solved only where
    some constraint is violated. Applies to streams of every kind, any head and any backbone.

    Args:
        model: The model, with a head for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: memories hold a random sample of a task, not its last examples (in a shuffled pass these are
    random too); the margin bounds the dual variables from below, as in the authors' code; the dual is solved exactly.

    Source: https://arxiv.org/abs/1706.08840, equations 8 to 11 and algorithm 1.
    """

    paper = "Lopez-Paz 2017"
    source = "https://arxiv.org/abs/1706.08840"
    citation = """@inproceedings{lopezpaz2017gradient,
  title = {Gradient Episodic Memory for Continual Learning},
  author = {Lopez-Paz, David and Ranzato, Marc'Aurelio},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2017}
}"""

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        settings = self.configure(config)
        super().__init__(model, settings, settings.memory, task=task)
        self._remembered: dict[int, Replay] = {}

    def loss(self, batch: Batch) -> Terms:
        """Returns the scalars `labels` and, for each finished task k, `memory/k`."""
        if len(self.memory) and not self._remembered:
            self._remembered = self.memory.by_task()
        kept = {f"memory/{number}": self.label_loss(replay) for number, replay in self._remembered.items()}
        return {**super().loss(batch), **kept}

    def updates(self) -> list[Any]:
        """One step along the projected gradient."""
        return [Descend(self.loss, combine=GEMProjection(self.config.margin, self.config.ridge))]

    def begin(self, item: Any, runtime: "Runtime") -> None:
        """Looks at the memory anew."""
        self._remembered = {}
        super().begin(item, runtime)
