"""One process with batches of 2n and two with n end with the same parameters. One launch serves all methods."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hubtransfer.data import Loader
from tests.contract.methods import BY_EXAMPLE
from tests.contract.two_processes import MULTI_TASK, REMEMBERING, run, some_labels

TOYS = [f"toy_{name}" for name in ("Plain", "Explicit", "Ranked", "TwoPlayers", "LookAhead", "Growing")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    root = Path(__file__).parents[2]
    # `accelerate launch --cpu --num_processes 2` silently starts one process; torchrun starts two.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.contract.two_processes", str(two), "4"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    run(one, 8)
    return one, two


def test_there_really_were_two_processes(folders):
    assert (folders[1] / "world").read_text() == "2"
    assert (folders[0] / "world").read_text() == "1"


@pytest.mark.parametrize("name", [*BY_EXAMPLE, *TOYS, *MULTI_TASK])
def test_two_processes_equal_one(name, folders):
    one, two = (load_file(folder / f"{name}.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", REMEMBERING)
def test_both_processes_remember_what_one_would(name, folders):
    """After each addition: inputs, labels, tasks, slots and counts to the bit; what networks said of them nearly."""
    alone = load_file(folders[0] / f"{name} remembers 0.safetensors")
    one, two = (load_file(folders[1] / f"{name} remembers {rank}.safetensors") for rank in (0, 1))
    assert one.keys() == two.keys() == alone.keys()
    assert {key.partition(".")[2] for key in alone} >= {"facts", "labels", "task", "input_pixel_values"}
    for key in alone:
        assert torch.equal(one[key], two[key]), key
        if ".kept_" in key:
            torch.testing.assert_close(one[key], alone[key], rtol=0, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
        else:
            assert torch.equal(one[key], alone[key]), key
    assert any(filled > 0 for key in alone if key.endswith(".facts") for filled in alone[key][3:4])


def test_labels_really_are_uneven():
    """In some step one process alone knows labels of a task; of another both know some, but not equally many."""
    loaders = [Loader(some_labels().train_source, batch_size=4, seed=0, rank=rank, world=2) for rank in (0, 1)]
    steps = list(zip(*(loader.batches(0) for loader in loaders)))
    known = {t: [tuple(int((p.labels[t] >= 0).sum()) for p in parts) for parts in steps] for t in ("left", "right")}
    assert any((first == 0) != (second == 0) for first, second in known["right"])
    assert any(first and second and first != second for first, second in known["left"])


def test_both_processes_remember_the_embeddings_of_all_examples(folders):
    """Banks hold what either process saw, in one order: else the processes would contrast with other negatives."""
    one, two = (load_file(folders[1] / f"bank{rank}.safetensors") for rank in range(2))
    alone = load_file(folders[0] / "bank0.safetensors")
    assert one.keys() == two.keys() == alone.keys()
    for key, rows in one.items():
        assert torch.equal(rows, two[key]), key
    assert torch.equal(one["classes"], alone["classes"])
    assert (one["classes"] >= 0).all()  # every example was seen by one of them
