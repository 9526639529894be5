"""Dynamically expandable networks (Yoon et al., 2018)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

from hubtransfer.data import Batch, TaskStream
from hubtransfer.functional.subnetworks import reaching_units, rows_shrunk, shrunk
from hubtransfer.methods.continual_method import ContinualMethod
from hubtransfer.methods.evaluating import evaluating
from hubtransfer.methods.item_batches import item_batches, need_ends
from hubtransfer.methods.parameter_state import ParameterState
from hubtransfer.methods.stage import OptimizerConfig, Stage
from hubtransfer.methods.unit_chain import UnitChain
from hubtransfer.methods.update import Descend, Terms
from hubtransfer.models import TransferModel
from hubtransfer.patches import EarlierUnitsConfig

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class DENConfig:
    """Hyper-parameters of `DEN`.

    Attributes:
        l1: How much nearer to zero each step draws weights of the first task's network, new heads and new units.
        l2: mu, weight of the squared sub-network while it is retrained.
        group_lasso: How much shorter each step makes the incoming weights of each new unit.
        drift: lambda, weight of the squared way from the weights before the task.
        loss: tau: a mean training loss above it adds units.
        units: k, units added to each layer then.
        split: sigma: a unit whose incoming weights moved farther is split.
        seed: Of new units.
    """

    l1: float = 1e-5
    l2: float = 1e-4
    group_lasso: float = 1e-3
    drift: float = 0.5
    loss: float = 0.01
    units: int = 10
    split: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        for name in ("l1", "l2", "group_lasso", "drift", "loss", "split"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.units < 1:
            raise ValueError(f"units must be at least 1, got {self.units}")


class DEN(ContinualMethod, name="den", config=DENConfig):
    r"""Retrains for each task the part of a network that it needs, adds units if that is not enough, and splits others.

    .. math:: (1)\; \min_{W_{head}} L_t + \mu_1 \|W_{head}\|_1, \quad (2)\; \min_{W_S} L_t + \mu_2 \|W_S\|_2^2, \quad
       (3)\; \min_{W_N} L_t + \mu_1 \|W_N\|_1 + \gamma \sum_{i \in N} \|w_i\|_2, \quad
       (4)\; \min_{W_{S \cup N}} L_t + \lambda \|W - W^{t-1}\|_2^2

    The first task learns with L1. For a later one: (1) its head; then the units S from which non-zero weights lead to
    it, (units,) a layer, by breadth-first search, and (2) the weights among them; if the training loss stays above tau,
    k new units N a layer (3), of which those without incoming weights go again; then (4), after which each old unit
    whose incoming weights moved farther than sigma is doubled, the original gets its old weights back, and (4) once
    more. A task is answered by the units that were there when it was learned (timestamps).

    Applies to streams of kind "task", trunks of linear layers in a row (such as `plain:mlp`) and linear heads. When the
    stream is over, earlier tasks get a patch that leaves later units out; the trunk does not grow after that.

    Args:
        model: The model, with a head for each of the stream's tasks.
        task: The first task (default: the active one).

    Differs from the paper: (4) moves S and N alone, so that units outside S stay as they were; right after a split the
    new task's head and units read the double in place of the original; (2) squares the norm of equation 4, as the
    authors' code does; the sparse norms act by their proximal steps, so that zeros are zeros.

    Source: https://arxiv.org/abs/1708.01547, algorithms 1 to 4 and equations 2 to 6.
    """

    paper = "Yoon 2018"
    source = "https://arxiv.org/abs/1708.01547"
    citation = """@inproceedings{yoon2018lifelong,
  title = {Lifelong Learning with Dynamically Expandable Networks},
  author = {Yoon, Jaehong and Yang, Eunho and Lee, Jeongtae and Hwang, Sung Ju},
  booktitle = {International Conference on Learning Representations},
  year = {2018}
}"""

    widths: Tensor
    reached: Tensor
    was_split: Tensor

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)
        self.chain = UnitChain(model)
        self.before, self.chosen = ParameterState(), ParameterState()
        like = next(model.parameters())
        self.register_buffer(
            "widths", torch.empty(0, len(self.chain.layers), dtype=torch.int64)
        )  # a row a finished task
        self.register_buffer("reached", torch.zeros((), dtype=like.dtype))  # mean loss of the retrained sub-network
        self.register_buffer("was_split", torch.zeros((), dtype=torch.bool))

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks the stream's kind and heads too."""
        if scenario.kind != "task":
            raise ValueError(
                "DEN answers a task with the units of its time, so it has to know the task at test time; the stream is "
                f"of kind {scenario.kind!r}: make it TaskStream(..., kind='task'), with a head for each task"
            )
        items = need_ends(self, super().checked(scenario))
        for item in items:
            self.chain.head(item.task)
        return items

    def groups(self) -> dict[str, Any]:
        """The trunk with the current task's head, and that head alone."""
        head = self.model.trainable("head", self.current)
        return {"model": self.model.trainable("all", self.current), "head": head}

    def stages(self, scenario: TaskStream) -> Iterator[Stage]:
        """One stage for the first task; for each later one up to five."""
        items = self.checked(scenario)
        for number, item in enumerate(items):
            begin, end = partial(self.begin, item), partial(self.finish, number == len(items) - 1)
            if number == 0:
                alone = Descend(self.loss, after=self.sparser)
                yield Stage(item.name, item.train_source, [alone], enter=begin, exit=end)
                continue
            head = Descend(self.loss, trains="head", after=self.sparser_head)
            retrain, expand = Descend(self.subnetwork), Descend(self.new_units, after=self.sparser_units)
            drift = Descend(self.drifting)
            short, split = self.is_short, lambda: bool(self.was_split)
            yield _stage(item, "head", head, enter=begin, exit=self.choose)
            yield _stage(item, "retrain", retrain, exit=partial(self.measure, item))
            yield _stage(item, "expand", expand, when=short, enter=self.expand, exit=self.prune)
            yield _stage(item, "drift", drift, exit=partial(self.split, end))
            yield _stage(item, "settle", drift, when=split, exit=end)

    # ------------------------------------------------------------------------------------------------- losses

    def subnetwork(self, batch: Batch) -> Terms:
        """Returns the scalars `labels` and `size`, of the weights among the chosen units (equation 4 of the paper)."""
        masks, held, labels = self._held(batch, "among")
        squares = [(mask * held[name].square()).sum() for name, mask in masks.items()]
        return {"labels": labels, "size": self.config.l2 * torch.stack(squares).sum()}

    def new_units(self, batch: Batch) -> Terms:
        """Returns the scalar `labels`, as a function of the weights into and out of new units (equation 5)."""
        return {"labels": self._held(batch, "touching")[2]}

    def drifting(self, batch: Batch) -> Terms:
        """Returns the scalars `labels` and `drift`, of the weights that were there before the task (equation 6)."""
        _, held, labels = self._held(batch, "among")
        ways = [
            (held[name][tuple(map(slice, kept.shape))] - kept).square().sum()
            for name, kept in self.before.tensors().items()
        ]
        return {"labels": labels, "drift": self.config.drift * torch.stack(ways).sum()}

    @torch.no_grad()
    def sparser(self, batch: Batch) -> None:
        """Draws all weights of the first task towards zero (equation 2)."""
        for weight in self.chain.weights(self.current):
            weight.copy_(shrunk(weight, self.config.l1))

    @torch.no_grad()
    def sparser_head(self, batch: Batch) -> None:
        """Draws the head's weights towards zero (equation 3)."""
        head = self.chain.head(self.current)
        head.weight.copy_(shrunk(head.weight, self.config.l1))

    @torch.no_grad()
    def sparser_units(self, batch: Batch) -> None:
        """Draws the weights of new units towards zero, and each unit's incoming ones as a group (equation 5)."""
        masks = list(self._masks("touching").values())
        for weight, mask in zip(self.chain.weights(self.current), (mask for mask in masks if mask.dim() > 1)):
            weight.copy_(torch.where(mask, shrunk(weight, self.config.l1), weight))
        for layer, old in zip(self.chain.linears, self._old()):
            layer.weight[old:] = rows_shrunk(layer.weight[old:], self.config.group_lasso)

    # -------------------------------------------------------------------------------------------------- hooks

    def before_task(self, item: Any, runtime: "Runtime") -> None:
        """Keeps the trunk as the tasks before have left it."""
        self.before.keep(self.chain.parameters())
        self.was_split.zero_()

    @torch.no_grad()
    def choose(self, runtime: "Runtime") -> None:
        """Finds the units on which the new head depends."""
        self.chosen.keep(dict(zip(self.chain.layers, reaching_units(self.chain.weights(self.current)))))

    @torch.no_grad()
    def measure(self, item: Any, runtime: "Runtime") -> None:
        """Notes the loss that the retrained sub-network reaches on the task's training data."""
        sums = torch.zeros(2, dtype=torch.float64)
        with evaluating(self.model):
            for batch in item_batches(self, item, runtime, shared=True):
                sums += torch.tensor([float(self.label_loss(batch)) * len(batch), len(batch)], dtype=torch.float64)
        total, count = runtime.reduce(sums.to(runtime.device), "sum")
        self.reached.copy_(total / count)

    def is_short(self) -> bool:
        """Whether the sub-network does not suffice."""
        return bool(self.reached > self.config.loss)

    def expand(self, runtime: "Runtime") -> None:
        """Adds k units to each layer."""
        new = [-1] * self.config.units
        seed = self.config.seed + self.number
        self.grow("rebuild", sources=[[*range(width), *new] for width in self.chain.widths], seed=seed)

    def prune(self, runtime: "Runtime") -> None:
        """Removes new units without incoming weights."""
        kept = []
        for layer, old in zip(self.chain.linears, self._old()):
            alive = layer.weight.detach().ne(0).any(1).nonzero().flatten().tolist()
            kept.append([*range(old), *(unit for unit in alive if unit >= old)])
        self.grow("rebuild", sources=kept)

    @torch.no_grad()
    def split(self, end: Any, runtime: "Runtime") -> None:
        """Doubles units that drifted; the originals become again what they were."""
        kept = self.before.tensors()
        drifted = self.chain.drifted(kept, self.config.split)
        if not any(drifted):
            end(runtime)
            return
        self.was_split.fill_(True)
        self.grow("rebuild", sources=[[*range(width), *units] for width, units in zip(self.chain.widths, drifted)])
        self.chain.put_back(drifted, kept, self.current)
        for name, units in zip(self.chain.layers, drifted):
            self.chosen.like(name, kept[f"backbone.trunk.{name}.weight"][:, 0])[units] = False

    def finish(self, last: bool, runtime: "Runtime") -> None:
        """Stamps the units that are there now; after the last task gives earlier ones a view of those of their time."""
        self.widths = torch.cat([self.widths, self.widths.new_tensor([self.chain.widths])])
        if last:
            for task, widths in zip(self.learned_tasks, self.widths.tolist()):
                if widths[:-1] != self.chain.widths[:-1]:
                    self.grow("look_back", task=task, inputs=dict(zip(self.chain.layers[1:], widths)))

    # ---------------------------------------------------------------------------------------------- structure

    def rebuild(self, sources: Sequence[Sequence[int]], seed: int = 0) -> None:
        """Makes every hidden layer out of units that it has, -1 for a new one."""
        self.model.grow("units", sources=dict(zip(self.chain.layers, map(list, sources))), seed=seed)

    def look_back(self, task: str, inputs: Mapping[str, int]) -> None:
        """Leaves out for a task the units after its time."""
        self.model.add_patch(task, EarlierUnitsConfig(inputs=inputs))

    def predict(self, batch: Batch, task: str) -> Tensor:
        """Returns a task's logits from the units of its time."""
        tasks = self.learned_tasks[: len(self.widths)]
        if task not in tasks or task in self.model.patches:
            return super().predict(batch, task)
        seen = {}
        for name, layer, width in zip(
            self.chain.layers[1:], self.chain.linears[1:], self.widths[tasks.index(task)].tolist()
        ):
            seen[f"backbone.trunk.{name}.weight"] = layer.weight.clone()
            seen[f"backbone.trunk.{name}.weight"][:, width:] = 0
        return functional_call(self.model, seen, (), {**batch.inputs, "task": task}).logits

    def _held(self, batch: Batch, which: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """What may move, parameters with gradients there alone, and the label loss at them."""
        masks = self._masks(which)
        held = self.chain.held(masks)
        given = {**batch.inputs, "labels": self.labels(batch), "task": self.current}
        return masks, held, functional_call(self.model, held, (), given).loss

    def _masks(self, which: Any) -> dict[str, Tensor]:
        """Weights among chosen and new units, or those touching new ones."""
        units = []
        for name, layer, old in zip(self.chain.layers, self.chain.linears, self._old()):
            flags = torch.ones(layer.out_features, dtype=torch.bool, device=layer.weight.device)
            flags[:old] = self.chosen.like(name, flags[:old]) if which == "among" else False
            units.append(flags)
        return self.chain.masks(self.current, units, which)

    def _old(self) -> list[int]:
        """Units of each layer before the task."""
        return [len(self.before.tensors()[f"backbone.trunk.{name}.weight"]) for name in self.chain.layers]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}widths")
        if saved is not None:
            self.widths = self.widths.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _stage(item: Any, name: str, update: Descend, **hooks: Any) -> Stage:
    still = OptimizerConfig(weight_decay=0.0)  # decay would move weights that are held
    optimizers = dict.fromkeys(update.groups(), still)
    return Stage(f"{item.name}/{name}", item.train_source, [update], optimizers=optimizers, **hooks)
