"""One tensor for each of some parameters, by name: importances, anchors, copies."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ParameterState(nn.Module):
    """A mapping from names of parameters to tensors that is saved and resumed with the method that owns it.

    It is empty when made and takes whatever a checkpoint holds. Where a parameter has grown since (a head got new
    classes), the tensor is filled up with zeros at the end of each axis.

        >>> import torch
        >>> state = ParameterState()
        >>> state.keep({"head.weight": torch.ones(1, 2)})
        >>> state.like("head.weight", torch.empty(2, 2))
        tensor([[1., 1.],
                [0., 0.]])
    """

    def __init__(self) -> None:
        super().__init__()
        self._place = torch.empty(0)  # where the method is: a state that is still empty moves with it

    def keep(self, values: Mapping[str, Tensor]) -> None:
        """Stores copies of tensors under their names, in place of what was there; other names stay."""
        for name, value in values.items():
            self.register_buffer(_key(name), value.detach().clone())

    def clear(self) -> None:
        """Forgets all tensors."""
        self._buffers.clear()

    def like(self, name: str, parameter: Tensor) -> Tensor:
        """Returns the tensor of a name in the shape of a parameter, zeros where there is none."""
        kept = self._buffers.get(_key(name))
        if kept is None:
            return parameter.new_zeros(parameter.shape)
        if kept.device != parameter.device:  # it was empty when the method moved, and was loaded since
            kept = self._buffers[_key(name)] = kept.to(parameter.device)
        if kept.shape == parameter.shape:
            return kept
        missing = [new - old for old, new in zip(kept.shape, parameter.shape)]
        return F.pad(kept, [side for more in reversed(missing) for side in (0, more)])

    def __contains__(self, name: str) -> bool:
        return _key(name) in self._buffers

    def __iter__(self) -> Iterator[str]:
        return (_name(key) for key in self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def __bool__(self) -> bool:
        return bool(self._buffers)

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors by name."""
        return {_name(key): value for key, value in self._buffers.items() if value is not None}

    def _apply(self, function: Any, recurse: bool = True) -> "ParameterState":
        self._place = function(self._place)
        return super()._apply(function, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.clear()
        for key, value in state_dict.items():
            if key.startswith(prefix) and "." not in key[len(prefix) :]:
                self.register_buffer(key[len(prefix) :], value.detach().clone().to(self._place.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _key(name: str) -> str:
    """A buffer's name may not hold a dot; names of tasks may hold what stands for it."""
    return name.replace("%", "%25").replace(":", "%3a").replace(".", ":")


def _name(key: str) -> str:
    return key.replace(":", ".").replace("%3a", ":").replace("%25", "%")
