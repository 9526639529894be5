"""Model cards: the README.md of a saved folder, written from what really ran.

Every number comes from the `run` a trainer recorded; a model without one gets a card that says nothing was measured.
The text around the numbers is `card_template.md` beside this file (jinja2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any

import jinja2

from hubtransfer.evaluation.confidence import mean_interval
from hubtransfer.evaluation.stream_metrics import accuracy_table
from hubtransfer.models.card_metadata import base_model, metadata, patch_configs, title_of, unique

MARKER = (
    "<!-- Made by hubtransfer for {name}. Take this line out and the card is yours: no save or push replaces it. -->"
)
_MARKER = re.compile(re.escape(MARKER).replace(r"\{name\}", "(?P<name>.+)"))
LOCAL = frozenset({"output_dir"})  # arguments that say something about a machine and nothing about the model


def write(
    folder: str | Path,
    model: Any,
    run: Mapping[str, Any] | None = None,
    task: str | None = None,
    *,
    name: str | None = None,
    license: str | None = None,
) -> str:
    """Write README.md into a saved folder, unless a person wrote one that is there already.

    Args:
        folder: Where the model or patch was saved. Of the run's plots, the ones that lie in it are shown.
        model: The `TransferModel`.
        run: What the trainer recorded: `method` {name, title, paper, citation, config}, `training` {argument: value},
            `data` {name: {fingerprint, examples}}, `results` [{task, dataset, split, metric, values (one a seed), n}],
            `parameters` {trunk, changed, changed_percent}, `versions` {package: version}, `command`, `seeds`, `plots`
            and, if wanted, `license`. Any of them may be missing; what is missing is left out of the card.
        task: Given when the folder holds this task's patch alone.
        name: How the loading code calls the folder or repository; by default the folder's own name.
        license: By default the run's, then the base model's.

    Returns:
        The text that README.md has now.

    Raises:
        ValueError: There is no such task, or a result has no values.
    """
    folder = Path(folder)
    path = folder / "README.md"
    if path.exists() and not is_generated(text := path.read_text(encoding="utf-8")):
        return text
    here = [plot for plot in (run or {}).get("plots", ()) if _stays_inside(plot) and (folder / plot).is_file()]
    text = render(
        model, {**(run or {}), "plots": here} if run else None, task, name=name or folder.name, license=license
    )
    path.write_text(text, encoding="utf-8")
    return text


def is_generated(text: str) -> bool:
    """Whether a card was made here, so that making it anew loses no one's work."""
    return _MARKER.search(text) is not None


def readdress(text: str, name: str) -> str:
    """The same generated card for a folder or repository of another name: its loading code loads from there."""
    found = _MARKER.search(text)
    if not found:
        return text
    old = found["name"]
    for call in ("TransferModel.from_pretrained(", "load_patch("):
        text = text.replace(f"{call}{_quote(old)}", f"{call}{_quote(name)}")
    for title in ("# ", "- name: "):  # the second is in the model-index
        text = text.replace(f"\n{title}{title_of(old)}\n", f"\n{title}{title_of(name)}\n", 1)
    return text.replace(found[0], MARKER.format(name=name))


