"""Progressive networks: a task's own column of layers, which listens to the columns before it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hubtransfer.config import unknown_name
from hubtransfer.patches.patch import Patch, PatchConfig, applied
from hubtransfer.patches.stand_in import StandIn

if TYPE_CHECKING:
    from hubtransfer.backbones import Backbone, LayerInfo


@dataclass(frozen=True, kw_only=True)
class ColumnConfig(PatchConfig):
    """A whole network of the task's own, with lateral adapters from the trunk and from earlier tasks' columns.

    h_i^(k) = f_i^(k)(h_{i-1}^(k)) + U_i relu(V_i [a_i^(0) h_i^(0); ...; a_i^(k-1) h_i^(k-1)]) at each of some layers i,
    with the layer's maps h (batch, channels, ...), learned scalars a, one a column, and projections V of channels, from
    those of all earlier columns to `channels / reduction`, and U back. Column 0 is the trunk. What earlier columns
    compute is not changed, so nothing is forgotten.

    Source: Rusu et al. 2016, "Progressive Neural Networks", section 2, equations 1 and 2.
    Differs from the paper: what is heard joins the output of a layer of the same depth and so reaches the next one
    through that layer's own weights (the paper gives it weights of its own there), which any backbone's layers allow.

    Attributes:
        columns: tasks whose columns it hears besides the trunk, in the order in which they were added.
        layers: where it listens; None: at all of `Backbone.layers`.
        reduction: how many times narrower the adapters are than the layer.
        scale: the scalars a at first.
        init: "random": every layer as it resets itself; "copy": the trunk's weights.
        seed: of what is random.
    """

    kind: ClassVar[str] = "column"
    paper: ClassVar[str] = "Rusu 2016"
    summary: ClassVar[str] = (
        "a network of the task's own with lateral adapters from earlier ones (progressive networks)"
    )
    citation: ClassVar[str] = """@article{rusu2016progressive,
  title={Progressive Neural Networks}, author={Rusu, Andrei A. and Rabinowitz, Neil C. and Desjardins, Guillaume and
  Soyer, Hubert and Kirkpatrick, James and Kavukcuoglu, Koray and Pascanu, Razvan and Hadsell, Raia},
  journal={arXiv preprint arXiv:1606.04671}, year={2016}}"""

    columns: tuple[str, ...] = ()
    layers: tuple[str, ...] | None = None
    reduction: int = 2
    scale: float = 0.1
    init: Literal["random", "copy"] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {self.reduction}")
        if self.init not in ("random", "copy"):
            raise ValueError(f"init must be 'random' or 'copy', got {self.init!r}")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"columns names a task twice: {', '.join(self.columns)}")

    def build(self, backbone: "Backbone", dim: int | None = None) -> "ColumnPatch":
        """Make the column; the trunk is left as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return ColumnPatch(self, backbone)


class ColumnPatch(Patch):
    """See `ColumnConfig`.

    Attributes:
        hears: tasks whose columns it needs the maps of; the trunk's come first.
        places: layers at which it listens.
    """

    config: ColumnConfig

    def __init__(self, config: ColumnConfig, backbone: "Backbone"):
        super().__init__(config, backbone)
        known = [layer.name for layer in backbone.layers]
        self.places: tuple[str, ...] = tuple(known) if config.layers is None else tuple(config.layers)
        self.hears: tuple[str, ...] = config.columns
        modules = dict(backbone.trunk.named_modules())
        for name in self.places:
            if name not in modules or not name:
                raise ValueError(unknown_name("layer", name, known, "the backbone"))
        if not self.places:
            raise ValueError(
                "the backbone names no layers to listen at: make it with layers= and sample=, or give them"
            )
        for name, module in modules.items():
            if any(tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values())):
                self._own_tensors(name, module)
        like = next((p for p in backbone.trunk.parameters() if p.is_floating_point()), torch.zeros(()))
        for name in self.places:
            info, channels_last = backbone._facts(name)
            self._stand_in(name, Laterals(info, channels_last, 1 + len(self.hears), config).to(like), "lateral")
        if config.init == "random":
            with torch.no_grad(), applied(self):
                for module in modules.values():
                    if callable(getattr(module, "reset_parameters", None)):
                        module.reset_parameters()

    @contextmanager
    def hearing(self, maps: Sequence[Mapping[str, Tensor]]) -> Iterator[None]:
        """While this lasts the column hears these maps by layer: the trunk's, then those of each task in `hears`."""
        for name in self.places:
            self._lateral(name).__dict__["heard"] = [each[name] for each in maps]
        try:
            yield
        finally:
            for name in self.places:
                self._lateral(name).__dict__["heard"] = None

    def _lateral(self, name: str) -> nn.Module:
        node = self._node(name)
        assert node is not None
        return node._modules["lateral"]  # type: ignore[return-value]


class Laterals(StandIn):
    """A layer, and an adapter that adds to its output what the same layer of earlier columns computed."""

    def __init__(self, info: "LayerInfo", channels_last: bool, columns: int, config: ColumnConfig):
        super().__init__()
        width = max(1, info.channels // config.reduction)
        self.scales = nn.Parameter(torch.full((columns,), config.scale))
        self.down = nn.Linear(columns * info.channels, width)
        self.up = nn.Linear(width, info.channels, bias=False)
        self.axis = 1 if info.kind == "map" else -1
        self.own_axis = -1 if channels_last else self.axis
        self.__dict__["heard"] = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, or the first tensor of it, with the adapter's added."""
        output = self.base_layer(*args, **kwargs)
        heard = self.__dict__["heard"]
        if heard is None:
            return output
        last = [scale * each.movedim(self.axis, -1) for scale, each in zip(self.scales, heard)]
        added = self.up(torch.relu(self.down(torch.cat(last, -1)))).movedim(-1, self.own_axis)
        if isinstance(output, Tensor):
            return output + added.reshape(output.shape)  # vectors are heard as one place
        return type(output)([output[0] + added.reshape(output[0].shape), *output[1:]])
