"""Fine-tuning in sequence: the plain loop, and that it forgets."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import DataStream, SingleTask, TaskStream
from hubtransfer.methods.continual.sequential import SequentialFineTune
from tests.methods.continual.streams import class_stream, domain_stream, model_for, task_stream
from tests.methods.steps import assert_same_parameters, batches_of, clone, descend, run
from tests.tiny import tiny_data


def example(dtype=torch.float32, seed=0, n=24):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    return SequentialFineTune(model_for(stream, dtype=dtype, seed=seed)), stream


def test_tasks_in_turn_equal_a_plain_loop():
    for stream in (domain_stream(3), task_stream(3), class_stream(3)):
        method = SequentialFineTune(model_for(stream))
        plain = clone(method.model)
        run(method, stream)
        for item in stream:
            head = plain.heads[item.task or "task"]
            parameters = [*plain.backbone.parameters(), *head.parameters()]
            for each in batches_of(stream, item):
                loss = F.cross_entropy(head(plain.backbone.trunk(each.inputs["pixel_values"])), each.labels)
                descend(parameters, loss)
        assert_same_parameters(method.model, plain, 1e-6)


def test_it_forgets():
    """The second task gives the first task's images other labels: what was learned of them is gone."""
    data = tiny_data(24)
    stream = TaskStream(
        [
            SingleTask(data, evaluation=data, name="a"),
            SingleTask(data | {"labels": (data["labels"] + 1) % 3}, name="b"),
        ],
        kind="domain",
    )
    learned, forgot = (SequentialFineTune(model_for(stream)) for _ in range(2))
    assert run(learned, TaskStream(stream.items[:1], kind="domain"), steps=60, lr=0.3).evaluate()["accuracy"] == 1
    assert run(forgot, stream, steps=60, lr=0.3).evaluate()["accuracy"] == 0


@pytest.mark.parametrize("make", [SingleTask, DataStream])
def test_a_bare_task_is_refused_with_what_to_write(make):
    data = tiny_data(8)
    method = SequentialFineTune(model_for(domain_stream()))
    with pytest.raises(
        TypeError, match=rf"got {make.__name__}; wrap it as ht.TaskStream\(\[scenario\], kind='domain'\)"
    ):
        run(method, make(data))
    run(method, TaskStream([make(data)], kind="domain"), steps=1)
