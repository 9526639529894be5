"""Optimisers by name, and their learning rates as a function of the step."""

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hubtransfer.functional.schedules import check_schedule, rate
from hubtransfer.methods.stage import OptimizerConfig

_TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    name.lower(): cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}


def make_optimizer(config: OptimizerConfig, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """Makes an optimiser; torch's own go before timm's of the same name.

    Args:
        config: With name, lr, weight_decay and momentum set.
        groups: Torch parameter groups; `lr_scale` multiplies the learning rate of its group.

    Raises:
        ValueError: for an unknown name, naming the nearest, or a keyword the optimiser does not take.
    """
    assert config.name is not None and config.lr is not None
    groups = [{k: v for k, v in group.items() if k != "lr_scale"} | {"lr": config.lr * group.get("lr_scale", 1.0)}
              for group in groups]  # fmt: skip
    name = config.name.lower()
    if name not in _TORCH:
        return _timm_optimizer(name, config, groups)
    cls = _TORCH[name]
    accepted = inspect.signature(cls).parameters
    keywords: dict[str, Any] = {"weight_decay": config.weight_decay, "momentum": config.momentum}
    keywords = {k: v for k, v in keywords.items() if k in accepted and v is not None} | dict(config.options)
    unknown = [k for k in keywords if k not in accepted]
    if unknown:
        near = difflib.get_close_matches(unknown[0], accepted, n=1) or sorted(accepted)
        raise ValueError(f"optimizer {config.name!r} has no option {unknown[0]!r}; did you mean {near[0]!r}?")
    if "fused" in accepted and "foreach" not in keywords and "differentiable" not in keywords:
        # One kernel for all tensors: a patch has hundreds of small ones, where per-tensor Python would dominate.
        floats = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for g in groups for p in g["params"])
        keywords.setdefault("fused", floats)
    return cls(groups, lr=config.lr, **keywords)


def _timm_optimizer(name: str, config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2, list_optimizers

    if name not in list_optimizers():
        known = sorted({*_TORCH, *list_optimizers()})
        near = difflib.get_close_matches(name, known, n=3) or known
        raise ValueError(f"unknown optimizer {config.name!r}; did you mean {' or '.join(map(repr, near))}?")
    keywords = {"weight_decay": config.weight_decay or 0.0, "momentum": config.momentum or 0.0}
    return create_optimizer_v2(groups, opt=name, lr=config.lr, **keywords, **dict(config.options))  # type: ignore[arg-type]


class Schedule:
    """Sets an optimiser's learning rates for a step; holds nothing that a checkpoint would need."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimizerConfig, total: int) -> None:
        assert config.schedule is not None
        self.name = check_schedule(config.schedule)
        self.optimizer, self.config, self.total = optimizer, config, total
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self._stays = False  # set once, a constant rate needs no further work

    def set(self, step: int) -> None:
        """Sets every group's rate to its peak times the schedule's factor at this step."""
        if self._stays:
            return
        self._stays = self.name == "constant" and not self.config.warmup and not self.config.milestones
        factor = rate(
            self.name,
            step,
            self.total,
            warmup=self.config.warmup or 0.0,
            milestones=self.config.milestones or (),
            decay=0.1 if self.config.decay is None else self.config.decay,
        )
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * factor
