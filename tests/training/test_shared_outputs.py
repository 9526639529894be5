"""What a frozen network said on one of two processes is known to the other in the next epoch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from hubtransfer.data import SingleTask
from hubtransfer.methods.distillation.fitnet import FitNet
from hubtransfer.models import OutputCache, Teacher
from hubtransfer.training import Trainer
from tests.methods.steps import settings
from tests.tiny import batch, tiny_data, tiny_model

EXAMPLES, EPOCHS = 48, 3


def train(folder: Path) -> None:
    """Trains on this process's share, with maps on disk, and writes which examples its teacher was asked for when."""
    torch.set_num_threads(1)
    data, asked, epochs = tiny_data(EXAMPLES), [], []
    whole = Teacher(tiny_model(seed=4), cache=False)
    # Logits, pooled features and one map of 48 examples take about 0.2 MB: beyond the limit they go to disk.
    teacher = Teacher(tiny_model(seed=4), cache=OutputCache(limit=1000, folder=folder / "rows"))
    teacher.model.backbone.trunk.register_forward_pre_hook(lambda m, args: asked.append(len(args[0])))
    method = FitNet(tiny_model(), teacher, stages="one")
    trainer = Trainer(method, SingleTask(train=data), settings(output_dir=str(folder), steps=None, epochs=EPOCHS))
    share = trainer._share_outputs

    def at_the_end_of_an_epoch() -> None:
        share()
        epochs.append(sum(asked))
        asked.clear()

    trainer._share_outputs = at_the_end_of_an_epoch
    trainer.train()
    (key,) = teacher.cache._tables
    known = teacher.cache.lookup(key, torch.arange(EXAMPLES))
    expected = whole(batch(data["labels"], pixel_values=data["pixel_values"]), layers=method.reads[0][1])
    wanted = (expected.logits, expected.features.pooled, *expected.features.maps.values())
    right = known is not None and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(known, wanted, strict=True))
    found = {"world": trainer.runtime.world, "epochs": epochs, "right": right}
    (folder / f"{trainer.runtime.rank}.json").write_text(json.dumps(found))


def test_two_processes_ask_the_teacher_once_an_example(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.training.test_shared_outputs", str(tmp_path)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {"world": 2, "epochs": [EXAMPLES // 2, 0, 0], "right": True}


if __name__ == "__main__":
    train(Path(sys.argv[1]))
