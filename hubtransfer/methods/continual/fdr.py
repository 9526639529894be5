"""Function distance regularisation (Benjamin et al., 2019)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hubtransfer.data import Batch, MemoryConfig, Ring, TaskStream
from hubtransfer.methods.episodic_memory import random_examples
from hubtransfer.methods.evaluating import TOGETHER, evaluating
from hubtransfer.methods.importance import need_classes
from hubtransfer.methods.item_batches import need_ends
from hubtransfer.methods.replay_method import Part, ReplayMethod, check_replay, mean, widest
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.update import Descend, Terms
from hubtransfer.models import TransferModel

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class FDRConfig:
    """Hyper-parameters of `FDR`.

    Attributes:
        alpha: Weight of the distance.
        memory: What is kept of finished tasks.
        replay_batch: Examples drawn at each step; by default as many as the batch has.
    """

    alpha: float = 1.0
    memory: MemoryConfig = field(default_factory=lambda: Ring(200))
    replay_batch: int | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, got {self.alpha}")
        check_replay(self.memory, self.replay_batch)


class FDR(ReplayMethod, name="fdr", config=FDRConfig):
    r"""Holds the network's function where finished tasks left it, by its distance on remembered examples.

    .. math:: \theta \leftarrow \theta - \eta \nabla L_{CE}(B), \qquad
       \theta \leftarrow \theta - \eta \nabla\, \alpha\, \frac{1}{|B_M|} \sum_{(x, p) \in B_M}
       \big\| p - \mathrm{softmax}(h(f(x))) \big\|_2

    two steps a batch, with p the class probabilities (classes,) that the network gave for x when the task of x was
    finished, in evaluation mode. Needs task boundaries; streams of every kind, classification heads, any backbone.

    Args:
        model: The model, with a head for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: a step of its own for the distance, which is a mean of single examples' distances, as in the
    code of dark experience replay; unlike there alpha is applied (alpha = 1 is the same). Tasks have equal shares of
    the memory.

    Source: https://arxiv.org/abs/1805.08289, section 3.1 (a working memory against forgetting).
    """

    paper = "Benjamin 2019"
    source = "https://arxiv.org/abs/1805.08289"
    citation = """@inproceedings{benjamin2019measuring,
  title = {Measuring and regularizing networks in function space},
  author = {Benjamin, Ari S. and Rolnick, David and Kording, Konrad P.},
  booktitle = {International Conference on Learning Representations},
  year = {2019}
}"""

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks the stream's heads too, and that a random sample of each task can be drawn."""
        return need_classes(self, need_ends(self, super().checked(scenario)), "a distance of probabilities")

    def distance(self, batch: Batch) -> Terms:
        """Returns the weighted distance from the remembered probabilities: the scalar `distance`."""
        _, parts = self.run(None, self.draw(batch))

        def of(part: Part) -> Tensor:
            kept = part.kept["probabilities"][:, : part.logits.shape[1]]
            return torch.linalg.vector_norm(kept - part.logits.softmax(1), dim=1).mean()

        return {"distance": self.config.alpha * mean(parts, of)}

    def stages(self, scenario: TaskStream) -> Iterator[Stage]:
        """One stage an item; from the second item on each batch makes two steps."""
        for number, item in enumerate(self.checked(scenario)):
            updates = [Descend(self.loss), Descend(self.distance)] if number else [Descend(self.loss)]
            begin, end = partial(self.begin, item), self.ending(item)
            yield Stage(item.name, item.train_source, updates, enter=begin, exit=end)

    @torch.no_grad()
    def after_task(self, item: Any, runtime: "Runtime") -> None:
        """Remembers random examples of the task with the probabilities that the network gives them."""
        batch = random_examples(self, item, runtime, self.memory.size)
        parts = (batch.rows(rows) for rows in torch.arange(len(batch)).split(TOGETHER))
        with evaluating(self.model):
            found = [self.model(**part.inputs, task=self.current).logits.softmax(1) for part in parts]
        probabilities = widest(self.model, torch.cat(found))
        self.memory.add(batch, task=self.number, labels=self.labels(batch), same=True, probabilities=probabilities)
