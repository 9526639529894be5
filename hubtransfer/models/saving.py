"""Saving, loading and sharing: whole models, and patches alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from hubtransfer.backbones import Backbone, Processor
from hubtransfer.config import to_dict
from hubtransfer.models import files
from hubtransfer.models.heads import HeadConfig
from hubtransfer.models.patch_files import (
    HEAD_TENSORS,
    PATCH,
    PATCH_TENSORS,
    Folder,
    describe,
    head_from,
    local_folder,
    patch_from,
    read_patch,
)
from hubtransfer.models.record import record_of
from hubtransfer.patches import Patch, patch_to_dict

if TYPE_CHECKING:
    from hubtransfer.models.model import TransferModel

Model = TypeVar("Model", bound="Saving")

MODEL, MODEL_TENSORS = "config.json", "model.safetensors"
RUN = "run.json"


class Saving:
    """How a `TransferModel` goes to folders and to the Hub, and comes back."""

    def save_pretrained(self, folder: Folder, card: str | None = None) -> Path:
        """Saves the whole model: a folder with config.json, model.safetensors, the processor's files and README.md.

        A kill at any moment leaves what was there before, or all of the new.

        Args:
            folder: Made when missing; files of other names in it stay.
            card: Text of README.md. By default a card is written when there is none yet.

        Returns:
            The folder.
        """
        return self._save_model(Path(folder), card, name=None)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name_or_path: Folder,
        *,
        revision: str | None = None,
        token: str | None = None,
        backbone: Backbone | None = None,
        trust_remote_code: bool = False,
    ) -> Model:
        """Loads a saved model from a folder or from the Hub, in evaluation mode; its outputs are bit for bit the same.

        Args:
            name_or_path: A folder, or a repository such as "me/birds".
            revision: Branch, tag or commit on the Hub.
            token: For private repositories; by default the logged-in user's.
            backbone: Needed when the model was built on a plain module: one of the same structure. It becomes part of
                the model and its tensors are overwritten.
            trust_remote_code: Whether code from the backbone's repository may run, where its architecture needs that.

        Raises:
            FileNotFoundError: if the folder is not there or holds no model.
            ValueError: if a file is damaged, or the tensors do not fit exactly.
        """
        folder = local_folder(name_or_path, revision, token)
        manifest = files.read_manifest(folder, MODEL, "model")
        with torch.random.fork_rng(devices=[]):  # loading draws random weights only to overwrite them
            if backbone is None:
                backbone = Backbone.from_source(manifest["source"], trust_remote_code=trust_remote_code)
            model = cast("TransferModel", cls(backbone))  # type: ignore[call-arg]
            for op, kwargs in manifest["growth"]:
                model.grow(op, **kwargs)
            for name, spec in manifest["tasks"].items():
                model.add_task(name, head_from(spec["head"], name), patch_from(spec["patch"]))
        if manifest["active"] is not None:
            model.set_task(manifest["active"])
        tensors = files.read_tensors(folder, MODEL_TENSORS, manifest)
        tensors |= {name: tensors[first] for name, first in manifest["aliases"].items()}
        files.fill(model.state_dict(keep_vars=True), tensors, f"{str(folder / MODEL_TENSORS)!r}")
        model.backbone.processor = Processor.load(folder)
        if (folder / RUN).is_file():
            model.record = json.loads((folder / RUN).read_text(encoding="utf-8"))
        return cast(Model, model.eval())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Pushes the whole model to the Hub as one commit and returns its address."""
        from hubtransfer.models import hub

        with hub.folder_to_push(repo_id) as folder:
            self._save_model(folder, None, name=repo_id)
            message = commit_message or "Upload model"
            return hub.push(folder, repo_id, private=private, revision=revision, token=token, commit_message=message)

    # -------------------------------------------------------------------------------------------------- patches

    def save_patch(self, folder: Folder, task: str | None = None) -> Path:
        """Saves what is one task's own, its patch and its head: kilobytes, with the trunk's fingerprint.

        Args:
            folder: Made when missing; files of other names in it stay.
            task: The active one by default.

        Returns:
            The folder.
        """
        return self._save_patch(Path(folder), task, name=None)

    def load_patch(
        self,
        name_or_path: Folder,
        task: str | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        strict: bool = True,
    ) -> str:
        """Adds a saved patch as a task, which becomes the active one.

        Args:
            name_or_path: A folder, or a repository such as "me/birds-patch".
            task: Its name here; by default the one it was saved under.
            revision: Branch, tag or commit on the Hub.
            token: For private repositories; by default the logged-in user's.
            strict: Whether the trunk's weights must be those that the patch was made for. If not, a difference is
                logged.

        Returns:
            The task's name.

        Raises:
            FileNotFoundError: if the folder is not there or holds no patch.
            ValueError: if a file is damaged, the task exists already, or the patch was made for another backbone.
        """
        model = cast("TransferModel", self)
        saved = read_patch(name_or_path, revision, token)
        name = saved.task if task is None else task
        active = model.active_task
        with torch.random.fork_rng(devices=[]):
            try:
                model.add_task(name, saved.head, saved.patch)
            except ValueError as error:
                if name in model.tasks or saved.made_for == describe(model.backbone.source):
                    raise
                raise saved.misfit(model.backbone, error) from None
        try:
            try:
                if saved.tensors:
                    model.patches[name].load_tensors(saved.tensors)  # type: ignore[operator]
                if saved.weights:
                    where = str(saved.folder / HEAD_TENSORS)
                    files.fill(model.heads[name].state_dict(keep_vars=True), saved.weights, where)
            except ValueError as error:
                raise saved.misfit(model.backbone, error) from None
            saved.check_fingerprint(model.backbone, strict)
        except ValueError:
            model.remove_task(name)
            model.active_task = active
            raise
        return name

    def export_peft(self, folder: Folder, task: str | None = None) -> None:
        """Writes a task's patch so that stock PEFT, without hubtransfer, applies it to the bare trunk.

        Args:
            folder: Made when missing; gets adapter_config.json and adapter_model.safetensors (no head).
            task: The active one by default.

        Raises:
            ValueError: if the task has no patch, or PEFT has no counterpart of its kind.
        """
        from hubtransfer.patches.export import export_peft

        model = cast("TransferModel", self)
        name = model.task_name(task)
        if name not in model.patches:
            raise ValueError(
                f"task {name!r} has no patch to export; those with one: {', '.join(model.patches) or 'none'}"
            )
        with model.unmerged():
            export_peft(cast(Patch, model.patches[name]), model.backbone, folder)

    def push_patch_to_hub(
        self,
        repo_id: str,
        task: str | None = None,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Pushes one task's patch and head to the Hub as one commit and returns its address."""
        from hubtransfer.models import hub

        with hub.folder_to_push(repo_id) as folder:
            self._save_patch(folder, task, name=repo_id)
            message = commit_message or "Upload patch"
            return hub.push(folder, repo_id, private=private, revision=revision, token=token, commit_message=message)

    # ------------------------------------------------------------------------------------------------ mechanics

    def _save_model(self, folder: Path, card: str | None, name: str | None) -> Path:
        model = cast("TransferModel", self)

        def write(staging: Path) -> None:
            tensors, aliases = files.distinct(model.state_dict())
            files.write_tensors(staging / MODEL_TENSORS, tensors)
            tasks = {
                task: {"head": _head(spec.head), "patch": _patch(spec.patch)} for task, spec in model.tasks.items()
            }
            files.write_json(
                staging / MODEL,
                _header("model")
                | {
                    "source": model.backbone.source,
                    "fingerprint": model.backbone.fingerprint(),
                    "growth": [list(entry) for entry in model.growth],
                    "tasks": tasks,
                    "active": model.active_task,
                    "aliases": aliases,
                    "sha256": {MODEL_TENSORS: files.sha256(staging / MODEL_TENSORS)},
                },
            )
            model.processor.save(staging)
            _write_run(staging, model, None)
            _write_card(staging, folder, model, card, None, name)

        with model.unmerged():
            files.write_folder(folder, MODEL, write)
        return folder

    def _save_patch(self, folder: Path, task: str | None, name: str | None) -> Path:
        model = cast("TransferModel", self)
        task = model.task_name(task)
        spec = model.tasks[task]
        if task not in model.patches and task not in model.heads:
            raise ValueError(f"task {task!r} has neither a patch nor a head: there is nothing to save")

        def write(staging: Path) -> None:
            if task in model.patches:
                files.write_tensors(staging / PATCH_TENSORS, model.patches[task].tensors())  # type: ignore[operator]
            if task in model.heads:
                files.write_tensors(staging / HEAD_TENSORS, model.heads[task].state_dict())
            files.write_json(
                staging / PATCH,
                _header("patch")
                | {
                    "task": task,
                    "head": _head(spec.head),
                    "patch": _patch(spec.patch),
                    "source": model.backbone.source,
                    "fingerprint": model.backbone.fingerprint(),
                    "sha256": {path.name: files.sha256(path) for path in sorted(staging.glob("*.safetensors"))},
                },
            )
            _write_run(staging, model, task)
            _write_card(staging, folder, model, None, task, name)

        with model.unmerged():
            files.write_folder(folder, PATCH, write)
        return folder


def _header(what: str) -> dict[str, Any]:
    from hubtransfer import __version__

    return {"library": "hubtransfer", "version": __version__, "format": files.FORMAT, "holds": what}


def _head(config: HeadConfig | None) -> dict[str, Any] | None:
    return None if config is None else to_dict(config)


def _patch(config: Any) -> Any:
    return None if config is None else patch_to_dict(config)


def _write_run(staging: Path, model: TransferModel, task: str | None) -> None:
    record = record_of(model, task)
    if record is not None:
        files.write_json(staging / RUN, record)


def _write_card(
    staging: Path, folder: Path, model: nn.Module, text: str | None, task: str | None, name: str | None
) -> None:
    """A card for people. One that a person wrote stays, and so does a generated one while the weights are the same."""
    from hubtransfer.models import card

    there = folder / "README.md"
    if text is None or card.is_generated(text):
        if there.is_file() and not card.is_generated(there.read_text(encoding="utf-8")):
            return
        if text is None and there.is_file() and _hashes(staging) == _hashes(folder):
            return  # it may tell of the run that made these weights
    if text is None:
        run = record_of(cast("TransferModel", model), task)
        card.write(staging, model, run=run, task=task, name=name or folder.name)
    else:
        (staging / "README.md").write_text(text, encoding="utf-8")


def _hashes(folder: Path) -> list[Any]:
    manifests = [folder / name for name in (MODEL, PATCH)]
    return [json.loads(path.read_text(encoding="utf-8")).get("sha256") for path in manifests if path.is_file()]
