"""Scale-and-bias patches: a task's own normalisation layers."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hubtransfer.patches.gather import Owned
from hubtransfer.patches.gathered_norms import gather_of_norm
from hubtransfer.patches.patch import Patch, PatchConfig
from hubtransfer.patches.places import chosen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hubtransfer.backbones import Backbone

COUNTS = "*.num_batches_tracked"  # all layers' counters in one tensor: one name instead of dozens in the file
_NORM_NAME = re.compile(r"(batch|layer|group|instance|rms)_?norm", re.IGNORECASE)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer that has something to own.

    torch's own classes and those derived from them (timm's BatchNormAct2d, LayerNorm2d ...), and any other leaf whose
    class is called a layer, batch, group, instance or RMS norm (transformers' LlamaRMSNorm, T5LayerNorm ...).
    """
    if not any(t is not None for t in (*module._parameters.values(), *module._buffers.values())):
        return False
    if isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return True
    inside = any(True for child in module.children() for _ in child.parameters())
    return bool(_NORM_NAME.search(type(module).__name__)) and not inside and any(True for _ in module.parameters())


@dataclass(frozen=True, kw_only=True)
class ScaleBiasConfig(PatchConfig):
    """A task's own scale, bias and running statistics for every normalisation layer.

    For each layer y = gamma * (x - mu) / sqrt(sigma^2 + eps) + beta the patch owns gamma, beta (c,) and, where the
    layer keeps them, the running mu, sigma^2 (c,); all start as copies of the trunk's, so the function starts
    unchanged. RMSNorm has gamma alone.

    Source: Mudrakarta, Sandler, Zhmoginov, Howard 2019, "K for the Price of 1", section 3 (S/B patch).
    Differs from the paper: also LayerNorm, GroupNorm, InstanceNorm and RMSNorm, which the paper's MobileNetV2 and
    Inception do not have.

    Attributes:
        layers: regular expression over whole module names of the trunk; None for all normalisation layers.
        statistics: "task": running statistics move with the task's batches, as in the paper. "source": they stay the
            copies of the trunk's that they start as, in training too. Better where a batch says little about them:
            small batches, or images so small that the deep maps have only a few positions.
    """

    kind: ClassVar[str] = "scale_bias"
    paper: ClassVar[str] = "Mudrakarta 2019"
    summary: ClassVar[str] = "a task's own scale, bias and running statistics of every normalisation layer"
    citation: ClassVar[str] = """@inproceedings{mudrakarta2019k,
  title={K for the Price of 1: Parameter-efficient Multi-task and Transfer Learning},
  author={Mudrakarta, Pramod Kaushik and Sandler, Mark and Zhmoginov, Andrey and Howard, Andrew},
  booktitle={International Conference on Learning Representations}, year={2019}}"""

    layers: str | None = None
    statistics: Literal["task", "source"] = "task"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.statistics not in ("task", "source"):
            raise ValueError(f"statistics must be 'task' or 'source', got {self.statistics!r}")

    def build(self, backbone: "Backbone", dim: int | None = None) -> "ScaleBiasPatch":
        """Copy the trunk's normalisation tensors into a new patch."""
        return ScaleBiasPatch(self, backbone)


class ScaleBiasPatch(Patch):
    """See `ScaleBiasConfig`."""

    config: ScaleBiasConfig

    def __init__(self, config: ScaleBiasConfig, backbone: "Backbone"):
        super().__init__(config, backbone)
        for name, module in chosen(backbone.trunk, config.layers):
            if is_norm(module):
                node = self._own_tensors(name, module)
                if config.statistics == "source":
                    self._keep_statistics(name, node)
        if not self._bindings:
            raise ValueError(_nothing_found(backbone, config.layers))

    def tensors(self) -> dict[str, Tensor]:
        """As `Patch.tensors`, with all counters of batches in one tensor ``*.num_batches_tracked`` (layers,)."""
        tensors = super().tensors()
        counts = [tensors.pop(name) for name in list(tensors) if name.rpartition(".")[2] == "num_batches_tracked"]
        return {**tensors, COUNTS: torch.stack(counts)} if counts else tensors

    def gathered(self) -> "Mapping[str, Owned] | None":
        """Every normalisation layer, where it normalises each example by itself."""
        return self._owned_layers(gather_of_norm)

    def load_tensors(self, tensors: "Mapping[str, Tensor]") -> None:
        """See `Patch.load_tensors`."""
        super().load_tensors(tensors)  # the stacked counters are a copy: their rows go back one by one
        own = super().tensors()
        names = [name for name in own if name.rpartition(".")[2] == "num_batches_tracked"]
        for name, count in zip(names, tensors.get(COUNTS, ())):
            own[name].copy_(count)


def _nothing_found(backbone: "Backbone", layers: str | None) -> str:
    norms = [name for name, module in backbone.trunk.named_modules() if is_norm(module)]
    if not norms:
        return (
            f"{type(backbone.trunk).__name__} has no normalisation layer with tensors of its own; "
            "use DepthwiseConfig, a peft config such as LoraConfig(), WidenConfig or DeepenConfig."
        )
    return f"layers={layers!r} matches none of the {len(norms)} normalisation layers: {', '.join(norms[:4])}, ..."
