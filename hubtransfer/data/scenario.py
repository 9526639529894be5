"""What data there is: one task, two domains, several tasks, a stream of tasks, an unbounded stream.

Scenarios check their data sets when they are made: a missing column or an empty set is an error here, not in the
middle of training. Their sources are what a method's stages name as data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from hubtransfer.data.mixing import Mixing, Mixture
from hubtransfer.data.source import Source, is_mapping_of_datasets

Columns = Mapping[str, str | None] | None
Augmentation = Callable[..., Any] | Sequence[Callable[..., Any]] | None
Evaluations = dict[str, tuple[Source, str | None]]
"""What is evaluated: name -> (source, task)."""


@dataclass(frozen=True, eq=False)
class SingleTask:
    """One task's training data.

    Args:
        train: training set, see :class:`~hubtransfer.data.source.Source` for what it may be.
        evaluation: evaluation set, or a mapping from names to several.
        columns: renames for all of them, canonical name -> column.
        task: task of the model that learns; None: its active task.
        augment: augmentation of the training batches.
        name: for messages and tables.
    """

    train: Any
    evaluation: Any = None
    columns: Columns = None
    task: str | None = None
    augment: Augmentation = None
    name: str | None = None

    def __post_init__(self) -> None:
        self.train_source.check()
        self.evaluations()

    @cached_property
    def train_source(self) -> Source:
        """Training data."""
        return Source.of(
            self.train, columns=self.columns, task=self.task, augment=self.augment, name=self.name or "train"
        )

    @cached_property
    def _evaluations(self) -> Evaluations:
        return _evaluations(self.evaluation, "evaluation", self.columns, self.task)

    def sources(self) -> dict[str, Source]:
        """Every data set by name, training and evaluation."""
        return _all({"train": self.train_source}, self.evaluations())

    def evaluations(self) -> Evaluations:
        """Evaluation sets by name."""
        return self._evaluations


@dataclass(frozen=True, eq=False)
class DomainPair:
    """Labelled data of a source domain and unlabelled data of a target domain with the same classes.

    Args:
        source: labelled training set of the source domain.
        target: training set of the target domain; its labels are never read unless ``target_labels``.
        evaluation: evaluation set (of the target domain), or a mapping from names to several.
        columns: renames for all of them, canonical name -> column.
        target_columns: renames for the target where they differ.
        target_labels: whether methods may see the target's labels (supervised adaptation).
        task: task of the model that learns; None: its active task.
        augment: augmentation of both domains' training batches.
        name: for messages and tables.
    """

    source: Any
    target: Any
    evaluation: Any = None
    columns: Columns = None
    target_columns: Columns = None
    target_labels: bool = False
    task: str | None = None
    augment: Augmentation = None
    name: str | None = None

    def __post_init__(self) -> None:
        self.source_source.check()
        self.target_source.check()
        self.evaluations()

    @cached_property
    def source_source(self) -> Source:
        """Labelled training data of the source domain."""
        return Source.of(self.source, columns=self.columns, task=self.task, augment=self.augment, name="source")

    @cached_property
    def target_source(self) -> Source:
        """Training data of the target domain, without labels unless ``target_labels``."""
        columns = self.columns if self.target_columns is None else self.target_columns
        if not self.target_labels:
            columns = {**(columns or {}), "labels": None}
        return Source.of(self.target, columns=columns, task=self.task, augment=self.augment, name="target")

    @property
    def train_sources(self) -> dict[str, Source]:
        """Both domains as streams named ``source`` and ``target``."""
        return {"source": self.source_source, "target": self.target_source}

    @cached_property
    def _evaluations(self) -> Evaluations:
        columns = self.columns if self.target_columns is None else self.target_columns
        many = _named_sets(self.evaluation, "target")
        of_source = {"source": many.pop("source")} if "source" in many else {}
        return {
            **_evaluations(of_source, "source", self.columns, self.task),
            **_evaluations(many, "target", columns, self.task),
        }

    def evaluations(self) -> Evaluations:
        """Evaluation sets by name; a single one is called ``target``."""
        return self._evaluations

    def sources(self) -> dict[str, Source]:
        """Every data set by name, training and evaluation."""
        return _all(self.train_sources, self.evaluations())


@dataclass(frozen=True, eq=False)
class MultiTask:
    """Several tasks that learn together, on their own data sets or on one with a label column a task.

    An example may lack the label of a task: -100 or -1 for a class, NaN for a number, NaN or -1 among many labels, 255
    or -100 for a pixel. It is masked in that task's loss and metrics, which are means over the examples (of one
    process's batch) that have a label; the other tasks learn from it all the same.

    Args:
        datasets: task -> training set, when every task has its own inputs; a :class:`Source` keeps its own columns.
        train: the one training set, when tasks share inputs; then ``labels`` names each task's column.
        labels: task -> label column of ``train`` (and of ``evaluation``).
        evaluation: task -> evaluation set; with shared inputs one evaluation set.
        columns: renames for all of them, canonical name -> column.
        augment: augmentation of the training batches.
        name: for messages and tables.
        mixing: how tasks with data sets of their own take turns; by default every step has a batch of each.
    """

    datasets: Mapping[str, Any] | None = None
    train: Any = None
    labels: Mapping[str, str] | None = None
    evaluation: Any = None
    columns: Columns = None
    augment: Augmentation = None
    name: str | None = None
    mixing: Mixing | None = None

    def __post_init__(self) -> None:
        if (self.datasets is None) == (self.train is None):
            raise ValueError("MultiTask takes either {task: data set} or train= with labels={task: column}")
        if self.train is not None and not self.labels:
            raise ValueError("MultiTask(train=...) needs labels={task: column}, one entry a task")
        if self.datasets is not None and self.labels is not None:
            raise ValueError("labels={task: column} goes with train=; with a data set a task use columns=")
        if self.datasets is not None and not _named_sets(self.datasets, ""):
            raise ValueError("MultiTask needs at least one task")
        if self.mixing is not None and self.shared:
            raise ValueError(
                "mixing says how data sets take turns; tasks that share their inputs (train=...) learn from every "
                "batch together: leave it out, or give each task its own data set"
            )
        for source in self.train_sources.values():
            source.check()
        self.evaluations()

    @property
    def shared(self) -> bool:
        """Whether the tasks share their inputs."""
        return self.train is not None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self.labels or ()) if self.shared else tuple(self.datasets or ())

    @cached_property
    def train_source(self) -> Source:
        """The shared training data, labels by task; ValueError when every task has its own."""
        if not self.shared:
            raise ValueError(f"tasks {', '.join(self.tasks)} have a data set each: use train_sources")
        return Source.of(
            self.train, columns=self.columns, labels=self.labels, augment=self.augment, name=self.name or "train"
        )

    @cached_property
    def train_sources(self) -> dict[str, Source]:
        """Training streams by task; the single stream ``train`` when tasks share their inputs."""
        if self.shared:
            return {"train": self.train_source}
        sources = {
            task: Source.of(data, columns=self.columns, task=task, augment=self.augment, name=task)
            for task, data in (self.datasets or {}).items()
        }
        return sources if self.mixing is None else Mixture(sources, self.mixing)

    @cached_property
    def _evaluations(self) -> Evaluations:
        if self.evaluation is None:
            return {}
        if self.shared:
            labels = dict(self.labels or {})
            sources = {
                task: Source.of(self.evaluation, columns=self.columns, labels=column, task=task, name=task)
                for task, column in labels.items()
            }
        else:
            if not isinstance(self.evaluation, Mapping) or not set(self.evaluation) <= set(self.tasks):
                raise ValueError(f"evaluation must map tasks to data sets; tasks are: {', '.join(self.tasks)}")
            sources = {
                task: Source.of(data, columns=self.columns, task=task, name=task)
                for task, data in self.evaluation.items()
            }
        return {task: (source.check(), task) for task, source in sources.items()}

    def sources(self) -> dict[str, Source]:
        """Every data set by name, training and evaluation."""
        return _all(self.train_sources, self.evaluations())

    def evaluations(self) -> Evaluations:
        """Evaluation sets by task."""
        return self._evaluations


@dataclass(frozen=True, eq=False)
class TaskStream:
    """Tasks that come one after another; iterating gives them in order.

    Args:
        items: the tasks, each a :class:`SingleTask` or anything with ``name``, ``train_source`` and ``evaluations()``.
        kind: ``"task"``: every item has its own head and is told apart at test time; ``"class"``: one head whose
            classes come in portions; ``"domain"``: the same classes all along, the inputs change.
        name: for messages and tables.
    """

    items: Sequence[Any]
    kind: Literal["task", "class", "domain"] = "task"
    name: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("task", "class", "domain"):
            raise ValueError(f"kind must be 'task', 'class' or 'domain', not {self.kind!r}")
        if not self.items:
            raise ValueError("TaskStream needs at least one task")
        items = [item if hasattr(item, "train_source") else SingleTask(item) for item in self.items]
        names = [getattr(item, "name", None) or str(number) for number, item in enumerate(items, 1)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"names of the tasks must differ; more than once: {', '.join(twice)}")
        items = [_named(item, name, self.kind) for item, name in zip(items, names)]
        object.__setattr__(self, "items", tuple(items))

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[SingleTask]:
        return iter(self.items)

    def __getitem__(self, position: int) -> SingleTask:
        return self.items[position]

    def sources(self) -> dict[str, Source]:
        """Every data set by name, training and evaluation."""
        return _all({item.name: item.train_source for item in self.items}, self.evaluations())

    def evaluations(self) -> Evaluations:
        """Evaluation sets by the item's name; an item with several gives ``item/set``."""
        found: Evaluations = {}
        for item in self.items:
            sets = item.evaluations()
            found |= {item.name if len(sets) == 1 else f"{item.name}/{key}": value for key, value in sets.items()}
        return found


