"""Along a stream the trainer fills the accuracy matrix, one row a task, also over a kill; it costs no training."""

import json
from dataclasses import replace

import pytest
import torch

from hubtransfer.data import DataStream, Loader, SingleTask, Source, TaskStream, permuted_tasks
from hubtransfer.methods.continual.ewc import EWC
from hubtransfer.methods.continual.joint import Joint
from hubtransfer.methods.continual.lwf import LwF
from hubtransfer.methods.continual.sequential import SequentialFineTune
from hubtransfer.methods.continual.si import SI
from hubtransfer.training import Checkpoints, Trainer, TrainingArguments
from hubtransfer.training.evaluate import EvaluationSets
from hubtransfer.training.history import TaskHistory, kept_bytes
from tests.methods.continual.streams import domain_stream, model_for, task_stream
from tests.tiny import tiny_data


def arguments(folder, **changes):
    chosen = {"steps": 4, "batch_size": 8, "optimizer": "sgd", "lr": 0.1, "evaluate": "stage", "progress": False}
    return TrainingArguments(**{**chosen, "output_dir": str(folder), "plots": False, "save": "no"} | changes)


def trained(folder, stream=None, method=None, **changes):
    stream = stream or domain_stream(3)
    trainer = Trainer(method or SequentialFineTune(model_for(stream)), stream, arguments(folder, **changes))
    return trainer, trainer.train()


def test_every_row_is_what_evaluation_gives_after_that_task(tmp_path):
    stream = domain_stream(3)
    _, result = trained(tmp_path, stream)
    found = result.record["stream"]
    assert found["tasks"] == found["after"] == ["t0", "t1", "t2"]
    untrained = Trainer(SequentialFineTune(model_for(stream)), stream, arguments(tmp_path)).evaluate()
    assert found["baseline"] == pytest.approx([untrained[f"t{k}/accuracy"] for k in range(3)], abs=1e-6)
    for count in (1, 2):
        part = TaskStream(stream.items[:count], kind="domain")
        method = SequentialFineTune(model_for(stream))
        trained(tmp_path, part, method, evaluate="no")
        expected = Trainer(method, stream, arguments(tmp_path)).evaluate()
        assert found["accuracy"][count - 1] == pytest.approx([expected[f"t{k}/accuracy"] for k in range(3)], abs=1e-6)
    assert result.metrics["average_accuracy"] == pytest.approx(sum(found["accuracy"][-1]) / 3, abs=1e-6)
    assert next(iter(result.metrics)) == "average_accuracy", "the metric to watch"
    assert {"backward_transfer", "forward_transfer", "forgetting"} < set(result.metrics)
    assert result.metrics["t1/accuracy"] == pytest.approx(found["accuracy"][-1][1], abs=1e-6)
    assert all(seconds > 0 for seconds in found["seconds"])


def test_evaluating_along_the_stream_changes_nothing_that_is_trained(tmp_path):
    one, _ = trained(tmp_path)
    two, _ = trained(tmp_path, evaluate="no")
    three, _ = trained(tmp_path, evaluate=1)
    for other in (two, three):
        for key, value in one.method.state_dict().items():
            assert torch.equal(value, other.method.state_dict()[key])


