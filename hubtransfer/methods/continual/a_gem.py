"""Averaged gradient episodic memory (Chaudhry et al., 2019)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hubtransfer.data import Batch, MemoryConfig, Ring
from hubtransfer.methods.aggregate import GramAggregator
from hubtransfer.methods.episodic_memory import EpisodicMemory
from hubtransfer.methods.update import Descend, Terms
from hubtransfer.models import TransferModel


@dataclass(frozen=True, kw_only=True)
class AGEMConfig:
    """Hyper-parameters of `AGEM`.

    Attributes:
        memory: What is kept of finished tasks.
        reference: Examples drawn from it at each step (default: as many as the batch has).
    """

    memory: MemoryConfig = field(default_factory=lambda: Ring(256))
    reference: int | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.reference is not None and self.reference < 1:
            raise ValueError(f"reference must be at least 1, got {self.reference}")


class AGEMProjection(GramAggregator):
    r"""Takes the part of the first gradient that points against the second away.

    .. math:: \tilde g = g - \min\Big(0, \frac{g^\top r}{r^\top r}\Big) r
    """

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Maps inner products, (2, 2), or (1, 1) while there is no reference, to weights."""
        weights = torch.zeros_like(gram[0])
        weights[0] = 1
        if len(gram) > 1 and gram[0, 1] < 0:
            weights[1] = -gram[0, 1] / gram[1, 1]
        return weights


class AGEM(EpisodicMemory, name="a_gem", config=AGEMConfig):
    r"""Learns a task under the constraint that the mean loss on a draw from the memory does not rise.

    .. math:: \tilde g = g - \frac{g^\top r}{r^\top r}\, r \quad\text{where}\quad g^\top r < 0, \quad\text{else}\quad g

    with the gradient g on the batch and r on examples of finished tasks, (parameters,). Applies to streams of every
    kind, any head and any backbone.

    Args:
        model: The model, with a head for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: nothing in the step; memories hold a random sample of each finished task.

    Source: https://arxiv.org/abs/1812.00420, equation 11 and algorithm 2.
    """

    paper = "Chaudhry 2019"
    source = "https://arxiv.org/abs/1812.00420"
    citation = """@inproceedings{chaudhry2019efficient,
  title = {Efficient Lifelong Learning with A-GEM},
  author = {Chaudhry, Arslan and Ranzato, Marc'Aurelio and Rohrbach, Marcus and Elhoseiny, Mohamed},
  booktitle = {International Conference on Learning Representations},
  year = {2019}
}"""

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        settings = self.configure(config)
        super().__init__(model, settings, settings.memory, task=task)

    def loss(self, batch: Batch) -> Terms:
        """Returns the scalars `labels` and, once a task is finished, `memory`."""
        terms = super().loss(batch)
        drawn = self.memory.draw(self.config.reference or len(batch))
        return terms if drawn is None else {**terms, "memory": self.label_loss(drawn)}

    def updates(self) -> list[Any]:
        """One step along the projected gradient."""
        return [Descend(self.loss, combine=AGEMProjection())]
