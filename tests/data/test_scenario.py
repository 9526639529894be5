import dataclasses

import pytest
import torch

from hubtransfer.data import DataStream, DomainPair, MultiTask, SingleTask, Source, TaskStream


def data(**columns):
    return {"pixel_values": torch.zeros(4, 3), "labels": torch.arange(4) % 2} | columns


@pytest.mark.parametrize(
    ("columns", "inputs", "labels"),
    [
        (("pixel_values", "labels"), {"pixel_values": "pixel_values"}, "labels"),
        (("img", "fine_label"), {"pixel_values": "img"}, "fine_label"),
        (("idx", "sentence", "label"), {"text": "sentence"}, "label"),
        (
            ("input_ids", "attention_mask", "label"),
            {"input_ids": "input_ids", "attention_mask": "attention_mask"},
            "label",
        ),
        (("image", "text", "label"), {"pixel_values": "image"}, "label"),
    ],
)
def test_columns_are_found(columns, inputs, labels):
    found = Source.of({name: torch.zeros(2) for name in columns}).fields
    assert found.inputs == inputs
    assert found.labels == labels


def test_columns_are_renamed():
    source = Source.of(data(digit=torch.arange(4)), columns={"labels": "digit"})
    assert source.fields.labels == "digit"
    assert Source.of(data(), columns={"labels": None}).fields.labels is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"labels": "digits"}, "no column 'digits'; it has: pixel_values, labels, digit; did you mean 'digit'?"),
        ({"pixel_values": "picture"}, "no column 'picture'"),
    ],
)
def test_a_wrong_rename_names_the_nearest(columns, message):
    with pytest.raises(ValueError) as error:
        SingleTask(data(digit=torch.arange(4)), columns=columns, name="mine")
    assert message in str(error.value)
    assert "'mine'" in str(error.value)


def test_missing_columns_are_listed_with_the_remedy():
    with pytest.raises(ValueError, match='columns={"labels": None}'):
        SingleTask({"image": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="has columns foo, label; none is a known input"):
        SingleTask({"foo": torch.zeros(2, 3), "label": torch.zeros(2)})


def test_scenarios_are_checked_when_they_are_made():
    with pytest.raises(ValueError, match="empty"):
        SingleTask(data(), evaluation={"pixel_values": torch.zeros(0, 3), "labels": torch.zeros(0)})


def test_single_task():
    scenario = SingleTask(data(), evaluation={"clean": data(), "noisy": data()}, task="birds")
    assert scenario.train_source is scenario.train_source  # readers keep what they process by source
    assert scenario.train_source.task == "birds"
    assert list(scenario.evaluations()) == ["clean", "noisy"]
    assert {task for _, task in scenario.evaluations().values()} == {"birds"}
    assert list(SingleTask(data(), data()).evaluations()) == ["evaluation"]
    assert set(SingleTask(data(), data()).sources()) == {"train", "evaluation"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        scenario.task = "x"


def test_a_domain_pair_hides_the_targets_labels():
    pair = DomainPair(data(), data(), evaluation=data())
    assert pair.source_source.fields.labels == "labels"
    assert pair.target_source.fields.labels is None
    assert pair.evaluations()["target"][0].fields.labels == "labels"
    assert DomainPair(data(), data(), target_labels=True).target_source.fields.labels == "labels"
    assert list(pair.train_sources) == ["source", "target"]
    assert len(pair.sources()) == 3
    unlabelled = {"pixel_values": torch.zeros(4, 3)}
    assert DomainPair(data(), unlabelled).target_source.fields.labels is None


def test_a_domain_pair_renames_each_side():
    pair = DomainPair(
        data(a=torch.arange(4)),
        data(b=torch.arange(4)),
        evaluation={"source": data(a=torch.arange(4)), "target": data(b=torch.arange(4))},
        columns={"labels": "a"},
        target_columns={"labels": "b"},
        target_labels=True,
    )
    assert pair.target_source.fields.labels == "b"
    assert {name: source.fields.labels for name, (source, _) in pair.evaluations().items()} == {
        "source": "a",
        "target": "b",
    }


def test_multi_task_on_one_data_set():
    both = {"pixel_values": torch.zeros(4, 3), "left": torch.arange(4), "right": torch.arange(4)}
    scenario = MultiTask(train=both, labels={"l": "left", "r": "right"}, evaluation=both)
    assert scenario.shared
    assert scenario.tasks == ("l", "r")
    assert scenario.train_source.fields.labels == {"l": "left", "r": "right"}
    assert {t: (s.fields.labels, s.task) for t, (s, _) in scenario.evaluations().items()} == {
        "l": ("left", "l"),
        "r": ("right", "r"),
    }
    assert set(scenario.train_sources) == {"train"}


def test_multi_task_on_several_data_sets():
    scenario = MultiTask({"a": data(), "b": data()}, evaluation={"a": data()})
    assert not scenario.shared
    assert {name: source.task for name, source in scenario.train_sources.items()} == {"a": "a", "b": "b"}
    assert list(scenario.evaluations()) == ["a"]
    with pytest.raises(ValueError, match="use train_sources"):
        _ = scenario.train_source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "takes either"),
        ({"train": data()}, "needs labels="),
        ({"datasets": {}}, "at least one task"),
        ({"datasets": {"a": data()}, "evaluation": {"b": data()}}, "tasks are: a"),
        ({"train": data(), "labels": {"a": "lables"}}, "did you mean 'labels'"),
    ],
)
def test_multi_task_errors(arguments, message):
    with pytest.raises(ValueError) as error:
        MultiTask(**arguments)
    assert message in str(error.value)