def render(
    model: Any, run: Mapping[str, Any] | None, task: str | None = None, *, name: str, license: str | None = None
) -> str:
    """The card's text; see `write`."""
    if task is not None and task not in model.tasks:
        raise ValueError(f"there is no task {task!r} to write a card about; the model has {sorted(model.tasks)}")
    tasks = {key: spec for key, spec in model.tasks.items() if task in (None, key)}
    known = dict(run or {})
    results = [
        {**row, "values": [float(value) for value in row["values"]]}
        for row in known.get("results") or ()
        if task is None or row.get("task") in (None, task)
    ]
    for row in results:
        if not row["values"]:
            raise ValueError(f"the result {row['metric']!r} on {row['dataset']!r} has no values")
    license = license or known.get("license") or _base_license(model)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["capital"] = lambda text: text[:1].upper() + text[1:]
    text = environment.get_template("card_template.md").render(
        metadata=metadata(
            model, known, results, tasks, name=name, license=license, patch_only=task is not None
        ).to_yaml(),
        marker=MARKER.format(name=name),
        title=title_of(name),
        patch_only=task is not None,
        base=_base_text(model),
        tasks=[{"name": key} for key in tasks],
        task_rows=[_task_row(key, spec) for key, spec in tasks.items()],
        labels={key: spec.head.labels for key, spec in tasks.items() if getattr(spec.head, "labels", None)},
        code=_code(model, name, tasks, patch_only=task is not None),
        parameters=_parameters(model, known, tasks),
        has_run=run is not None,
        method=_method(known),
        method_rows=_rows(known.get("method", {}).get("config") or {}),
        training_rows=_rows(
            {k: v for k, v in (known.get("training") or {}).items() if k not in LOCAL and v is not None}
        ),
        data_rows=[
            [_cell(key), _cell(_known(facts.get("examples"))), _cell(_known(facts.get("fingerprint")))]
            for key, facts in (known.get("data") or {}).items()
        ],
        result_rows=[_result_row(row) for row in results],
        interval_note=_interval_note(results),
        stream=_stream(known),
        plots=[{"path": p, "title": PurePosixPath(p).stem.replace("_", " ")} for p in known.get("plots", ())],
        command=known.get("command"),
        seeds=known.get("seeds") or [],
        version_rows=[[_cell(key), _cell(value)] for key, value in (known.get("versions") or {}).items()],
        licence_note=None if license else "No licence was given. The licences of the base model and of the data apply.",
        citations=_citations(known, tasks),
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


# ---- parts of the text


def _base_text(model: Any) -> str:
    source = model.backbone.source
    if base := base_model(model):
        return f"[{base}](https://huggingface.co/{base})"
    if source.get("library") == "module":
        return "a backbone of its own"
    return f"`{source['name']}`{' (from random weights)' if source.get('pretrained') is False else ''}"


def _base_license(model: Any) -> str | None:
    return (getattr(model.backbone.trunk, "pretrained_cfg", None) or {}).get("license") if base_model(model) else None


def _code(model: Any, name: str, tasks: Mapping[str, Any], *, patch_only: bool) -> str:
    """Python that loads it and predicts; `inputs` is the reader's."""
    source, task = model.backbone.source, next(iter(tasks), None)
    own = source.get("library") == "module"
    lines = ["import hubtransfer as ht", ""]
    if own:
        lines += ["backbone = ht.Backbone.from_module(module)  # the module it was made with", ""]
    if patch_only:
        if not own:
            options = "".join(f", {key}={value!r}" for key, value in source.get("kwargs", {}).items())
            if source.get("pretrained") is False:
                lines += ["# random weights: take the very backbone that the patch was made for"]
                options += ", pretrained=False"
            lines += [f"backbone = ht.Backbone.from_pretrained({_quote(source['name'])}{options})"]
        lines += ["model = ht.TransferModel(backbone)", f"task = model.load_patch({_quote(name)})"]
        task_code = "task"
    else:
        lines += [f"model = ht.TransferModel.from_pretrained({_quote(name)}{', backbone=backbone' if own else ''})"]
        task_code = _quote(task) if task else ""
    inputs = {"image": "images", "text": "texts"}.get(model.backbone.modality, "inputs")
    if task and tasks[task].head is not None:
        lines += [f"predictions = model.predict({inputs}, task={task_code})"]
    elif task:
        lines += [f"features = model.features(model.processor({inputs}), task={task_code}).pooled"]
    else:
        lines += [f"features = model.features(model.processor({inputs})).pooled"]
    return "\n".join(lines)


def _parameters(model: Any, run: Mapping[str, Any], tasks: Mapping[str, Any]) -> str | None:
    facts = run.get("parameters")
    if facts:
        return (
            f"{facts['changed']:,} parameters were trained; the backbone has {facts['trunk']:,} "
            f"({facts['changed_percent']:.3g} %)."
        )
    trunk = sum(parameter.numel() for parameter in model.backbone.trunk.parameters())
    shares = [
        f"`{key}`: {share * trunk:,.0f} parameters, {100 * share:.3g} % of the backbone's {trunk:,}."
        for key in tasks
        if (share := model.changed_share(key))
    ]
    return "Patch and head of each task:\n\n" + "\n".join(f"- {line}" for line in shares) if shares else None


def _method(run: Mapping[str, Any]) -> dict[str, Any] | None:
    method = run.get("method")
    if not method:
        return None
    title = (method.get("title") or method.get("name", "not named")).rstrip(".")
    return {"title": title, "paper": method.get("paper")}


def _rows(config: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Rows of a configuration, inner ones with dotted names."""
    rows: list[list[str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            rows += _rows(value, f"{prefix}{key}.")
        else:
            rows.append([f"`{_cell(prefix + str(key))}`", _cell(value)])
    return rows


def _worth_telling(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in LOCAL and value is not None}


def _result_row(row: Mapping[str, Any]) -> list[str]:
    values = row["values"]
    bounds = "one seed"
    if len(values) > 1:
        sure = mean_interval(values)
        bounds = f"{_number(sure.low)} to {_number(sure.high)}"
    about = [_cell(row.get(key) or "") for key in ("task", "dataset", "split", "metric")]
    return [*about, _number(fmean(values)), bounds, str(len(values)), _cell(_known(row.get("n")))]


def _stream(known: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """Heads and rows of what a stream of tasks left after each of them."""
    if not known.get("stream"):
        return None
    heads, rows = accuracy_table(known["stream"])
    return [_cell(head) for head in heads], [[_cell(value) for value in row] for row in rows]


def _interval_note(results: Sequence[Mapping[str, Any]]) -> str:
    counts = {len(row["values"]) > 1 for row in results}
    notes = []
    if True in counts:
        notes.append("The interval is Student's t over the seeds, for the mean over many of them.")
    if False in counts:
        notes.append("A figure from one seed has no interval: another seed may give another figure.")
    return " ".join(notes)


def _task_row(name: str, spec: Any) -> list[str]:
    head = spec.head
    width = "" if head is None else head.width
    patches = ", ".join(type(config).__name__.removesuffix("Config") for config in patch_configs(spec)) or "none"
    return [f"`{_cell(name)}`", type(head).__name__ if head is not None else "none", str(width), patches]


def _citations(run: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[str]:
    cited = [run.get("method", {}).get("citation")]
    cited += [getattr(config, "citation", None) for spec in tasks.values() for config in patch_configs(spec)]
    return unique(text.strip() for text in cited if text)


# ---- small change


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return str(value).replace("|", r"\|").replace("\n", " ")


def _known(value: Any) -> Any:
    return "not known" if value is None else value


def _number(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.4g}"


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
