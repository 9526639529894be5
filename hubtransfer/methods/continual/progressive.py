"""Progressive neural networks (Rusu et al., 2016)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hubtransfer.data import TaskStream
from hubtransfer.methods.continual_method import ContinualMethod
from hubtransfer.models import TransferModel
from hubtransfer.patches import ColumnConfig, ColumnPatch

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class ProgressiveConfig:
    """Hyper-parameters of `Progressive`.

    Attributes:
        layers: Layers of the backbone at which columns listen (default: all of `Backbone.layers`).
        reduction: How many times narrower the adapters are than the layer.
        scale: The adapters' learned scalars at first.
        init: New columns start "random" or as a "copy" of the trunk.
        seed: Of random columns; each gets its own.
    """

    layers: tuple[str, ...] | None = None
    reduction: int = 2
    scale: float = 0.1
    init: Literal["random", "copy"] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        ColumnConfig(layers=self.layers, reduction=self.reduction, init=self.init)


class Progressive(ContinualMethod, name="progressive", config=ProgressiveConfig):
    r"""Gives each task a network of its own that hears, layer by layer, the frozen networks of the tasks before.

    .. math:: h_i^{(k)} = f_i^{(k)}\big(h_{i-1}^{(k)}\big) +
       U_i^{(k)}\, \mathrm{relu}\Big(V_i^{(k)} \big[a_i^{(0)} h_i^{(0)}; \dots; a_i^{(k-1)} h_i^{(k-1)}\big]\Big)

    with maps h of layer i, (batch, channels, ...), column k's own layers f, projections U and V of channels and a
    learned scalar a for each earlier column. The first task trains the trunk; each later one adds a column (a
    `ColumnConfig` patch) when it begins and trains that and its head. No earlier output changes by a bit. Needs to know
    at test time which task it is: streams of kind "task" with a head each; any head, any backbone with named layers.

    Args:
        model: The model, with a head for each of the stream's tasks.
        task: The first task (default: the active one).

    Differs from the paper: what is heard joins the output of the layer of the same depth, so that any backbone's layer
    list will do, and reaches the next layer through that one's own weights.

    Source: https://arxiv.org/abs/1606.04671, section 2, equations 1 and 2.
    """

    paper = "Rusu 2016"
    source = "https://arxiv.org/abs/1606.04671"
    citation = """@article{rusu2016progressive,
  title = {Progressive Neural Networks},
  author = {Rusu, Andrei A. and Rabinowitz, Neil C. and Desjardins, Guillaume and Soyer, Hubert and Kirkpatrick, James
            and Kavukcuoglu, Koray and Pascanu, Razvan and Hadsell, Raia},
  journal = {arXiv preprint arXiv:1606.04671},
  year = {2016}
}"""

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)

    def checked(self, scenario: TaskStream) -> list[Any]:
        """Checks the stream's kind too."""
        if scenario.kind != "task":
            raise ValueError(
                f"Progressive runs a task's own column, so it has to know the task at test time; the stream is of kind "
                f"{scenario.kind!r}: make it TaskStream(..., kind='task'), with a head for each task"
            )
        items = super().checked(scenario)
        names = [item.task for item in items]
        again = next((name for k, name in enumerate(names) if name in names[:k]), None)
        if again is not None:
            raise ValueError(
                f"Progressive freezes what a task has learned, but {again!r} comes again: give each item of the stream "
                "a task of its own"
            )
        return items

    def add_column(self, task: str, columns: Sequence[str]) -> None:
        """Gives a task a column that hears the trunk and the columns of other tasks."""
        chosen = self.config
        patch = ColumnConfig(
            columns=tuple(columns),
            layers=chosen.layers,
            reduction=chosen.reduction,
            scale=chosen.scale,
            init=chosen.init,
            seed=chosen.seed + 1 + len(columns),
        )
        self.model.add_patch(task, patch)

    def before_task(self, item: Any, runtime: "Runtime") -> None:
        """Grows the column of a task that is not the first."""
        if self.number > 0 and self.current not in self.model.patches:
            columns = [name for name, patch in self.model.patches.items() if isinstance(patch, ColumnPatch)]
            self.grow("add_column", task=self.current, columns=columns)
