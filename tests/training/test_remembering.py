"""Two processes: memories, statistics and normalisation are the same on both, and what one process would have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.remembering import COUNTING, LEARNING, run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.training.remembering", str(two), "4"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    run(one, 8)
    return one, two


def read(folders, name):
    one, two = folders
    files = [one / f"{name}0.safetensors", *(two / f"{name}{k}.safetensors" for k in (0, 1))]
    return [load_file(file) for file in files]


@pytest.mark.parametrize("name", [*COUNTING, *LEARNING])
def test_both_have_the_same(name, folders):
    alone, first, second = read(folders, name)
    assert first.keys() == second.keys() == alone.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("name", COUNTING)
def test_every_example_counts_once(name, folders):
    """23 and 21 examples, of which two processes can share 22 and 20: the last of each counts too."""
    alone, first, _ = read(folders, name)
    counts = first["model.heads.task.counts"]
    assert counts.sum() == alone["model.heads.task.counts"].sum() == 23 + 21
    for key in (key for key in alone if key.startswith("model.heads.task")):
        torch.testing.assert_close(first[key], alone[key], rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["er", "fdr"])
def test_memories_are_those_of_one_process(name, folders):
    alone, first, _ = read(folders, name)
    # What is kept beside them is what the networks said, and each process normalises its own batches
    own = [key for key in alone if key.startswith("memory.") and "kept" not in key]
    assert len(own) >= 4
    for key in own:
        assert torch.equal(first[key], alone[key]), key


@pytest.mark.parametrize("name", ["er", "fdr"])
def test_running_means_are_those_of_all_examples(name, folders):
    """The first layer's: its inputs do not depend on what is learned, and a mean over halves is one of all."""
    alone, first, _ = read(folders, name)
    for key in ("running_mean", "num_batches_tracked"):
        full = f"model.backbone.trunk.norm.{key}"
        torch.testing.assert_close(first[full], alone[full], rtol=1e-9, atol=1e-12)
        assert alone[full].abs().sum() > 0


def test_only_parameters_are_broadcast_and_those_once_a_stage(folders):
    _, first, _ = read(folders, "er")
    assert first["sent"] == 2 * first["parameters"]
