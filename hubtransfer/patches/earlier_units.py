"""A task's view of a trunk that has grown since: the units of its time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from hubtransfer.config import unknown_name
from hubtransfer.patches.patch import Patch, PatchConfig
from hubtransfer.patches.stand_in import StandIn

if TYPE_CHECKING:
    from hubtransfer.backbones import Backbone


@dataclass(frozen=True, kw_only=True)
class EarlierUnitsConfig(PatchConfig):
    """Linear layers of the trunk read their first inputs alone: units that were added later are not there for the task.

    y = W_{:, :n} x_{:n} + b with x (batch, ..., inputs) and W (units, inputs). The patch has no tensors of its own. The
    task's head sees all units of the last layer: its weights for later ones should be zero.

    Source: Yoon, Yang, Lee, Hwang 2018, "Lifelong Learning with Dynamically Expandable Networks", section 3.4
    (timestamped inference). Differs from the paper: nothing.

    Attributes:
        inputs: linear layer -> n, how many of its inputs it reads.
    """

    kind: ClassVar[str] = "earlier_units"
    paper: ClassVar[str] = "Yoon 2018"
    summary: ClassVar[str] = "the units that were there at the task's time, of a trunk that has grown since"
    citation: ClassVar[str] = """@inproceedings{yoon2018lifelong,
  title={Lifelong Learning with Dynamically Expandable Networks}, author={Yoon, Jaehong and Yang, Eunho and Lee,
  Jeongtae and Hwang, Sung Ju}, booktitle={International Conference on Learning Representations}, year={2018}}"""

    inputs: Mapping[str, int] = field(default_factory=dict)

    def build(self, backbone: "Backbone", dim: int | None = None) -> Patch:
        """Make the patch.

        Raises:
            ValueError: when there is no such linear layer, or it has fewer inputs.
        """
        return _EarlierUnits(self, backbone)


class _EarlierUnits(Patch):
    config: EarlierUnitsConfig

    def __init__(self, config: EarlierUnitsConfig, backbone: "Backbone"):
        super().__init__(config, backbone)
        linears = {name: layer for name, layer in backbone.trunk.named_modules() if isinstance(layer, nn.Linear)}
        if not config.inputs:
            raise ValueError(f"inputs names no layer, so nothing would be left out; there are {', '.join(linears)}")
        for name, count in config.inputs.items():
            if name not in linears:
                raise ValueError(unknown_name("linear layer", name, linears, "inputs"))
            if not 1 <= count <= linears[name].in_features:
                raise ValueError(f"layer {name!r} has {linears[name].in_features} inputs, so it cannot read {count}")
            self._stand_in(name, FirstInputs(count), "first")


class FirstInputs(StandIn):
    """The layer it stands for, on its first inputs."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., units)."""
        layer = self.base_layer
        return F.linear(x[..., : self.count], layer.weight[:, : self.count], layer.bias)  # type: ignore[arg-type,index]
