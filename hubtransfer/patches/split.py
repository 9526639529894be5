"""Hard sharing with the split at any layer: a task's own copy of all that comes after it."""

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from hubtransfer.patches.patch import Patch, PatchConfig

if TYPE_CHECKING:
    from hubtransfer.backbones import Backbone


@dataclass(frozen=True, kw_only=True)
class SplitConfig(PatchConfig):
    """A task's own copy of every layer after the split; what comes before is shared.

    With the trunk f = f_2 o f_1 cut after a layer, task t computes h_t(f_2^t(f_1(x))), where f_2^t starts as a copy of
    f_2, running statistics included, so the function starts unchanged. Without a layer nothing is shared: each task has
    a network of its own. A task without a patch goes on with the trunk's own f_2.

    A layer belongs to f_2 if it first runs after the named one has finished. Tensors that a module holds directly while
    it runs on both sides of the cut (a transformer's class token, say) are shared. Every task runs the shared part for
    itself.

    Source: Caruana 1997, "Multitask Learning", section 2; the split at any layer is the baseline "Split" of Misra,
    Shrivastava, Gupta, Hebert 2016. Differs from the paper: Misra's split is one that brute-force search
    found best; here a person chooses.

    Attributes:
        after: the last shared layer: a name within the trunk, or a number among `Backbone.layers`, negative ones from
            the deep end. None shares nothing.
    """

    kind: ClassVar[str] = "split"
    paper: ClassVar[str] = "Caruana 1997"
    summary: ClassVar[str] = "a task's own copy of all layers after a split; what comes before is shared (hard sharing)"
    citation: ClassVar[str] = """@article{caruana1997multitask,
  title={Multitask Learning}, author={Caruana, Rich}, journal={Machine Learning}, volume={28}, pages={41--75},
  year={1997}}"""

    after: str | int | None = None

    def __post_init__(self) -> None:
        """Checks the value.

        Raises:
            ValueError: if `after` is no name, number or None.
        """
        if isinstance(self.after, bool) or not isinstance(self.after, (str, int, type(None))):
            raise ValueError(f"after must be the name or the number of a layer, or None, got {self.after!r}")

    def build(self, backbone: "Backbone", dim: int | None = None) -> "SplitPatch":
        """Copy what comes after the split into a new patch."""
        return SplitPatch(self, backbone)


class SplitPatch(Patch):
    """See `SplitConfig`."""

    config: SplitConfig

    def __init__(self, config: SplitConfig, backbone: "Backbone"):
        super().__init__(config, backbone)
        for name, module in _behind(backbone, config.after):
            if any(tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values())):
                self._own_tensors(name, module)
        if not self._bindings:
            raise ValueError(
                f"after={config.after!r}: no layer with tensors comes after it, so everything would be shared; leave "
                "the patch out for that, or split earlier."
            )


def _behind(backbone: "Backbone", after: str | int | None) -> list[tuple[str, nn.Module]]:
    """The trunk's modules that first run when the layer has finished; all of them for None."""
    modules = dict(backbone.trunk.named_modules())
    if after is None:
        return list(modules.items())
    seen = backbone._seen
    if not seen:
        raise ValueError(
            f"after={after!r}: nobody has seen in which order this backbone's layers run; make it with `sample=` "
            "(example inputs), or share nothing with after=None"
        )
    names = [layer.name for layer in backbone.layers]
    if isinstance(after, int):
        if not -len(names) <= after < len(names):
            raise ValueError(f"after={after}, but the backbone has {len(names)} layers: {', '.join(names)}")
        after = names[after]
    if after not in seen or not after:
        near = difflib.get_close_matches(after, seen, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        why = "never runs" if after in modules else "does not exist"
        raise ValueError(f"after={after!r}: this layer {why}{hint}; the backbone's layers: {', '.join(names)}")
    end = seen[after].end
    return [(name, module) for name, module in modules.items() if name in seen and seen[name].start > end]
