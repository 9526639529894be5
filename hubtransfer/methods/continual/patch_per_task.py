"""A patch a task, and the task found from the features (Wang et al., 2022)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hubtransfer.data import Batch, TaskStream
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.statistics_method import StatisticsMethod
from hubtransfer.methods.update import Accumulate, Descend, Terms
from hubtransfer.models import ClassificationHead, NearestMeanHead, TransferModel
from hubtransfer.models.statistic_heads import UNSEEN, ClassMeans
from hubtransfer.patches import PatchConfig, ScaleBiasConfig

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


PATCH = ScaleBiasConfig()


@dataclass(frozen=True, kw_only=True)
class PatchPerTaskConfig:
    """Hyper-parameters of `PatchPerTask`.

    Attributes:
        patch: What each task gets.
    """

    patch: PatchConfig = PATCH


class PatchPerTask(StatisticsMethod, name="patch_per_task", config=PatchPerTaskConfig):
    r"""Gives each task a patch of a frozen trunk, and finds an example's task by its nearest prototype.

    .. math:: \hat t(x) = \arg\max_t \max_c\, s\big(f(x), \mu_{ct}\big), \qquad
       \hat y(x) = \arg\max_{c \in C_t} h_t\big(f_{\pi_t}(x)\big)_c \;\text{ at }\; t = \hat t(x)

    with features f of the bare trunk, (dim,), the mean mu of class c in task t and the likeness s of a
    `NearestMeanHead` (cosine, or the log-likelihood of unit Gaussians); the task's patch pi, and its head h over its
    own classes C. Each item of the stream is seen once to count its means, then its patch and head are trained. Nothing
    of an earlier task moves: what is forgotten is forgotten by taking one task for another. Streams of kind "class" and
    "domain", any backbone and patch. `route` says which task an example belongs to, in a loaded model too:
    `model(x, task=method.route(x))`.

    Args:
        model: The model, with a `NearestMeanHead` that has as many `prototypes` as the stream has tasks.
        task: Task of that head (default: the active one).

    Differs from the paper: any patch in place of prompts; a task's prototypes are its class means, not centres of
    K-means; the trunk is not bound to be a transformer.

    Source: https://arxiv.org/abs/2207.12819, section 3.
    """

    paper = "Wang 2022"
    source = "https://arxiv.org/abs/2207.12819"
    citation = """@inproceedings{wang2022sprompts,
  title = {{S-Prompts} Learning with Pre-trained Transformers: An {Occam's} Razor for Domain Incremental Learning},
  author = {Wang, Yabin and Huang, Zhiwu and Hong, Xiaopeng},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022}
}"""
    head = NearestMeanHead

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)

    def __add__(self, other: Any) -> Any:
        """Takes no terms: what a task trains is new, its head's classes are its own, and what was there before stays.

        Raises:
            TypeError: saying so.
        """
        raise TypeError(
            f"PatchPerTask and {type(other).__name__} cannot be added: of earlier tasks nothing moves that a penalty "
            "or a memory could hold back, and each task's new head has classes of its own, which no teacher shares"
        )

    __radd__ = __add__

    @property
    def means(self) -> ClassMeans:
        """What finds the task; its groups are the tasks."""
        return self.model.heads[self.task]  # type: ignore[return-value]

    @property
    def experts(self) -> list[str]:
        """Names of the tasks with a patch, in the order in which they came."""
        return [name for name in self.model.patches if name != self.task]

    def classes(self, number: int) -> Tensor:
        """Returns the classes that a task has, int64 (classes,)."""
        return self.means.counts[:, number].nonzero().flatten()

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks the stream's kind, the patches that are there, and the number of prototypes too."""
        if scenario.kind == "task":
            raise ValueError(
                "PatchPerTask finds the task of an example, but in a stream of kind 'task' it is told; give each task "
                "its patch, model.add_task(name, head, patch=...), and train with SequentialFineTune"
            )
        items, experts, prototypes = super().checked(scenario), self.experts, self.means.counts.shape[1]
        if len(experts) > self.means.counts.any(0).sum():
            raise ValueError(
                f"PatchPerTask takes every task with a patch for one that it has learned, but the head of task "
                f"{self.task!r} has not counted examples of each of {experts}; train in a model without other patches"
            )
        needed = len({*experts, *(item.name for item in items)})
        if prototypes < needed:
            raise ValueError(
                f"PatchPerTask keeps a mean a class and task, but the head of task {self.task!r} has {prototypes} "
                f"prototypes for {needed} tasks: NearestMeanHead(num_classes=..., prototypes={needed})"
            )
        return items

    def stages(self, scenario: TaskStream) -> Iterator[Stage]:
        """Two stages an item: one pass that counts, then the patch and its head."""
        for item in self.checked(scenario):
            begin, rest, source = partial(self.begin, item), partial(self.count_rest, item), item.train_source
            count = Stage(f"{item.name}/prototypes", source, [Accumulate(self.count)], enter=begin, exit=rest)
            yield self.one_pass(count, item)
            add = partial(self.before_patch, item)
            yield Stage(f"{item.name}/patch", item.train_source, [Descend(self.loss)], enter=add)

    def add(self, head: Any, features: Tensor, labels: Tensor, held_out: Tensor) -> Tensor:
        """Gives examples to the newest task's means."""
        return head.add(features, labels, held_out, group=len(self.experts))

    def add_expert(self, name: str, classes: Sequence[int]) -> None:
        """Adds a task with a patch, and a head over some of the classes."""
        every = self.model.tasks[self.task].head
        labels = every.labels if every is not None and every.labels else list(map(str, range(self.means.out_features)))
        own = ClassificationHead(len(classes), labels=tuple(labels[c] for c in classes))
        self.model.add_task(name, own, patch=self.config.patch).set_task(self.task)

    def before_patch(self, item: Any, runtime: "Runtime") -> None:
        """Grows the item's task and makes it the current one."""
        self.grow("add_expert", name=item.name, classes=self.classes(len(self.experts)).tolist())
        self.begun[-1] = list(self.model.tasks).index(item.name)

    def loss(self, batch: Batch) -> Terms:
        """Returns the loss of the current task's head over its own classes: the scalar `labels`."""
        classes, labels = self.classes(self.experts.index(self.current)), self.labels(batch)
        places = torch.searchsorted(classes, labels).where(labels >= 0, -100)
        return {"labels": self.model(**batch.inputs, labels=places, task=self.current).loss}

    @torch.no_grad()
    def route(self, inputs: Batch | Tensor) -> list[str]:
        """Returns the name of the task that each example most likely belongs to."""
        batch = inputs if isinstance(inputs, Batch) else Batch({"pixel_values": inputs})
        likenesses = self.means.likenesses(self.features(batch, self.task)).amax(1)[:, : len(self.experts)]
        return [self.experts[number] for number in likenesses.argmax(1).tolist()]

    def predict(self, batch: Batch, task: str) -> Tensor:
        """Returns logits (batch, classes) of the task found for each example; nearest means until there is one."""
        if task != self.task or not self.experts:
            return super().predict(batch, task)
        names = self.route(batch)
        own = {name: self.classes(number) for number, name in enumerate(self.experts)}
        found = self.model(**batch.inputs, task=names).logits
        rows = [F.one_hot(own[name], self.means.out_features).to(row).T @ row for name, row in zip(names, found)]
        seen = torch.stack([F.one_hot(own[name], self.means.out_features).sum(0) for name in names])
        return torch.stack(rows).masked_fill(seen == 0, UNSEEN)
