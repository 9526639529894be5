"""Every continual strategy over a CNN, a ViT and a text encoder: it learns a short stream, or says what it needs.

The cases come from the registry, with the hyper-parameters, heads and kind of stream of each strategy's own example.
"""

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hubtransfer.backbones import Backbone
from hubtransfer.data import SingleTask, TaskStream
from hubtransfer.methods import Method
from hubtransfer.models import TransferModel
from tests.contract.methods import CONTINUAL, cls_of, example
from tests.methods.steps import run, snapshot

NETWORKS = ("timm/test_resnet", "timm/test_vit", "bert")
REFUSED = {
    ("den", "timm/test_resnet"): "a trunk of linear layers in a row",
    ("den", "timm/test_vit"): "a trunk of linear layers in a row",
    ("den", "bert"): "a trunk of linear layers in a row",
    ("hal", "bert"): "HAL moves inputs along gradients, but those of 't0' are tokens",
    ("dgr", "bert"): "DGR generates inputs of one size",
    ("cn_dpm", "bert"): "CNDPM generates inputs of one size",
}
"""Strategies that do not apply to a network, as their docstrings say, and the reason that they give."""

TEXT = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


@functools.cache
def made(network: str) -> Backbone:
    torch.manual_seed(0)
    options = TEXT if network == "bert" else {"image_size": 32}
    return Backbone.from_pretrained(network, pretrained=False, **options)


def inputs(network: str, n: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    if network != "bert":
        return {"pixel_values": torch.rand(n, 3, 32, 32, generator=generator)}
    lengths = torch.randint(3, 7, (n,), generator=generator).tolist()
    return {"input_ids": [torch.randint(4, 50, (length,), generator=generator).tolist() for length in lengths]}


def over(name: str, network: str) -> tuple[Method, TaskStream]:
    """The example's strategy, config and heads over another trunk, and a stream of its kind with its labels."""
    small, stream = example(name)
    model = TransferModel(copy.deepcopy(made(network)))
    for task in dict.fromkeys(item.task or small.task for item in stream):
        model.add_task(task, small.model.tasks[task].head)
    items = [
        SingleTask({**inputs(network, 12, k), "labels": item.train["labels"][:12]}, name=item.name)
        for k, item in enumerate(stream)
    ]
    options = {} if small.config is None else dict(vars(small.config))
    return cls_of(name)(model.set_task(small.task), **options), TaskStream(items, kind=stream.kind)


def first_seen(method: Method) -> dict[str, Tensor]:
    """Has a method note each parameter and buffer of its model as the first stage that has it begins."""
    values: dict[str, Tensor] = {}
    stages = method.stages

    def noting(scenario: TaskStream) -> Any:
        for stage in stages(scenario):

            def enter(runtime: Any, enter: Any = stage.enter) -> None:
                if enter is not None:
                    enter(runtime)
                for key, value in snapshot(method.model).items():
                    values.setdefault(key, value)

            yield replace(stage, enter=enter)

    method.stages = noting  # type: ignore[method-assign]
    return values


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", CONTINUAL)
def test_it_learns_a_stream_or_says_what_it_needs(name: str, network: str) -> None:
    if (name, network) in REFUSED:
        with pytest.raises((ValueError, TypeError), match=REFUSED[name, network]):
            run(*over(name, network), steps=1, batch_size=4)
        return
    method, stream = over(name, network)
    descends = any(update.groups() for stage in method.stages(stream) for update in stage.updates)
    before = first_seen(method)
    run(method, stream, steps=2, batch_size=4)
    after, parameters = snapshot(method), dict(method.model.named_parameters())
    assert before.keys() >= parameters.keys(), "something came that no stage began with"
    learned = parameters if descends else {f"heads.{k}": b for k, b in method.model.heads.named_buffers()}  # it counts
    assert any(not torch.equal(before[key], value) for key, value in learned.items())
    assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())
