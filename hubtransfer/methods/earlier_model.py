"""The model as it was at an earlier time, frozen, to be asked what it would have answered."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hubtransfer.data import Batch
from hubtransfer.methods.parameter_state import ParameterState
from hubtransfer.models import OutputCache, TransferModel


class EarlierModel(nn.Module):
    """A copy of a model that is saved and resumed with the method, as plain tensors: nothing of it is ever trained.

    Inputs that are not augmented are answered once and looked up afterwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.cache = ParameterState(), OutputCache()
        self.__dict__["_copy"] = None  # no module of its own, or checkpoints would hold it twice

    def __bool__(self) -> bool:
        return bool(self.kept)

    def hold(self, model: TransferModel) -> None:
        """Keeps the model as it is now, in place of what was kept before."""
        self.forget()
        self.kept.clear()
        self.kept.keep(model.state_dict())

    def forget(self) -> None:
        """Drops what was computed; the copy is made again when it is asked."""
        self.__dict__["_copy"] = None
        self.cache.clear()

    @torch.no_grad()
    def outputs(
        self,
        model: TransferModel,
        batch: Batch,
        answers: Callable[[TransferModel, Mapping[str, Tensor]], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """Returns what the earlier model says.

        Args:
            model: The model as it is now, which has the same structure.
            batch: The inputs.
            answers: From a model and inputs to tensors (batch, ...); the same function until `hold` or `forget`.
        """
        if self.__dict__["_copy"] is None:
            earlier = copy.deepcopy(model)
            earlier.load_state_dict(self.kept.tensors())
            self.__dict__["_copy"] = earlier.eval().requires_grad_(False)
        return self.cache.outputs(batch, lambda inputs: answers(self.__dict__["_copy"], inputs))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.forget()
        super()._load_from_state_dict(state_dict, prefix, *args)
