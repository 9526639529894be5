"""What a method needs that keeps a generator beside its model: the shape and range of inputs, and a fresh start."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hubtransfer.data.seeds import seeded
from hubtransfer.methods.continual_method import ContinualMethod
from hubtransfer.methods.item_batches import item_batches

if TYPE_CHECKING:
    from hubtransfer.training.runtime import Runtime


def need_one_shape(method: Any) -> tuple[int, ...]:
    """Returns the shape of one of the model's inputs, such as (channels, height, width).

    Raises:
        ValueError: if the model reads texts, or its backbone does not know the size of its inputs.
    """
    sample = method.model.backbone._sample
    if "pixel_values" not in sample:
        found = f"reads {', '.join(sample)}" if sample else "was made without a sample of its inputs"
        raise ValueError(
            f"{type(method).__name__} generates inputs of one size, such as images, but the model's backbone {found}; "
            "give it a backbone of images, or from_module(..., sample=...)"
        )
    return tuple(sample["pixel_values"][0][1:])


def span_of(method: ContinualMethod, item: Any, runtime: "Runtime") -> Tensor:
    """Returns the lowest and the highest number among a task's inputs, (2,), as the model gets them.

    Raises:
        ValueError: if the data are a stream without an end, or all their numbers are the same.
    """
    ends = [torch.stack(batch.inputs["pixel_values"].aminmax()) for batch in item_batches(method, item, runtime)]
    low, high = torch.stack(ends).amin(0)[0], torch.stack(ends).amax(0)[1]
    if not low < high:
        raise ValueError(
            f"{type(method).__name__}: all numbers in the inputs of {item.train_source.where} are {low.item():g}"
        )
    return torch.stack([low, high])


@torch.no_grad()
def restart(roots: Sequence[nn.Module], seed: int) -> None:
    """Gives every layer new random weights, which depend on the seed alone: the same on all processes.

    Raises:
        ValueError: if a layer does not say how its weights are made.
    """
    with seeded(seed):
        for root in roots:
            for name, module in root.named_modules():
                if not any(True for _ in module.parameters(recurse=False)):
                    continue
                if not callable(getattr(module, "reset_parameters", None)):
                    raise ValueError(
                        f"layer {name!r} ({type(module).__name__}) has no reset_parameters() to start anew"
                    )
                module.reset_parameters()
