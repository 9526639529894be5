"""Streams of tasks that are wrong or end early: one error before work starts, or each task is finished all the same.

The cases come from the registry, with the hyper-parameters, heads and kind of stream of each strategy's own example.
"""

import re
from dataclasses import fields, replace

import pytest
import torch

from hubtransfer.data import MemoryConfig, Ring, SingleTask, TaskStream
from hubtransfer.methods.continual.er import ER
from hubtransfer.training import Trainer
from tests.contract.methods import CONTINUAL, cls_of, example
from tests.methods.continual.streams import class_stream, domain_stream, model_for, task_stream
from tests.methods.steps import changed, run, settings, snapshot
from tests.tiny import tiny_data


def memories(config):
    """The memories among a strategy's hyper-parameters, by name."""
    named = [] if config is None else [(field.name, getattr(config, field.name)) for field in fields(config)]
    return {name: value for name, value in named if isinstance(value, MemoryConfig)}


REPLAY = [name for name in CONTINUAL if memories(example(name)[0].config)]


def with_last(stream, change):
    """The stream with the last task's training data changed."""
    *others, last = stream
    return TaskStream([*others, replace(last, train=change(last.train))], kind=stream.kind)


@pytest.mark.parametrize("name", CONTINUAL)
def test_labels_of_the_last_task_that_no_head_has_are_named_before_work_starts(name):
    method, stream = example(name)
    wrong = with_last(stream, lambda data: data | {"labels": torch.full_like(data["labels"], 77)})
    before = snapshot(method)
    with pytest.raises(ValueError, match="77"):
        run(method, wrong)
    assert not changed(before, method)


def test_an_empty_task_is_an_error_when_the_stream_is_made():
    with pytest.raises(ValueError, match=r"t1.*(empty|no example)"):
        TaskStream([SingleTask(tiny_data(8), name="t0"), SingleTask(tiny_data(0), name="t1")], kind="task")


@pytest.mark.parametrize("name", REPLAY)
def test_a_memory_smaller_than_a_batch_gives_what_it_has(name):
    method, stream = example(name)
    classes = len(torch.cat([item.train["labels"] for item in stream]).unique())
    given = {field.name: getattr(method.config, field.name) for field in fields(method.config)}
    small = {key: replace(value, size=classes) for key, value in memories(method.config).items()}
    method = cls_of(name)(method.model, task=method.task, **{**given, **small})
    run(method, stream, batch_size=classes + 2)
    assert 0 < len(method.memory) <= classes


@pytest.mark.parametrize("make", [domain_stream, task_stream, class_stream])
def test_a_changed_order_of_tasks_is_refused_at_resume(make, tmp_path):
    stream = make(3)
    run_in = settings(output_dir=str(tmp_path), save="stage", keep=9)
    Trainer(ER(model_for(stream)), stream, run_in).train()
    turned = TaskStream([stream[0], stream[2], stream[1]], kind=stream.kind)
    with pytest.raises(ValueError, match="was made with"):
        Trainer(ER(model_for(stream)), turned, run_in).train(resume="auto")


def streamed(data):
    """The same examples one by one, as often as somebody asks."""

    def rows():
        return ({key: column[k] for key, column in data.items()} for k in range(len(data["labels"])))

    return rows


NEED_ENDS = {
    "a_gem": "has to look at all of data set 't0', but it has no end; give data of known length",
    "cn_dpm": "reads data set 't0' in portions, which needs data of known length",
    "den": "has to look at all of data set 't0', but it has no end",
    "dgr": "has to look at all of data set 't0', but it has no end",
    "ewc": "data set 't0' has no end; say on how many samples",
    "fdr": "has to look at all of data set 't0', but it has no end",
    "gem": "has to look at all of data set 't0', but it has no end",
    "icarl": "which classes data set 't0' has, but its labels cannot be read beforehand",
    "joint": "data set 't0' is a stream: .* cannot be indexed",
    "lwf": "which classes data set 't0' has, but its labels cannot be read beforehand",
    "mas": "data set 't0' has no end; say on how many samples",
    "online_ewc": "data set 't0' has no end; say on how many samples",
}
"""Strategies that need more than a stream of examples, and the reason that they give: all others learn from one."""

WITH_STAGES_AFTER = {"patch_per_task"}
"""Strategies whose own further stages do what others do after a task."""


@pytest.mark.parametrize("name", CONTINUAL)
def test_tasks_that_end_before_their_steps_are_finished_all_the_same(name, caplog):
    """Examples without a known end: what follows a task follows when they end, or what is needed is said at once."""
    method, stream = example(name)
    items = [replace(item, train=streamed(item.train), evaluation=None) for item in stream]
    before, finished, after_task = snapshot(method), [], method.after_task
    method.after_task = lambda item, runtime: (finished.append(item.name), after_task(item, runtime))
    if name in NEED_ENDS:
        with pytest.raises((TypeError, ValueError), match=NEED_ENDS[name]):
            run(method, TaskStream(items, kind=stream.kind), steps=50)
        assert not changed(before, method)
        return
    run(method, TaskStream(items, kind=stream.kind), steps=50)
    assert re.search(r"the stream ended after \d of 50 steps", caplog.text)
    assert method.number == len(items) - 1
    assert finished == ([] if name in WITH_STAGES_AFTER else [item.name for item in items])


SHARED = [name for name in REPLAY if isinstance(next(iter(memories(example(name)[0].config).values())), Ring)]


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (Ring(12, groups=1), "made for 1 tasks, but the stream has 2; give it groups=2, or no groups"),
        (Ring(1), "cannot keep an example of each of 2 tasks; give it a size of at least 2"),
    ],
)
@pytest.mark.parametrize("name", SHARED)
def test_a_memory_without_a_share_for_each_task_is_named_before_work_starts(name, memory, message):
    method, stream = example(name)
    method = cls_of(name)(method.model, task=method.task, memory=memory)
    before = snapshot(method)
    with pytest.raises(ValueError, match=message):
        run(method, TaskStream(list(stream)[:2], kind=stream.kind))
    assert not changed(before, method)


@pytest.mark.parametrize("name", ["ewc", "online_ewc", "mas"])
def test_a_task_without_a_known_end_is_measured_on_a_number_of_its_examples(name):
    """Five of them, drawn from what the first task's generator gives."""
    _, stream = example(name)
    items = [replace(item, train=streamed(item.train), evaluation=None) for item in stream]
    method = cls_of(name)(model_for(stream), samples=5)
    run(method, TaskStream(items, kind=stream.kind), steps=50)
    assert any((value > 0).any() for value in method.importance.tensors().values())
