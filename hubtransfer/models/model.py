"""`TransferModel`: one backbone, named tasks, each with its head and its patch; the only thing that is saved."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hubtransfer.backbones import Backbone, Features
from hubtransfer.config import unknown_name
from hubtransfer.models import growth, parameters
from hubtransfer.models.heads import ClassificationHead, HeadConfig, Inputs, LinearHead
from hubtransfer.models.mixed import run_mixed
from hubtransfer.models.output import TransferModelOutput
from hubtransfer.models.saving import Saving
from hubtransfer.models.serving import Serving
from hubtransfer.models.statistic_heads import StatisticHead
from hubtransfer.models.tasks import TaskSpec, check_task_name
from hubtransfer.patches import Patch, build_patch


class TransferModel(Saving, Serving):
    """A backbone with named tasks on it.

    Every task has a head, and possibly a patch: the few tensors in which it differs from the shared trunk. Running one
    task never changes the outputs of another.

        >>> import torch, hubtransfer as ht
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8))
        >>> backbone = ht.Backbone.from_module(net, dim=8, sample=torch.zeros(1, 3, 2, 2))
        >>> model = ht.TransferModel(backbone).add_task("birds", ht.ClassificationHead(5))
        >>> model(pixel_values=torch.zeros(4, 3, 2, 2), task="birds").logits.shape
        torch.Size([4, 5])

    Attributes:
        backbone: The shared trunk.
        heads: Task name -> the head's module.
        patches: Task name -> its patch, for the tasks that have one.
        tasks: Task name -> the configs of both.
        active_task: The task that runs when none is named: the one added or set last.
        growth: Operations that changed the trunk's structure, in order; replayed on loading.
        record: What trained it, as the Trainer wrote it down; cards tell of it while the weights are those measured.
    """

    def __init__(self, backbone: Backbone) -> None:
        """Wraps a backbone; it has no task yet.

        Raises:
            TypeError: if `backbone` is no `Backbone`.
        """
        if not isinstance(backbone, Backbone):
            raise TypeError(
                f"TransferModel takes a Backbone, got {type(backbone).__name__}; make one with "
                "Backbone.from_pretrained(name) or Backbone.from_module(module)."
            )
        super().__init__(backbone)
        self.tasks: dict[str, TaskSpec] = {}
        self.growth: list[tuple[str, dict[str, Any]]] = []
        self.record: dict[str, Any] | None = None

    # ---------------------------------------------------------------------------------------------------- tasks

    def add_task(self, name: str, head: HeadConfig | None = None, patch: Any = None) -> TransferModel:
        """Adds a task and makes it the active one.

        Args:
            name: Any text without a dot.
            head: What the task predicts; without one the pooled features are its output.
            patch: A patch config, a peft config, or a list of them; by default the task uses the trunk as it is.

        Raises:
            ValueError: if there is such a task already, or the head or patch does not fit the backbone.
        """
        check_task_name(name, self.tasks)
        if head is not None and not isinstance(head, HeadConfig):
            raise TypeError(f"head must be a head such as ClassificationHead(num_classes=10), got {head!r}")
        self._refuse_when_merged("add a task")
        built = None if patch is None else build_patch(patch, self.backbone)
        if head is not None:
            self.heads[name] = head.build(self.backbone, self.backbone.dim + (built.extra_dim if built else 0))
        if built is not None:
            self.patches[name] = self._placed(built)
        self.tasks[name] = TaskSpec(head, patch)
        return self.set_task(name)

    def add_patch(self, name: str, config: Any) -> TransferModel:
        """Gives an existing task a patch. Its outputs stay as they are where the patch starts as a copy of the trunk.

        Raises:
            ValueError: if there is no such task or it has a patch already.
        """
        spec = self.tasks[self.task_name(name)]
        if name in self.patches:
            raise ValueError(
                f"task {name!r} has a patch already ({spec.patch!r}); for two, add the task with patch=[first, second]"
            )
        self._refuse_when_merged("add a patch")
        patch = build_patch(config, self.backbone)
        if patch.extra_dim and name in self.heads:
            head = self.heads[name]
            if not isinstance(head, LinearHead):
                raise ValueError(
                    f"task {name!r}: this patch widens the pooled features, but its head does not read them"
                )
            self.heads[name] = head.resized(head.in_features + patch.extra_dim, head.out_features)
        self.patches[name] = self._placed(patch)
        self.tasks[name] = TaskSpec(spec.head, config)
        return self._forget_modes()

    def set_task(self, name: str) -> TransferModel:
        """Makes a task the active one.

        Raises:
            ValueError: if there is no such task; the message names the nearest.
        """
        self.active_task = self.task_name(name)
        return self

    def remove_task(self, name: str) -> TransferModel:
        """Removes a task with its head and patch; everything else stays bit for bit as it is."""
        self._refuse_when_merged("remove a task")
        del self.tasks[self.task_name(name)]
        for modules in (self.heads, self.patches):
            if name in modules:
                del modules[name]
        if self.active_task == name:
            self.active_task = next(reversed(self.tasks), None)
        return self._forget_modes()

    def extend_head(self, name: str, num_classes: int, labels: Sequence[str] | None = None) -> TransferModel:
        """Widens a classification head to `num_classes`; the outputs for the classes so far stay as they are.

        A head of statistics keeps them: later examples of any class count as if they had been there from the start.

        Args:
            name: The task.
            num_classes: New number of classes, the old ones included.
            labels: Names of all classes; by default new ones are called by their number where the old ones have names.

        Raises:
            ValueError: if the head would shrink, or is neither linear nor one of statistics.
        """
        spec = self.tasks[self.task_name(name)]
        head, old = spec.head, self.heads.get(name)
        if not isinstance(head, ClassificationHead) or not isinstance(old, (LinearHead, StatisticHead)):
            raise ValueError(f"task {name!r} has no linear classification head to extend, but {head!r}")
        if num_classes < head.num_classes:
            raise ValueError(f"task {name!r} has {head.num_classes} classes already; {num_classes} would be fewer")
        if labels is None and head.labels is not None:
            labels = (*head.labels, *map(str, range(head.num_classes, num_classes)))
        new = replace(head, num_classes=num_classes, labels=None if labels is None else tuple(labels))
        self.heads[name] = old.resized(old.in_features, num_classes, head.zero_init)
        self.tasks[name] = TaskSpec(new, spec.patch)
        return self._forget_modes()

    def task_name(self, name: str | None = None) -> str:
        """Returns `name`, or the active task's.

        Raises:
            ValueError: if there is no such task; the message names the nearest.
        """
        if name is None:
            if self.active_task is None:
                raise ValueError("the model has no task yet: model.add_task('name', ht.ClassificationHead(10))")
            return self.active_task
        if name not in self.tasks:
            raise ValueError(unknown_name("task", name, self.tasks, "the model"))
        return name

    def grow(self, op: str, **kwargs: Any) -> TransferModel:
        """Changes the trunk's structure by a registered operation and remembers it, so that loading repeats it.

        Args:
            op: Name given to `register_growth`.
            **kwargs: Its arguments, plain JSON values.

        Raises:
            ValueError: if there is no such operation, or tasks have patches (they are made for the trunk as it is).
        """
        growth.apply(self, op, kwargs)
        self.growth.append((op, copy.deepcopy(kwargs)))
        self.one_pass.clear()
        return self._forget_modes()

    # -------------------------------------------------------------------------------------------------- running

    def forward(
        self,
        pixel_values: Inputs | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        task: str | Sequence[str] | None = None,
        layers: Sequence[str] = (),
    ) -> TransferModelOutput:
        """Runs the trunk, the task's patch and its head.

        Args:
            pixel_values: Images (batch, channels, height, width), or whatever a plain module takes.
            input_ids: Tokens (batch, length), in place of `pixel_values`.
            attention_mask: (batch, length), 1 for tokens and 0 for padding.
            token_type_ids: (batch, length).
            labels: As the task's head wants them; the output then has a loss.
            task: One name for all examples, or one for each; the active task by default. In evaluation mode patches of
                most kinds share one pass of the trunk.
            layers: Maps to return in `features.maps`.

        Raises:
            ValueError: if there is no such task, or the labels cannot be its own.
        """
        inputs: Inputs | None = pixel_values
        if inputs is None:
            text = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
            inputs = {name: tensor for name, tensor in text.items() if tensor is not None}
            if not inputs:
                raise ValueError("the model got no inputs: give it pixel_values, or input_ids and attention_mask")
        if isinstance(task, str) and self.is_stored(task):
            task = [task] * len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)
        if task is not None and not isinstance(task, str):
            loss, mixed, features = run_mixed(self, inputs, labels, task, layers)
            return TransferModelOutput(loss=loss, logits=mixed, features=features)
        name = self.task_name(task)
        features = self.features(inputs, self.layers_for(name, layers), name)
        logits = self.logits(features, name, inputs)
        loss = None if labels is None else self.loss(logits, labels, name)
        return TransferModelOutput(loss=loss, logits=logits, features=features)

    def features(self, inputs: Inputs, layers: Sequence[str] = (), task: str | None = None) -> Features:
        """Runs the trunk with the task's patch (the trunk alone while there is no task).

        Args:
            inputs: A tensor, or a mapping of the backbone's inputs.
            layers: Names of the maps to return.
            task: The active one by default.
        """
        name = self.task_name(task) if task is not None or self.active_task is not None else None
        with self.turn(), self.computing(name, inputs):
            found = self.backbone(inputs, layers)
        return (
            found if not found.by_task or name is None else Features(*self.own_features(found, name)[:2], found.by_task)
        )

    def logits(self, features: Features, task: str | None = None, inputs: Inputs | None = None) -> Tensor:
        """Applies a task's head alone.

        Args:
            features: What `features` returned.
            task: The active one by default.
            inputs: The inputs, for heads that predict at their size (`DenseHead`).
        """
        name = self.task_name(task)
        head, features = self.tasks[name].head, self.own_features(features, name)
        return features.pooled if head is None else head.logits(self.heads[name], features, inputs)

    def loss(self, logits: Tensor, labels: Tensor, task: str | None = None) -> Tensor:
        """Returns the task's plain loss, a scalar.

        Raises:
            ValueError: if the task has no head, or the labels do not fit it.
        """
        with self._naming(task) as head:
            return head.loss(logits, labels)

    def check_labels(self, labels: Tensor, task: str | None = None) -> None:
        """Checks all labels of a data set before work starts.

        Raises:
            ValueError: with the task, the offending value and the number of classes.
        """
        with self._naming(task) as head:
            head.check(labels)

    def merge(self, task: str | None = None) -> TransferModel:
        """Leaves a task's patch in the trunk until `revert`, so that running the task costs nothing extra.

        No other task can run meanwhile.
        """
        name = self.task_name(task)
        self._merged_with(name)
        return self.set_task(name)

    # ------------------------------------------------------------------------------------------------- training

    def trainable(self, what: parameters.What, task: str | None = None, layer_decay: float | None = None) -> list[dict]:
        """Returns torch parameter groups, each with an `lr_scale`; see `hubtransfer.models.parameters.groups`."""
        return parameters.groups(self, what, self.task_name(task), layer_decay)

    def train_only(self, what: parameters.What, task: str | None = None) -> TransferModel:
        """Sets `requires_grad` so that exactly `trainable(what, task)` learns."""
        chosen = self.trainable(what, task)
        self.requires_grad_(False)
        for group in chosen:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        return self.train(self.training)

    def changed_share(self, task: str | None = None) -> float:
        """Returns the task's own parameters (patch and head) as a share of the trunk's."""
        name = self.task_name(task)
        own = sum(p.numel() for m in (self.heads, self.patches) if name in m for p in m[name].parameters())
        with self.unmerged():
            return own / max(1, sum(p.numel() for p in self.backbone.trunk.parameters()))

    @property
    def processor(self) -> Any:
        """Turns images or texts into the model's inputs."""
        return self.backbone.processor

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @cached_property
    def config(self) -> Any:
        """What `transformers.Trainer` asks of a model's config: which outputs it must not gather."""
        from transformers import PretrainedConfig

        config = PretrainedConfig()
        config.keys_to_ignore_at_inference = ["features"]
        return config

    def predict(self, images_or_texts: Any, task: str | Sequence[str] | None = None, batch_size: int = 64) -> list[Any]:
        """Predicts from raw images or texts; see `hubtransfer.models.predict.predict`."""
        from hubtransfer.models.predict import predict

        return predict(self, images_or_texts, task, batch_size)

    # ------------------------------------------------------------------------------------------------ mechanics

    def layers_for(self, task: str, layers: Sequence[str] = ()) -> Sequence[str]:
        """Returns `layers` and those that the task's head reads."""
        head = self.tasks[task].head
        return layers if head is None else (*layers, *(n for n in head.layers(self.backbone) if n not in layers))

    @contextmanager
    def _naming(self, task: str | None) -> Iterator[HeadConfig]:
        """Gives the task's head and puts the task's name in front of its complaints."""
        name = self.task_name(task)
        head = self.tasks[name].head
        if head is None:
            raise ValueError(
                f"task {name!r} has no head and so no loss; add it with one, such as ClassificationHead(10)"
            )
        try:
            yield head
        except ValueError as error:
            raise ValueError(f"task {name!r}: {error}") from None

    def own_features(self, features: Features, task: str) -> Features:
        """A task's own features, where tasks have networks of their own."""
        if features.by_task and task not in features.by_task:
            raise ValueError(
                f"task {task!r} has no network: the trunk was grown for the tasks {', '.join(features.by_task)}"
            )
        return features.by_task.get(task, features)

    def _placed(self, patch: Patch) -> Patch:
        return patch if self.device.type == "cpu" else patch.to(self.device)
