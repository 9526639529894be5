"""Independent networks for each task, their predictions averaged: the baseline of cross-stitch networks."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hubtransfer.backbones import Backbone, Towers
from hubtransfer.data import Batch, MultiTask
from hubtransfer.methods.method import Method
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.task_losses import on_every_process, over_processes, task_names, task_streams
from hubtransfer.methods.update import AnyBatch, Descend, Terms
from hubtransfer.models import TransferModel
from hubtransfer.models.heads import LinearHead
from hubtransfer.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """Hyper-parameters of `Ensemble`.

    Attributes:
        members: Networks a task (M); 1 gives single-task networks, the other baseline.
    """

    members: int = 2

    def __post_init__(self) -> None:
        """Checks the value.

        Raises:
            ValueError: if it is less than 1.
        """
        if self.members < 1:
            raise ValueError(f"members must be at least 1, got {self.members}")


class Ensemble(Method, name="ensemble", config=EnsembleConfig, scenario=MultiTask):
    r"""Trains M networks for each task, none of which shares anything with another, and averages their logits.

    .. math:: z^t = \frac{1}{M} \sum_m h^t_m(f^t_m(x)), \qquad L = \sum_t \sum_m L_t\big(h^t_m(f^t_m(x))\big)

    with networks f (batch, dim) and linear heads h. A task's first network starts from the model's trunk and head; the
    others start from fresh random weights if the trunk did, and else from the same trunk with a fresh head. After every
    step the heads of a task make up the model's, which reads all its networks' features, (batch, M dim), and gives the
    same logits.

    The paper compares cross-stitch networks for two tasks with an ensemble of two one-task networks for each, which has
    as many parameters for one task as they have for both.

    Args:
        model: A model with a linear head for every task; its trunk is copied when training starts.
        tasks: Names of the tasks (default: all of the model's).

    Differs from the paper: which predictions are averaged is not said there; here they are logits.

    Source: https://arxiv.org/abs/1604.03539 (the baselines of its experiments).
    """

    paper = "Misra 2016"
    source = "https://arxiv.org/abs/1604.03539"
    citation = """@inproceedings{misra2016cross,
  title = {Cross-Stitch Networks for Multi-Task Learning},
  author = {Misra, Ishan and Shrivastava, Abhinav and Gupta, Abhinav and Hebert, Martial},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2016}
}"""

    def __init__(self, model: TransferModel, tasks: Sequence[str] | None = None, **config: Any) -> None:
        names = task_names(model, tasks, "Ensemble")
        super().__init__(model, self.configure(config), task=names[0])
        if isinstance(model.backbone, Towers):
            raise ValueError("Ensemble makes networks from the model's trunk, but this model has several already")
        if len(names) * self.config.members < 2:
            raise ValueError("Ensemble: one network for one task is plain fine-tuning; take members=2, or more tasks")
        self.tasks = names
        self.heads = nn.ModuleList()
        for task in names:
            head = model.heads[task]
            if not isinstance(head, LinearHead):
                raise ValueError(f"Ensemble averages linear heads; that of task {task!r} is a {type(head).__name__}")
            fresh = [
                LinearHead(head.in_features, head.out_features, head.dropout) for _ in range(1, self.config.members)
            ]
            self.heads.append(nn.ModuleList([copy.deepcopy(head), *(one.to(head.weight) for one in fresh)]))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """One group: all networks and their heads, frozen parts excepted.

        The model's heads are in it, too: they have no gradient but follow the networks'.
        """
        joined = [p for task in self.tasks for p in self.model.heads[task].parameters()]
        everything = [*self.model.backbone.parameters(), *self.heads.parameters(), *joined]
        return {"networks": [p for p in everything if p.requires_grad]}

    def members(self, task: str) -> list[tuple[Backbone, LinearHead]]:
        """Returns a task's networks with their heads."""
        backbone, heads = self.model.backbone, self.heads[self.tasks.index(task)]
        assert isinstance(backbone, Towers) and isinstance(heads, nn.ModuleList)
        return list(zip(backbone.networks(task), heads))  # type: ignore[arg-type]

    def member_logits(self, batch: Batch, task: str) -> list[Tensor]:
        """Returns the logits of each of a task's networks, (batch, width)."""
        return [head(network(batch.inputs).pooled) for network, head in self.members(task)]

    def predict(self, batch: Batch, task: str) -> Tensor:
        """Returns the mean of the networks' logits."""
        if not isinstance(self.model.backbone, Towers):
            return super().predict(batch, task)
        return torch.stack(self.member_logits(batch, task)).mean(0)

    def loss(self, batch: AnyBatch) -> Terms:
        """Returns each task's loss, summed over its networks, under its name: scalars."""
        terms: Terms = {}
        for task in self.tasks:
            own = batch if isinstance(batch, Batch) else batch.get(task)
            if own is not None:
                labels: Any = own.labels[task] if isinstance(own.labels, dict) else own.labels
                losses = [self.model.loss(logits, labels, task) for logits in self.member_logits(own, task)]
                terms[task] = torch.stack(losses).sum() * (1.0 if own.share is None else own.share)
        terms = over_processes(terms, self.model, self.tasks, batch)
        return on_every_process(terms, self.tasks, batch)

    def stages(self, scenario: MultiTask) -> Iterator[Stage]:
        """One stage."""
        data = task_streams(scenario, self.tasks, "Ensemble")
        descend = Descend(self.loss, trains="networks", after=self._join)
        yield Stage("independent", data, [descend], enter=self._part)

    def _part(self, runtime: Runtime) -> None:
        self.model.grow("towers", tasks=list(self.tasks), members=self.config.members)
        for task in self.tasks:
            for network, _ in self.members(task)[1:]:
                _start_afresh(network)
        self._join()

    @torch.no_grad()
    def _join(self, batch: AnyBatch = None) -> None:
        """Writes the heads into the model's: it may be saved after any step."""
        for task in self.tasks:
            joined, heads = self.model.heads[task], [head for _, head in self.members(task)]
            assert isinstance(joined, LinearHead)
            joined.weight.copy_(torch.cat([head.weight for head in heads], 1) / len(heads))
            joined.bias.copy_(torch.stack([head.bias for head in heads]).mean(0))


def _start_afresh(network: Backbone) -> None:
    """Gives a network new random weights if it started from random ones; pre-trained weights stay."""
    if network.source.get("pretrained") is False:
        network.load_state_dict(Backbone.from_source(network.source).state_dict())
    elif network.source.get("library") == "module":
        for module in network.modules():
            if callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()  # type: ignore[operator]
