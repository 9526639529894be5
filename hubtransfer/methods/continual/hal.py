"""Hindsight anchor learning (Chaudhry et al., 2021)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hubtransfer.data import Batch, MemoryConfig, Ring, TaskStream
from hubtransfer.data.processes import everywhere
from hubtransfer.methods.evaluating import evaluating
from hubtransfer.methods.hindsight import after_rehearsal, ascend
from hubtransfer.methods.importance import need_classes
from hubtransfer.methods.parameter_state import ParameterState
from hubtransfer.methods.replay_method import ReplayMethod, check_replay
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.trial_step import TrialStep
from hubtransfer.methods.update import Descend, Terms
from hubtransfer.models import TransferModel

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class HALConfig:
    """Hyper-parameters of `HAL`.

    Attributes:
        strength: lambda, weight of what a step moves on the anchors.
        decay: beta, of the running mean of features.
        gamma: Weight of the distance between an anchor's features and their mean.
        anchor_steps: Steps in which anchors are learned.
        anchor_lr: Rate of these steps; by default the model's.
        memory: Which examples are kept.
        replay_batch: Examples drawn at each step; by default as many as the batch has.
    """

    strength: float = 0.1
    decay: float = 0.5
    gamma: float = 0.1
    anchor_steps: int = 100
    anchor_lr: float | None = None
    memory: MemoryConfig = field(default_factory=lambda: Ring(200))
    replay_batch: int | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        for name in ("strength", "gamma", "anchor_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {self.decay}")
        check_replay(self.memory, self.replay_batch)


class HAL(ReplayMethod, name="hal", config=HALConfig):
    r"""Experience replay whose steps leave the outputs on learned anchors of finished tasks where they are.

    .. math:: \tilde\theta = \theta - \eta \nabla L(\theta; B \cup B_M), \qquad \theta \leftarrow \theta - \eta
       \nabla_\theta \Big( L(\theta; B \cup B_M) + \frac{\lambda}{A C} \sum_{a=1}^{A}
       \| h_\theta(f(e_a)) - h_{\tilde\theta}(f(e_a)) \|_2^2 \Big)

    with C classes and A anchors e, one a class and task. When a task is finished those of its classes y ascend on what
    would be forgotten, from noise, near the mean features phi (features,) of the task:

    .. math:: \max_e\; L_{CE}(h_{\theta_M}(f(e)), y) - L_{CE}(h_\theta(f(e)), y) - \gamma \|f(e) - \phi\|_2^2, \qquad
       \phi \leftarrow \beta \phi + (1 - \beta)\, \mathrm{mean}_{x \in B} f(x)

    where theta_M is the model after one more pass over the memory. Needs task boundaries; streams of every kind of
    images (or other inputs that are numbers), classification heads, any backbone.

    Args:
        model: The model, with a head for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: the squared distance is a mean over anchors and classes, as in the code of dark experience
    replay, for which lambda was chosen; as in the paper and not there, its gradient goes through the look-ahead step,
    and the memory is a ring of each task's last examples (that code asks for a ring but fills a reservoir).

    Source: https://arxiv.org/abs/2002.08165, algorithm 1.
    """

    paper = "Chaudhry 2021"
    source = "https://arxiv.org/abs/2002.08165"
    citation = """@inproceedings{chaudhry2021using,
  title = {Using Hindsight to Anchor Past Knowledge in Continual Learning},
  author = {Chaudhry, Arslan and Gordo, Albert and Dokania, Puneet K. and Torr, Philip and Lopez-Paz, David},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year = {2021}
}"""

    phi: Tensor
    present: Tensor

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)
        width = max((spec.head.width for spec in model.tasks.values() if spec.head is not None), default=0)
        self.anchors = ParameterState()  # by number of the item in the stream
        patches: Any = model.patches.values()
        widest = max([model.backbone.dim, *(patch.dim for patch in patches)])
        self.register_buffer("phi", next(model.parameters()).new_zeros(widest))
        self.register_buffer("present", torch.zeros(width, dtype=torch.bool))  # classes of the current item

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks the stream's heads and inputs too."""
        for name, source in scenario.sources().items():
            if not source.iterable and "pixel_values" not in source.fields.inputs:
                raise ValueError(f"HAL moves inputs along gradients, but those of {name!r} are tokens, not images")
        return need_classes(self, super().checked(scenario), "an anchor a class")

    def stages(self, scenario: TaskStream) -> Iterator[Stage]:
        """One stage an item; from the second item on there are anchors."""
        plain = Descend(self.loss, after=self.after_step)
        held = TrialStep(self.loss, self.on_anchors, self.config.strength, after=self.after_step)
        for number, item in enumerate(self.checked(scenario)):
            begin, end = partial(self.begin, item), self.ending(item)
            yield Stage(item.name, item.train_source, [held if number else plain], enter=begin, exit=end)

    def before_task(self, item: Any, runtime: "Runtime") -> None:
        """Starts the task's mean of features and its classes anew."""
        self.phi.zero_()
        self.present.zero_()

    def loss(self, batch: Batch) -> Terms:
        """Returns the mean loss over batch and replay: the scalar `labels`."""
        output = self.output_together(batch, self.draw(batch))
        assert output.loss is not None and output.features is not None
        batch.memo["features"] = output.features.pooled[: len(batch)].detach()
        return {"labels": output.loss}

    def on_anchors(self, batch: Batch) -> Terms:
        """Returns the logits (anchors, classes) of each head that has anchors, in evaluation mode."""
        rows: dict[str, list[Tensor]] = {}
        for number, anchors in self.anchors.tensors().items():
            rows.setdefault(self.learned_tasks[int(number)], []).append(anchors.to(self.phi.device))
        with evaluating(self.model):
            return {task: self.model(pixel_values=torch.cat(own), task=task).logits for task, own in rows.items()}

    def after_step(self, batch: Batch) -> None:
        """Adds the batch to the memory, its features to their mean, its classes to the task's."""
        mean = everywhere(batch.memo["features"].mean(0, keepdim=True)).mean(0)
        self.phi[: len(mean)].mul_(self.config.decay).add_(mean, alpha=1 - self.config.decay)
        labels = everywhere(self.labels(batch))
        self.present[labels[labels >= 0]] = True
        self.remember(batch)

    def after_task(self, item: Any, runtime: "Runtime") -> None:
        """Learns an anchor for each class of the task, all at once, from noise in the range of the inputs."""
        config, labels = self.config, self.present.nonzero().flatten()
        lr = runtime.arguments.optimizer_for("model", None).lr
        assert lr is not None
        later = after_rehearsal(self, list(self.learned()), lr, runtime.arguments.batch_size * runtime.world)
        seen = self.memory.at(torch.arange(len(self.memory))).inputs["pixel_values"]
        noise = torch.rand((len(labels), *seen.shape[1:]), generator=self.memory.random("anchors", self.number))
        start = seen.min() + (seen.max() - seen.min()) * noise.to(seen)
        how = {"gamma": config.gamma, "lr": config.anchor_lr or lr, "steps": config.anchor_steps}
        current: Any = dict(self.model.patches.items()).get(self.current, self.model.backbone)
        near = self.phi[: current.dim]
        self.anchors.keep({str(self.number): ascend(self.model, later, self.current, start, labels, near, **how)})
