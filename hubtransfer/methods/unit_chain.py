"""The weights of a trunk of linear layers in a row, and which of them learn: those of some units."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hubtransfer.models import TransferModel, linear_chain
from hubtransfer.models.heads import LinearHead

Which = Literal["among", "touching"]


class UnitChain:
    """A model's trunk as hidden layers of units, below its heads.

    Attributes:
        layers: Names of the linear layers, input side first.

    Raises:
        ValueError: if the trunk is anything else.
    """

    def __init__(self, model: TransferModel) -> None:
        self.model, self.layers = model, linear_chain(model.backbone)

    @property
    def linears(self) -> list[nn.Linear]:
        """The layers."""
        return [self.model.backbone.trunk.get_submodule(name) for name in self.layers]  # type: ignore[misc]

    @property
    def widths(self) -> list[int]:
        """Units of each layer."""
        return [layer.out_features for layer in self.linears]

    def head(self, task: str) -> LinearHead:
        """The task's head.

        Raises:
            ValueError: if it is not linear.
        """
        head = self.model.heads.get(task)
        if not isinstance(head, LinearHead):
            raise ValueError(f"the head of task {task!r} does not read the trunk's units by a linear layer")
        return head

    def weights(self, task: str) -> list[Tensor]:
        """Of each layer, (units, units below), the task's head last."""
        return [*(layer.weight for layer in self.linears), self.head(task).weight]

    def parameters(self) -> dict[str, Tensor]:
        """The trunk's parameters by their names in the model."""
        return {f"backbone.trunk.{name}": p for name, p in self.model.backbone.trunk.named_parameters()}

    def masks(self, task: str, units: Sequence[Tensor], which: Which) -> dict[str, Tensor]:
        """Returns which entries of the trunk's and the head's parameters belong to some units, by name in the model.

        Args:
            task: Whose head.
            units: For each hidden layer bool (units,).
            which: "among": weights from a unit (or an input) to a unit or output; "touching": weights into or out of
                one.
        """
        linears, head = self.linears, self.head(task)
        inputs = torch.full((linears[0].in_features,), which == "among", device=head.weight.device)
        below = [inputs, *units]
        outputs = torch.full((head.out_features,), which == "among", device=head.weight.device)
        names = [*(f"backbone.trunk.{name}" for name in self.layers), f"heads.{task}"]
        masks: dict[str, Tensor] = {}
        for name, layer, mine, read in zip(names, [*linears, head], [*units, outputs], below):
            both = mine[:, None] & read if which == "among" else mine[:, None] | read
            masks[f"{name}.weight"] = both
            if layer.bias is not None:
                masks[f"{name}.bias"] = mine if layer is not head else torch.ones_like(mine)
        return masks

    def held(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns parameters with their values, of which those entries alone have a gradient that a mask marks."""
        values: dict[str, Any] = dict(self.model.named_parameters())
        return {name: torch.where(mask, values[name], values[name].detach()) for name, mask in masks.items()}

    def drifted(self, kept: Mapping[str, Tensor], farther: float) -> list[list[int]]:
        """Returns of each layer the units whose incoming weights are farther than that from what they were.

        Args:
            kept: The trunk's parameters at an earlier time, when it may have had fewer units, by name in the model.
            farther: Euclidean distance.
        """
        found = []
        for name, layer in zip(self.layers, self.linears):
            start = kept[f"backbone.trunk.{name}.weight"]
            way = torch.linalg.vector_norm(layer.weight[: start.shape[0], : start.shape[1]] - start, dim=1)
            found.append((way > farther).nonzero().flatten().tolist())
        return found

    @torch.no_grad()
    def put_back(self, doubled: Sequence[Sequence[int]], kept: Mapping[str, Tensor], task: str) -> None:
        """Gives units that were just doubled their earlier weights back; what is newer reads their doubles instead.

        Args:
            doubled: Of each layer, the units whose doubles are its last units, in that order.
            kept: The trunk's parameters at an earlier time, by name in the model.
            task: Whose head is newer; units that came after that time are, too.
        """
        below: tuple[int, Sequence[int]] = (0, [])
        for name, layer, units in zip(self.layers, self.linears, doubled):
            weight, bias = (kept.get(f"backbone.trunk.{name}.{what}") for what in ("weight", "bias"))
            assert weight is not None
            layer.weight[units] = 0
            layer.weight[units, : weight.shape[1]] = weight[units]
            if bias is not None:
                layer.bias[units] = bias[units]
            width = layer.out_features - len(units)
            _read_doubles(layer.weight[len(weight) : width], *below)
            below = (width, units)
        _read_doubles(self.head(task).weight, *below)


def _read_doubles(weight: Tensor, start: int, originals: Sequence[int]) -> None:
    """Lets rows read the doubles, which begin at column `start`, in place of the originals."""
    if originals:
        weight[:, start:] = weight[:, originals]
        weight[:, originals] = 0
