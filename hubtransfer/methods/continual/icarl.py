"""Incremental classifier and representation learning (Rebuffi et al., 2017)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hubtransfer.data import Batch, Herding, MemoryConfig, Replay, TaskStream
from hubtransfer.data.batch import joined_inputs
from hubtransfer.data.processes import rank, world
from hubtransfer.methods.class_portions import classes_of
from hubtransfer.methods.continual_method import ContinualMethod
from hubtransfer.methods.earlier_model import EarlierModel
from hubtransfer.methods.evaluating import TOGETHER, evaluating
from hubtransfer.methods.exemplars import class_means, herded, once_a_pass, unit_features
from hubtransfer.methods.importance import need_classes
from hubtransfer.methods.update import Terms
from hubtransfer.models import TransferModel

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime

_UNKNOWN = -5.0  # below every -|a - b|^2 of two vectors of unit length


@dataclass(frozen=True, kw_only=True)
class ICaRLConfig:
    """Hyper-parameters of `ICaRL`.

    Attributes:
        memory: How many exemplars there are, of all classes together.
    """

    memory: MemoryConfig = field(default_factory=lambda: Herding(200))

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if not isinstance(self.memory, Herding):
            raise ValueError(f"memory must be Herding(size), which keeps the best exemplars, got {self.memory!r}")


class ICaRL(ContinualMethod, name="icarl", config=ICaRLConfig):
    r"""Learns classes in portions: exemplars and old answers while training, nearest mean of exemplars to classify.

    .. math:: L = \frac{1}{|B|\, C} \sum_{x \in B} \sum_{c \le C} \mathrm{BCE}\big(q_c(x), \sigma(z_c(x))\big), \quad
       q_c = \begin{cases} \sigma(z_c^{old}(x)) & c \text{ old} \\ [y = c] & c \text{ new} \end{cases}; \qquad
       y^* = \arg\min_c \| \varphi(x) - \mu_c \|_2

    with logits z of the C classes so far, those of the network that the last portion left for old classes, features
    phi = f(x) / |f(x)| and mu_c their mean over the exemplars of class c, of unit length too. Batches B are of new data
    and exemplars, each seen once a pass. After a portion exemplars are chosen by herding on phi: the mean of the first
    k is as near the class's mean as can be. For streams of kind "class" with one head, any backbone. Until a class has
    exemplars it is not predicted. The exported model answers with its linear head.

    Args:
        model: The model, with one head for all classes.
        task: That head's task (default: the active one).

    Differs from the paper: exemplars join batches of new data, evenly over a pass, in place of one shuffled set of
    both; the loss is a mean over classes, not a sum, as in the authors' code.

    Source: https://arxiv.org/abs/1611.07725, algorithms 1 to 5.
    """

    paper = "Rebuffi 2017"
    source = "https://arxiv.org/abs/1611.07725"
    citation = """@inproceedings{rebuffi2017icarl,
  title = {iCaRL: Incremental Classifier and Representation Learning},
  author = {Rebuffi, Sylvestre-Alvise and Kolesnikov, Alexander and Sperl, Georg and Lampert, Christoph H.},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2017}
}"""

    old: Tensor
    new: Tensor
    read: Tensor
    portion: Tensor

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)
        head = model.tasks[self.task].head
        width = 0 if head is None else head.width
        self.memory, self.before = self.config.memory.build(model.processor), EarlierModel()
        self.register_buffer("old", torch.zeros(width, dtype=torch.bool))  # classes of earlier portions
        self.register_buffer("new", torch.zeros(width, dtype=torch.bool))  # classes that are new in this one
        self.register_buffer("read", torch.zeros((), dtype=torch.int64))  # examples of this portion so far
        self.register_buffer("portion", torch.ones((), dtype=torch.int64))  # examples that it has
        self._means: Tensor | None = None

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks the stream's kind and head too."""
        if scenario.kind != "class":
            raise ValueError(
                f"ICaRL learns portions of classes with one head: it needs a stream of kind 'class', got kind "
                f"{scenario.kind!r}; a class's mean says nothing where a task gives it other images or another head"
            )
        items = need_classes(self, super().checked(scenario), "a mean a class")
        every = torch.stack([classes_of(item, len(self.old), type(self).__name__) for item in items]).any(0)
        if self.memory.size < every.sum():
            few = f"{self.memory.size} exemplars cannot be divided among {int(every.sum())} classes"
            raise ValueError(f"ICaRL: {few}, at least one each; give it a larger memory")
        return items

    def before_task(self, item: Any, runtime: "Runtime") -> None:
        """Keeps the model as it is, and notes which classes are old and which are new."""
        self.old |= self.new
        self.new.copy_(classes_of(item, len(self.new), type(self).__name__).to(self.old.device) & ~self.old)
        self.read.zero_()
        self.portion.fill_(len(item.train_source.table))
        self._means = None
        if self.number > 0:
            self.before.hold(self.model)

    def loss(self, batch: Batch) -> Terms:
        """Returns the scalar `classes`."""
        replay, count = self._exemplars(batch)
        parts = [batch] if replay is None else [batch, replay]
        logits = self.model(**joined_inputs([part.inputs for part in parts]), task=self.task).logits
        labels = torch.cat([self.labels(part) for part in parts]).long()
        targets = F.one_hot(labels.clamp(min=0), logits.shape[1]).to(logits)
        if self.number > 0:
            answers = self.before.outputs(self.model, batch, lambda model, inputs: (self._answers(model, inputs),))
            answers += () if replay is None else (replay.kept["answers"],)
            targets = torch.where(self.old, torch.cat(answers).to(targets), targets)
        seen = self.old | self.new
        errors = F.binary_cross_entropy_with_logits(logits[:, seen], targets[:, seen], reduction="none").mean(1)
        return {"classes": errors[labels >= 0].sum() * (world() / count)}  # a mean over all processes' examples

    def after_step(self, batch: Batch) -> None:
        """Counts the examples, by which exemplars join them."""
        self.read += len(batch) * world()
        self._means = None

    @torch.no_grad()
    def after_task(self, item: Any, runtime: "Runtime") -> None:
        """Makes room for exemplars of the new classes, chooses them, and notes what the model says of all exemplars."""
        classes = self.new.nonzero().flatten().cpu()
        if len(classes):
            count = self.memory.size // int((self.old | self.new).sum())
            batch = herded(self.model, self.task, item, runtime, classes, count)
            labels = self.labels(batch)
            empty = next(self.model.parameters()).new_zeros(len(labels), len(self.old))
            self.memory.add(batch, task=self.number, labels=labels, same=True, answers=empty)
        with evaluating(self.model):
            for slots in torch.arange(len(self.memory)).split(TOGETHER):
                self.memory.update(slots, answers=self._answers(self.model, self.memory.at(slots).inputs))
        self._means = None

    def predict(self, batch: Batch, task: str) -> Tensor:
        """Returns -|phi - mu|^2 of each class, (batch, classes); the head's logits while there are no exemplars."""
        if not len(self.memory) or task != self.task:
            return super().predict(batch, task)
        if self._means is None:
            self._means = class_means(self.model, self.memory, task, len(self.old))
        features = unit_features(self.model, batch.inputs, task)
        return (2 * features @ self._means.T.to(features) - 2).nan_to_num(nan=_UNKNOWN)

    def _exemplars(self, batch: Batch) -> tuple[Replay | None, int]:
        """Exemplars that join a batch, this process's share, and how many examples all processes' batches then have."""
        everyone, begun, kept = len(batch) * world(), int(self.read), len(self.memory)
        places = [done * kept // int(self.portion) for done in (begun, begun + everyone)]
        slots = once_a_pass(self.memory, self.number, *places)
        own = slots[rank() :: world()]
        return (self.memory.at(own) if len(own) else None), everyone + len(slots)

    def _answers(self, model: TransferModel, inputs: Any) -> Tensor:
        """Probabilities of each class by itself, (batch, classes)."""
        return model(**inputs, task=self.task).logits.sigmoid()
