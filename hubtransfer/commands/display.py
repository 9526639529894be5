"""Tables on the terminal, JSON for programs, log lines for people."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[str] = ()) -> None:
    """Prints a table; the columns in ``right`` are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    # A pipe has no width: print every line whole, for grep and for files
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    if title:
        console.print(title, style="bold")
    console.print(made)


def as_json(value: Any) -> None:
    """Prints JSON."""
    print(json.dumps(value, indent=1, default=str))


def percent(part: float, whole: float) -> str:
    """A share as text with enough digits to tell small shares apart."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.2f} %" if share < 10 else f"{share:.1f} %"


def options(values: Mapping[str, Any]) -> str:
    """``key=default`` pairs as text."""
    return ", ".join(f"{key}={value}" for key, value in values.items())


def short(key: str, value: Any) -> str:
    """A setting as a few words: the last part of its dotted name, and values that are mappings without braces."""
    if isinstance(value, Mapping):
        value = " ".join(f"{k}={v}" for k, v in value.items())
    return f"{key.rpartition('.')[2]} {value}" if "=" in str(value) else f"{key.rpartition('.')[2]}={value}"


def loud() -> None:
    """Shows the library's own log lines."""
    logger = logging.getLogger("hubtransfer")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
