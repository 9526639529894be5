"""A recipe's teachers: loaded or trained first, and what a student takes over from them before it learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtransfer.config import from_dict, to_dict, unknown_name

if TYPE_CHECKING:
    from hubtransfer.models import Teacher, TransferModel
    from hubtransfer.recipe import Recipe, TeacherSection
    from hubtransfer.training import TrainingArguments


def build_teachers(recipe: Recipe, scenario: Any, arguments: TrainingArguments) -> list[Teacher]:
    """Makes every teacher of a recipe; one that has to be trained first is kept beside the student's output folder.

    Args:
        recipe: its teachers' sections.
        scenario: of the student; heads that nobody trains take their width from its data.
        arguments: of the student: output folder and seed.

    Raises:
        ValueError: a key that the training of a teacher does not have, or a value that does not fit.
    """
    return [_teacher(section, recipe, scenario, arguments) for section in recipe.teachers]


def hand_over(teacher: Teacher, model: TransferModel, initialise: str | Mapping[str, str] | None) -> None:
    """Gives a student the teacher's weights, if it is to start from them, and its tokenizer, if it has none."""
    from hubtransfer.backbones.processor import TextProcessor
    from hubtransfer.models import initialise_from_teacher

    if initialise is not None:
        initialise_from_teacher(model, teacher, "uniform" if isinstance(initialise, str) else initialise)
    own, theirs = model.backbone.processor, teacher.model.backbone.processor
    if isinstance(own, TextProcessor) and isinstance(theirs, TextProcessor) and own.tokenizer is None:
        model.backbone.processor = replace(own, tokenizer=theirs.tokenizer)


def _teacher(section: TeacherSection, recipe: Recipe, scenario: Any, arguments: TrainingArguments) -> Teacher:
    from hubtransfer.experiment import digest
    from hubtransfer.models import OutputCache, Teacher, TransferModel
    from hubtransfer.recipe import Recipe, build, build_model
    from hubtransfer.training import Trainer

    cache = OutputCache(folder=Path(arguments.output_dir) / "teacher-cache")  # a folder for what memory has no room for
    if section.train is None:
        return Teacher(build_model(section, scenario), task=section.task, cache=cache)
    plain = {k: v for k, v in to_dict(section, defaults=False).items() if k not in ("train", "task", "seed")}
    known = ("method", "training", "data")
    for key in section.train:
        if key not in known:
            raise ValueError(unknown_name("key", key, known, "teacher.train"))
    inner = from_dict(
        Recipe, {"model": plain, "data": recipe.data, "method": {}, **section.train}, where="teacher.train"
    )
    seed = arguments.seed if section.seed is None else section.seed
    folder = Path(arguments.output_dir).parent / f"teacher-{digest([to_dict(inner, defaults=False), seed])[:12]}"
    if not (folder / "model" / "config.json").is_file():
        inner = replace(inner, training={**inner.training, "output_dir": str(folder)})
        Trainer(*build(inner, seed)).train(resume="auto")
    return Teacher(TransferModel.from_pretrained(str(folder / "model")), task=section.task, cache=cache)
