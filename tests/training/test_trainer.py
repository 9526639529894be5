"""What a person sees of a run: lengths, rates, logs, evaluation, early stopping, errors."""

import json
import warnings

import pytest
import torch
from torch.utils.data import IterableDataset

from hubtransfer.data import DataStream, SingleTask
from hubtransfer.methods import Descend, OptimizerConfig, Stage
from hubtransfer.training import Callback, Checkpoints, Trainer, TrainingArguments
from hubtransfer.training.optimizers import make_optimizer
from hubtransfer.training.progress import NotFiniteError
from tests.tiny import tiny_data
from tests.training.toys import Plain, Poisoned, TwoPlayers, make


def run(method, scenario, folder, callbacks=(), resume=None, **changes):
    settings = {"output_dir": str(folder), "batch_size": 8, "progress": False, "plots": False, "lr": 0.01}
    trainer = Trainer(method, scenario, TrainingArguments(**(settings | changes)), callbacks)
    return trainer, trainer.train(resume)


@pytest.fixture
def scenario():
    data = tiny_data(36)
    train, held_out = ({k: v[part] for k, v in data.items()} for part in (slice(24), slice(24, None)))
    return SingleTask(train, evaluation=held_out)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"epochs": 2}, 6),
        ({"epochs": 0.5}, 2),  # 1.5 of 3 batches, rounded to even
        ({"steps": 4}, 4),
        ({}, 9),  # three epochs by default
        ({"epochs": 2, "accumulation": 2}, 4),  # 3 batches an epoch make 2 steps
    ],
)
def test_length_of_a_run(changes, steps, scenario, tmp_path):
    _, result = run(make(Plain), scenario, tmp_path, evaluate="no", save="no", **changes)
    assert result.steps == steps


def test_a_learnable_task_is_learnt_and_everything_is_written(scenario, tmp_path):
    _, result = run(make(Plain), scenario, tmp_path, epochs=8, lr=0.02, best_metric="accuracy", plots=True)
    assert result.metrics["accuracy"] == 1.0
    names = {file.name for file in tmp_path.iterdir()}
    assert {
        "log.jsonl",
        "results.json",
        "model",
        "best",
        "checkpoints",
        "learning_curves.png",
        "confusion.png",
    } <= names
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["steps"] == 24
    assert record["data"]["train"]["examples"] == 24
    assert len(record["data"]["train"]["fingerprint"]) == 64
    assert {row["metric"]: row["values"] for row in record["results"]}["accuracy"] == [1.0]
    assert record["parameters"]["changed"] == sum(p.numel() for p in make(Plain).parameters())
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"stage", "step", "total", "epoch", "losses", "lr"} <= set(next(r for r in rows if "losses" in r))
    assert sum("metrics" in row for row in rows) == 8


def test_all_that_learned_in_some_stage_is_counted_even_by_a_resumed_run(scenario, tmp_path):
    class InTurns(Plain):
        def groups(self):
            return {"trunk": self.model.backbone, "head": self.model.heads["task"]}

        def stages(self, scenario):
            for name in self.groups():
                yield Stage(name, scenario.train_source, [Descend(self.loss, name)])

    every = sum(p.numel() for p in make(InTurns).parameters())
    _, result = run(make(InTurns), scenario, tmp_path, steps=2, save="stage")
    assert result.record["parameters"]["changed"] == every
    after_trunk = min((tmp_path / "checkpoints").glob("step-*"))
    _, resumed = run(make(InTurns), scenario, tmp_path, resume=str(after_trunk), steps=2, save="stage")
    assert resumed.record["parameters"]["changed"] == every


def test_what_a_method_watches_stands_in_the_log_with_its_losses(scenario, tmp_path):
    class Watching(Plain):
        def watched(self):
            return {"norm/head": self.model.heads["task"].weight.norm().detach(), "count": 7}

    trainer, _ = run(make(Watching), scenario, tmp_path, steps=3, logging_steps=1, evaluate="no", save="no")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["watched"]["count"] for row in rows] == [7, 7, 7]
    norms = [row["watched"]["norm/head"] for row in rows]
    assert len(set(norms)) == 3, "each row has the values of its own step"
    assert norms[-1] == pytest.approx(float(trainer.method.model.heads["task"].weight.detach().norm()))


