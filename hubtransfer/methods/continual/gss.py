"""Gradient-based sample selection (Aljundi et al., 2019)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hubtransfer.data import Batch, GradientBased, MemoryConfig, TaskStream
from hubtransfer.data.processes import everywhere, rank
from hubtransfer.functional.missing import known_classes
from hubtransfer.functional.subsets import least_similar
from hubtransfer.methods.evaluating import evaluating
from hubtransfer.methods.gradient_similarity import GradientSimilarity
from hubtransfer.methods.importance import need_classes
from hubtransfer.methods.replay_method import ReplayMethod, check_replay
from hubtransfer.methods.update import Terms
from hubtransfer.models import TransferModel

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime

_FIRST_SCORE = 0.1


@dataclass(frozen=True, kw_only=True)
class GSSConfig:
    """Hyper-parameters of `GSS`.

    Attributes:
        selection: "greedy" judges each example by itself, "iqp" chooses among the memory and the batch together.
        compared: Examples of the memory, drawn at random, whose gradients a new one's is compared with ("greedy").
        memory: How many examples are kept.
        replay_batch: Examples drawn at each step; by default as many as the batch has.
    """

    selection: Literal["greedy", "iqp"] = "greedy"
    compared: int = 10
    memory: MemoryConfig = field(default_factory=lambda: GradientBased(200))
    replay_batch: int | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.selection not in ("greedy", "iqp"):
            raise ValueError(f"selection must be 'greedy' or 'iqp', got {self.selection!r}")
        if self.compared < 1:
            raise ValueError(f"compared must be at least 1, got {self.compared}")
        check_replay(self.memory, self.replay_batch)
        if not isinstance(self.memory, GradientBased):
            raise ValueError(f"memory must be GradientBased(size), which lets gradients choose, got {self.memory!r}")


class GSS(ReplayMethod, name="gss", config=GSSConfig):
    r"""Experience replay out of a memory whose examples pull the network in directions as different as can be.

    .. math:: S_{ij} = \frac{\langle g_i, g_j \rangle}{\|g_i\| \|g_j\|}, \quad
       g_i = \nabla_\theta L_{CE}(h(f(x_i)), y_i); \qquad
       c_i = 1 + \max_{j \in R} S_{ij}, \qquad \min_{w \in \{0, 1\}^n,\, 1^\top w = |M|} w^\top S\, w

    with gradients (parameters,) in evaluation mode after the step. Greedy: example i gets the score c from a random
    part R of the memory; once the memory is full, and c < 1, it takes the place of example j, drawn in proportion to
    the scores C kept, with probability C_j / (C_j + c). IQP: w says which of memory and batch stay. Task boundaries are
    not needed; streams of every kind, classification heads, any backbone; penalties join it with `+`. Where an old task
    has a head of its own, gradients are those by what it shares with the current one.

    Args:
        model: The model, with a head for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: batch and replay make one step together, as in the code of dark experience replay. As
    algorithm 2 is written every example is judged by itself; the published codes let a batch in as a whole, by its mean
    gradient, and with large batches hardly ever do. The integer program starts from the memory as it is and ends where
    no exchange of two examples helps; the authors' solver stops after 1000 nodes.

    Source: https://arxiv.org/abs/1903.08671, algorithms 1 (IQP) and 2 (greedy).
    """

    paper = "Aljundi 2019"
    source = "https://arxiv.org/abs/1903.08671"
    citation = """@inproceedings{aljundi2019gradient,
  title = {Gradient based sample selection for online continual learning},
  author = {Aljundi, Rahaf and Lin, Min and Goujaud, Baptiste and Bengio, Yoshua},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2019}
}"""

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)
        self._gradients = GradientSimilarity(self)

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks the stream's heads too."""
        return need_classes(self, super().checked(scenario), "a loss of single examples")

    def before_task(self, item: Any, runtime: "Runtime") -> None:
        """Other parameters train than for the task before."""
        self._gradients.forget()

    def loss(self, batch: Batch) -> Terms:
        """Returns the mean loss over batch and replay: the scalar `labels`."""
        return {"labels": self.loss_together(batch, self.draw(batch))}

    def after_step(self, batch: Batch) -> None:
        """Offers the batch to the memory."""
        together = self.config.selection == "iqp" or not len(self.memory)  # whether new examples meet one another
        judge = self._chosen if self.config.selection == "iqp" else self._greedy
        every = self._everyone(batch) if together else batch
        known = known_classes(self.labels(every))
        scores = torch.ones(len(every), dtype=next(self.model.parameters()).dtype, device=known.device)
        if known.any():  # an example without a label has no gradient, and the memory does not take it
            with evaluating(self.model):
                scores[known] = judge(every.rows(known)).to(scores)
        self.remember(batch, score=scores[rank() * len(batch) :][: len(batch)] if together else scores)

    def _greedy(self, batch: Batch) -> Tensor:
        """Scores c, (batch,)."""
        memory = self.memory
        if not len(memory):  # each of the first batch is compared with those before it
            gradients = self._gradients.of(batch)
            scores = 1 + gradients.cosines(gradients)
            before = torch.ones_like(scores, dtype=torch.bool).tril(-1)
            scores = torch.where(before, scores, 0.0).amax(1)
            scores[0] = _FIRST_SCORE
            return scores
        order = torch.randperm(len(memory), generator=memory.random("compare", memory.seen))
        others = memory.at(order[: self.config.compared])
        return 1 + self._gradients.of(batch).cosines(self._gradients.of(others)).amax(1)

    def _chosen(self, batch: Batch) -> Tensor:
        """Scores (batch,) with which the memory's rule is certain: 0 takes the place of a 1, and a 1 is not taken."""
        size = len(self.memory)
        if size < self.memory.size:
            return torch.ones(len(batch), device=self.labels(batch).device)  # as long as it is not full all are taken
        parts = [self.memory.at(torch.arange(size)), batch]
        gradients = [self._gradients.of(part) for part in parts]
        similarity = torch.cat([torch.cat([one.cosines(two) for two in gradients], 1) for one in gradients])
        present = torch.arange(len(similarity)) < size
        scores = (~least_similar(similarity, size, start=present)).to(similarity)
        self.memory.update(torch.arange(size), score=scores[:size])
        return scores[size:]

    def _everyone(self, batch: Batch) -> Batch:
        """The batches of all processes as one."""
        inputs = {name: everywhere(value) for name, value in batch.inputs.items()}
        return batch.replace(inputs=inputs, labels=everywhere(self.labels(batch)), index=None)
