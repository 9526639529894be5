"""Dark experience replay (Buzzega et al., 2020)."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hubtransfer.data import Batch, MemoryConfig
from hubtransfer.methods.replay_method import MEMORY, Part, ReplayMethod, check_replay, mean, widest
from hubtransfer.methods.update import Terms
from hubtransfer.models import TransferModel


@dataclass(frozen=True, kw_only=True)
class DERConfig:
    """Hyper-parameters of `DER`.

    Attributes:
        alpha: Weight of the logits' term.
        memory: Which examples are kept.
        replay_batch: Examples drawn at each step; by default as many as the batch has.
    """

    alpha: float = 0.5
    memory: MemoryConfig = MEMORY
    replay_batch: int | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, got {self.alpha}")
        check_replay(self.memory, self.replay_batch)


class DER(ReplayMethod, name="der", config=DERConfig):
    r"""Keeps the network's answers to remembered examples what they were when the examples were seen.

    .. math:: L = L_{CE}(B) + \alpha\, \frac{1}{|B_M|\, C} \sum_{(x, z) \in B_M} \|z - h(f(x))\|_2^2

    with z the logits (classes,) that the network gave for x in the step in which x entered the memory, and C classes.
    Applies to streams of every kind (task boundaries are not needed) with classification heads, any backbone and
    optimiser; penalties and teachers join it with `+`.

    Args:
        model: The model, with a head for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: as in the authors' code the squared distance is a mean over classes too. Batch and replay go
    through the network in one forward: normalisation layers see both. Heads of earlier tasks stay as they are.

    Source: https://arxiv.org/abs/2004.07211, equation 5 and algorithm 1.
    """

    paper = "Buzzega 2020"
    source = "https://arxiv.org/abs/2004.07211"
    citation = """@inproceedings{buzzega2020dark,
  title = {Dark Experience for General Continual Learning: a Strong, Simple Baseline},
  author = {Buzzega, Pietro and Boschini, Matteo and Porrello, Angelo and Abati, Davide and Calderara, Simone},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020}
}"""

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)

    def loss(self, batch: Batch) -> Terms:
        """Returns the batch's loss `labels` and, once there is a memory, `logits`."""
        own, replay = self.run(batch, self.draw(batch))
        return self.current_loss(batch, own) | self.dark(replay)

    def current_loss(self, batch: Batch, own: list[Part]) -> Terms:
        """Returns the batch's loss, and notes the logits that enter the memory after the step."""
        batch.memo["logits"] = own[0].logits.detach()
        return {"labels": self.loss_of(own)}

    def dark(self, replay: list[Part]) -> Terms:
        """Returns the weighted distance of logits from those kept, where there is a replay."""

        def distance(part: Part) -> Tensor:
            return F.mse_loss(part.logits, part.kept["logits"][:, : part.logits.shape[1]])

        return {"logits": self.config.alpha * mean(replay, distance)} if replay else {}

    def after_step(self, batch: Batch) -> None:
        """Adds the batch with its logits to the memory."""
        self.remember(batch, logits=widest(self.model, batch.memo["logits"]))
