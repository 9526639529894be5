"""Dynamically expandable networks (Yoon et al., 2018)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

from hubtransfer.data import Batch, TaskStream
from hubtransfer.functional.subnetworks import group_norms, reaching_units
from hubtransfer.methods.aggregate import Combine, Gradients
from hubtransfer.methods.continual_method import ContinualMethod
from hubtransfer.methods.importance import mean_loss
from hubtransfer.methods.parameter_state import ParameterState
from hubtransfer.methods.stage import OptimizerConfig, Stage
from hubtransfer.methods.update import Descend, Terms
from hubtransfer.models import TransferModel, linear_chain
from hubtransfer.patches import SplitConfig

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class DENConfig:
    """Hyper-parameters of `DEN`.

    Attributes:
        l1: Weight of the L1 norms that make the first task's network, new heads and new units sparse.
        l2: Weight of the squared sub-network while it is retrained.
        group_lasso: Weight of the norms of new units.
        drift: Weight of the squared way from the weights before the task.
        loss: tau: a mean training loss above it adds units.
        units: k, units added to each layer then.
        split: sigma: a unit whose incoming weights moved farther is split.
        zero: Weights, and norms of new units, up to this count as zero.
        seed: Of new units.
    """

    l1: float = 1e-5
    l2: float = 1e-4
    group_lasso: float = 1e-3
    drift: float = 0.5
    loss: float = 0.01
    units: int = 10
    split: float = 0.05
    zero: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        for name in ("l1", "l2", "group_lasso", "drift", "loss", "split", "zero"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.units < 1:
            raise ValueError(f"units must be at least 1, got {self.units}")


class DEN(ContinualMethod, name="den", config=DENConfig):
    r"""Retrains for each task the part of a network that it needs, adds units if that is not enough, and splits others.

    .. math:: (1)\; \min_{W_{head}} L_t + \mu \|W_{head}\|_1, \quad (2)\; \min_{W_S} L_t + \mu_2 \|W_S\|_2^2, \quad
       (3)\; \min_{W_N} L_t + \mu \|W_N\|_1 + \gamma \sum_{i \in N} \|w_i\|_2, \quad
       (4)\; \min_{W} L_t + \lambda \|W - W^{t-1}\|_2^2

    The first task learns with L1. For a later one: (1) its head; then the units S from which non-zero weights lead to
    it, (units,) a layer, by breadth-first search, and (2) the weights among them; if the loss stays above tau, k new
    units N a layer (3), of which those with norm zero go again; then (4) the weights among S and N, after which each
    old unit whose incoming weights moved farther than sigma is doubled, the original gets its old weights back, and (4)
    once more. A task is answered by the units that were there when it was learned (timestamps). When the stream is over
    each task's network is cut out of the whole as a patch of its own.

    Applies to streams of kind "task" and trunks of linear layers in a row (such as `plain:mlp`), with linear heads.

    Args:
        model: The model, with a head for each of the stream's tasks.
        task: The first task (default: the active one).

    Differs from the paper: step (4) moves S and N alone, not all weights, so that units outside S are not affected; a
    weight counts as zero below a threshold, for gradient descent leaves none at zero; steps have the length of the
    training arguments.

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

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)
        self.layers = linear_chain(model.backbone)
        self.before, self.chosen = ParameterState(), ParameterState()
        like = next(model.parameters())
        self.register_buffer("widths", torch.empty(0, len(self.layers), dtype=torch.int64))  # a row a finished task
        self.register_buffer("reached", torch.full((), torch.inf, dtype=like.dtype))  # the loss after retraining
        self.register_buffer("was_split", torch.zeros((), dtype=torch.bool))

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks the stream's kind too."""
        if scenario.kind != "task":
            raise ValueError(
                "DEN answers a task with the units of its time, so it has to know the task at test time; the stream is "
                f"of kind {scenario.kind!r}: make it TaskStream(..., kind='task'), with a head for each task"
            )
        return super().checked(scenario)

    def groups(self) -> dict[str, Any]:
        """The trunk with the current task's head, and that head alone."""
        head = self.model.trainable("head", self.current)
        return {"model": self.model.trainable("all", self.current), "head": head}

    def stages(self, scenario: TaskStream) -> Iterator[Stage]:
        """One stage for the first task; for each later one up to five."""
        items = self.checked(scenario)
        free = {"model": OptimizerConfig(weight_decay=0.0)}  # it would move weights that are held
        for number, item in enumerate(items):
            begin, data = partial(self.begin, item), item.train_source
            end = partial(self.finish, item, number == len(items) - 1)
            if number == 0:
                yield Stage(item.name, data, [Descend(self.first)], enter=begin, exit=end)
                continue

            def stage(name: str, loss: Any, moves: str, item: Any = item, data: Any = data, **hooks: Any) -> Stage:
                update = Descend(loss, combine=Masked(partial(self.masks, moves)))
                return Stage(f"{item.name}/{name}", data, [update], optimizers=free, **hooks)

            head = [Descend(self.new_head, trains="head")]
            yield Stage(f"{item.name}/head", data, head, enter=begin, exit=self.choose)
            yield stage("retrain", self.subnetwork, "chosen", exit=partial(self.measure, item))
            expand = {"when": lambda: bool(self.reached > self.config.loss), "enter": self.expand, "exit": self.prune}
            yield stage("expand", self.new_units, "new", **expand)
            yield stage("drift", self.drifting, "chosen", exit=partial(self.split, end))
            yield stage("settle", self.drifting, "chosen", when=lambda: bool(self.was_split), exit=end)

    # ------------------------------------------------------------------------------------------------- losses

    def first(self, batch: Batch) -> Terms:
        """Returns the scalars `labels` and `sparse`, for the whole network."""
        sizes = [weight.abs().sum() for weight in self._weights()]
        return {"labels": self.label_loss(batch), "sparse": self.config.l1 * torch.stack(sizes).sum()}

    def new_head(self, batch: Batch) -> Terms:
        """Returns the scalars `labels` and `sparse`, for the head alone (equation 2)."""
        return {"labels": self.label_loss(batch), "sparse": self.config.l1 * self._weights()[-1].abs().sum()}

    def subnetwork(self, batch: Batch) -> Terms:
        """Returns the scalars `labels` and `size`, of the weights among the chosen units (equation 3)."""
        squares = [(mask * p.square()).sum() for mask, p in zip(self.masks("chosen"), self._moving())]
        return {"labels": self.label_loss(batch), "size": self.config.l2 * torch.stack(squares).sum()}

    def new_units(self, batch: Batch) -> Terms:
        """Returns the scalars `labels`, `sparse` and `groups`, of new weights and new units (equation 4)."""
        sparse = [(mask * p).abs().sum() for mask, p in zip(self.masks("new"), self._moving()) if p.ndim > 1]
        norms = [group_norms(layer.weight)[old:].sum() for layer, old in zip(self._linear(), self._old_widths())]
        lasso = self.config.group_lasso * torch.stack(norms).sum()
        return {"labels": self.label_loss(batch), "sparse": self.config.l1 * torch.stack(sparse).sum(), "groups": lasso}

    def drifting(self, batch: Batch) -> Terms:
        """Returns the scalars `labels` and `drift`, of the weights that were there before the task (equation 6)."""
        values = dict(self.model.named_parameters())
        ways = [
            (values[name][tuple(map(slice, kept.shape))] - kept).square().sum()
            for name, kept in self.before.tensors().items()
        ]
        return {"labels": self.label_loss(batch), "drift": self.config.drift * torch.stack(ways).sum()}

    # -------------------------------------------------------------------------------------------------- hooks

    def before_task(self, item: Any, runtime: "Runtime") -> None:
        """Keeps the trunk as the tasks before have left it."""
        trunk = {id(p) for p in self.model.backbone.trunk.parameters()}
        self.before.keep({name: p for name, p in self.model.named_parameters() if id(p) in trunk})
        self.was_split.zero_()

    @torch.no_grad()
    def choose(self, runtime: "Runtime") -> None:
        """Finds the units on which the new head depends."""
        self.chosen.keep(dict(zip(self.layers, reaching_units(self._weights(), self.config.zero))))

    def measure(self, item: Any, runtime: "Runtime") -> None:
        """Notes the loss that the retrained sub-network reaches on the task's training data."""
        self.reached.copy_(mean_loss(self, item, runtime))

    def expand(self, runtime: "Runtime") -> None:
        """Adds k units to each layer."""
        new = [-1] * self.config.units
        self.grow(
            "rebuild", sources=[[*range(width), *new] for width in self._now()], seed=self.config.seed + self.number
        )

    def prune(self, runtime: "Runtime") -> None:
        """Removes new units whose incoming weights are zero."""
        kept = []
        for layer, old in zip(self._linear(), self._old_widths()):
            alive = (group_norms(layer.weight.detach()) > self.config.zero).nonzero().flatten().tolist()
            kept.append([*range(old), *(unit for unit in alive if unit >= old)])
        self.grow("rebuild", sources=kept, seed=0)

    @torch.no_grad()
    def split(self, end: Any, runtime: "Runtime") -> None:
        """Doubles units that drifted; the originals become again what they were."""
        kept, moved = self.before.tensors(), []
        for name, layer in zip(self._names(), self._linear()):
            start = kept[f"{name}.weight"]
            drift = group_norms(layer.weight[: start.shape[0], : start.shape[1]] - start)
            moved.append((drift > self.config.split).nonzero().flatten().tolist())
        if not any(moved):
            end(runtime)
            return
        self.was_split.fill_(True)
        now = self._now()
        self.grow("rebuild", sources=[[*range(width), *units] for width, units in zip(now, moved)], seed=0)
        for name, layer, units in zip(self._names(), self._linear(), moved):
            weight, bias = kept[f"{name}.weight"], kept.get(f"{name}.bias")
            layer.weight[units, : weight.shape[1]] = weight[units]
            if bias is not None:
                layer.bias[units] = bias[units]
        head = self._weights()[-1]
        head[:, now[-1] :] = head[:, moved[-1]]
        held = {name: self.chosen.tensors()[name].clone() for name in self.layers}
        for name, units in zip(self.layers, moved):
            held[name][units] = False
        self.chosen.keep(held)

    def finish(self, item: Any, last: bool, runtime: "Runtime") -> None:
        """Stamps the units that are there now; at the stream's end gives each task its own network."""
        self.widths = torch.cat([self.widths, self.widths.new_tensor([self._now()])])
        self.after_task(item, runtime)
        if last:
            for task, widths in zip(self.learned_tasks, self.widths.tolist()):
                if widths != self._now():
                    self.grow("cut_out", task=task, widths=widths)

    # ---------------------------------------------------------------------------------------------- structure

    def rebuild(self, sources: Sequence[Sequence[int]], seed: int) -> None:
        """Makes every hidden layer out of units that it has, -1 for a new one."""
        self.model.grow("units", sources=dict(zip(self.layers, map(list, sources))), seed=seed)

    @torch.no_grad()
    def cut_out(self, task: str, widths: Sequence[int]) -> None:
        """Gives a task a copy of the trunk in which units after its time are not read."""
        self.model.add_patch(task, SplitConfig())
        own = dict(self.model.patches[task].own.named_parameters())
        for layer, width in zip(self.layers[1:], widths):
            own[f"{layer}.weight"][:, width:] = 0

    def predict(self, batch: Batch, task: str) -> Tensor:
        """Returns a task's logits from the units of its time."""
        tasks = self.learned_tasks[: len(self.widths)]
        if task not in tasks or task in self.model.patches:
            return super().predict(batch, task)
        sliced = {}
        for name, layer, width in zip(self._names()[1:], self._linear()[1:], self.widths[tasks.index(task)].tolist()):
            weight = layer.weight.clone()
            weight[:, width:] = 0
            sliced[f"{name}.weight"] = weight
        return functional_call(self.model, sliced, (), {**batch.inputs, "task": task}).logits

    def masks(self, moves: str) -> list[Tensor]:
        """Returns which entries of each trained parameter may move: 1 or 0, in the order of the optimiser.

        Args:
            moves: "chosen" for weights among chosen and new units, "new" for those into or out of new units.
        """
        rows, below = {}, None
        for name, layer, full, old in zip(self.layers, self._linear(), self._names(), self._old_widths()):
            chosen = torch.ones(layer.out_features, dtype=torch.bool, device=layer.weight.device)
            chosen[:old] = self.chosen.tensors()[name].to(chosen.device) if moves == "chosen" else False
            if below is None:
                below = chosen.new_ones(layer.in_features) if moves == "chosen" else chosen.new_zeros(layer.in_features)
            pairs = torch.outer(chosen, below) if moves == "chosen" else chosen[:, None] | below
            rows[f"{full}.weight"], rows[f"{full}.bias"] = pairs, chosen
            below = chosen
        names = {id(p): name for name, p in self.model.named_parameters()}
        found = [rows.get(names.get(id(p), "")) for p in self._moving()]
        return [torch.ones_like(p) if m is None else m.to(p) for m, p in zip(found, self._moving())]

    def _moving(self) -> list[Tensor]:
        return list(dict.fromkeys(p for group in self.groups()["model"] for p in group["params"]))

    def _names(self) -> list[str]:
        return [f"backbone.trunk.{name}" for name in self.layers]

    def _linear(self) -> list[Any]:
        return [self.model.backbone.trunk.get_submodule(name) for name in self.layers]

    def _weights(self) -> list[Tensor]:
        """Of each layer, the current head's last."""
        return [*(layer.weight for layer in self._linear()), self.model.heads[self.current].weight]  # type: ignore[list-item]

    def _now(self) -> list[int]:
        return [layer.out_features for layer in self._linear()]

    def _old_widths(self) -> list[int]:
        return [len(self.before.tensors()[f"{name}.weight"]) for name in self._names()]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}widths")
        if saved is not None:
            self.widths = self.widths.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Masked(Combine):
    """The sum of all terms, for the entries that may move."""

    def __init__(self, masks: Any) -> None:
        self.masks = masks

    def from_rows(self, rows: Sequence[Gradients], losses: Tensor) -> Gradients:
        """Adds the rows up and multiplies by the masks."""
        return [mask * torch.stack(column).sum(0) for mask, column in zip(self.masks(), zip(*rows))]
