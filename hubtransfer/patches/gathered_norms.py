"""Normalisation layers that run with every example's own scale and shift in one pass."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode

from hubtransfer.patches.gather import Gather, lent, plain_forward, stacked


def gather_of_norm(module: nn.Module) -> Gather | None:
    """How a normalisation layer runs for several tasks at once; None where it cannot."""
    if isinstance(module, _BatchNorm):
        return BATCH_NORM if module.running_mean is not None else None  # otherwise examples depend on one another
    if isinstance(module, _NormBase):
        return None  # instance normalisation
    return GROUP_NORM if isinstance(module, nn.GroupNorm) else LAST_AXIS


class BatchNormGather(Gather):
    r"""Batch normalisation with running statistics, which is affine: y = s x + t.

    .. math:: s = \gamma / \sqrt{\sigma^2 + \epsilon}, \quad t = \beta - \mu s

    Rows are (s, t), 2c numbers for c channels. Examples become channels: a batch (b, c, ...) is one example of b c
    channels, so the layer's own kernel reads each value once, whatever follows the normalisation in its class.
    """

    def rows(self, module: nn.Module, owners: Sequence[nn.Module]) -> Tensor:
        """(owners, 2c)."""
        mean, variance = stacked(owners, "running_mean", "_buffers"), stacked(owners, "running_var", "_buffers")
        assert mean is not None and variance is not None
        if mean.dtype.itemsize < 4:  # torch's kernel computes in 32 bits too, whatever the statistics are kept in
            mean, variance = mean.float(), variance.float()
        scale = (variance + module.eps).rsqrt()  # type: ignore[operator]
        weight, bias = stacked(owners, "weight"), stacked(owners, "bias")
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
        return torch.cat([scale, shift], 1)

    def run(self, module: nn.Module, rows: Tensor, x: Tensor) -> Tensor:
        """(batch, c, ...) -> (batch, c, ...)."""
        scale, shift = (part.reshape(-1) for part in rows.chunk(2, 1))
        as_channels = x if len(rows) == 1 else x.reshape(1, -1, *x.shape[2:])
        parameters = {"weight": scale, "bias": shift}
        neutral = {"running_mean": torch.zeros_like(scale), "running_var": torch.ones_like(scale)}
        buffers = {"num_batches_tracked": None, **neutral}
        with lent(module, _parameters=parameters, _buffers=buffers, eps=0.0, training=False):
            return plain_forward(module, as_channels).reshape(x.shape)


class GroupNormGather(Gather):
    """Group normalisation: rows are (gamma, beta), 2c numbers; a batch of b is one example with b times the groups."""

    def rows(self, module: nn.Module, owners: Sequence[nn.Module]) -> Tensor:
        """(owners, 2c)."""
        return torch.cat([part for key in ("weight", "bias") if (part := stacked(owners, key)) is not None], 1)

    def run(self, module: nn.Module, rows: Tensor, x: Tensor) -> Tensor:
        """(batch, c, ...) -> (batch, c, ...)."""
        weight, bias = (part.reshape(-1).to(x.dtype) for part in rows.chunk(2, 1))
        groups = module.num_groups * len(rows)  # type: ignore[operator]
        as_channels = x if len(rows) == 1 else x.reshape(1, -1, *x.shape[2:])
        with lent(module, _parameters={"weight": weight, "bias": bias}, num_groups=groups):
            return plain_forward(module, as_channels).reshape(x.shape)


class LastAxisGather(Gather):
    """Layer and RMS normalisation over the last axes: rows are gamma and, where the layer has one, beta.

    The layer's class runs with tensors that have a batch axis in front, (batch, 1, ..., d). Classes that multiply by
    their weight themselves need no more; torch's kernels take one weight for all, so scale and shift follow after them.
    """

    def rows(self, module: nn.Module, owners: Sequence[nn.Module]) -> Tensor:
        """(owners, numbers of all of the layer's parameters)."""
        return torch.cat([part for key in module._parameters if (part := stacked(owners, key)) is not None], 1)

    def run(self, module: nn.Module, rows: Tensor, x: Tensor) -> Tensor:
        """(batch, ..., d) -> (batch, ..., d); layers over channels that lie elsewhere move them to the end first."""
        own = {key: tensor for key, tensor in module._parameters.items() if tensor is not None}
        parts = rows.split([tensor.numel() for tensor in own.values()], 1)
        parameters: dict[str, Tensor | None] = dict(module._parameters)
        for (key, tensor), part in zip(own.items(), parts):
            between = [1] * (x.dim() - 1 - tensor.dim())
            shape = tensor.shape if len(rows) == 1 else (len(rows), *between, *tensor.shape)
            parameters[key] = part.reshape(shape).to(tensor.dtype)
        with lent(module, _parameters=parameters), nullcontext() if len(rows) == 1 else _AffineAfterwards():
            return plain_forward(module, x)


class _AffineAfterwards(TorchFunctionMode):
    """Layer and RMS normalisation kernels run with weight 1 and bias 0; the real ones are applied to what they give."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is not F.layer_norm and func is not F.rms_norm:
            return func(*args, **given)
        names = ["input", "normalized_shape", "weight", "bias", "eps"]
        if func is F.rms_norm:
            names.remove("bias")
        given = {**dict(zip(names, args)), **given}
        weight, bias = given.pop("weight", None), given.pop("bias", None)
        if weight is None:
            return func(**given)
        # with a weight of ones the kernel takes half the time that it takes without
        given["weight"] = torch.ones(given["normalized_shape"], dtype=weight.dtype, device=weight.device)
        if bias is not None:
            given["bias"] = torch.zeros_like(given["weight"])
        normal = func(**given)
        own = normal if not torch.is_grad_enabled() and normal.dtype == weight.dtype else None  # no new memory
        if bias is None:
            return torch.mul(normal, weight, out=own).to(normal.dtype)
        return torch.addcmul(bias, normal, weight, out=own).to(normal.dtype)


BATCH_NORM, GROUP_NORM, LAST_AXIS = BatchNormGather(), GroupNormGather(), LastAxisGather()
