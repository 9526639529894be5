"""From a recipe (YAML) to a method, a scenario and training arguments. Names no method: classes say what they need.

A recipe is strict: every key is checked before anything is loaded. What it leaves out and the data know (number of
classes, label names, the name of the only task) is filled in from the data.

.. code-block:: yaml

    method: {name: <registered name>, <hyper-parameters>}           # or {sum: [{name: ...}, {name: ...}]}
    model: {backbone: timm/tf_efficientnet_lite0, image_size: 64, tasks: {digits: {patch: scale_bias}}}
    teacher: {from: me/big-model}            # only for methods that have one; or a list of several
    data: {name: digits, limit: 1000}        # or source and target, tasks, stream: see recipe_data.py
    training: {epochs: 5, lr: 1e-3}
    seeds: [0, 1, 2]
    grid: {training.lr: [1e-3, 1e-2]}
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import reduce
from operator import add
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hubtransfer.config import from_dict, kinds_of, load_yaml, override, unknown_name
from hubtransfer.recipe_methods import method_parts

if TYPE_CHECKING:
    from hubtransfer.backbones import Backbone
    from hubtransfer.data import Source
    from hubtransfer.methods import Method
    from hubtransfer.models import TransferModel
    from hubtransfer.models.heads import HeadConfig
    from hubtransfer.training import TrainingArguments

PatchSection = str | Mapping[str, Any] | list[str | Mapping[str, Any]] | None


@dataclass(frozen=True, kw_only=True)
class TaskSection:
    """A task of a model: its head (its width is taken from the data when left out) and its patch."""

    head: Mapping[str, Any] | str | None = "classification"
    patch: PatchSection = None


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """A model: a backbone with tasks, or a saved model.

    Attributes:
        backbone: name or path for ``Backbone.from_pretrained``.
        from_: folder or repository of a saved model, instead of a backbone.
        pretrained: false starts from random weights.
        image_size: side of the images in pixels.
        revision: of the backbone or the saved model.
        trust_remote_code: whether code from the Hub may run.
        options: further keywords of the backbone.
        tasks: task -> head and patch; by default one for each task of the data.
        initialise: "teacher" gives the model its teacher's weights to start from, layer by layer and of wider layers
            the first channels; {module of the model: module of the teacher} names what is not at equal distances.
    """

    backbone: str | None = None
    from_: str | None = None
    pretrained: bool = True
    image_size: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    tasks: Mapping[str, TaskSection | None] = field(default_factory=dict)
    initialise: Literal["teacher"] | Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        """Checks that there is one place to take the model from.

        Raises:
            ValueError: if there is none, or two.
        """
        if (self.backbone is None) == (self.from_ is None):
            raise ValueError("give either 'backbone' (a name such as timm/resnet18) or 'from' (a saved model)")


@dataclass(frozen=True, kw_only=True)
class TeacherSection(ModelSection):
    """A teacher: a saved model, or one that is trained first.

    Attributes:
        task: task of the teacher; by default its only one.
        train: method, training arguments and, if they differ, data with which the teacher is trained first. It is
            kept in the output folder and taken from there the next time.
        seed: of that training: one teacher for all students. By default each student's seed has a teacher of its own.
    """

    task: str | None = None
    train: Mapping[str, Any] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Checks what only a model that learns can have, and what only a training can.

        Raises:
            ValueError: if the teacher is to be initialised, or has a seed and no training.
        """
        super().__post_init__()
        if self.initialise is not None:
            raise ValueError("'initialise' belongs to the model that learns; the teacher keeps its weights")
        if self.seed is not None and self.train is None:
            raise ValueError("'seed' is that of the teacher's training: give 'train' too")


