"""What really ran, as plain data: the source of results files and model cards."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubtransfer.data import Source
from hubtransfer.methods.registry import title_of

if TYPE_CHECKING:
    from hubtransfer.training.trainer import Trainer

_PACKAGES = ("hubtransfer", "torch", "timm", "transformers", "accelerate", "datasets", "peft", "safetensors")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a run depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source tree"
    return found


def data_facts(source: Source) -> dict[str, Any]:
    """Returns the content hash and the size of a data set; a stream has neither."""
    if source.iterable:
        return {"fingerprint": None, "examples": None}
    return {"fingerprint": source.table.fingerprint(), "examples": len(source.table)}


def run_record(trainer: "Trainer", metrics: dict[str, float], seconds: float) -> dict[str, Any]:
    """Returns everything a reader needs to judge and repeat a run, JSON-ready."""
    method, scenario = trainer.method, trainer.scenario
    evaluations = scenario.evaluations()
    results = []
    for key, value in metrics.items():
        name, _, metric = key.rpartition("/")
        name = name or ("all tasks" if len(evaluations) > 1 else next(iter(evaluations), "evaluation"))
        source, task = evaluations.get(name, (None, None))
        results.append(
            {
                "task": task or method.task,
                "dataset": scenario.name or (source.name if source else None) or name,
                "split": name,
                "metric": metric,
                "values": [value],
                "n": None if source is None or source.iterable else len(source.table),
            }
        )
    trunk = sum(p.numel() for p in method.model.backbone.parameters())
    changed = sum(p.numel() for name, p in method.model.named_parameters() if name in trainer.trained)
    history = trainer.history.record() if trainer.history is not None and trainer.history.rows else None
    return {
        "method": {
            "name": method.name,
            "title": title_of(type(method)),
            "paper": method.paper,
            "source": method.source,
            "citation": method.citation,
            "config": method.hyper_parameters(),
        },
        "training": trainer.arguments_as_dict(),
        "data": {name: data_facts(source) for name, source in scenario.sources().items()},
        "results": results,
        "parameters": {
            "trunk": trunk,
            "total": sum(p.numel() for p in method.model.parameters()),
            "changed": changed,
            "changed_percent": 100 * changed / max(1, trunk),
        },
        **({"stream": history} if history is not None else {}),
        "steps": trainer.cursor.total,
        "seconds": round(seconds, 2),
        "versions": versions(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seeds": [trainer.arguments.seed],
        "processes": trainer.runtime.world,
        "plots": [file.name for file in sorted(Path(trainer.arguments.output_dir).glob("*.png"))],
    }