@dataclass(frozen=True, eq=False)
class DataStream:
    """Examples that arrive in their own order and are seen once, possibly without end.

    Args:
        stream: a ``datasets.IterableDataset``, torch ``IterableDataset``, a function that returns a new iterator
            over examples, or a map-style data set, which is then read in its own order.
        evaluation: evaluation set, or a mapping from names to several.
        columns: renames for all of them, canonical name -> column.
        task: task of the model that learns; None: its active task.
        augment: augmentation of the training batches.
        name: for messages and tables.
    """

    stream: Any
    evaluation: Any = None
    columns: Columns = None
    task: str | None = None
    augment: Augmentation = None
    name: str | None = None

    def __post_init__(self) -> None:
        self.train_source.check()
        self.evaluations()

    @cached_property
    def train_source(self) -> Source:
        """The stream."""
        name = self.name or "stream"
        return Source.of(
            self.stream, columns=self.columns, task=self.task, augment=self.augment, name=name, shuffle=False
        )

    @cached_property
    def _evaluations(self) -> Evaluations:
        return _evaluations(self.evaluation, "evaluation", self.columns, self.task)

    def sources(self) -> dict[str, Source]:
        """Every data set by name, training and evaluation."""
        return _all({"stream": self.train_source}, self.evaluations())

    def evaluations(self) -> Evaluations:
        """Evaluation sets by name."""
        return self._evaluations


def _named_sets(data: Any, default: str) -> dict[str, Any]:
    """Several data sets by name; a single one gets the default name. A mapping of columns is one data set."""
    if data is None:
        return {}
    return dict(data) if is_mapping_of_datasets(data) else {default: data}


def _all(train: Mapping[str, Source], evaluations: Evaluations) -> dict[str, Source]:
    """Training and evaluation sources under names that differ."""
    return dict(train) | {
        f"{name}/evaluation" if name in train else name: source for name, (source, _) in evaluations.items()
    }


def _evaluations(data: Any, default: str, columns: Columns, task: str | None) -> Evaluations:
    many = _named_sets(data, default)
    return {name: (Source.of(one, columns=columns, task=task, name=name).check(), task) for name, one in many.items()}


def _named(item: Any, name: str, kind: str) -> Any:
    """The stream's item under its name; in a stream of tasks the item's task is its name unless it says otherwise."""
    if not hasattr(item, "__dataclass_fields__"):  # an item of some other make has its name
        return item
    named: dict[str, Any] = {"name": name}
    if hasattr(item, "task"):
        named["task"] = item.task or (name if kind == "task" else None)
    return item if all(getattr(item, key) == value for key, value in named.items()) else replace(item, **named)