def test_a_table_that_a_method_watches_is_drawn(scenario, tmp_path):
    class Watching(Plain):
        def watched(self):
            return {"pair weight/a -> b": 1.0, "pair weight/a -> c": 2.0, "count": 7}

    run(make(Watching), scenario, tmp_path, steps=2, evaluate="no", save="no", plots=True)
    assert {file.name for file in tmp_path.glob("*.png")} >= {"learning_curves.png", "pair_weight.png"}


def test_evaluation_leaves_no_trace(scenario, tmp_path):
    """Evaluating after every step gives the same parameters as never evaluating."""
    often, never = make(Plain), make(Plain)
    run(often, scenario, tmp_path / "often", steps=5, evaluate=1, save="no")
    run(never, scenario, tmp_path / "never", steps=5, evaluate="no", save="no")
    assert all(torch.equal(a, b) for a, b in zip(often.parameters(), never.parameters()))


def test_early_stopping_ends_a_stage_that_does_not_improve(scenario, tmp_path):
    trainer, result = run(make(Plain), scenario, tmp_path, epochs=50, lr=1e-9, early_stopping=3, save="no")
    assert result.steps == 3 * 4  # the first evaluation sets the mark, three more bring nothing
    assert (tmp_path / "best").is_dir()
    assert trainer.cursor.best is not None


def test_early_stopping_leaves_a_stage_alone_that_learns_something_else(scenario, tmp_path):
    class Prepared(Plain):
        def stages(self, scenario):
            yield Stage("prepare", scenario.train_source, [Descend(self.loss)], epochs=6, measured=False)
            yield from super().stages(scenario)

    _, result = run(make(Prepared), scenario, tmp_path, epochs=50, lr=1e-9, early_stopping=2, save="no")
    assert result.steps == 3 * 6 + 3 * 3


def test_nan_names_stage_step_and_term_and_keeps_the_last_good_checkpoint(scenario, tmp_path):
    method = make(Poisoned)
    with pytest.raises(NotFiniteError, match=r"Poisoned, stage 'train': loss term 'poison' is nan at step 5.*lr"):
        run(method, scenario, tmp_path, steps=9, save=2, keep=9)
    kept = [folder.name for folder in Checkpoints(tmp_path / "checkpoints").all()]
    assert kept == ["step-00000002", "step-00000004"]


def test_callbacks_see_everything_in_order(scenario, tmp_path):
    seen = []

    class Recorder(Callback):
        def on_train_begin(self, trainer):
            seen.append("begin")

        def on_stage_begin(self, trainer, stage, steps):
            seen.append(f"stage {stage.name} {steps}")

        def on_evaluate(self, trainer, row):
            seen.append("evaluate")

        def on_save(self, trainer, folder):
            seen.append(folder.name)

        def on_train_end(self, trainer, result):
            seen.append(f"end {result is not None}")

    run(make(Plain), scenario, tmp_path, [Recorder()], epochs=2)
    assert seen == ["begin", "stage train 6", "evaluate", "step-00000003", "evaluate", "step-00000006", "end True"]


def test_group_settings_go_before_the_stage_and_the_stage_before_the_defaults(scenario, tmp_path):
    class WithDefaults(TwoPlayers):
        def stages(self, scenario):
            for stage in super().stages(scenario):
                chosen = {"rival": OptimizerConfig(lr=0.5, name="sgd"), "model": OptimizerConfig(lr=0.25)}
                yield Stage(stage.name, stage.data, stage.updates, optimizers=chosen)

    found = {}

    class Look(Callback):
        def on_log(self, trainer, row):
            found.update(
                {k: (type(o).__name__, o.param_groups[0]["lr"]) for k, o in trainer.runtime.optimizers.items()}
            )

    run(
        make(WithDefaults), scenario, tmp_path, [Look()], steps=1, schedule="constant", save="no", evaluate="no",
        groups={"model": {"lr": 0.125}},
    )  # fmt: skip
    assert found == {"rival": ("SGD", 0.5), "model": ("AdamW", 0.125)}


def test_lr_scale_of_a_parameter_group_multiplies_its_rate():
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    config = OptimizerConfig(name="sgd", lr=0.2, weight_decay=0.0, momentum=0.0)
    optimizer = make_optimizer(config, [{"params": [first], "lr_scale": 0.1}, {"params": [second]}])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02, 0.2])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "lamb", "lion"])
