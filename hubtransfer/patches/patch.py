"""What a patch is: the few tensors in which one task differs from the shared trunk, and how they come and go.

A patch owns its tensors (and, for grown or injected layers, modules). While the task runs its dictionaries
``_parameters`` and ``_buffers`` take the places of those of the trunk's modules, and its layers those of the trunk's
layers; afterwards the very same objects as before are put back. Nothing is copied, the trunk never changes, and patches
never meet one another.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hubtransfer.patches.gather import Gather, Owned
from hubtransfer.patches.places import HEAD, Binding, Slot, checkpointing, places_of
from hubtransfer.patches.training_mode import KEEPS_STATISTICS

if TYPE_CHECKING:
    from hubtransfer.backbones import Backbone

PATCHES: dict[str, type["PatchConfig"]] = {}
_ABSENT = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """How to build one kind of patch. A subclass names its ``kind`` and enters the registry by that.

    Class attributes:
        kind: the registered name, the same as the file's.
        paper: "Author year".
        summary: one line for the table of patches.
    """

    kind: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    citation: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if not cls.kind:
            raise TypeError(f"{cls.__name__} needs a class attribute `kind`, the name it is saved under.")
        other = PATCHES.setdefault(cls.kind, cls)
        if other is not cls and other.__qualname__ != cls.__qualname__:
            raise TypeError(f"patch kind {cls.kind!r} of {cls.__name__} is taken by {other.__name__}.")
        PATCHES[cls.kind] = cls

    def build(self, backbone: "Backbone", dim: int | None = None) -> "Patch":
        """Make the patch for this backbone.

        Args:
            backbone: whose trunk the patch is for; left as it is.
            dim: width of the classifier's input before this patch, when an earlier patch of a list has changed it.
        """
        raise NotImplementedError


class Patch(nn.Module):
    """One task's own tensors. Everything to be saved lives in ``own``, a tree of modules named like the trunk's.

    Attributes:
        config: what built it.
        own: the task's tensors; ``own.blocks.0.bn1.weight`` takes the place of the trunk's ``blocks.0.bn1.weight``.
        extra_dim: by how much the classifier's input is wider with this patch than without (0 for most).
        hears: tasks whose maps it reads while it runs, after the trunk's own; None for a patch that reads none.
        places: layers whose maps it reads.
    """

    extra_dim: int = 0
    hears: tuple[str, ...] | None = None
    places: tuple[str, ...] = ()
    behind_trunk: ClassVar[bool] = False  # stands between trunk and head: the trunk cannot be widened after it
    own: nn.Module
    _host: tuple["Backbone"]
    _slots: list[Slot] | None
    _owned: dict[str, Owned] | None
    _watched: list[tuple[dict[str, Any], str, bool]]

    def __init__(self, config: Any, backbone: "Backbone"):
        super().__init__()
        self.config = config
        self.own = nn.Module()
        self._bindings: list[Binding] = []
        self._attach(backbone)

    def hearing(self, maps: Sequence[Mapping[str, Tensor]]) -> AbstractContextManager[None]:
        """While this lasts it reads these maps by layer: the trunk's, then those of each task in `hears`."""
        return nullcontext()

    # ------------------------------------------------------------------ building

    def _branch(self, name: str) -> nn.Module:
        """The node of ``own`` that is named like the trunk's module, made when missing."""
        node = self.own
        for part in name.split(".") if name else ():
            child = node._modules.get(part)
            if child is None:
                child = node._modules[part] = nn.Module()  # not add_module: trunk names may shadow nn.Module attributes
            node = child
        return node

    def _node(self, name: str) -> nn.Module | None:
        """The node of ``own`` of that name, None when the patch owns nothing there."""
        node: nn.Module | None = self.own
        for part in name.split(".") if name else ():
            node = node._modules.get(part) if node is not None else None
        return node

    def _own_tensors(self, name: str, module: nn.Module) -> nn.Module:
        """Copy every tensor that the trunk's module holds directly; the copies are swapped in for them."""
        node = self._branch(name)
        for key, parameter in module._parameters.items():
            node._parameters[key] = None if parameter is None else nn.Parameter(parameter.detach().clone())
        for key, buffer in module._buffers.items():
            copied = None if buffer is None else buffer.detach().clone()
            node.register_buffer(key, copied, persistent=key not in module._non_persistent_buffers_set)
        # Statistics move only in training mode, so the flag belongs to whoever owns the statistics: another task
        # that runs through the same module in between finds the module as it left it.
        node.training = module.training
        held = [key for key in ("_parameters", "_buffers") if getattr(module, key)]
        for key in (*held, "training"):  # every tensor of the module is the patch's, so the dictionaries go as a whole
            self._bindings.append(Binding(name, "__dict__", key, node, "__dict__", key))
        return node

    def _keep_statistics(self, name: str, node: nn.Module) -> None:
        """The layer stays in evaluation mode while it learns (see `train_where_it_learns`)."""
        node.training = False
        node.__dict__[KEEPS_STATISTICS] = True
        self._bindings.append(Binding(name, "__dict__", KEEPS_STATISTICS, node, "__dict__", KEEPS_STATISTICS))

    def _stand_in(self, name: str, module: nn.Module, own_key: str = "grown") -> None:
        """Swap `module` in for the trunk's module `name`, which it is lent as ``base_layer`` meanwhile."""
        node = self._branch(name)
        if own_key in node._modules:
            raise ValueError(f"the patch already has a layer of its own at {name!r}.")
        node._modules[own_key] = module
        if name == HEAD:
            places = [(HEAD, "neck")]
        else:
            trunk = self._backbone.trunk
            places = places_of(trunk, trunk.get_submodule(name))
        if not places:
            raise ValueError(f"the trunk as a whole ({type(self._backbone.trunk).__name__}) cannot be replaced.")
        self._bindings.append(Binding(module, "_modules", "base_layer", places[0][0], "_modules", places[0][1]))
        for parent, key in places:
            self._bindings.append(Binding(parent, "_modules", key, node, "_modules", own_key))

    # ------------------------------------------------------------------ swapping

    def _attach(self, backbone: "Backbone") -> "Patch":
        """Look the places up again, in this backbone (needed after it was copied or replaced)."""
        self.__dict__["_host"] = (backbone,)  # in a tuple, so that the trunk is not registered inside the patch
        self.__dict__["_slots"] = self.__dict__["_owned"] = None
        self.__dict__["_watched"] = checkpointing(backbone.trunk)
        return self

    @property
    def dim(self) -> int:
        """Width of the classifier's input with this patch."""
        return self._backbone.dim + self.extra_dim

    @property
    def _backbone(self) -> "Backbone":
        return self._host[0]

    def _compiled(self) -> list[Slot]:
        slots = self._slots
        if slots is None:
            slots = self.__dict__["_slots"] = [binding.resolve(self._backbone) for binding in self._bindings]
        return slots

    def slots(self) -> Iterator[Slot]:
        """Which dictionary entries are exchanged, in the order in which that happens."""
        yield from self._compiled()

    def parts(self) -> tuple["Patch", ...]:
        """The patches a composed patch consists of; of any other the patch itself."""
        return (self,)

    def gathered(self) -> Mapping[str, Owned] | None:
        """The layers in which the task differs, for one pass of the trunk over examples of several tasks (`gather`).

        Returns:
            Name of the trunk's layer -> how it runs then, and the task's tensors; None where this is not possible.
        """
        return None

    def _owned_layers(self, gather_of: Callable[[nn.Module], Gather | None]) -> Mapping[str, Owned] | None:
        """`gathered` for patches that own copies of layers' tensors."""
        if self._owned is None:
            names = dict.fromkeys(str(binding.host) for binding in self._bindings)
            trunk = self._backbone.trunk
            found = {name: (gather_of(trunk.get_submodule(name)), self._node(name)) for name in names}
            if any(gather is None for gather, _ in found.values()):
                return None
            self.__dict__["_owned"] = {name: Owned(*pair) for name, pair in found.items()}  # type: ignore[arg-type]
        return self._owned

    # ------------------------------------------------------------------ tensors

    def tensors(self) -> dict[str, Tensor]:
        """The patch's own tensors under the trunk's names: what goes to disk. Never a tensor of the trunk."""
        return {name: tensor.detach() for name, tensor in _named_tensors(self.own)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors that `tensors()` of an equal patch gave; strict about names and shapes.

        Raises:
            ValueError: when names or shapes differ; it lists the first of them, and nothing has been changed.
        """
        own = self.tensors()
        check_tensors(own, tensors, f"a {self._describe()} patch")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    def num_parameters(self) -> int:
        """How many numbers of the patch are trained (statistics and constants do not count)."""
        return sum(parameter.numel() for group in self.param_groups() for parameter in group["params"])

    def param_groups(self) -> list[dict[str, Any]]:
        """Torch parameter groups, each ``{"params": [...], "lr_scale": float}``; layers that start from nothing: 10."""
        return [{"params": list(self.parameters()), "lr_scale": 1.0}]

    def _describe(self) -> str:
        return str(getattr(self.config, "kind", "") or getattr(self.config, "peft_type", type(self.config).__name__))

    # ------------------------------------------------------------------ copies

    def __deepcopy__(self, memo: dict[int, Any]) -> "Patch":
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        kept = {k: v for k, v in self.__dict__.items() if k not in ("_host", "_slots", "_owned", "_watched")}
        clone.__dict__.update(copy.deepcopy(kept, memo))
        # A patch copied together with its backbone belongs to the copy; copied alone it stays with the same trunk.
        return clone._attach(memo.get(id(self._backbone), self._backbone))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slots": None, "_owned": None, "_watched": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._attach(self._backbone)


class ComposedPatch(Patch):
    """Several patches that act as one; they may not own the same tensor."""

    def __init__(self, parts: Sequence[Patch], backbone: "Backbone"):
        super().__init__([part.config for part in parts], backbone)
        self.members = nn.ModuleList(parts)
        self.extra_dim = sum(part.extra_dim for part in parts)
        self._check_overlap()

    def parts(self) -> tuple[Patch, ...]:
        """The members, in the order of the list."""
        return tuple(self.members)  # type: ignore[arg-type]

    def _compiled(self) -> list[Slot]:
        slots = self._slots
        if slots is None:
            slots = self.__dict__["_slots"] = [slot for part in self.parts() for slot in part._compiled()]
        return slots

    def gathered(self) -> Mapping[str, Owned] | None:
        """All members' layers."""
        if self._owned is None:
            owned: dict[str, Owned] = {}
            for part in self.parts():
                found = part.gathered()
                if found is None:
                    return None
                owned |= found
            self.__dict__["_owned"] = owned
        return self._owned

    def tensors(self) -> dict[str, Tensor]:
        """The union of the members' tensors."""
        return {name: tensor for part in self.parts() for name, tensor in part.tensors().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Strict over the union: see `Patch.load_tensors`."""
        check_tensors(self.tensors(), tensors, f"the patches {self._describe()}")
        for part in self.parts():
            part.load_tensors({name: tensors[name] for name in part.tensors()})

    def param_groups(self) -> list[dict[str, Any]]:
        """The members' groups."""
        return [group for part in self.parts() for group in part.param_groups()]

    def _attach(self, backbone: "Backbone") -> "Patch":
        for part in self.parts() if "members" in self.__dict__.get("_modules", {}) else ():
            part._attach(backbone)
        return super()._attach(backbone)

    def _describe(self) -> str:
        return " + ".join(part._describe() for part in self.parts())

    def _check_overlap(self) -> None:
        seen: dict[tuple[str, str, str], Patch] = {}
        names: dict[str, Patch] = {}
        for part in self.parts():
            for binding in part._bindings:
                # Layers in front of the head are stacked, each is lent the one below: no overlap.
                if isinstance(binding.host, str) and binding.host != HEAD:
                    other = seen.setdefault((binding.host, binding.attr, binding.key), part)
                    if other is not part:
                        replaced = binding.attr == "_modules"
                        layer = f"{binding.host}.{binding.key}".lstrip(".") if replaced else binding.host
                        raise ValueError(
                            f"both {other._describe()} and {part._describe()} own {layer!r} of the trunk; "
                            "restrict one of them with `layers=` or leave it out."
                        )
            for name in part.tensors():
                if names.setdefault(name, part) is not part:
                    raise ValueError(
                        f"two {part._describe()} patches would save a tensor {name!r}; "
                        "give one patch with a wider `layers=` regex instead."
                    )


@contextmanager
def applied(*patches: Patch) -> Iterator[None]:
    """Run what is inside with the patches' tensors in the places of the trunk's; put exactly the old objects back.

    May be nested, survives exceptions, and reads the patches' dictionaries at the time of the swap, so that
    `torch.func.functional_call` over a module that owns trunk and patches works. Not for several threads at once.

    Raises:
        RuntimeError: when gradients are on and the trunk checkpoints activations: the recomputation would happen in
            `backward`, when the patch is no longer there, and give wrong gradients without a word.
    """
    undo: list[tuple[dict[str, Any], str, Any, Any, dict[str, Any], str]] = []
    push = undo.append
    try:
        for patch in patches:
            if patch._watched and torch.is_grad_enabled():
                _refuse_checkpointing(patch)
            for target, key, source, source_key in patch._compiled():
                new = source[source_key]
                push((target, key, target.get(key, _ABSENT), new, source, source_key))
                target[key] = new
        yield
    finally:
        for target, key, old, new, source, source_key in reversed(undo):
            now = target.get(key, _ABSENT)
            if now is not new and key != "base_layer" and now is not _ABSENT:
                source[source_key] = now  # a layer or train() put something else there: it is the patch's
            if old is _ABSENT:
                target.pop(key, None)
            else:
                target[key] = old


def check_tensors(own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Names and shapes must agree exactly.

    Raises:
        ValueError: with the first tensors that differ, both shapes, and what is missing or too much.
    """
    shapes = [
        f"{name}: {tuple(given[name].shape)} given, {tuple(tensor.shape)} needed"
        for name, tensor in own.items()
        if name in given and given[name].shape != tensor.shape
    ]
    missing = [f"{name}: missing, {tuple(own[name].shape)} needed" for name in own if name not in given]
    unknown = [f"{name}: {tuple(given[name].shape)} given, not needed" for name in given if name not in own]
    wrong = shapes + missing + unknown
    if wrong:
        few = wrong[:3] + [line for line in missing[:2] + unknown[:2] if line not in wrong[:3]]
        raise ValueError(
            f"these tensors do not fit {what} of this backbone; was it made for another one? "
            f"{len(wrong)} of {len(own)} differ: " + "; ".join(few)
        )


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    kept = module.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def _refuse_checkpointing(patch: Patch) -> None:
    for flags, key, needs_training in patch._watched:
        if flags.get(key) and (not needs_training or flags.get("training")):
            raise RuntimeError(
                f"the trunk has gradient checkpointing switched on, but a patch ({patch._describe()}) is applied: "
                "activations would be recomputed in backward, after the patch was taken out, and the gradients would "
                "be wrong. Switch it off (timm: `backbone.trunk.set_grad_checkpointing(False)`, transformers: "
                "`backbone.trunk.gradient_checkpointing_disable()`), or train without a patch (trains='all')."
            )
