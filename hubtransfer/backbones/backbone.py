"""The one face of every backbone: inputs -> `Features(pooled, maps)`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from hubtransfer.backbones.features import Features
from hubtransfer.backbones.fingerprint import fingerprint
from hubtransfer.backbones.names import suggestion, unknown_name
from hubtransfer.backbones.probe import (
    Hint,
    LayerInfo,
    Sample,
    Seen,
    describe,
    first_tensor,
    group_layers,
    likely_layers,
    trial_run,
)
from hubtransfer.backbones.processor import Processor

Modality = Literal["image", "text", "tensor"]
Inputs = Tensor | Mapping[str, Tensor]


class Backbone(nn.Module):
    """A network without its classifier, from timm, transformers or plain torch.

    Names of layers, groups and parameters are names within `trunk`.

    Attributes:
        trunk: The wrapped network, its own classifier removed.
        dim: Width of `Features.pooled`.
        layers: The last layer of each stage (convolutional and hierarchical networks) or every block (transformers).
        modality: "image", "text" or "tensor".
        processor: Turns raw images or texts into the inputs.
        source: JSON facts from which `from_source` makes the same structure.
    """

    trunk: nn.Module
    dim: int
    layers: list[LayerInfo]
    modality: Modality
    processor: Processor
    source: dict[str, Any]

    def __init__(self, trunk: nn.Module, *, modality: Modality, processor: Processor, source: dict[str, Any]):
        super().__init__()
        self.trunk = trunk
        self.neck = nn.Identity()  # between trunk and head: where patches that deepen put their layers
        self.modality = modality
        self.processor = processor
        self.source = source
        self.layers = []
        self._prefix = 0
        self._hints: dict[str, Hint] = {}
        self._sample: Sample = {}
        self._seen: dict[str, Seen] = {}
        self._infos: dict[str, tuple[LayerInfo, bool]] = {}

    # ---------------------------------------------------------------- making

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | nn.Module,
        *,
        pretrained: bool = True,
        trust_remote_code: bool = False,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Backbone:
        """Make a backbone by name.

        | name | read by |
        |---|---|
        | `"resnet18"`, `"timm/resnet18"`, `"timm/resnet18.a1_in1k"` | timm |
        | `"hf-hub:org/name"`, `"local-dir:path"` | timm, from a repository or folder that timm saved |
        | `"org/name"` | transformers (or timm, if the repository says so) |
        | `"plain:mlp"`, `"plain:lenet"`, `"plain:wide_resnet"` with `pretrained=False` | this library, see `plain` |
        | `"bert"` with `pretrained=False` | transformers, the default structure of a model type |
        | a folder with config.json and model.safetensors | whichever library wrote it |
        | an `nn.Module` | `from_module` |

        Args:
            name_or_path: See the table.
            pretrained: False gives random weights, without any network for every name that is known beforehand.
            trust_remote_code: Whether a transformers repository may bring its own Python code.
            revision: Branch, tag or commit on the Hub.
            **kwargs: `image_size` (pixels a side, of the processor and of networks built for one size); `pooling`
                (transformers: "cls", "mean", "pooler", "cls+mean", "last"); `max_length` (texts are cut to as many
                tokens); everything else goes to `timm.create_model`, or overrides the transformers config.

        Returns:
            The backbone, in evaluation mode.

        Raises:
            ValueError: For an unknown name (with the nearest valid ones), an unreachable or missing repository, or an
                argument that the network does not take.
        """
        from hubtransfer.backbones import plain

        if isinstance(name_or_path, nn.Module):
            return cls.from_module(name_or_path, **kwargs)
        name = os.fspath(name_or_path)
        if name.startswith(plain.PREFIX):
            return plain.from_plain(name, pretrained=pretrained, kwargs=kwargs)
        from hubtransfer.backbones import names, timm, transformers  # seconds of imports that a plain network needs not

        options: dict[str, Any] = {"pretrained": pretrained, "revision": revision, "kwargs": kwargs}
        remote = {**options, "trust_remote_code": trust_remote_code}
        if name.startswith(("local-dir:", "hf-hub:", "hf_hub:", "timm/")) or timm.is_architecture(name):
            return timm.from_timm(name, **options)
        name = names.LEGACY_CHECKPOINTS.get(name, name)
        if Path(name).is_dir():
            if "architecture" in _folder_config(Path(name)):
                return timm.from_timm(f"local-dir:{name}", **options)
            return transformers.from_transformers(name, **remote)
        if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
            raise ValueError(f"There is no folder {name!r}: a backbone folder holds config.json and model.safetensors.")
        if "/" not in name:
            if name not in names.transformers_types():
                raise unknown_name(name)
            if pretrained:
                raise ValueError(
                    f"{name!r} is a model type of transformers, which has no weights: pass pretrained=False, or name a "
                    f"checkpoint.{suggestion(name, names.KNOWN_CHECKPOINTS)}"
                )
        return transformers.from_transformers(name, **remote)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        dim: int | None = None,
        layers: Sequence[str | LayerInfo] | None = None,
        sample: Inputs | None = None,
        processor: Processor | None = None,
    ) -> Backbone:
        """Wrap a module; the module itself becomes the trunk (a timm model loses its classifier in place).

        Args:
            module: Gives a tensor: (batch, dim), or maps or tokens, which are averaged over places.
            dim: Width of the output; needed only without `sample`.
            layers: Names of sub-modules whose outputs may be asked for (default: direct children).
            sample: Example inputs with a batch axis; only shape and dtype count.
            processor: Default: inputs become float tensors and are otherwise left alone.

        Returns:
            The backbone. Models of timm and transformers are recognised and wrapped as such.

        Raises:
            ValueError: Without `sample` and `dim`, or for a layer that the module does not have.
        """
        from hubtransfer.backbones import module as plain

        return plain.wrap(module, dim=dim, layers=layers, sample=sample, processor=processor)

    @classmethod
    def from_source(cls, source: Mapping[str, Any], *, trust_remote_code: bool = False) -> Backbone:
        """The structure that `source` describes, with random weights and without any network.

        Args:
            source: `Backbone.source` of the backbone to rebuild.
            trust_remote_code: Needed again if the structure came from a repository's own code (which is then fetched).

        Raises:
            ValueError: If the structure is a plain module, which only its own code can make.
        """
        from hubtransfer.backbones import plain, timm, transformers

        library = source.get("library")
        if library == "plain":
            return plain.from_source(source)
        if library == "timm":
            return timm.from_source(source)
        if library == "transformers":
            return transformers.from_source(source, trust_remote_code=trust_remote_code)
        if library == "module":
            raise ValueError(
                f"The backbone is a plain module ({source.get('name')}), which no config can rebuild: make it "
                "with your own code and pass `backbone=Backbone.from_module(...)`."
            )
        raise ValueError(
            f"Unknown library {library!r} in the backbone's source; valid: timm, transformers, plain, module."
        )

    # --------------------------------------------------------------- running

    def forward(self, inputs: Inputs, layers: Sequence[str] = ()) -> Features:
        """Run the trunk once.

        Args:
            inputs: Images (batch, channels, height, width), or a mapping of named tensors (texts: `input_ids`,
                `attention_mask`, `token_type_ids`).
            layers: Names of sub-modules of the trunk whose outputs are wanted.

        Returns:
            Pooled features and the maps asked for, in the order in which they arise.

        Raises:
            ValueError: For an unknown layer, or inputs of another shape.
        """
        if not layers:
            return Features(self.neck(self.run(inputs)), {})
        maps: dict[str, Tensor] = {}
        handles = []
        # Sub-modules are looked up anew in each call: a patch may have put another one in their place.
        wanted = [(name, *self._facts(name)) for name in self._checked(layers)]
        try:
            for name, info, channels_last in wanted:
                keep = _keeper(
                    maps,
                    info,
                    channels_last,
                    batch=_rows(inputs),
                    copy=name in self._seen and self._seen[name].overwritten,
                )
                handles.append(self.trunk.get_submodule(name).register_forward_hook(keep))
            pooled = self.neck(self.run(inputs))
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name, *_ in wanted if name not in maps]
        if missing:
            raise ValueError(f"The layers {missing} did not run in this forward pass, so they have no output.")
        return Features(pooled, maps)

    def run(self, inputs: Inputs) -> Tensor:
        """Run the trunk and pool: inputs -> (batch, dim). Each library has its own."""
        raise NotImplementedError

    def layer(self, name: str) -> LayerInfo:
        """Facts about any sub-module's output, also of one that is not in `layers`.

        Raises:
            ValueError: If the trunk has no such sub-module, or its output is neither a map nor tokens.
        """
        return self._facts(name)[0]

    # ----------------------------------------------------------------- facts

    def layer_groups(self) -> list[list[str]]:
        """Names within the trunk, shallow to deep, that together cover each of its parameters exactly once.

        A name is a sub-module, or a loose parameter (`cls_token`). Groups end where `layers` end: stem, one group a
        stage or block, and what follows the last one.
        """
        return group_layers(self.trunk, [info.name for info in self.layers], self._seen)

    def fingerprint(self) -> str:
        """The sha256 of the trunk's weights: names, shapes, dtypes and bytes of what its state dict holds.

        `num_batches_tracked` does not count. Kept until a tensor is replaced or written to (as `_version` tells; writes
        through `.data` go unnoticed).
        """
        return fingerprint(self.trunk)

    def extra_repr(self) -> str:
        """What print shows beside the sub-modules."""
        return f"{self.source.get('name')}, dim={self.dim}, layers={len(self.layers)}"

    # -------------------------------------------------- for the libraries' files

    def survey(
        self,
        sample: Sample,
        *,
        layers: Sequence[str] | None = None,
        hints: Mapping[str, Hint] | None = None,
        prefix: int = 0,
    ) -> None:
        """Find `dim` and `layers` by one trial run; the last step of making a backbone.

        Args:
            sample: Input name -> (shape with a batch axis, dtype).
            layers: Candidates; those that give no map or tokens are left out. None: found by `likely_layers`.
            hints: What the library says about layers.
            prefix: The number of prefix tokens that the library says there are.

        Raises:
            ValueError: If the network does not run, or its pooled output is not (batch, dim).
        """
        # Two rows tell the batch from whatever else has length one.
        self._sample = {name: ((2, *shape[1:]), dtype) for name, (shape, dtype) in sample.items()}
        self._hints, self._prefix = dict(hints or {}), prefix
        self._infos = {}
        pooled, self._seen = trial_run(self, self._sample)
        if len(pooled) != 2:
            raise ValueError(f"{type(self.trunk).__name__} gives pooled features of shape {pooled}, not (batch, dim).")
        self.dim = pooled[1]
        usable = [n for n in layers or () if n in self._seen and self._is_clean(n) and self._described(n)]
        if not usable:
            usable = [n for n in likely_layers(self.trunk, self._seen) if self._is_clean(n) and self._described(n)]
        usable.sort(key=lambda name: self._seen[name].end)
        self.layers = [self._facts(name)[0] for name in dict.fromkeys(usable)]

    def declare(self, info: LayerInfo) -> None:
        """Take one's word for a layer, in place of what the trial run says."""
        channels_last = info.name in self._infos and self._infos[info.name][1]
        self._infos[info.name] = (info, channels_last)
        self.layers = [info if layer.name == info.name else layer for layer in self.layers]

    def _is_clean(self, name: str) -> bool:
        return self._seen[name].calls == 1 and not self._seen[name].overwritten

    def _described(self, name: str) -> tuple[LayerInfo, bool] | None:
        facts = self._seen.get(name)
        if facts is None or facts.shape is None:
            return None
        image = None
        if self.modality != "text" and len(shape := next(iter(self._sample.values()))[0]) == 4:
            image = (shape[2], shape[3])
        return describe(name, facts.shape, image, self._hints.get(name), self._prefix)

    def _facts(self, name: str) -> tuple[LayerInfo, bool]:
        if name not in self._infos:
            modules = dict(self.trunk.named_modules())
            if name not in modules or not name:
                near = suggestion(name, [key for key in modules if key]) or suggestion(
                    name, [i.name for i in self.layers]
                )
                known = ", ".join(info.name for info in self.layers)
                raise ValueError(f"{type(self.trunk).__name__} has no layer {name!r}.{near} Its layers: {known}.")
            if name not in self._seen and self._sample:  # a sub-module that was added since
                _, self._seen = trial_run(self, self._sample)
            found = self._described(name)
            if found is None:
                shape = self._seen[name].shape if name in self._seen else None
                raise ValueError(
                    f"The output of {name!r} (shape {shape}) is neither a map nor tokens. "
                    f"Layers of this backbone: {', '.join(info.name for info in self.layers)}."
                )
            self._infos[name] = found
        return self._infos[name]

    def _checked(self, layers: Sequence[str]) -> list[str]:
        if isinstance(layers, str):
            raise TypeError(f"`layers` is a sequence of names, got the string {layers!r}: write ({layers!r},).")
        return list(dict.fromkeys(layers))


def _rows(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)


def _keeper(
    maps: dict[str, Tensor], info: LayerInfo, channels_last: bool, batch: int, copy: bool
) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output, batch)
        if tensor is None:
            raise ValueError(f"The layer {info.name!r} gave no tensor with {batch} rows but {type(output).__name__}.")
        if channels_last:
            tensor = tensor.permute(0, 3, 1, 2)
        elif tensor.dim() == 2:  # one vector is one token
            tensor = tensor.unsqueeze(1)
        # Some layers are written over by an in-place operation that follows.
        maps[info.name] = tensor.clone() if copy else tensor

    return keep


def _folder_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"The folder {str(folder)!r} has no config.json: it is not a backbone that timm or transformers saved."
        )
    config = json.loads(path.read_text(encoding="utf-8"))
    if "architecture" not in config and "model_type" not in config:
        what = "a saved TransferModel: use TransferModel.from_pretrained" if "source" in config else "not a backbone's"
        raise ValueError(
            f"{str(path)!r} names neither a timm architecture nor a transformers model type; it is {what}."
        )
    return config