def test_torch_and_timm_optimizers_by_name(name):
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = OptimizerConfig(name=name, lr=0.1, weight_decay=0.01, momentum=0.9)
        optimizer = make_optimizer(config, [{"params": [parameter]}])
        parameter.grad = torch.ones(3, 3)
        optimizer.step()
    assert not torch.equal(parameter, torch.ones(3, 3))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig(name="adamv", lr=0.1), "unknown optimizer 'adamv'; did you mean 'adam"),
        (OptimizerConfig(name="adam", lr=0.1, options={"beta": 1}), "no option 'beta'; did you mean 'betas'"),
    ],
)
def test_unknown_optimizers_and_options_name_the_nearest(config, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(config, [{"params": [torch.nn.Parameter(torch.ones(1))]}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"epochs": 1, "steps": 3}, "epochs or steps, not both"),
        ({"precision": "fp8"}, "precision must be 'fp32'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"evaluate": "batch"}, "evaluate must be 'epoch'"),
        ({"best_metric": "acuracy", "evaluate": 1}, "best_metric 'acuracy' is not among the metrics: accuracy"),
    ],
)
def test_bad_arguments_are_named(changes, message, scenario, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(make(Plain), scenario, tmp_path, **changes)


def test_an_unknown_or_empty_group_is_named(scenario, tmp_path):
    class Typo(Plain):
        def stages(self, scenario):
            yield Stage("train", scenario.train_source, [Descend(self.loss, "modle")])

    class Empty(Plain):
        def groups(self):
            return {"model": []}

    with pytest.raises(
        ValueError, match=r"Typo, stage 'train': an update names group 'modle'; the method has \['model'\]"
    ):
        run(make(Typo), scenario, tmp_path)
    with pytest.raises(ValueError, match="Empty, stage 'train': group 'model' has no parameter to train"):
        run(make(Empty), scenario, tmp_path)


def test_a_stream_without_end_needs_steps_and_gets_no_hash(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            data = tiny_data(8)
            while True:
                for k in range(8):
                    yield {name: column[k] for name, column in data.items()}

    class Streamed(Plain, scenario=DataStream):
        pass

    scenario = DataStream(Endless(), evaluation=tiny_data(6))
    with pytest.raises(ValueError, match="stream without an end: set steps"):
        run(make(Streamed), scenario, tmp_path)
    _, result = run(make(Streamed), scenario, tmp_path, steps=3, evaluate="no")
    assert result.steps == 3
    assert result.record["data"]["stream"] == {"fingerprint": None, "examples": None}


def test_evaluate_without_an_evaluation_set_says_so(tmp_path):
    trainer, result = run(make(Plain), SingleTask(tiny_data(8)), tmp_path, steps=1)
    assert result.metrics == {}
    with pytest.raises(ValueError, match="no evaluation set"):
        trainer.evaluate()


def test_an_unwritable_log_or_an_error_leaves_requires_grad_as_it_was(scenario, tmp_path):
    method = make(Poisoned)
    method.model.heads["task"].requires_grad_(False)
    flags = {n: p.requires_grad for n, p in method.named_parameters()}
    with pytest.raises(NotFiniteError):
        run(method, scenario, tmp_path, steps=9, save="no")
    assert flags == {n: p.requires_grad for n, p in method.named_parameters()}


def test_a_stream_that_ends_early_ends_the_stage_and_says_so(tmp_path, caplog):
    class Streamed(Plain, scenario=DataStream):
        pass

    def rows():
        data = tiny_data(20)
        return ({name: column[k] for name, column in data.items()} for k in range(20))

    _, result = run(make(Streamed), DataStream(rows), tmp_path, steps=9, evaluate="no", save="no")
    assert result.steps == 3  # 8 + 8 + 4 examples
    assert "ended after 3 of 9 steps" in caplog.text
    with pytest.raises(ValueError, match="gave no examples in epoch 0; give .* a function that makes it anew"):
        run(make(Streamed), DataStream(lambda: iter(())), tmp_path, steps=9, evaluate="no", save="no")


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_stream_resumes_where_it_stopped(cut, tmp_path):
    class Streamed(Plain, scenario=DataStream):
        pass

    def rows():
        data = tiny_data(48)
        return ({name: column[k] for name, column in data.items()} for k in range(48))

    whole, resumed = make(Streamed), make(Streamed)
    changes = {"steps": 6, "evaluate": "no", "keep": 9}
    run(whole, DataStream(rows), tmp_path / "whole", save=1, **changes)
    folder = tmp_path / "whole" / "checkpoints" / f"step-{cut:08d}"
    run(resumed, DataStream(rows), tmp_path / "resumed", save="no", resume=str(folder), **changes)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
