"""The contract of a method."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from hubtransfer.config import to_dict
from hubtransfer.data import Batch, SingleTask
from hubtransfer.methods import registry
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.update import AnyBatch, Loss, Terms
from hubtransfer.models import TransferModel
from hubtransfer.patches import train_where_it_learns


class Method(nn.Module):
    """Says which losses train which parameters in which order; owns every network and buffer that takes part.

    A subclass names itself in its header and overrides `stages`, and `groups` where there is more than one:

        class KD(Method, name="kd", config=KDConfig, scenario=SingleTask): ...

    Its `state_dict` is training state: it goes into checkpoints and is never exported. What is exported is `model`.

    Attributes:
        model: The model that is trained and saved.
        config: Its hyper-parameters, a frozen dataclass, or `None`.
        task: Name of the model's task that it trains.
        growth: Operations that changed the method's structure, in order; replayed when a checkpoint is loaded.
        paper: Short reference, such as "Hinton 2015".
        source: Address of the paper.
        citation: BibTeX entry; flows into model cards.
        over_batch: Whether a loss compares the examples of one process's batch, so that more processes see other pairs.
    """

    name: ClassVar[str] = ""
    config_class: ClassVar[type | None] = None
    scenario: ClassVar[type] = SingleTask
    paper: ClassVar[str] = ""
    source: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    over_batch: ClassVar[bool] = False

    def __init_subclass__(
        cls, name: str | None = None, config: type | None = None, scenario: type | None = None, **kwargs: Any
    ) -> None:
        """Registers a subclass that has a name."""
        super().__init_subclass__(**kwargs)
        cls.config_class = config if config is not None else cls.config_class
        cls.scenario = scenario if scenario is not None else cls.scenario
        if name is not None:
            cls.name = name
            registry.register(name, cls)

    def __init__(self, model: TransferModel, config: Any = None, *, task: str | None = None) -> None:
        """Takes the model, the hyper-parameters and the task (by default the model's active one).

        Raises:
            ValueError: if the model has no such task.
        """
        super().__init__()
        self.model = model
        self.config = config
        task = model.active_task if task is None else task
        if task not in model.tasks:
            known = list(model.tasks)
            near = difflib.get_close_matches(str(task), known, n=1) or known
            advice = f"did you mean {near[0]!r}?" if near else "add one with model.add_task(name, head)."
            raise ValueError(f"{type(self).__name__}: the model has no task {task!r}; {advice}")
        self.task: str = task
        self.growth: list[tuple[str, dict[str, Any]]] = []

    @classmethod
    def configure(cls, options: Mapping[str, Any]) -> Any:
        """Makes the method's config from keywords.

        Raises:
            TypeError: if a keyword is unknown; the message names the nearest.
        """
        if cls.config_class is None:
            if options:
                raise TypeError(f"{cls.__name__} has no hyper-parameters, got {sorted(options)}")
            return None
        known = [field.name for field in fields(cls.config_class)]
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise TypeError(f"{cls.__name__} has no hyper-parameter {key!r}; {hint}It has {', '.join(known)}.")
        return cls.config_class(**options)

    def forward(self, loss: Loss, batch: AnyBatch) -> Terms:
        """Evaluates one of the method's own losses.

        Going through `forward` lets the same loss run inside DDP and, through `torch.func.functional_call`, with
        look-ahead weights.
        """
        return loss(batch)

    def labels(self, batch: Batch) -> Tensor:
        """Returns a batch's labels of the method's task.

        Raises:
            ValueError: if it has none.
        """
        labels = batch.labels.get(self.task) if isinstance(batch.labels, dict) else batch.labels
        if labels is None:
            raise ValueError(
                f"{type(self).__name__} learns task {self.task!r} from labels, but these data have none; "
                "name their column, e.g. columns={'labels': '<column>'}"
            )
        return labels

    def predict(self, batch: Batch, task: str) -> Tensor:
        """Returns a task's logits for evaluation; override where they can be had cheaper, such as from a cache."""
        return self.model(**batch.inputs, task=task).logits

    def train(self, mode: bool = True) -> "Method":
        """Puts into training mode what learns; frozen networks and their normalisation statistics stay as they are."""
        super().train(mode)
        for child in self.children():
            if not isinstance(child, TransferModel):  # which has the same rule, patches included
                train_where_it_learns(child, mode)
        return self

    def groups(self) -> Mapping[str, nn.Module | Sequence[Any]]:
        """Returns the parameters that updates name: a module, a list of parameters, or torch parameter groups.

        A parameter group may carry `lr_scale`, a factor on the group's learning rate.
        """
        return {"model": self.model}

    def stages(self, scenario: Any) -> Iterator[Stage]:
        """Yields the schedule. Pure: it may read the method's state but changes nothing."""
        raise TypeError(f"{type(self).__name__} does not say what it does: override stages()")

    def grow(self, operation: str, **kwargs: Any) -> None:
        """Changes the method's structure by one of its own operations and remembers it for reloading."""
        getattr(self, operation)(**kwargs)
        self.growth.append((operation, kwargs))

    def watched(self) -> Mapping[str, Tensor | float]:
        """Returns numbers of the method's own that a person wants to see over time, such as a weight for each task.

        The log gets their values at each of its rows, under `watched`: the mean over processes, which all have to give
        the same names. A name is `what/of what`: `weight/left` and `weight/right` are drawn together. Names of the form
        `what/a -> b` are drawn as a table of a by b.
        """
        return {}

    def hyper_parameters(self) -> dict[str, Any]:
        """Returns the config as a plain dictionary, for logs and cards."""
        return to_dict(self.config) if is_dataclass(self.config) and not isinstance(self.config, type) else {}
