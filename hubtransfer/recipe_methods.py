"""Which methods a recipe names: one, or several whose losses are added up."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_origin

from hubtransfer.config import from_dict

if TYPE_CHECKING:
    from hubtransfer.methods import Method
    from hubtransfer.recipe import Recipe


class Part(NamedTuple):
    """One of the methods whose sum a recipe trains: most recipes have one."""

    cls: type[Method]
    options: dict[str, Any]
    learns: bool

    @property
    def name(self) -> str:
        """Its registered name."""
        return self.cls.name


def method_parts(recipe: Recipe) -> list[Part]:
    """The recipe's method, or the methods it sums up, after a look at their hyper-parameters.

    Raises:
        ValueError: there is no such method or hyper-parameter, or the teacher's section is missing or not needed.
    """
    from hubtransfer.methods import find

    section = recipe.method
    entries: list[tuple[str, Any]] = [("method", section)]
    if "sum" in section:
        shared = {k: v for k, v in section.items() if k != "sum"}
        if set(shared) - {"task"}:
            key = next(k for k in shared if k != "task")
            raise ValueError(f"method: {key!r} beside 'sum': give hyper-parameters to the methods of the sum")
        if not isinstance(section["sum"], list | tuple) or not section["sum"]:
            raise ValueError(f"method.sum is a list of at least one method, got {section['sum']!r}")
        entries = [
            (f"method.sum.{k}", {**shared, **e} if isinstance(e, Mapping) else e) for k, e in enumerate(section["sum"])
        ]
    parts = []
    for where, entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            shown = dict(entry) if isinstance(entry, Mapping) else entry
            raise ValueError(f"{where} lacks the key 'name', a registered method; got {shown!r}")
        cls = find(entry["name"])
        learns = "teacher" in inspect.signature(cls.__init__).parameters
        if learns and not recipe.teachers:
            raise ValueError(f"method {cls.name!r} learns from a teacher: the recipe needs a 'teacher' section")
        if learns and isinstance(recipe.teacher, tuple) and not _takes_several(cls):
            raise ValueError(
                f"method {cls.name!r} learns from one teacher: give 'teacher' as one section, not as a list"
            )
        parts.append(Part(cls, _method_options(cls, entry, where), learns))
    if recipe.teachers and not any(part.learns for part in parts):
        raise ValueError(f"method {parts[0].name!r} has no teacher: remove the 'teacher' section")
    return parts


def method_name(recipe: Recipe) -> str:
    """The name of the recipe's method; of a sum, the names of all."""
    return " + ".join(part.name for part in method_parts(recipe))


def _takes_several(cls: type[Method]) -> bool:
    """Whether the constructor's `teacher` may be a sequence."""
    hint = inspect.get_annotations(cls.__init__, eval_str=True)["teacher"]
    return any(get_origin(one) is Sequence for one in (hint, *get_args(hint)))


def _method_options(cls: type[Method], section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keywords of the method's constructor: its hyper-parameters, strictly read, and its task or tasks."""
    options = {k: v for k, v in section.items() if k != "name"}
    parameters = inspect.signature(cls.__init__).parameters
    keywords: dict[str, Any] = {k: options.pop(k) for k in ("task", "tasks") if k in parameters and k in options}
    if cls.config_class is None:
        if options:
            raise ValueError(f"method {cls.name!r} has no hyper-parameters, got {', '.join(options)}")
        return keywords
    config: Any = from_dict(cls.config_class, options, where=where)
    return keywords | {key: getattr(config, key) for key in options}
