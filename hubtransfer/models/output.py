"""What a model returns."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

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
        self, loss: Tensor | None = None, logits: Tensor | list[Tensor] | None = None, features: Features | None = None
    ) -> None:
        """Enters what there is: what transformers' own constructor does, which looks at every field several times."""
        for name, value in (("loss", loss), ("logits", logits), ("features", features)):
            self.__dict__[name] = value
            if value is not None:
                OrderedDict.__setitem__(self, name, value)
