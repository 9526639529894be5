"""What a model returns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import register_pytree_node

from hubtransfer.backbones import Features


class TransferModelOutput(OrderedDict[str, Any]):
    """What a `TransferModel` returns: by attribute, by key or by position, as transformers' outputs.

    It is none of theirs, so that whoever needs no model of transformers need not wait for its import.

    Attributes:
        loss: Scalar, when labels were given.
        logits: (batch, width); a list with one tensor an example where tasks of unlike width are mixed.
        features: The backbone's pooled features and the maps asked for.
    """

    def __init__(
        self,
        loss: Tensor | Mapping[str, Any] | None = None,
        logits: Tensor | list[Tensor] | None = None,
        features: Features | None = None,
    ) -> None:
        """Enters what there is; one mapping in place of everything is taken apart: accelerate makes outputs anew so."""
        super().__init__()
        if isinstance(loss, Mapping):
            loss, logits, features = (loss.get(name) for name in ("loss", "logits", "features"))
        for name, value in (("loss", loss), ("logits", logits), ("features", features)):
            if value is not None:
                self[name] = value

    @property
    def loss(self) -> Tensor | None:
        """Scalar, when labels were given."""
        return self.get("loss")

    @property
    def logits(self) -> Any:
        """Logits (batch, width), or a list of them."""
        return self.get("logits")

    @property
    def features(self) -> Features | None:
        """What the backbone returned."""
        return self.get("features")

    def __getitem__(self, key: str | int | slice) -> Any:
        """What stands under a name, or at a position among what there is."""
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """Everything there is, in order."""
        return tuple(self.values())


def _unflatten(values: Iterable[Any], names: Any) -> TransferModelOutput:
    return TransferModelOutput(dict(zip(names, values)))


register_pytree_node(  # sharded training looks for tensors in what a model returns
    TransferModelOutput,
    lambda output: (list(output.values()), list(output.keys())),
    _unflatten,
    serialized_type_name="hubtransfer.TransferModelOutput",
)
