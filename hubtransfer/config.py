"""Configs as plain data: frozen dataclass <-> dict <-> YAML, strict in both directions.

Every config in the library is a frozen keyword-only dataclass that maps one to one onto YAML. Reading is
strict, because a misspelt hyper-parameter that is silently ignored costs a day of training: an unknown key is an
error that names the nearest valid one, and a value of the wrong type is an error that names the key, the value
and the type that was expected. ``from_dict(type(c), to_dict(c)) == c`` holds for every config.

Example:
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, kw_only=True)
    ... class Training:
    ...     epochs: float = 1.0
    ...     lr: float | None = None
    >>> from_dict(Training, {"epochs": 2, "lr": "1e-3"}, where="training")
    Training(epochs=2.0, lr=0.001)
    >>> from_dict(Training, {"epochz": 2}, where="training")
    Traceback (most recent call last):
    ValueError: unknown key 'epochz' in training; did you mean 'epochs'? valid: epochs, lr
    >>> override({"training": {"epochs": 1}}, ["training.epochs=2", "seeds=[0, 1]"])
    {'training': {'epochs': 2}, 'seeds': [0, 1]}
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import inspect
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from hubtransfer.yaml_text import dump_text, load_yaml, nearest, override, parse_yaml, unknown_name, write_whole

__all__ = [
    "convert",
    "dump_yaml",
    "from_dict",
    "load_yaml",
    "nearest",
    "override",
    "parse_yaml",
    "to_dict",
    "to_yaml",
    "unknown_name",
    "write_whole",
]

T = TypeVar("T")

_SEQUENCES = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_SETS = (set, frozenset, collections.abc.Set)


# ------------------------------------------------------------------------------------------------ writing


def to_dict(config: Any, *, defaults: bool = True) -> dict[str, Any]:
    """A config dataclass as plain data (dict, list, str, int, float, bool, None), ready for YAML or JSON.

    Classes that carry a ``kind`` (heads, patches) write it as a key, so that the right class is found on reading.

    Args:
        config: a dataclass instance.
        defaults: whether fields that have their default value are written.

    Raises:
        TypeError: not a dataclass instance, or a field holds something that plain data cannot express.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"to_dict takes an instance of a config dataclass, got {config!r}")
    kind = _kind(type(config))
    result: dict[str, Any] = {"kind": kind} if kind else {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.init and (defaults or not _is_default(field, value)):
            key = _key(field.name)
            result[key] = _plain(value, f"{type(config).__name__}.{key}", defaults)
    return result


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return field.default is not dataclasses.MISSING and bool(value == field.default)


def _plain(value: Any, where: str, defaults: bool = True) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value, defaults=defaults)
    if isinstance(value, Mapping):
        return {_plain(k, where): _plain(v, f"{where}.{k}", defaults) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{where}[{i}]", defaults) for i, v in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(v, where, defaults) for v in value), key=repr)
    raise TypeError(f"{where} holds {value!r} ({type(value).__name__}), which cannot be written as plain data")


def _key(field_name: str) -> str:
    """The YAML key of a field: ``from_`` stands for ``from``, which Python keeps for itself."""
    return field_name.rstrip("_") or field_name


# ------------------------------------------------------------------------------------------------ reading


def from_dict(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build the config ``cls`` from plain data.

    Args:
        cls: a dataclass; when it is the common parent of several kinds, the key ``kind`` picks the class.
        mapping: keys are field names.
        where: what the mapping is, for error messages ("training", "method").

    Raises:
        ValueError: unknown or missing key, a value of the wrong type, or a value the class itself refuses.
    """
    where = where or cls.__name__
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where} must be a mapping of {cls.__name__}'s keys, got {mapping!r}")
    data = dict(mapping)
    cls = _class_of_kind(cls, data, where)
    hints = _hints(cls)
    fields = {_key(f.name): f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ValueError(unknown_name("key", key, fields, where))
    missing = [
        name
        for name, f in fields.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks the key {missing[0]!r}; valid: {', '.join(fields)}")
    values = {
        fields[key].name: convert(hints.get(fields[key].name, Any), value, f"{where}.{key}")
        for key, value in data.items()
    }
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def convert(hint: Any, value: Any, where: str) -> Any:
    """Turn a plain ``value`` into what the type ``hint`` says, or raise a ValueError that names both.

    Accepted beyond the exact type: an int for a float, a string such as "1e-3" for a float (YAML 1.1 reads it as
    text), a list for a tuple, a mapping for a dataclass.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint in (Any, object) or isinstance(hint, TypeVar):
        return value
    if origin in (typing.Annotated, typing.Required, typing.NotRequired, ClassVar):
        return convert(args[0], value, where)
    if hint is None or hint is type(None):
        return _expect(value is None, value, hint, where, value)
    if origin in (Union, types.UnionType):
        return _union(args, value, hint, where)
    if origin is Literal:
        if any(value == a and type(value) is type(a) for a in args):
            return value
        raise ValueError(unknown_name("value", value, args, where))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    return _scalar_or_container(hint, origin or hint, args, value, where)


def _scalar_or_container(hint: Any, origin: Any, args: tuple[Any, ...], value: Any, where: str) -> Any:
    if origin is bool:
        return _expect(isinstance(value, bool), value, hint, where, value)
    if origin is int:
        return _expect(isinstance(value, int) and not isinstance(value, bool), value, hint, where, value)
    if origin is float:
        return _float(value, hint, where)
    if origin is str:
        return _expect(isinstance(value, str), value, hint, where, value)
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        found = [m for m in origin if value in (m, m.value, m.name)]
        if not found:
            raise ValueError(unknown_name("value", value, [m.value for m in origin], where))
        return found[0]
    if origin in (Path, os.PathLike):
        return _expect(isinstance(value, (str, os.PathLike)), value, hint, where, value) and Path(value)
    if origin is tuple:
        return _tuple(args, value, hint, where)
    if origin in _SEQUENCES or origin in _SETS:
        _expect(isinstance(value, (list, tuple, set, frozenset)), value, hint, where, value)
        items = [convert(args[0] if args else Any, v, f"{where}[{i}]") for i, v in enumerate(value)]
        return frozenset(items) if origin is frozenset else set(items) if origin in _SETS else items
    if origin in _MAPPINGS:
        _expect(isinstance(value, Mapping), value, hint, where, value)
        key, item = args if len(args) == 2 else (Any, Any)
        return {convert(key, k, where): convert(item, v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(origin, type):
        return _expect(isinstance(value, origin), value, hint, where, value)
    raise ValueError(f"{where} has the type {_type_name(hint)}, which plain data cannot express (got {value!r})")


def _float(value: Any, hint: Any, where: str) -> float:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return float(_expect(isinstance(value, (int, float)) and not isinstance(value, bool), value, hint, where, value))


def _tuple(args: tuple[Any, ...], value: Any, hint: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(value, (list, tuple)), value, hint, where, value)
    if not args:
        return tuple(value)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    _expect(len(value) == len(args), value, hint, where, value)
    return tuple(convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))


def _union(args: tuple[Any, ...], value: Any, hint: Any, where: str) -> Any:
    # The exact type wins, so that in `float | str` the text "1e-3" stays text and in `int | float` 3 stays an int.
    for arg in args:
        if arg in (bool, int, float, str, type(None)) and type(value) is (type(None) if arg is None else arg):
            return value
    if isinstance(value, Mapping):
        classes = [a for a in args if isinstance(a, type) and dataclasses.is_dataclass(a)]
        kinds = [k for c in classes for k in kinds_of(c).values()]
        if "kind" in value and kinds:
            return from_dict(_class_of_kind_among(kinds, value["kind"], where), value, where)
        if len(classes) == 1 and not any((get_origin(a) or a) in _MAPPINGS for a in args):
            return from_dict(classes[0], value, where)  # its own error says more than "none of these types"
    if isinstance(value, (list, tuple)):
        sequences = [a for a in args if (get_origin(a) or a) in (tuple, *_SEQUENCES)]
        if len(sequences) == 1:
            return convert(sequences[0], value, where)  # likewise
    for arg in args:
        try:
            return convert(arg, value, where)
        except ValueError:
            continue
    literals = [x for a in args if get_origin(a) is Literal for x in get_args(a)]
    if isinstance(value, str) and literals:
        others = [_type_name(a) for a in args if get_origin(a) is not Literal]
        raise ValueError(unknown_name("value", value, [*literals, *(f"<{o}>" for o in others)], where))
    return _expect(False, value, hint, where, value)


def _expect(ok: bool, value: Any, hint: Any, where: str, result: Any) -> Any:
    if ok:
        return result
    quote = " (put quotes round it if you mean text: YAML reads it otherwise)" if hint is str else ""
    raise ValueError(f"{where} must be {_type_name(hint)}, got {value!r} ({type(value).__name__}){quote}")


def _type_name(hint: Any) -> str:
    if hint is None or hint is type(None):
        return "null"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(a) for a in get_args(hint))
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "").replace("collections.abc.", "")


# ------------------------------------------------------------------------------------------------ kinds


def _kind(cls: type) -> str | None:
    kind = getattr(cls, "kind", None)
    is_field = any(f.name == "kind" for f in dataclasses.fields(cls))
    return kind if isinstance(kind, str) and not is_field else None


def kinds_of(cls: type) -> dict[str, type]:
    """Every class with a kind among ``cls`` and its subclasses."""
    found = {cls.__dict__["kind"]: cls} if isinstance(cls.__dict__.get("kind"), str) and _kind(cls) else {}
    subclasses: list[type] = cls.__subclasses__()
    for sub in subclasses:
        if dataclasses.is_dataclass(sub):
            found |= kinds_of(sub)
    return found


def _class_of_kind(cls: type[T], data: dict[str, Any], where: str) -> type[T]:
    """Take ``kind`` out of ``data`` and return the class it names; ``cls`` itself when it has no kinds."""
    kinds = kinds_of(cls)
    if not kinds:
        return cls
    if "kind" in data:
        return _class_of_kind_among(list(kinds.values()), data.pop("kind"), where)
    if not _kind(cls):
        raise ValueError(f"{where} lacks the key 'kind'; valid: {', '.join(kinds)}")
    return cls


def _class_of_kind_among(classes: Sequence[type], kind: object, where: str) -> type:
    by_kind = {_kind(c): c for c in classes}
    if kind not in by_kind:
        raise ValueError(unknown_name("kind", kind, [k for k in by_kind if k], where))
    return by_kind[kind]


def _hints(cls: type) -> dict[str, Any]:
    """Resolved annotations. A name imported only for type checkers counts as Any: it cannot be looked up."""
    try:
        return typing.get_type_hints(cls)
    except NameError:
        hints: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            owner = next(k for k in cls.__mro__ if field.name in inspect.get_annotations(k))
            try:
                text = field.type if isinstance(field.type, str) else "field_type"
                hints[field.name] = eval(text, {"field_type": field.type, **vars(sys.modules[owner.__module__])})
            except NameError:
                hints[field.name] = Any
        return hints


def to_yaml(config: Any) -> str:
    """A config (or plain data) as YAML text, keys in their own order."""
    plain = to_dict(config) if dataclasses.is_dataclass(config) else _plain(config, "the data")
    return dump_text(plain)


def dump_yaml(config: Any, path: str | os.PathLike[str]) -> Path:
    """Write a config (or plain data) as YAML; the file appears whole or not at all."""
    return write_whole(path, to_yaml(config))