def test_a_tasks_learning_curve_is_what_was_measured_while_it_was_learned(tmp_path):
    trainer, result = trained(tmp_path, evaluate=2)
    found, looks = result.record["stream"], []
    for line in (trainer.folder / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "metrics" in row:
            looks.append((row["stage"], row["total"], row["metrics"]))
    for number, task in enumerate(found["tasks"]):
        before = found["baseline"] if number == 0 else found["accuracy"][number - 1]
        measured = {at: metrics[f"{task}/accuracy"] for stage, at, metrics in looks if stage == task}
        assert list(measured) == [4 * number + 2, 4 * number + 4]
        steps, values = zip(*found["curves"][number])
        assert list(steps) == [4 * number, *measured]
        assert values == pytest.approx([before[number], *measured.values()], abs=1e-6)
    assert "curves" not in trained(tmp_path / "stage")[1].record["stream"]


def test_every_way_to_evaluate_gives_the_same_matrix(tmp_path):
    matrices = [trained(tmp_path, evaluate=when)[1].record["stream"]["accuracy"] for when in ("stage", "epoch", 3, 1)]
    assert all(matrix == matrices[0] for matrix in matrices)
    assert "stream" not in trained(tmp_path, evaluate="no")[1].record


@pytest.mark.parametrize("evaluate", ["stage", 1])
def test_a_resumed_run_has_the_whole_matrix(evaluate, tmp_path):
    _, whole = trained(tmp_path / "whole", save=1, keep=100, steps=2, evaluate=evaluate)
    for folder in Checkpoints(tmp_path / "whole" / "checkpoints").all():
        stream = domain_stream(3)
        trainer = Trainer(
            SequentialFineTune(model_for(stream)), stream, arguments(tmp_path / "again", steps=2, evaluate=evaluate)
        )
        again = trainer.train(resume=str(folder)).record["stream"]
        for key in ("accuracy", "baseline", "after", "bytes", "curves"):
            assert again.get(key) == whole.record["stream"].get(key), folder.name


def test_a_changed_order_of_tasks_is_refused_at_resume(tmp_path):
    trained(tmp_path, save="stage", keep=100)
    stream = domain_stream(3)
    other = TaskStream([stream[1], stream[0], stream[2]], kind="domain")
    trainer = Trainer(SequentialFineTune(model_for(stream)), other, arguments(tmp_path, save="stage"))
    with pytest.raises(ValueError, match="was made with"):
        trainer.train(resume="auto")


def test_stages_of_one_task_make_one_row(tmp_path):
    stream = task_stream(2)
    _, result = trained(tmp_path, stream, LwF(model_for(stream)))
    assert result.record["stream"]["after"] == ["t0", "t1"]


def looks_of(method, stream, folder, resume=None, **changes):
    """Trains, and returns the steps after which the evaluation sets were read, and the result."""
    trainer, looks = Trainer(method, stream, arguments(folder, **changes)), []
    measured = trainer._metrics
    trainer._metrics = lambda brief: (looks.append(trainer.cursor.total), measured(brief))[1]
    return looks, trainer.train(resume)


@pytest.mark.parametrize("name", [SequentialFineTune, EWC, SI])
def test_nothing_is_looked_at_twice(name, tmp_path):
    """Before the first of two tasks, and once an epoch of 3 batches, whether or not a method measures at the end."""
    stream = domain_stream(2)
    looks, _ = looks_of(name(model_for(stream)), stream, tmp_path, steps=None, epochs=3, evaluate="epoch")
    assert looks == [0, 3, 6, 9, 12, 15, 18]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["total"] for row in rows if "metrics" in row] == looks[1:]


def test_what_changes_the_model_at_the_end_comes_before_the_last_look(tmp_path):
    class Wiping(SequentialFineTune):
        def after_task(self, item, runtime):
            with torch.no_grad():  # class 0 for everything, which is a third of each set
                self.model.heads["task"].weight.zero_()
                self.model.heads["task"].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))

    stream = domain_stream(2)
    looks, result = looks_of(Wiping(model_for(stream)), stream, tmp_path, evaluate=2)
    assert looks == [0, 2, 4, 6, 8]
    assert result.record["stream"]["accuracy"] == [[pytest.approx(1 / 3, abs=1e-6)] * 2] * 2


def test_an_item_of_several_stages_is_looked_at_when_the_last_one_is_done(tmp_path):
    """Its first task takes 4 steps, its second 3 (one epoch) of warming up and 4; each stage is a checkpoint."""
    stream = task_stream(2)
    whole = LwF(model_for(stream), warm_up=1)
    looks, result = looks_of(whole, stream, tmp_path, save="stage", keep=9)
    assert looks == [0, 4, 11]
    for folder in Checkpoints(tmp_path / "checkpoints").all():
        again, after = looks_of(LwF(model_for(stream), warm_up=1), stream, tmp_path / "again", resume=str(folder))
        assert again[-1] == 11
        for key in ("accuracy", "baseline", "after", "bytes", "curves"):
            assert after.record["stream"].get(key) == result.record["stream"].get(key), folder.name


def test_stages_that_are_skipped_do_not_count_as_the_last(tmp_path):
    """Two stages of 4 steps each for a task, of which the second runs only if it is wanted."""

    def looks(wanted):
        class Twice(SequentialFineTune):
            def stages(self, scenario):
                for stage in super().stages(scenario):
                    yield stage
                    yield replace(stage, name=f"{stage.name}/again", enter=None, when=lambda: wanted)

        stream = domain_stream(2)
        return looks_of(Twice(model_for(stream)), stream, tmp_path / str(wanted))[0]

    assert looks(True) == [0, 8, 16]
    assert looks(False) == [0, 4, 8]


