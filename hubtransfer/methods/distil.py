"""What every distillation method that adds terms to a student's loss starts from, and how such methods add up."""

import copy
import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from hubtransfer.data import Batch, SingleTask
from hubtransfer.methods.feature_pairs import FeaturePairs, Texts
from hubtransfer.methods.method import Method
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.update import Descend, Terms
from hubtransfer.models import Teacher, TransferModel, TransferModelOutput

AnyMethod = TypeVar("AnyMethod", bound=Method)
log = logging.getLogger(__name__)


class Distillation(Method, scenario=SingleTask):
    r"""A student's own loss and terms that compare it with frozen teachers.

    .. math:: L = w\, L_{labels} + \sum_k T_k

    A method says which of the student's layers it reads (`layers`), how much the labels count (`label_weight`) and what
    the terms are (`terms`). The student runs once a batch and so does each teacher, however many methods are added up:
    `KD(...) + AT(...)` is a method whose terms are both methods' and whose label weight is the product of theirs.
    Stages that a method needs before (`before`) run one method after the other; then all terms train together.
    `FineTune(...) + KD(...)` gives the terms to a method of another family (see `MethodWithTerms`).

    Attributes:
        teachers: Frozen models, in no state dict.
        layers: Layers of the student whose maps `terms` reads.
        label_weight: w, the factor on the student's own loss.
        reads: Pairs (teacher, its layers) that `terms` asks of the teachers at each step.
    """

    layers: tuple[str, ...] = ()
    reads: tuple[tuple[Teacher, tuple[str, ...]], ...] = ()
    label_weight: float = 1.0

    def __init__(
        self, model: TransferModel, teacher: Teacher | Sequence[Teacher], config: Any, task: str | None = None
    ) -> None:
        super().__init__(model, config, task=task)
        name = type(self).__name__
        given = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
        wrong = [each for each in given if not isinstance(each, Teacher)]
        if wrong or not given:
            what = type(wrong[0]).__name__ if wrong else "none"
            raise TypeError(f"{name} needs a frozen teacher: wrap the model as Teacher(model), got {what}")
        self.teachers: Any = nn.ModuleList(each.check_student(model) for each in given)

    def one_teacher(self) -> Teacher:
        """Returns the teacher, for methods that compare with a single one.

        Raises:
            ValueError: if several were given.
        """
        if len(self.teachers) != 1:
            name = type(self).__name__
            raise ValueError(
                f"{name} takes one teacher, got {len(self.teachers)}; add one {name} a teacher: "
                f"{name}(model, a) + {name}(model, b)"
            )
        return self.teachers[0]

    @property
    def like(self) -> Tensor:
        """A tensor of the student's head (or trunk), whose type and device projectors take."""
        return next(self.model.heads[self.task].parameters(), next(self.model.backbone.parameters()))

    def pair(self, rule: Any, texts: Texts = None) -> FeaturePairs:
        """Chooses the layers to compare (see `FeaturePairs`), logs them, notes which the student has to return."""
        pairs = FeaturePairs(self.model.backbone, list(self.teachers), rule, texts)
        log.info("%s compares the layers (teacher -> student) %s", type(self).__name__, pairs)
        self.layers = tuple(dict.fromkeys((*self.layers, *pairs.layers)))
        self.reads = (*self.reads, *zip(pairs.teachers, pairs.teacher_layers))
        return pairs

    @abstractmethod
    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns named scalars, already weighted, that compare the student's outputs with the teachers'."""

    def before(self, scenario: SingleTask) -> Iterator[Stage]:
        """Stages that come before the student learns from the terms; none by default. Pure, as `stages`."""
        return iter(())

    def after(self, batch: Batch) -> None:
        """Called after each step: to fill a memory, say."""

    def own_parameters(self) -> list[nn.Parameter]:
        """Returns what the method trains besides the student: projectors and the like, dropped at export."""
        student = {id(p) for p in self.model.parameters()}
        return [p for p in self.parameters() if id(p) not in student]

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """One group: the student (the task's patch and head where there is a patch) and the method's projectors."""
        what: Literal["patch", "all"] = "patch" if self.task in self.model.patches else "all"
        own = self.own_parameters()
        return {"model": [*self.model.trainable(what, self.task), *([{"params": own}] if own else [])]}

    def loss(self, batch: Batch) -> Terms:
        """Returns the terms and, where labels count, the student's own loss: the scalar `labels`."""
        student = self.model(**batch.inputs, task=self.task, layers=self.layers)
        terms = self.terms(student, batch)
        if self.label_weight:
            labels = self.model.loss(student.logits, self.labels(batch), self.task)
            terms["labels"] = labels if self.label_weight == 1 else self.label_weight * labels
        return terms

    def stages(self, scenario: SingleTask) -> Iterator[Stage]:
        """The method's own stages, if it has any (`before`), then one that descends on the sum of all terms."""
        yield from self.before(scenario)
        yield Stage("distil", scenario.train_source, [Descend(self.loss, after=self.after)])

    def __add__(self, other: Any) -> Any:
        """Returns both methods as one.

        Raises:
            ValueError: if they train other students or tasks, or one of them has a schedule that nothing can join.
        """
        if isinstance(other, Distillation):
            return SumOfTerms([*parts_of(self), *parts_of(other)])
        return other.__radd__(self) if hasattr(other, "__radd__") else self.__radd__(other)

    def __radd__(self, other: Any) -> Any:
        """Gives the terms to a method of another family."""
        from hubtransfer.methods.method_with_terms import MethodWithTerms

        if not isinstance(other, Method):
            return NotImplemented
        return MethodWithTerms(other, parts_of(self))


class SumOfTerms(Distillation):
    """Several distillation methods on one student: their terms added up, one forward of the student for all.

    The parts are views of the methods that were added: they share everything with them, but the model is registered
    with the sum alone, so that a checkpoint holds it once.

    Raises:
        ValueError: if they train other students or tasks, or one of them has a schedule that nothing can join.
    """

    parts: Any

    def __init__(self, parts: Sequence[Distillation]) -> None:
        first = parts[0]
        check_parts(first, parts)
        super().__init__(first.model, [teacher for part in parts for teacher in part.teachers], None, task=first.task)
        self.parts = nn.ModuleList(without_model(part) for part in parts)
        self.layers = tuple(dict.fromkeys(layer for part in parts for layer in part.layers))
        self.reads = all_reads(parts)
        self.label_weight = 1.0
        for part in parts:
            self.label_weight *= part.label_weight

    @property
    def paper(self) -> str:  # type: ignore[override]
        """All papers."""
        return " + ".join(dict.fromkeys(part.paper for part in self.parts))

    @property
    def source(self) -> str:  # type: ignore[override]
        """The first method's source: that of the others is in their citations."""
        return self.parts[0].source

    @property
    def citation(self) -> str:  # type: ignore[override]
        """All citations."""
        return "\n\n".join(dict.fromkeys(part.citation for part in self.parts))

    @property
    def name(self) -> str:  # type: ignore[override]
        """The parts' names."""
        return " + ".join(part.name for part in self.parts)

    def hyper_parameters(self) -> dict[str, Any]:
        """Returns every part's hyper-parameters under its name."""
        return {name: part.hyper_parameters() for name, part in named(self.parts)}

    def watched(self) -> dict[str, Tensor | float]:
        """Returns what every part watches."""
        return joint_watched(self.parts)

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """The first method's groups, and what the others train besides the student."""
        return joint_groups(self.parts[0], self.parts[1:])

    def terms(self, student: TransferModelOutput, batch: Batch) -> Terms:
        """Returns every part's terms, under the part's name."""
        return joint_terms(self.parts, self.reads, student, batch)

    def before(self, scenario: SingleTask) -> Iterator[Stage]:
        """The parts' own stages, one part after the other."""
        for name, part in named(self.parts):
            for stage in part.before(scenario):
                yield replace(stage, name=f"{name}/{stage.name}")

    def after(self, batch: Batch) -> None:
        """Tells every part."""
        for part in self.parts:
            part.after(batch)


def parts_of(method: Distillation) -> list[Distillation]:
    """The methods that were added up to this one; itself, if none were."""
    return list(method.parts) if isinstance(method, SumOfTerms) else [method]


def named(parts: Iterable[Any]) -> list[tuple[str, Any]]:
    """Each method with its name, which gets a number where there are several of its class."""
    parts = list(parts)
    names = [part.name for part in parts]
    return [(n if names.count(n) == 1 else f"{n}.{names[:k].count(n)}", parts[k]) for k, n in enumerate(names)]


def joint_watched(parts: Iterable[Any]) -> dict[str, Tensor | float]:
    """What all methods watch; where a name is taken, with the name of the method in front."""
    found: dict[str, Tensor | float] = {}
    for name, part in named(parts):
        for key, value in part.watched().items():
            found[f"{name}: {key}" if key in found else key] = value
    return found


def without_model(method: AnyMethod) -> AnyMethod:
    """A view of a method: the same modules and tensors, but for the model, which it knows and does not own."""
    view = copy.copy(method)
    view._modules = {name: module for name, module in method._modules.items() if name != "model"}
    object.__setattr__(view, "model", method.model)  # around nn.Module's registration
    return view


def check_parts(first: Method, parts: Sequence[Distillation]) -> None:
    """Checks that methods can be added up.

    Raises:
        ValueError: if they train other students or tasks, or one of them has a schedule that nothing can join.
    """
    for part in parts:
        if part.model is not first.model or part.task != first.task:
            raise ValueError(
                f"{type(first).__name__} and {type(part).__name__} train different students or tasks; "
                "give both the same model and task"
            )
        if type(part).stages is not Distillation.stages or type(part).loss is not Distillation.loss:
            raise ValueError(
                f"{type(part).__name__} has a schedule of its own and cannot be added to another method; "
                "run it first, then the sum of the others on its model"
            )


def all_reads(parts: Sequence[Distillation]) -> tuple[tuple[Teacher, tuple[str, ...]], ...]:
    """All layers that some part asks of a teacher, teacher by teacher."""
    wanted: dict[Teacher, dict[str, None]] = {}
    for teacher, layers in (pair for part in parts for pair in part.reads):
        wanted.setdefault(teacher, {}).update(dict.fromkeys(layers))
    return tuple((teacher, tuple(layers)) for teacher, layers in wanted.items())


def joint_terms(
    parts: Iterable[Any],
    reads: Sequence[tuple[Teacher, tuple[str, ...]]],
    student: TransferModelOutput,
    batch: Batch,
) -> Terms:
    """Every part's terms, under the part's name; each teacher is asked once for all."""
    for teacher, layers in reads:
        if layers:
            teacher(batch, layers=layers)  # what the parts ask for later is taken from this answer
    found: dict[str, Tensor] = {}
    for name, part in named(parts):
        found |= {f"{name}/{key}": value for key, value in part.terms(student, batch).items()}
    return found


def joint_groups(first: Any, parts: Iterable[Any]) -> dict[str, Any]:
    """The groups of one method, joined by what others train besides the student.

    Raises:
        ValueError: if two of them have a group of the same name, or the first has none to join.
    """
    groups: dict[str, Any] = {name: _as_dicts(given) for name, given in first.groups().items()}
    if "model" not in groups:
        raise ValueError(f"{type(first).__name__} trains {', '.join(groups)}: no group 'model' that terms could join")
    student = {id(p) for p in first.model.parameters()}
    for part in parts:
        for name, given in part.groups().items():
            if name != "model" and name in groups:
                who = type(part).__name__
                raise ValueError(
                    f"{who} and a method before it both have a group {name!r}; if both are {who}, give one method both "
                    f"teachers: {who}(model, [a, b])"
                )
            if name != "model":
                groups[name] = given
                continue
            for group in _as_dicts(given):
                own = [p for p in group["params"] if id(p) not in student]
                groups["model"] += [{**group, "params": own}] if own else []
    return groups


def _as_dicts(given: nn.Module | Sequence[Any]) -> list[Mapping[str, Any]]:
    """Parameter groups, from whichever form `Method.groups` gave them in."""
    if isinstance(given, nn.Module):
        return [{"params": list(given.parameters())}]
    return [dict(one) if isinstance(one, Mapping) else {"params": [one]} for one in given]
