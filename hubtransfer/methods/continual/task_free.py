"""Task-free continual learning (Aljundi et al., 2019)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hubtransfer.data import Batch, Hardest, MemoryConfig, Replay, TaskStream
from hubtransfer.data.batch import joined_inputs
from hubtransfer.data.processes import everywhere
from hubtransfer.functional.fisher import squared_norm
from hubtransfer.functional.missing import known_classes
from hubtransfer.functional.plateau import Plateau, plateau
from hubtransfer.methods.evaluating import evaluating
from hubtransfer.methods.importance import need_classes
from hubtransfer.methods.parameter_state import ParameterState
from hubtransfer.methods.quadratic_penalty import weighted_distance
from hubtransfer.methods.replay_method import ReplayMethod, check_replay
from hubtransfer.methods.update import Descend, Terms
from hubtransfer.models import TransferModel
from hubtransfer.models.example_gradients import sum_over_examples

MEMORY = Hardest(30)


@dataclass(frozen=True, kw_only=True)
class TaskFreeConfig:
    """Hyper-parameters of `TaskFree`.

    Attributes:
        strength: lambda, how hard important parameters are held.
        window: Losses, of as many batches, in which a plateau is looked for.
        mean_below: A plateau's mean loss is below this.
        variance_below: And its variance below this.
        gradient_steps: Steps on each batch.
        memory: Which examples are kept and learned with every batch: the hard buffer.
    """

    strength: float = 0.5
    window: int = 5
    mean_below: float = 0.2
    variance_below: float = 0.1
    gradient_steps: int = 5
    memory: MemoryConfig = MEMORY

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        check_replay(self.memory, None)
        for name, least in (("window", 1), ("gradient_steps", 1), ("strength", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


class TaskFree(ReplayMethod, name="task_free", config=TaskFreeConfig):
    r"""Holds what matters, measured whenever the loss has settled: memory aware synapses without task boundaries.

    .. math:: L = \frac{1}{|B| + |H|} \sum_{(x, y) \in B \cup H} L(f(x), y) +
       \frac{\lambda}{2} \sum_j \Omega_j (\theta_j - \theta^*_j)^2

    with the batch B, and H the examples whose loss was highest of those seen (the hard buffer), all of them at each
    step. When the last few batches' losses are low and vary little, and had risen before (`functional.plateau`), the
    parameters become the anchor, and importances are averaged over such moments:

    .. math:: \Omega_j \leftarrow \frac{1}{k} \cdot \frac{1}{|H|} \sum_{x \in H}
       \Big|\frac{\partial \|f(x)\|_2^2}{\partial \theta_j}\Big| + \Big(1 - \frac{1}{k}\Big) \Omega_j

    at the k-th, with gradients of single examples. What happens does not depend on where items of the stream begin: a
    blurred stream, one of unknown length and one of tasks in a row are the same to it. Streams of kind "class" and
    "domain", one head of classes, any backbone and optimiser.

    Args:
        model: The model.
        task: Task that learns (default: the active one).

    Differs from the paper: losses are means, where the authors' code has sums, and cross-entropies; a plateau needs a
    whole window; optimisers start afresh with each item of the stream.

    Source: https://arxiv.org/abs/1812.03596, section 3 and algorithm 1.
    """

    paper = "Aljundi 2019"
    source = "https://arxiv.org/abs/1812.03596"
    citation = """@inproceedings{aljundi2019taskfree,
  title = {Task-Free Continual Learning},
  author = {Aljundi, Rahaf and Kelchtermans, Klaas and Tuytelaars, Tinne},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2019}
}"""

    window: Tensor
    said: Tensor
    steps: Tensor
    plateaus: Tensor

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)
        self.importance, self.anchor = ParameterState(), ParameterState()
        self.register_buffer("window", torch.zeros(self.config.window))
        self.register_buffer("said", torch.tensor([0.0, 1.0, 0.0, 0.0]))  # a `Plateau`, as numbers
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("plateaus", torch.tensor(0))

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks the stream's kind and the head too."""
        if scenario.kind == "task":
            raise ValueError(
                "TaskFree knows no boundaries, so it cannot know which head an example is for; the stream is of kind "
                "'task': make it of kind 'class' or 'domain'"
            )
        return need_classes(self, super().checked(scenario), "the hard buffer")

    def updates(self) -> list[Any]:
        """Several steps a batch."""
        return [Descend(self.loss, repeat=self.config.gradient_steps, after=self.after_step)]

    def loss(self, batch: Batch) -> Terms:
        """Returns the mean over batch and hard buffer, `labels`, and the `penalty` once there was a plateau."""
        hard: Replay | None = batch.once("hard", lambda: self.memory.draw(self.memory.size))
        parts = [batch] if hard is None else [batch, hard]
        labels = torch.cat([self.labels(part) for part in parts])
        known = known_classes(labels)
        logits = self.model(**joined_inputs([part.inputs for part in parts]), task=self.current).logits
        losses = F.cross_entropy(logits, labels.long().where(known, -100), reduction="none")
        mean = losses.sum() / known.sum().clamp(min=1)
        batch.memo["losses"] = losses.detach()
        batch.once("first", mean.detach)
        if not self.importance:
            return {"labels": mean}
        return {
            "labels": mean,
            "penalty": self.config.strength / 2 * weighted_distance(self.model, self.importance, self.anchor),
        }

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        """Keeps the hardest examples, and takes stock where the loss has settled."""
        losses, hard = batch.memo["losses"], batch.memo["hard"]
        if hard is not None:
            slots = everywhere(hard.slots.to(losses.device)).cpu()
            self.memory.update(slots, loss=everywhere(losses[len(batch) :]))
        self.remember(batch, loss=losses[: len(batch)])
        self.window[:-1] = self.window[1:].clone()
        self.window[-1] = everywhere(batch.memo["first"][None]).mean()
        self.steps += 1
        if self.steps >= len(self.window):
            found, armed, mean, variance = self.said.tolist()
            before = Plateau(bool(found), bool(armed), mean, variance)
            said = plateau(self.window, before, self.config.mean_below, self.config.variance_below)
            self.said.copy_(torch.tensor(said))
            if said.found:
                self.take_stock()

    def take_stock(self) -> None:
        """Measures importances on the hard buffer, averages them with those so far, and moves the anchor here."""
        hard = self.memory.everything()
        assert hard is not None
        learned = self.learned()
        with evaluating(self.model):
            totals, count = sum_over_examples(self.model, self.current, [(hard.inputs, ())], squared_norm, learned, 1)
        self.plateaus += 1
        share = 1 / float(self.plateaus)
        old = {name: self.importance.like(name, parameter) for name, parameter in learned.items()}
        self.importance.keep({name: share * totals[name] / count + (1 - share) * old[name] for name in learned})
        self.anchor.keep(learned)

    def watched(self) -> dict[str, Tensor | float]:
        """Returns how many plateaus were found so far."""
        return {"plateaus/found": self.plateaus}
