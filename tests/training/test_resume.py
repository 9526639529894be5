"""A run that is cut anywhere and resumed ends with the very same bits; damage is refused by name."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from hubtransfer.data import SingleTask, TaskStream
from hubtransfer.methods.continual.sequential import SequentialFineTune
from hubtransfer.models import ClassificationHead, TransferModel
from hubtransfer.training import Checkpoints, DamagedCheckpointError, Trainer, TrainingArguments
from hubtransfer.training.checkpoint import read_state, verify, write_state
from tests.tiny import tiny_backbone, tiny_data
from tests.training.toys import Dropped, Growing, LookAhead, Plain, TwoPlayers, make


def scenario_for(cls):
    data = tiny_data(20)
    if cls is Growing:
        return TaskStream([SingleTask(tiny_data(20, seed=s), name=f"t{s}") for s in (1, 2)], kind="domain")
    return SingleTask(data, evaluation=tiny_data(9, seed=3))


def arguments(folder, cls=Plain, **changes):
    optimizer = "sgd" if cls is LookAhead else "adamw"
    settings = {"epochs": 2, "batch_size": 8, "save": 1, "keep": 100, "optimizer": optimizer, "lr": 0.01}
    return TrainingArguments(**{**settings, "output_dir": str(folder), "progress": False, "plots": False} | changes)


def state(method):
    return {k: v.clone() for k, v in method.state_dict().items()}


@pytest.mark.parametrize("cls", [Dropped, TwoPlayers, Growing, LookAhead])
def test_resume_from_every_step_is_bit_exact(cls, tmp_path):
    whole = make(cls)
    Trainer(whole, scenario_for(cls), arguments(tmp_path / "whole", cls)).train()
    folders = Checkpoints(tmp_path / "whole" / "checkpoints").all()
    assert len(folders) >= 6
    for folder in folders:
        torch.manual_seed(time.time_ns() % 1000)  # whatever the new process drew before
        again = make(cls)
        Trainer(again, scenario_for(cls), arguments(tmp_path / "again", cls, save="no")).train(resume=str(folder))
        expected, found = state(whole), state(again)
        assert expected.keys() == found.keys()
        different = [k for k in expected if not torch.equal(expected[k], found[k])]
        assert not different, f"resumed from {folder.name}: {different}"


def test_kill_9_in_the_middle_and_resume(tmp_path):
    script = textwrap.dedent(
        """
        import sys, time
        from tests.training.test_resume import arguments, scenario_for
        from tests.training.toys import Dropped, make
        from hubtransfer.training import Callback, Trainer

        class Slow(Callback):
            def on_save(self, trainer, folder):
                print(trainer.cursor.total, flush=True)
                time.sleep(0.05)

        method = make(Dropped)
        callbacks = [Slow()] if sys.argv[2] == "slow" else []
        trainer = Trainer(method, scenario_for(Dropped), arguments(sys.argv[1], epochs=6), callbacks)
        trainer.train(resume="auto")
        from safetensors.torch import save_file
        save_file(method.state_dict(), sys.argv[1] + "/final.safetensors")
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def run(folder, speed):
        command = [sys.executable, "-c", script, str(folder), speed]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    killed = run(tmp_path / "killed", "slow")
    for line in killed.stdout:
        if int(line) >= 7:
            break
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "final.safetensors").exists()
    for folder, speed in ((tmp_path / "killed", "fast"), (tmp_path / "whole", "fast")):
        process = run(folder, speed)
        process.communicate(timeout=200)
        assert process.returncode == 0
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / name / "final.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(one[k], two[k]) for k in two)
    rows = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    logged = [row["total"] for row in rows if "losses" in row]
    assert len(logged) == len(set(logged)), "a step stands twice in the log"


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(tmp_path, caplog):
    method = make(Plain)
    Trainer(method, scenario_for(Plain), arguments(tmp_path)).train()
    newest, before = (Checkpoints(tmp_path / "checkpoints").all()[k] for k in (-1, -2))
    content = (newest / "state.safetensors").read_bytes()
    (newest / "state.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedCheckpointError, match=rf"{newest.name}.*state\.safetensors"):
        Trainer(make(Plain), scenario_for(Plain), arguments(tmp_path)).train(resume=str(newest))
    assert Checkpoints(tmp_path / "checkpoints").newest_whole() == before
    assert newest.name in caplog.text
    again = make(Plain)
    Trainer(again, scenario_for(Plain), arguments(tmp_path)).train(resume="auto")
    assert all(torch.equal(v, state(method)[k]) for k, v in state(again).items())


@pytest.mark.parametrize("harm", ["no_manifest", "missing_file", "draft"])
def test_half_written_checkpoints_do_not_count(harm, tmp_path):
    store = Checkpoints(tmp_path)
    for step in (1, 2):
        draft = store.begin(step)
        write_state(draft, "state", {"step": step})
        if not (step == 2 and harm == "draft"):
            store.finish(draft)
    if harm == "no_manifest":
        (tmp_path / "step-00000002" / "manifest.json").unlink()
    if harm == "missing_file":
        (tmp_path / "step-00000002" / "state.safetensors").unlink()
    assert store.newest_whole() == tmp_path / "step-00000001"


def test_only_the_newest_are_kept(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15):
        draft = store.begin(step)
        write_state(draft, "state", {"step": step})
        store.finish(draft)
    assert [folder.name for folder in store.all()] == ["step-00000010", "step-00000015"]
    verify(store.all()[-1])


def test_state_is_packed_without_pickle(tmp_path):
    shared = torch.arange(3.0)
    tree = {"a": [1, 2.5, None, True, "x"], 3: (shared, {"b": shared}), "nan": float("inf"), "empty": torch.empty(0)}
    write_state(tmp_path, "state", tree)
    again = read_state(tmp_path, "state")
    assert again["a"] == tree["a"]
    assert isinstance(again[3], tuple)
    assert torch.equal(again[3][0], shared)
    assert torch.equal(again[3][1]["b"], shared)
    assert again["nan"] == float("inf")
    assert (tmp_path / "state.safetensors").stat().st_size < 400, "shared storage was written twice"
    with pytest.raises(TypeError, match="/a/0 is a"):
        write_state(tmp_path, "bad", {"a": [object()]})


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    Trainer(make(Plain), scenario_for(Plain), arguments(tmp_path)).train()
    other = SingleTask(tiny_data(20, seed=9), evaluation=tiny_data(9, seed=3))
    with pytest.raises(ValueError, match="was made with data .* another output_dir"):
        Trainer(make(Plain), other, arguments(tmp_path)).train(resume="auto")


def test_resuming_without_a_checkpoint_starts_and_a_wrong_path_says_so(tmp_path):
    trainer = Trainer(make(Plain), scenario_for(Plain), arguments(tmp_path, steps=1, epochs=None))
    assert trainer.train(resume="auto").steps == 1
    with pytest.raises(ValueError, match="there is no checkpoint .*step-00000001"):
        Trainer(make(Plain), scenario_for(Plain), arguments(tmp_path)).train(resume=str(tmp_path / "nowhere"))


def test_what_an_epochs_end_decides_is_in_the_checkpoint_made_there(tmp_path):
    """Saving every third step of three-step epochs: the evaluation that stops the run early must not be lost."""
    changes = {"epochs": 40, "lr": 1e-9, "save": 3, "early_stopping": 2, "keep": 99}
    whole = Trainer(make(Plain), scenario_for(Plain), arguments(tmp_path / "whole", **changes))
    steps = whole.train().steps
    assert steps == 9
    for folder in Checkpoints(tmp_path / "whole" / "checkpoints").all():
        resumed = Trainer(make(Plain), scenario_for(Plain), arguments(tmp_path / "again", **(changes | {"save": "no"})))
        assert resumed.train(resume=str(folder)).steps == steps, folder.name


def test_a_model_with_its_heads_in_another_order_is_refused(tmp_path):
    """Which task learns is a number in a buffer: the wrong head would train."""
    stream = TaskStream([SingleTask(tiny_data(20, seed=s), name=f"t{s}") for s in (1, 2)], kind="task")

    def method(*order):
        model = TransferModel(tiny_backbone("mlp"))
        for name in order:
            model.add_task(name, ClassificationHead(3))
        return SequentialFineTune(model.set_task("t1"))

    Trainer(method("t1", "t2"), stream, arguments(tmp_path)).train()
    with pytest.raises(ValueError, match="was made with tasks t1, t2 in the model, this run has t2, t1; .* same order"):
        Trainer(method("t2", "t1"), stream, arguments(tmp_path)).train(resume="auto")
