"""Cross-stitch networks (Misra, Shrivastava, Gupta and Hebert, 2016)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hubtransfer.backbones import Towers
from hubtransfer.data import MultiTask
from hubtransfer.methods.method import Method
from hubtransfer.methods.stage import OptimizerConfig, Stage
from hubtransfer.methods.task_losses import task_losses, task_names, task_streams
from hubtransfer.methods.update import AnyBatch, Descend, Terms
from hubtransfer.models import TransferModel
from hubtransfer.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class CrossStitchConfig:
    """Hyper-parameters of `CrossStitch`.

    Attributes:
        layers: Layers of the network after which units stand; by default all of `Backbone.layers`, or those of a model
            that is stitched already.
        same: A unit's alpha for the task's own network at first (alpha_S).
        different: For all other networks together (alpha_D).
        unit_lr: Factor on the learning rate for the units.
        single_task_epochs: Epochs in which each network learns its own task alone, before units mix them; 0 starts
            from the model as it is, such as one made by `stitched_model` from trained ones: its units keep their alpha.
    """

    layers: tuple[str, ...] | None = None
    same: float = 0.9
    different: float = 0.1
    unit_lr: float = 100.0
    single_task_epochs: float = 0.0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if not self.unit_lr > 0:
            raise ValueError(f"unit_lr must be positive, got {self.unit_lr}")
        if not self.single_task_epochs >= 0:
            raise ValueError(f"single_task_epochs must not be negative, got {self.single_task_epochs}")


class CrossStitch(Method, name="cross_stitch", config=CrossStitchConfig, scenario=MultiTask):
    r"""Trains a network for each task; after some layers each goes on with a learned mixture of all of them.

    .. math:: \tilde x^i_{c} = \sum_j \alpha^{ij}_{c}\, x^j_{c}, \qquad L = \sum_i L_i

    with activations x^i (batch, channels, ...) of task i's network and one matrix alpha (tasks, tasks) for each channel
    c of each stitched layer, alpha_S = 0.9 on its diagonal at first and alpha_D = 0.1 beside it. Units learn at a rate
    of their own, without weight decay. Networks start as single-task ones.

    Args:
        model: A model with a head for every task; its trunk is copied for each when training starts, unless it has
            networks of its own for them already.
        tasks: Names of the tasks (default: all of the model's).

    Raises:
        ValueError: for one task alone, or a model that is stitched after other layers already.

    Differs from the paper: any number of tasks, which share alpha_D; the networks may still learn while they are apart
    (``single_task_epochs``), which the paper does beforehand; units stand where a person says, not after poolings.

    Needs the package greenlet (``pip install 'hubtransfer[stitch]'``): networks wait for one another in mid-pass.

    Source: https://arxiv.org/abs/1604.03539, equation 1 and the section on design decisions.
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
        names = task_names(model, tasks, "CrossStitch")
        super().__init__(model, self.configure(config), task=names[0])
        if len(names) < 2:
            raise ValueError(f"CrossStitch: one task ({names[0]!r}) has nothing to be stitched to; train two or more")
        self.tasks = names
        layers, there = self.config.layers, model.backbone
        if layers is not None and isinstance(there, Towers) and set(layers) != set(there.stitched):
            raise ValueError(
                f"CrossStitch: units are to stand after {list(layers)}, but the model's networks are stitched after "
                f"{list(there.stitched)} already; leave layers out, or stitch single-task models after those you want"
            )

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """Two groups: the networks with their heads, frozen parts excepted, and the units with their own rate."""
        backbone = self.model.backbone
        units = [unit.alpha for unit in backbone.units] if isinstance(backbone, Towers) else []
        units = [alpha for alpha in units if alpha.requires_grad]
        of_units = set(map(id, units))
        networks = [p for p in self.model.parameters() if p.requires_grad and id(p) not in of_units]
        return {"networks": [{"params": networks}], "units": [{"params": units, "lr_scale": self.config.unit_lr}]}

    def watched(self) -> Mapping[str, Tensor | float]:
        """Returns how much of itself a network keeps after each layer: the mean of alpha's diagonal."""
        if not isinstance(self.model.backbone, Towers):
            return {}
        alphas = [unit.alpha.detach() for unit in self.model.backbone.units]
        return {f"own/{n}": a.diagonal().mean() for n, a in zip(self.model.backbone.stitched, alphas)}

    def loss(self, batch: AnyBatch) -> Terms:
        """Returns each task's loss under its name: scalars. All networks run on every example."""
        return task_losses(self.model, self.tasks, batch)

    def stages(self, scenario: MultiTask) -> Iterator[Stage]:
        """Networks apart (identity units that do not learn), then stitched."""
        data = task_streams(scenario, self.tasks, "CrossStitch")
        epochs = self.config.single_task_epochs
        if epochs:
            yield Stage("apart", data, [Descend(self.loss, trains="networks")], epochs=epochs, enter=self._apart)
        together = Descend(self.loss, trains=("networks", "units"))
        no_decay = {"units": OptimizerConfig(weight_decay=0.0)}
        yield Stage("stitched", data, [together], enter=self._stitched, optimizers=no_decay)

    def _apart(self, runtime: Runtime) -> None:
        self._set_units(1.0, 0.0)

    def _stitched(self, runtime: Runtime) -> None:
        if self.config.single_task_epochs or not isinstance(self.model.backbone, Towers):
            self._set_units(self.config.same, self.config.different)

    def _set_units(self, same: float, different: float) -> None:
        model, layers = self.model, self.config.layers
        if not isinstance(model.backbone, Towers):
            chosen = [info.name for info in model.backbone.layers] if layers is None else list(layers)
            model.grow("towers", tasks=list(self.tasks), layers=chosen)
        assert isinstance(model.backbone, Towers)
        for unit in model.backbone.units:
            unit.restart(same, different)
