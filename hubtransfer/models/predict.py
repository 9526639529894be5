"""From raw images or texts to answers that people read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hubtransfer.models.heads import ClassificationHead, DenseHead, HeadConfig, MultiLabelHead, RegressionHead

if TYPE_CHECKING:
    from hubtransfer.models.mixed import Member
    from hubtransfer.models.model import TransferModel


@dataclass(frozen=True)
class Prediction:
    """The answer for one example.

    | head | label | name | score | scores |
    |---|---|---|---|---|
    | `ClassificationHead` | class index | its name | its probability | probabilities (classes,) |
    | `MultiLabelHead` | indices with probability > 0.5 | their names | their probabilities | probabilities (labels,) |
    | `RegressionHead` | the number, or a tuple of them | none, or the names | none | the numbers (outputs,) |
    | `DenseHead` | class indices (height, width) | none | probabilities (height, width) | (classes, height, width) |

    Names are the head's `labels`, or the indices as text.
    """

    label: Any
    name: Any
    score: Any
    scores: Tensor


@torch.no_grad()
def predict(
    model: TransferModel, images_or_texts: Any, task: str | Sequence[str] | None = None, batch_size: int = 64
) -> list[Prediction]:
    """Predicts from raw inputs in evaluation mode; every module's mode is afterwards what it was.

    Args:
        model: The model; its processor makes the inputs.
        images_or_texts: What the processor takes: images (list, array or uint8 tensor), texts, or one of them; or a
            mapping of the model's own input tensors.
        task: One name for all examples, or one for each; the active one by default.
        batch_size: Examples at a time.

    Raises:
        ValueError: if there is no such task, it has no head, or there is not one name for each example.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    raw = _listed(images_or_texts)
    count = len(next(iter(raw.values()), ())) if isinstance(raw, Mapping) else len(raw)
    one = [task or model.task_name()] if task is None or isinstance(task, str) else []
    tasks = one * count if one else list(task or ())
    if len(tasks) != count:
        raise ValueError(f"task= names {len(tasks)} tasks for {count} examples; give one name, or one each")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    answers: list[Prediction] = []
    with evaluating(model):
        heads = {member.name: _with_head(member) for member in model.members(one)}
        for start in range(0, count, batch_size):
            names = tasks[start : start + batch_size]
            heads |= {member.name: _with_head(member) for member in model.members(dict.fromkeys(names))}
            inputs = _inputs(model, raw, slice(start, start + batch_size))
            ready = {
                key: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
                for key, value in inputs.items()
            }
            logits = model(**ready, task=names if len(set(names)) > 1 else names[0]).logits
            rows = logits if isinstance(logits, list) else logits.float().cpu()
            answers += [_rule(heads[n])(heads[n], row.float().cpu()) for n, row in zip(names, rows)]
    return answers


def _with_head(member: Member) -> HeadConfig:
    if member.head is None:
        raise ValueError(
            f"task {member.name!r} has no head and predicts nothing; model.features(inputs) gives its features"
        )
    return member.head


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode and afterwards gives every module inside the mode it had."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode


def _listed(raw: Any) -> Any:
    """Several raw inputs, or a mapping of input tensors; one image or text becomes a list of one."""
    is_image = hasattr(raw, "convert")  # PIL's, which may have __array__ too
    many = isinstance(raw, (Mapping, Sequence, Tensor)) or hasattr(raw, "__array__")
    return raw if many and not is_image and not isinstance(raw, str) else [raw]


def _inputs(model: TransferModel, raw: Any, rows: slice) -> Mapping[str, Tensor]:
    if isinstance(raw, Mapping):
        return {key: value[rows] for key, value in raw.items()}
    return model.processor(raw[rows])


def _named(head: HeadConfig, index: int) -> str:
    return head.labels[index] if head.labels is not None else str(index)


def _class(head: HeadConfig, logits: Tensor) -> Prediction:
    scores = logits.softmax(0)
    best = int(scores.argmax())
    return Prediction(best, _named(head, best), float(scores[best]), scores)


def _several(head: HeadConfig, logits: Tensor) -> Prediction:
    scores = logits.sigmoid()
    chosen = tuple((scores > 0.5).nonzero().flatten().tolist())
    return Prediction(chosen, tuple(_named(head, i) for i in chosen), tuple(float(scores[i]) for i in chosen), scores)


def _numbers(head: HeadConfig, values: Tensor) -> Prediction:
    numbers = tuple(values.tolist())
    single = len(numbers) == 1
    names = None if head.labels is None else (head.labels[0] if single else head.labels)
    return Prediction(numbers[0] if single else numbers, names, None, values)


def _pixels(head: HeadConfig, logits: Tensor) -> Prediction:
    scores = logits.softmax(0)
    best = scores.max(0)
    return Prediction(best.indices, None, best.values, scores)


_RULES: dict[type[HeadConfig], Callable[[HeadConfig, Tensor], Prediction]] = {
    ClassificationHead: _class,
    MultiLabelHead: _several,
    RegressionHead: _numbers,
    DenseHead: _pixels,
}


def _rule(head: HeadConfig) -> Callable[[HeadConfig, Tensor], Prediction]:
    return next(_RULES[cls] for cls in type(head).mro() if cls in _RULES)
