"""``hubtransfer methods`` and ``hubtransfer patches``, and the same tables for the README."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import hubtransfer
from hubtransfer.commands import display
from hubtransfer.config import write_whole


def methods(as_json: bool, markdown: bool, readme: str | None = None) -> None:
    """Lists the methods."""
    if readme is not None:
        text = Path(readme).read_text(encoding="utf-8")
        before, _, after = between(text, "tables")
        write_whole(readme, f"{before}\n{readme_tables()}\n\n{after}")
        return
    if markdown:
        print(readme_tables())
        return
    rows = method_rows()
    if as_json:
        display.as_json(rows)
        return
    display.table(
        f"{len(rows)} methods",
        ["name", "family", "paper", "data", "hyper-parameters"],
        [(r["name"], r["family"], r["paper"], r["scenario"], display.options(r["config"])) for r in rows],
    )


def patches(as_json: bool) -> None:
    """Lists the kinds of patches."""
    rows = patch_rows()
    if as_json:
        display.as_json(rows)
        return
    display.table(
        "Patches",
        ["kind", "class", "paper", "what", "options"],
        [(r["kind"], r["class"], r["paper"], r["summary"], display.options(r["options"])) for r in rows],
    )


def method_rows() -> list[dict[str, Any]]:
    """One row for each registered method, plain data."""
    from hubtransfer import methods

    return [{**dataclasses.asdict(row), "config": _defaults_of(row.config)} for row in methods.rows()]


def patch_rows() -> list[dict[str, Any]]:
    """One row for each registered kind of patch, plain data."""
    from hubtransfer.patches import PATCHES, patches

    options = {kind: {f.name: _default(f) for f in dataclasses.fields(cls)} for kind, cls in PATCHES.items()}
    return [{**row, "options": options.get(row["kind"], {})} for row in patches()]


def between(text: str, name: str) -> tuple[str, str, str]:
    """Splits a text at the comments ``<!-- name:begin ... -->`` and ``<!-- name:end -->``, which stay outside.

    Raises:
        ValueError: it has no such comments.
    """
    found = re.search(rf"<!-- {name}:begin.*?-->\n(.*?)<!-- {name}:end -->", text, flags=re.DOTALL)
    if found is None:
        raise ValueError(f"there are no comments <!-- {name}:begin --> and <!-- {name}:end --> in the text")
    return text[: found.start(1)], found[1], text[found.end(1) :]


def readme_tables() -> str:
    """The README's tables: families, methods with measured figures, patches."""
    lines = ["| family | method | paper | data | measured here | in the paper |", "|---|---|---|---|---|---|"]
    for r in method_rows():
        paper = f"[{r['paper']}]({r['source']})" if r["source"] else r["paper"]
        what = f"`{r['cls']}` (`{r['name']}`): {_sentence(r['title'])}"
        ours, theirs = _figures(r["family"], r["name"])
        lines.append(f"| {r['family']} | {what} | {paper} | `{r['scenario']}` | {ours} | {theirs} |")
    lines += ["", "| patch | what a task owns | paper |", "|---|---|---|"]
    lines += [f"| `{r['class']}` (`{r['kind']}`) | {_sentence(r['summary'])} | {r['paper']} |" for r in patch_rows()]
    return "\n".join(lines)


def _figures(family: str, method: str) -> tuple[str, str]:
    """Figures from the results files beside the method's recipes (there are none in an installed package)."""
    ours, theirs = [], []
    for file in sorted((Path(hubtransfer.__file__).parents[1] / "recipes" / family).glob("*.results.json")):
        document = json.loads(file.read_text(encoding="utf-8"))
        headline = document.get("headline")
        if document["method"] != method or not headline:
            continue
        name = file.name.removesuffix(".results.json")
        link = f"[{name.removeprefix(method + '_')}](recipes/{family}/{name}.yaml)"
        ours.append(f"{link} {_headline(document, headline)}")
        theirs += [headline["paper"]] if headline.get("paper") else []
    return "<br>".join(ours), "<br>".join(theirs)


def _headline(document: dict[str, Any], headline: dict[str, Any]) -> str:
    """What a recipe's headline shows of its results."""
    wrong, chosen = headline.get("wrong", False), headline.get("rows", {})
    teachers = [{**row, "metric": f"teacher/{row['metric']}"} for row in document.get("teachers", ())]
    known = [({"label": row.get("name"), **row["overrides"]}, row) for row in document["summary"]]
    rows = [row for changes, row in known if all(changes.get(k) in v for k, v in chosen.items())]
    wanted = headline["metric"]
    told = [row for row in teachers + rows if wanted in (row["metric"], row["metric"].rpartition("/")[2])]
    shown = [_figure(row, wanted, wrong) for row in told]
    return f"{'error in %' if wrong else wanted}: {'; '.join(shown)}"


def _figure(row: dict[str, Any], wanted: str, wrong: bool) -> str:
    changes = {path.rpartition(".")[2]: value for path, value in row["overrides"].items() if _is_plain(value)}
    where = row["metric"].removesuffix(wanted).removesuffix("/")
    named = [row["name"]] if "name" in row else [f"{name} {value}" for name, value in changes.items()]
    cell = ", ".join([*named, *([where] if where else [])])
    factor, digits = (100, 2) if wrong else (1, 3)
    mean = 100 * (1 - row["mean"]) if wrong else row["mean"]
    low, high = row["interval"] or (0, 0)
    half = "" if row["interval"] is None else f" ± {factor * (high - low) / 2:.{digits}f}"
    return f"{cell + ': ' if cell else ''}{mean:.{digits}f}{half}"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _sentence(text: str) -> str:
    text = text.strip()
    return (text if text.endswith("...") else text.removesuffix(".")).replace("|", "\\|")


def _defaults_of(config: dict[str, Any]) -> dict[str, Any]:
    return {k: "(required)" if v is dataclasses.MISSING else _readable(v) for k, v in config.items()}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return _readable(field.default)
    return "(required)" if field.default_factory is dataclasses.MISSING else _readable(field.default_factory())


def _readable(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str, list, dict)) else str(value)
