"""Finds methods by looking at the files: a family is a folder, a method is a file, its name is the file's name."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hubtransfer.methods.method import Method

_FOLDER = Path(__file__).parent
_registered: dict[str, type["Method"]] = {}


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """One row of the table of methods.

    Attributes:
        name: Registered name; also the file's name.
        family: Folder of the file.
        title: First sentence of the class's docstring.
        paper: Short reference such as "Hinton 2015".
        source: Address of the paper.
        scenario: Name of the scenario class the method trains on.
        config: Names and defaults of its hyper-parameters.
        cls: The class's name.
    """

    name: str
    family: str
    title: str
    paper: str
    source: str
    scenario: str
    config: dict[str, Any]
    cls: str


def families() -> list[str]:
    """Returns the names of the family folders."""
    return sorted(module.name for module in pkgutil.iter_modules([str(_FOLDER)]) if module.ispkg)


def register(name: str, cls: type["Method"]) -> None:
    """Enters a method under its name.

    Raises:
        TypeError: if another class has the name already.
    """
    known = _registered.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise TypeError(f"method {name!r} is already registered by {known.__module__}.{known.__qualname__}")
    _registered[name] = cls


def load_all() -> dict[str, type["Method"]]:
    """Imports every file of every family and returns the methods by name."""
    for family in families():
        load_family(f"hubtransfer.methods.{family}")
    return dict(sorted(_registered.items()))


def load_family(package: str) -> dict[str, type["Method"]]:
    """Imports every file of one family and returns its methods by class name."""
    module = importlib.import_module(package)
    for file in pkgutil.iter_modules(module.__path__):
        importlib.import_module(f"{package}.{file.name}")
    return {cls.__name__: cls for cls in _registered.values() if cls.__module__.startswith(package + ".")}


def find(name: str) -> type["Method"]:
    """Returns the method registered under a name.

    Raises:
        ValueError: if there is none; the message names the nearest ones.
    """
    for family in families():  # a name is a file's: all the others together take half a second to import
        if name in (file.name for file in pkgutil.iter_modules([str(_FOLDER / family)])):
            importlib.import_module(f"hubtransfer.methods.{family}.{name}")
    known = _registered if name in _registered else load_all()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or sorted(known)
        raise ValueError(f"unknown method {name!r}; did you mean {' or '.join(map(repr, near))}?")
    return known[name]


def title_of(cls: type["Method"]) -> str:
    """Returns the first line of a method's docstring, or its class name."""
    return next(iter((cls.__doc__ or "").strip().splitlines()), cls.__name__)


def rows() -> list[MethodInfo]:
    """Returns one row for every method that ships with the library, sorted by family and name."""
    table = []
    for name, cls in load_all().items():
        parts = cls.__module__.split(".")
        if parts[:2] != ["hubtransfer", "methods"]:
            continue
        defaults = {} if cls.config_class is None else {f.name: f.default for f in fields(cls.config_class)}
        table.append(
            MethodInfo(
                name=name,
                family=parts[2],
                title=title_of(cls),
                paper=cls.paper,
                source=cls.source,
                scenario=cls.scenario.__name__,
                config=defaults,
                cls=cls.__name__,
            )
        )
    return sorted(table, key=lambda row: (row.family, row.name))


def lazy_family(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__getattr__` and `__dir__` for a family package: its classes appear when they are asked for."""

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        members = load_family(package)
        if name not in members:
            near = difflib.get_close_matches(name, members, n=3) or sorted(members)
            raise AttributeError(f"module {package!r} has no method {name!r}; did you mean {' or '.join(near)}?")
        return members[name]

    def __dir__() -> list[str]:
        return sorted(load_family(package))

    return __getattr__, __dir__