def test_patience_counts_within_a_task(tmp_path):
    """An average over two tasks is no worse than one over the first alone only because it is lower.

    Epochs have 3 steps. With a patience of 2 the first and the last task, which stand still, end after 3 epochs; the
    second, which gets better all the time, has its 5.
    """
    stream = domain_stream(3)

    def trainer(folder):
        chosen = {"steps": None, "epochs": 5, "evaluate": "epoch", "save": "epoch", "keep": 99, "early_stopping": 2}
        made = Trainer(SequentialFineTune(model_for(stream)), stream, arguments(folder, **chosen))

        def measured(brief):
            second = min(made.cursor.total, 24) / 100
            return {"t0/accuracy": 1.0, "t1/accuracy": second, "t2/accuracy": 0.0}, {}

        made._metrics = measured
        return made

    whole = trainer(tmp_path)
    assert whole.train().steps == 3 * 3 + 5 * 3 + 3 * 3
    assert whole.cursor.best == pytest.approx((1 + 0.24 + 0) / 3), "the best of what stands for three tasks"
    for folder in Checkpoints(tmp_path / "checkpoints").all():
        again = trainer(tmp_path / "again")
        assert again.train(resume=str(folder)).steps == 33, folder.name
        assert again.cursor == whole.cursor


def test_one_stage_on_everything_has_an_average(tmp_path):
    stream = domain_stream(3)
    _, result = trained(tmp_path, stream, Joint(model_for(stream)))
    assert result.record["stream"]["after"] == ["all tasks"]
    values = [result.metrics[f"t{k}/accuracy"] for k in range(3)]
    assert result.metrics["average_accuracy"] == pytest.approx(sum(values) / 3)
    assert "forgetting" not in result.metrics


def test_a_stream_without_boundaries_has_one_row_and_no_transfer(tmp_path):
    data = [tiny_data(16, seed=seed) for seed in (0, 1)]
    item = DataStream(data[0], evaluation={"a": data[0], "b": data[1]}, name="flow")
    stream = TaskStream([item], kind="domain")
    _, result = trained(tmp_path, stream, SequentialFineTune(model_for(stream)))
    assert result.metrics["average_accuracy"] == pytest.approx(
        (result.metrics["flow/a/accuracy"] + result.metrics["flow/b/accuracy"]) / 2
    )
    assert "backward_transfer" not in result.metrics


def test_streams_without_evaluation_sets_have_no_history(tmp_path):
    stream = TaskStream([SingleTask(tiny_data(8), name="a")], kind="domain")
    assert TaskHistory.of(stream) is None
    _, result = trained(tmp_path, stream)
    assert result.metrics == {}


def test_record_card_and_pictures(tmp_path):
    trained(tmp_path, plots=True, save="stage")
    written = json.loads((tmp_path / "results.json").read_text())
    assert {"accuracy_matrix.png", "retention.png"} <= set(written["plots"])
    (row,) = [row for row in written["results"] if row["metric"] == "average_accuracy"]
    assert row["split"] == "all tasks"
    card = (tmp_path / "model" / "README.md").read_text()
    assert "accuracy_matrix.png" in card
    assert "forgetting" in card


def test_kept_bytes_are_those_besides_the_model():
    method = SequentialFineTune(model_for(domain_stream()))
    before = kept_bytes(method)
    method.register_buffer("extra", torch.zeros(10, dtype=torch.float64))
    assert kept_bytes(method) - before == 80


def test_evaluation_sets_in_memory_are_kept_from_the_second_look_on():
    stream = permuted_tasks({"pixel_values": torch.rand(10, 4, 4), "labels": torch.arange(10) % 2}, tasks=2)
    made = []

    def make(source):
        made.append(source.name)
        return Loader(source, batch_size=4, shuffle=False)

    sets = EvaluationSets(make, limit=10 * 16 * 4)  # room for one of them
    sources = [item.train_source for item in stream]
    looks = [[list(sets.batches(str(k), source)) for k, source in enumerate(sources)] for _ in range(3)]
    assert len(made) == 2
    assert looks[1][0][0] is looks[2][0][0], "kept"
    assert looks[1][1][0] is not looks[2][1][0], "no room"
    for k in range(2):
        for one, two in zip(looks[0][k], looks[2][k], strict=True):
            assert torch.equal(one.inputs["pixel_values"], two.inputs["pixel_values"])
    random = EvaluationSets(lambda source: Loader(source, batch_size=4, shuffle=False))
    augmented = Source(dataset=tiny_data(8), augment=lambda batch, generator: batch)
    first, _, third = (list(random.batches("x", augmented)) for _ in range(3))
    assert first[0] is not third[0]
