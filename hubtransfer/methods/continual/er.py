"""Experience replay (Ratcliff, 1990; Riemer et al., 2019)."""

from dataclasses import dataclass
from typing import Any

from hubtransfer.data import Batch, MemoryConfig
from hubtransfer.methods.replay_method import MEMORY, ReplayMethod, check_replay
from hubtransfer.methods.update import Terms
from hubtransfer.models import TransferModel


@dataclass(frozen=True, kw_only=True)
class ERConfig:
    """Hyper-parameters of `ER`.

    Attributes:
        memory: Which examples are kept.
        replay_batch: Examples drawn at each step; by default as many as the batch has.
    """

    memory: MemoryConfig = MEMORY
    replay_batch: int | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        check_replay(self.memory, self.replay_batch)


class ER(ReplayMethod, name="er", config=ERConfig):
    r"""Learns each batch together with examples drawn from a memory of the past.

    .. math:: \theta \leftarrow \theta - \eta \nabla_\theta \frac{1}{|B| + |B_M|} \sum_{(x, y) \in B \cup B_M}
       L(h(f(x)), y), \qquad B_M \sim M

    with B the batch and B_M examples drawn from the memory M uniformly and without replacement; B enters the memory
    after the step. One forward of batch and replay together: normalisation layers see both. Applies to streams of every
    kind (task boundaries are not needed), any head, backbone and optimiser; penalties and teachers join it with `+`.

    Args:
        model: The model, with a head for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: the gradients of batch and replay are those of one mean over both, as in the protocol of
    dark experience replay, not one step each. Where tasks have heads of their own, those of earlier tasks stay as they
    are: replay moves what tasks share.

    Source: https://arxiv.org/abs/1902.10486, algorithm 1 (with reservoir sampling, algorithm 3).
    """

    paper = "Riemer 2019"
    source = "https://arxiv.org/abs/1902.10486"
    citation = """@inproceedings{riemer2019learning,
  title = {Learning to Learn without Forgetting by Maximizing Transfer and Minimizing Interference},
  author = {Riemer, Matthew and Cases, Ignacio and Ajemian, Robert and Liu, Miao and Rish, Irina and Tu, Yuhai and
            Tesauro, Gerald},
  booktitle = {International Conference on Learning Representations},
  year = {2019}
}"""

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)

    def loss(self, batch: Batch) -> Terms:
        """Returns the mean loss over batch and replay: the scalar `labels`."""
        return {"labels": self.loss_together(batch, self.draw(batch))}

    def after_step(self, batch: Batch) -> None:
        """Adds the batch to the memory."""
        self.remember(batch)
