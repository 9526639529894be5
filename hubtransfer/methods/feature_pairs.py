"""Layers of a student beside layers of its teachers: what every method that compares feature maps starts from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from hubtransfer.backbones import Backbone, LayerInfo
from hubtransfer.config import unknown_name
from hubtransfer.data import Batch
from hubtransfer.functional.layer_pairs import PairRule, Pairs, check_pairs, pair_layers, same_depth
from hubtransfer.functional.maps import as_grid, same_size
from hubtransfer.models import Teacher, TransferModelOutput

Texts = Literal["tokens", "sequences"] | None


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Hyper-parameters of a term that is a sum over pairs of layers.

    Attributes:
        beta: Weight of the term.
        pairs: "single" (the last layers), "one_to_one" (stages of equal size), "all_to_all", or pairs (teacher's layer,
            student's layer) by name; "1:layer" is a layer of teacher number 1.
    """

    beta: float = 1.0
    pairs: Pairs = "single"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")
        check_pairs(self.pairs)


class Pair(NamedTuple):
    """A layer of teacher number `teacher` and a layer of the student."""

    teacher: int
    theirs: LayerInfo
    own: LayerInfo


class FeaturePairs:
    """Chooses pairs of layers and gives their maps, (batch, channels, height, width) each, pair by pair.

    Args:
        student: Backbone that learns.
        teachers: Frozen models.
        rule: How to pair (see `pair_layers`), or pairs (teacher's layer, student's layer) by name; with several
            teachers "1:layer" is a layer of teacher number 1.
        texts: How texts are compared, if at all. "tokens": for losses that take each position by itself; every token
            that is no padding counts as an example of its own, (tokens, channels, 1, 1). "sequences": for losses over
            the places of an example; (batch, channels, 1, tokens), zero where there is padding. "one_to_one" pairs
            each of the student's N layers with the teacher's layer floor(i M / N), and the last with the last.

    Raises:
        ValueError: if there is no such layer or teacher (naming the nearest), or a backbone has no maps to compare
            (listing the layers there are).
    """

    def __init__(
        self,
        student: Backbone,
        teachers: Sequence[Teacher],
        rule: PairRule | Sequence[tuple[str, str]],
        texts: Texts = None,
    ) -> None:
        self.teachers, self.texts = list(teachers), texts
        backbones = [teacher.model.backbone for teacher in self.teachers]
        everyone = {"the student": student, **{f"teacher {k}": backbone for k, backbone in enumerate(backbones)}}
        for who, backbone in everyone.items():
            if backbone.modality == "text" and texts is None:
                raise ValueError(
                    f"{who} (text) has no feature maps of images to compare, and this method is not available for "
                    "texts; choose one of pooled features, logits or single positions"
                )
            if not backbone.layers:
                known = "; ".join(f"{name}: {_listed(each.layers) or 'none'}" for name, each in everyone.items())
                raise ValueError(f"{who} ({backbone.modality}) has no feature maps to compare. Layers of {known}")
        self.pairs: list[Pair] = []
        named = [] if isinstance(rule, str) else [(*_split(theirs, len(backbones)), own) for theirs, own in rule]
        if isinstance(rule, str):
            for k, backbone in enumerate(backbones):
                if backbone.modality == "text" and rule == "one_to_one":
                    sizes = len(student.layers), len(backbone.layers)
                    named += [
                        (k, backbone.layers[same_depth(i, *sizes)].name, own.name)
                        for i, own in enumerate(student.layers)
                    ]
                    continue
                named += [(k, theirs, own) for theirs, own in pair_layers(backbone.layers, student.layers, rule)]
        for k, theirs, own in named:
            pair = Pair(k, _find(backbones[k], theirs, f"teacher {k}"), _find(student, own, "the student"))
            self.pairs.append(pair)

    def __len__(self) -> int:
        return len(self.pairs)

    def __str__(self) -> str:
        return ", ".join(self.names)

    @property
    def names(self) -> list[str]:
        """Each pair as `teacher's layer -> student's layer`; with several teachers `number:layer -> layer`."""
        several = len(self.teachers) > 1
        return [f"{f'{p.teacher}:' if several else ''}{p.theirs.name} -> {p.own.name}" for p in self.pairs]

    @property
    def layers(self) -> tuple[str, ...]:
        """The student's layers, each once: what to ask of its forward."""
        return _names(pair.own for pair in self.pairs)

    @property
    def teacher_layers(self) -> list[tuple[str, ...]]:
        """Each teacher's layers, each once."""
        return [_names(p.theirs for p in self.pairs if p.teacher == k) for k in range(len(self.teachers))]

    def maps(self, student: TransferModelOutput, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Returns the teacher's and the student's map of each pair, the larger average-pooled to the smaller."""
        assert student.features is not None
        both = zip(self.teacher_maps(batch), self.own_maps(student.features.maps, batch))
        return [same_size(there, here) for there, here in both]

    def regressors(self, like: Tensor) -> nn.ModuleList:
        """Returns a 1x1 convolution for each pair, from the student's channels to the teacher's."""
        return nn.ModuleList(nn.Conv2d(pair.own.channels, pair.theirs.channels, 1) for pair in self.pairs).to(like)

    def own_maps(self, maps: Mapping[str, Tensor], batch: Batch) -> list[Tensor]:
        """Returns the student's map of each pair, from the maps of its forward."""
        return [_grid(maps[pair.own.name], pair.own, batch.inputs, self.texts) for pair in self.pairs]

    def places(self, batch: Batch) -> Tensor | None:
        """Returns how many places of the maps of each text are no padding, (batch,); of images None: all are."""
        return batch.inputs["attention_mask"].sum(1) if "attention_mask" in batch.inputs else None

    def teacher_maps(self, batch: Batch) -> list[Tensor]:
        """Returns the teacher's map of each pair; each teacher runs once a step."""

        def compute() -> list[Tensor]:
            asked = zip(self.teachers, self.teacher_layers)
            found = [teacher(batch, layers=layers).features.maps if layers else {} for teacher, layers in asked]
            return self.by_pair([self.grids(k, maps, batch.inputs) for k, maps in enumerate(found)])

        return batch.once(("feature pairs", id(self)), compute)

    def grids(self, teacher: int, maps: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns one teacher's maps by layer, from what it gave for the student's inputs."""
        layers = {pair.theirs.name: pair.theirs for pair in self.pairs if pair.teacher == teacher}
        if any(layer.kind == "tokens" for layer in layers.values()):
            inputs = self.teachers[teacher].inputs(inputs)
        return {name: _grid(maps[name], layer, inputs, self.texts) for name, layer in layers.items()}

    def by_pair(self, found: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Returns what was found of the teacher's layer of each pair, teacher by teacher and layer by layer."""
        return [found[pair.teacher][pair.theirs.name] for pair in self.pairs]


def _split(name: str, teachers: int) -> tuple[int, str]:
    number, _, layer = name.rpartition(":")
    if number and (not number.isdigit() or int(number) >= teachers):
        raise ValueError(f"{name!r} names teacher {number!r}; teachers are numbered 0 to {teachers - 1}")
    return int(number or 0), layer


def _find(backbone: Backbone, name: str, who: str) -> LayerInfo:
    for layer in backbone.layers:
        if layer.name == name:
            return layer
    raise ValueError(unknown_name("layer", name, [layer.name for layer in backbone.layers], who))


def _listed(layers: Iterable[LayerInfo]) -> str:
    return ", ".join(layer.name for layer in layers)


def _names(layers: Iterable[LayerInfo]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(layer.name for layer in layers))


def _grid(features: Tensor, layer: LayerInfo, inputs: Mapping[str, Tensor], texts: Texts) -> Tensor:
    if layer.kind == "map":
        return features
    if "input_ids" in inputs:
        mask = inputs.get("attention_mask")
        if texts == "sequences":
            known = features if mask is None else features * mask[:, :, None].to(features)
            return known.mT[:, :, None]
        tokens = features.flatten(0, 1) if mask is None else features[mask.bool()]
        return tokens[:, :, None, None]
    height, width = inputs["pixel_values"].shape[-2:]
    return as_grid(features, layer.prefix, (height // layer.reduction, width // layer.reduction))