@dataclass(frozen=True, kw_only=True)
class Headline:
    """What the table of methods shows of a recipe's results.

    Attributes:
        metric: which number.
        wrong: show 100 (1 - metric) instead: the share that is wrong, in per cent.
        rows: show only those alternatives of the grid that have one of these values, path (or ``label``) -> values.
        label: what the recipe is called beside others.
        paper: the paper's figure, in words.
    """

    metric: str
    wrong: bool = False
    rows: Mapping[str, list[Any]] = field(default_factory=dict)
    label: str | None = None
    paper: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train on what and how; one to one with the YAML.

    Attributes:
        method: registered name and hyper-parameters; or ``sum``: a list of such, whose losses are added up.
        model: the model that learns.
        teacher: the model it learns from, or a list of several, for methods that have one.
        data: data sets, in the form of a scenario.
        training: training arguments.
        seeds: one run for each.
        grid: ``{path: [values]}`` runs every combination, ``[{path: value, ...}, ...]`` each alternative; there a
            ``label`` beside the paths is its name in tables.
        headline: what the table of methods shows of the results.
        about: what the recipe is for, in a sentence or two.
    """

    method: Mapping[str, Any]
    model: ModelSection
    data: Mapping[str, Any]
    teacher: TeacherSection | tuple[TeacherSection, ...] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    grid: Mapping[str, list[Any]] | tuple[Mapping[str, Any], ...] | None = None
    headline: Headline | None = None
    about: str = ""

    @property
    def teachers(self) -> tuple[TeacherSection, ...]:
        """Every teacher's section: none, one or several."""
        return self.teacher if isinstance(self.teacher, tuple) else () if self.teacher is None else (self.teacher,)


class Built(NamedTuple):
    """What a recipe describes, ready for ``Trainer(*built)``."""

    method: Method
    scenario: Any
    arguments: TrainingArguments


