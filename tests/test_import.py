"""The package's face: lazy, quick, complete, and helpful about names that do not exist."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hubtransfer as ht

PACKAGE = Path(ht.__file__).parent
FAMILIES = sorted(p.parent.name for p in (PACKAGE / "methods").glob("*/__init__.py"))


def in_new_interpreter(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=PACKAGE.parent
    ).stdout


def test_import_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import json, sys, time; start = time.process_time(); import hubtransfer; "
        "seconds = time.process_time() - start; "
        "heavy = [m for m in ('torch', 'timm', 'transformers', 'numpy', 'yaml') if m in sys.modules]; "
        "print(json.dumps([seconds, heavy]))"
    )
    runs = [json.loads(in_new_interpreter(code)) for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < 0.3
    assert runs[0][1] == []


def test_naming_a_method_loads_that_method_alone() -> None:
    code = (
        "import json, sys; from hubtransfer.methods import find; find('er'); "
        "print(json.dumps([name for name in sys.modules "
        "if name.startswith('hubtransfer.methods.') and name.count('.') == 3 or name == 'scipy']))"
    )
    assert json.loads(in_new_interpreter(code)) == ["hubtransfer.methods.continual.er"]


def test_type_checkers_and_the_interpreter_see_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    imported = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert imported == ht._WHERE


@pytest.mark.parametrize("name", sorted(ht._WHERE))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(ht, name).__name__ == name
    assert name in dir(ht)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_an_attribute_and_has_a_short_module_name(family: str) -> None:
    short = importlib.import_module(f"hubtransfer.{family}")
    names = [row.cls for row in ht.methods() if row.family == family]
    assert names
    for name in names:
        method = getattr(importlib.import_module(f"hubtransfer.methods.{family}"), name)
        assert getattr(short, name) is method
        assert getattr(getattr(ht, family), name) is method
        assert name in dir(short)
    with pytest.raises(AttributeError, match="did you mean"):
        getattr(short, names[0] + "x")


def test_methods_is_a_package_and_a_function() -> None:
    rows = ht.methods()
    assert rows
    assert {row.family for row in rows} <= set(FAMILIES)
    assert importlib.import_module("hubtransfer.methods") is ht.methods


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(AttributeError, match="no attribute 'TransferModle'; did you mean 'TransferModel'"):
        _ = ht.TransferModle
    with pytest.raises(AttributeError, match="no attribute '_ipython_display_'"):
        _ = ht._ipython_display_


def test_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert ht.__version__ == version("hubtransfer")


def test_what_is_imported_is_declared() -> None:
    declared = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    named = {re.split(r"[\[<>=]", line)[0].replace("-", "_") for line in declared["dependencies"]}
    named |= {"yaml", "hubtransfer", *sys.stdlib_module_names}
    for file in PACKAGE.rglob("*.py"):  # imports at the top: those within functions may need an extra
        for node in ast.parse(file.read_text()).body:
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {module.partition(".")[0] for module in modules} <= named, file