def test_task_stream():
    stream = TaskStream([SingleTask(data(), data(), name="x"), SingleTask(data(), data())], kind="task")
    assert len(stream) == 2
    assert [(item.name, item.task) for item in stream] == [("x", "x"), ("2", "2")]
    assert list(stream.evaluations()) == ["x", "2"]
    assert len(stream.sources()) == 4
    assert [item.task for item in TaskStream([data(), data()], kind="domain")] == [None, None]
    with pytest.raises(ValueError, match="more than once: x"):
        TaskStream([SingleTask(data(), name="x")] * 2)
    with pytest.raises(ValueError, match="kind must be"):
        TaskStream([data()], kind="classes")
    with pytest.raises(ValueError, match="at least one"):
        TaskStream([])


def test_data_stream():
    stream = DataStream(lambda: iter([data()]), evaluation=data())
    assert stream.train_source.iterable
    assert not stream.train_source.shuffle
    assert list(stream.evaluations()) == ["evaluation"]
    assert not DataStream(data()).train_source.iterable
    with pytest.raises(TypeError, match="can be read only once"):
        DataStream(iter([data()]))
    with pytest.raises(TypeError, match="cannot be indexed"):
        _ = stream.train_source.table


def test_a_source_keeps_its_own_settings():
    own = Source(dataset=data(digit=torch.arange(4)), columns={"labels": "digit"}, name="mine")
    source = SingleTask(own, task="t").train_source
    assert (source.fields.labels, source.name, source.task) == ("digit", "mine", "t")
    renamed = Source(dataset={"picture": torch.zeros(2, 3), "y": torch.zeros(2)}, columns={"pixel_values": "picture"})
    assert DomainPair(data(), renamed).target_source.fields == ({"pixel_values": "picture"}, None)


@pytest.mark.parametrize("kind", ["task", "domain"])
def test_streams_without_names_become_items_with_names(kind):
    stream = TaskStream([DataStream(data(), data()), DataStream(data(), data(), name="flow")], kind=kind)
    assert [item.name for item in stream] == ["1", "flow"]
    assert [item.task for item in stream] == (["1", "flow"] if kind == "task" else [None, None])
    assert list(stream.sources()) == ["1", "flow", "1/evaluation", "flow/evaluation"]
    assert not stream[0].train_source.shuffle