def read(recipe: str | PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe from a file or a mapping, after ``key=value`` overrides.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown key or a wrong value, with the nearest valid one.
    """
    mapping = recipe if isinstance(recipe, Mapping) else load_yaml(recipe)
    where = "the recipe" if isinstance(recipe, Mapping) else Path(recipe).name
    checked = from_dict(Recipe, override(mapping, overrides), where=where)
    if not checked.seeds:
        raise ValueError(f"{where}: seeds is empty; give at least one, for example seeds: [0]")
    if "seed" in checked.training:
        raise ValueError(f"{where}: give 'seeds: [{checked.training['seed']}]' in place of training.seed")
    method_parts(checked)
    _arguments(checked, checked.seeds[0])
    if checked.model.initialise is not None and len(checked.teachers) != 1:
        raise ValueError(f"{where}: model.initialise needs exactly one teacher, there are {len(checked.teachers)}")
    return checked


def build(recipe: Recipe | str | PathLike[str] | Mapping[str, Any], seed: int | None = None) -> Built:
    """Makes method, scenario and training arguments.

    Args:
        recipe: a recipe, or the file or mapping it is read from.
        seed: of everything random, new weights included; by default the recipe's first.

    Raises:
        ValueError: something in the recipe does not exist or does not fit together.
    """
    from hubtransfer.recipe_data import build_scenario
    from hubtransfer.recipe_teachers import build_teachers, hand_over

    recipe = recipe if isinstance(recipe, Recipe) else read(recipe)
    seed = recipe.seeds[0] if seed is None else seed
    parts = method_parts(recipe)
    arguments = _arguments(recipe, seed)
    named = recipe.method.get("task") or (next(iter(recipe.model.tasks)) if len(recipe.model.tasks) == 1 else None)
    main = next((part for part in parts if not part.learns), parts[0])
    scenario = build_scenario(recipe.data, main.cls.scenario, task=named, seed=seed)
    _seed_everything(seed)
    model = build_model(recipe.model, scenario)
    taught: dict[str, Any] = {}
    if recipe.teachers:
        teachers = build_teachers(recipe, scenario, arguments)
        taught["teacher"] = teachers if isinstance(recipe.teacher, tuple) else teachers[0]
        hand_over(teachers[0], model, recipe.model.initialise)
        _seed_everything(seed)
    methods: list[Any] = [part.cls(model, **part.options, **(taught if part.learns else {})) for part in parts]
    try:
        return Built(reduce(add, methods), scenario, arguments)
    except TypeError as error:
        raise ValueError(f"method.sum: {error}") from error


def build_model(section: ModelSection, scenario: Any = None) -> TransferModel:
    """Makes the model of a section; heads take from the scenario's data what the section leaves out."""
    from hubtransfer.models import TransferModel

    if section.from_ is not None:
        loaded = TransferModel.from_pretrained(
            section.from_, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
        for name, task in section.tasks.items():
            if name not in loaded.tasks:
                _add_task(loaded, name, task or TaskSection(), scenario)
        return loaded
    model = TransferModel(_backbone(section))
    wanted = section.tasks or dict.fromkeys(_tasks_of(scenario), None)
    if not wanted:
        raise ValueError("model.tasks is empty and the data name no task: add tasks: {name: {head: ...}}")
    for name, task in wanted.items():
        _add_task(model, name, task or TaskSection(), scenario)
    return model.set_task(next(iter(wanted)))


def _backbone(section: ModelSection) -> Backbone:
    from hubtransfer.backbones import Backbone

    assert section.backbone is not None
    options = dict(section.options)
    if section.image_size is not None:
        options["image_size"] = section.image_size
    return Backbone.from_pretrained(
        section.backbone,
        pretrained=section.pretrained,
        trust_remote_code=section.trust_remote_code,
        revision=section.revision,
        **options,
    )


def _add_task(model: TransferModel, name: str, task: TaskSection, scenario: Any) -> None:
    head = None if task.head is None else _head(task.head, name, scenario)
    model.add_task(name, head, patch=_patch(task.patch))


def _patch(section: PatchSection) -> Any:
    from hubtransfer.patches import patch_from_dict

    if section is None:
        return None
    many = [{"kind": s} if isinstance(s, str) else s for s in (section if isinstance(section, list) else [section])]
    return patch_from_dict(many if isinstance(section, list) else many[0])


def _head(section: Mapping[str, Any] | str, task: str, scenario: Any) -> HeadConfig:
    """The head's config; the number of its outputs and their names come from the data where it leaves them out."""
    from hubtransfer.models.heads import HeadConfig

    where = f"model.tasks.{task}.head"
    given = {"kind": section} if isinstance(section, str) else {"kind": "classification", **section}
    kinds: dict[str, Any] = kinds_of(HeadConfig)
    if given["kind"] not in kinds:
        raise ValueError(unknown_name("kind", given["kind"], kinds, where))
    cls = kinds[given["kind"]]
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]
    if missing:
        source = _source_of(task, scenario)
        if source is None:
            raise ValueError(f"{where} lacks the key {missing[0]!r}, and no data set of the recipe belongs to {task!r}")
        given |= _facts(missing[0], task, source, "labels" in given, _labelled(scenario))
    return from_dict(cls, given, where)


def _facts(key: str, task: str, source: Source, named: bool, others: Sequence[Source]) -> dict[str, Any]:
    columns = source.fields.labels
    column = columns.get(task) if isinstance(columns, Mapping) else columns
    if column is None:
        raise ValueError(f"{source.where} has no labels for task {task!r}: give the head its {key!r}")
    labels = source.table.labels(column)
    if key != "num_classes":
        if labels is None:
            raise ValueError(f"{source.where}: its labels are not known without reading every example: give {key!r}")
        return {key: 1 if labels.ndim == 1 else labels.shape[1]}
    names = source.table.class_names(column) or getattr(source.dataset, "classes", None)
    if names:
        return {key: len(names)} | ({} if named else {"labels": [str(name) for name in names]})
    if labels is None:
        raise ValueError(f"{source.where}: the number of classes is not known without reading it: give {key!r}")
    alike = [one for one in others if one.task == source.task and one.fields.labels == column]  # classes in portions
    every = [labels, *(found for one in alike if (found := one.table.labels(column)) is not None)]
    real = [found[(found >= 0) & (found != 255)] if found.ndim > 1 else found[found >= 0] for found in every]
    return {key: max(int(found.max()) for found in real) + 1}


def _labelled(scenario: Any) -> list[Source]:
    """Every source of a scenario whose labels may be seen, training data first."""
    sources = [] if scenario is None else list(scenario.sources().values())
    return [s for s in sources if not s.iterable and s.fields.labels is not None]


def _source_of(task: str, scenario: Any) -> Source | None:
    sources = _labelled(scenario)
    for source in sources:
        columns = source.fields.labels
        if source.task == task or (isinstance(columns, Mapping) and task in columns):
            return source
    return next((s for s in sources if s.task is None and not isinstance(s.fields.labels, Mapping)), None)


def _tasks_of(scenario: Any) -> list[str]:
    """The tasks that the data name; for data of one unnamed task the data set's own name."""
    found: dict[str, None] = {}
    for source in _labelled(scenario):
        columns = source.fields.labels
        named = list(columns) if isinstance(columns, Mapping) else [source.task] if source.task else []
        found |= dict.fromkeys(named)
    if not found and scenario is not None:
        found[(getattr(scenario, "name", None) or "task").replace(".", "-").replace("/", "-")] = None
    return list(found)


def _arguments(recipe: Recipe, seed: int) -> TrainingArguments:
    from hubtransfer.training import TrainingArguments

    return from_dict(TrainingArguments, {**recipe.training, "seed": seed}, where="training")


def _seed_everything(seed: int) -> None:
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
