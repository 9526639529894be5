"""What a model returns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from hubtransfer.backbones import Features


@dataclass
class TransferModelOutput(ModelOutput):
    """What a `TransferModel` returns: by attribute, by key or by position, as in transformers.

    Attributes:
        loss: Scalar, when labels were given.
        logits: (batch, width); a list with one tensor an example where tasks of unlike width are mixed.
        features: The backbone's pooled features and the maps asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | list[Tensor] | None = None
    features: Features | None = None

    def __init__(
        self,
        loss: Tensor | Mapping[str, Any] | None = None,
        logits: Tensor | list[Tensor] | None = None,
        features: Features | None = None,
    ) -> None:
        """Enters what there is: what transformers' own constructor does, which looks at every field several times.

        As there, one mapping in place of everything is taken apart: accelerate makes outputs anew so.
        """
        if isinstance(loss, Mapping):
            loss, logits, features = (loss.get(name) for name in ("loss", "logits", "features"))
        for name, value in (("loss", loss), ("logits", logits), ("features", features)):
            self.__dict__[name] = value
            if value is not None:
                OrderedDict.__setitem__(self, name, value)
