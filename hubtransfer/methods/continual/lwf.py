"""Learning without forgetting (Li and Hoiem, 2016)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hubtransfer.data import Batch, TaskStream
from hubtransfer.functional.distributions import softened_cross_entropy
from hubtransfer.methods.class_portions import classes_of
from hubtransfer.methods.earlier_model import EarlierModel
from hubtransfer.methods.importance import need_classes
from hubtransfer.methods.penalty import Penalty
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.update import Descend, Terms
from hubtransfer.models import TransferModel

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class LwFConfig:
    """Hyper-parameters of `LwF`.

    Attributes:
        alpha: Weight of the old answers.
        temperature: T >= 1.
        warm_up: Passes over a new task's data in which its outputs train alone, before everything does.
        trains: With a patch a task: "patch" (and head), which leaves nothing to forget, or "all": the trunk too.
    """

    alpha: float = 1.0
    temperature: float = 2.0
    warm_up: float = 0.0
    trains: Literal["patch", "all"] = "all"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, got {self.alpha}")
        if self.temperature < 1:
            raise ValueError(f"temperature must be at least 1, got {self.temperature}")
        if self.warm_up < 0:
            raise ValueError(f"warm_up must not be negative, got {self.warm_up}")
        if self.trains not in ("patch", "all"):
            raise ValueError(f"trains must be 'patch' or 'all', got {self.trains!r}")


class LwF(Penalty, name="lwf", config=LwFConfig):
    r"""Keeps the old tasks' answers to the new task's inputs as they were before it, without any old data.

    .. math:: L = L_t - \alpha \sum_{o} \frac{1}{B} \sum_{i,c} p^o_{ic} \log q^o_{ic}, \quad
       p^o_i = \mathrm{softmax}(v^o_i / T), \quad q^o_i = \mathrm{softmax}(z^o_i / T)

    with the logits v of the model as task t found it and z of the model now, (batch, old classes). In a stream of kind
    "task" o runs over the heads of earlier tasks; in one of kind "class" there is one o, the classes seen before.
    Inputs that are not augmented ask the old model once. Not for streams of kind "domain", whose one head has no output
    but those that the new labels change.

    Args:
        model: The model, with a head for each of the stream's tasks (kind "task") or one for all classes.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: the warm-up has a length given in advance (the paper: to convergence); heads of earlier
    tasks stay as they are (the paper trains them too); old answers come from a second forward, so that the statistics
    of batch normalisation move twice a step. As in the paper, gradients of the old answers are not multiplied by T^2.

    Source: https://arxiv.org/abs/1606.09282, equations 2 to 4 and figure 3; for classes in portions ("LwF.MC"):
    https://arxiv.org/abs/1611.07725, section 4.
    """

    paper = "Li 2016"
    source = "https://arxiv.org/abs/1606.09282"
    citation = """@inproceedings{li2016learning,
  title = {Learning without Forgetting},
  author = {Li, Zhizhong and Hoiem, Derek},
  booktitle = {European Conference on Computer Vision},
  year = {2016}
}"""

    seen: Tensor
    fresh: Tensor

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)
        head = model.tasks[self.task].head
        width = 0 if head is None else head.width
        self.register_buffer("seen", torch.zeros(width, dtype=torch.bool))  # classes before this task, for kind "class"
        self.register_buffer("fresh", torch.zeros(width, dtype=torch.bool))  # classes of this task
        self.before = EarlierModel()

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks the stream's kind and heads too, and that its classes are known before a task comes."""
        if scenario.kind == "domain":
            raise ValueError(
                "LwF keeps outputs that the new task's labels do not train; in a stream of kind 'domain' one head has "
                "the same classes all along, so that old answers and new labels contradict each other on every output"
            )
        items = need_classes(self, super().checked(scenario), "keeping old answers")
        other = next((item.task for item in items if item.task not in (None, self.task)), None)
        if scenario.kind == "class" and other is not None:
            raise ValueError(f"LwF: the stream's classes belong to task {other!r}: LwF(model, task={other!r})")
        for item in items:
            if item.task in (None, self.task):
                classes_of(item, len(self.fresh), type(self).__name__)
        return items

    def groups(self) -> dict[str, Any]:
        """The trunk with the current task's patch and head, and that head alone for the warm-up."""
        what: Literal["patch", "all"] = self.config.trains if self.current in self.model.patches else "all"
        return {"model": self.model.trainable(what, self.current), "head": self.model.trainable("head", self.current)}

    def before_task(self, item: Any, runtime: "Runtime") -> None:
        """Keeps the model as it is, and notes which classes are old and which come now."""
        if self._one_head:
            self.seen |= self.fresh
            self.fresh.copy_(classes_of(item, len(self.fresh), type(self).__name__))
        if self.number > 0:
            self.before.hold(self.model)

    def stages_before(self, item: Any, number: int) -> Iterator[Stage]:
        """The warm-up of a task that is not the first."""
        if number > 0 and self.config.warm_up:
            warm_up = [Descend(self.warm_up, trains="head")]
            yield Stage("warm-up", item.train_source, warm_up, epochs=self.config.warm_up)

    def warm_up(self, batch: Batch) -> Terms:
        """Returns the loss of the new outputs alone: the scalar `labels`."""
        if not self._one_head:
            return {"labels": self.label_loss(batch)}
        logits = self.model(**batch.inputs, task=self.task).logits
        return {"labels": self.model.loss(logits.masked_fill(~self.fresh, -torch.inf), self.labels(batch), self.task)}

    def terms(self, batch: Batch) -> Terms:
        """Returns the scalar `old`, how far the answers have moved, from the second task on."""
        if not self.before:
            return {}
        now = self._answers(self.model, batch.inputs)
        then = self.before.outputs(self.model, batch, self._answers)
        distances = [softened_cross_entropy(v, z, self.config.temperature) for v, z in zip(then, now)]
        return {"old": self.config.alpha * torch.stack(distances).sum()}

    @property
    def _one_head(self) -> bool:
        """Whether all items so far have the method's own head."""
        return set(self.learned_tasks) == {self.task}

    def _answers(self, model: TransferModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Logits of every earlier head, or of the one head's earlier classes."""
        if self._one_head:
            return (model(**inputs, task=self.task).logits[:, self.seen],)
        names = [name for name in dict.fromkeys(self.learned_tasks[:-1]) if name != self.current]
        shared = [name for name in names if name not in model.patches]
        given = next(iter(inputs.values())) if "pixel_values" in inputs else inputs
        logits: dict[str, Tensor] = {name: model(**inputs, task=name).logits for name in names if name in model.patches}
        if shared:
            layers = dict.fromkeys(layer for name in shared for layer in model.layers_for(name))
            features = model.features(given, tuple(layers), shared[0])
            logits |= {name: model.logits(features, name, given) for name in shared}
        return tuple(logits[name] for name in names)
