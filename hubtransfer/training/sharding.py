"""State of methods whose parameters are sharded over processes (FSDP 2), always exchanged whole and on the CPU."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def is_sharded(module: nn.Module) -> bool:
    """Says whether the parameters are spread over processes (between steps they may be whole for a while)."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # while nobody has imported it, which takes a second, nothing is
    return fsdp is not None and any(isinstance(inner, fsdp.FSDPModule) for inner in module.modules())


def method_state(method: nn.Module) -> dict[str, Any]:
    """Returns the whole state of a method; under sharding every process has to call it, process 0 gets the tensors."""
    if not is_sharded(method):
        return dict(method.state_dict())
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(method, options=_whole())


def optimizer_state(method: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Returns the whole state of an optimiser, likewise."""
    if not is_sharded(method):
        return optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(method, _torch(optimizer), options=_whole())


def load_optimizer_state(method: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> None:
    """Gives an optimiser what `optimizer_state` returned; every process passes the whole state."""
    if not is_sharded(method):
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(method, _torch(optimizer), optim_state_dict=dict(state), options=_whole())


def _whole() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def _torch(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)
