"""Model patches: K tasks on one trunk, each with the few tensors of its own (Mudrakarta et al., 2019)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hubtransfer.config import unknown_name
from hubtransfer.data import MultiTask
from hubtransfer.methods.multi_task_method import MultiTaskMethod
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.task_losses import task_losses, task_streams
from hubtransfer.methods.update import AnyBatch, Descend, Terms


@dataclass(frozen=True, kw_only=True)
class ModelPatchesConfig:
    """Hyper-parameters of `ModelPatches`.

    Attributes:
        mode: What learns. "transfer": patches and heads; the trunk is frozen, and so the tasks do not meet.
            "simultaneous": the trunk with them.
    """

    mode: Literal["transfer", "simultaneous"] = "transfer"

    def __post_init__(self) -> None:
        """Checks the value.

        Raises:
            ValueError: if `mode` is neither of the two.
        """
        if self.mode not in ("transfer", "simultaneous"):
            raise ValueError(unknown_name("mode", self.mode, ("transfer", "simultaneous"), "ModelPatches"))


class ModelPatches(MultiTaskMethod, name="model_patches", config=ModelPatchesConfig):
    r"""Trains K tasks on one trunk, each with a patch and a head of its own.

    .. math:: \min_{\theta,\, \{\pi_k, h_k\}} \sum_k L_k\big(h_k(f(x;\, \theta \leftarrow \pi_k))\big)

    with the trunk f (batch, dim), whose tensors theta are those of task k's patch where it has some. Simultaneous: over
    all of them; transfer: theta stays as it is. With `Mixing(batches="alternating")` each step has a batch of one task,
    as in the paper; without, a batch of each. Tasks bring their own data, or share inputs with labels by task.

    A patch owns its layers' running statistics: no task normalises with another one's. A task without a patch has its
    own head alone (the paper's "last layer") and in simultaneous mode shares the trunk's statistics with its like.

    Args:
        model: A model with a head for every task, and a patch for those that shall have one.
        tasks: Names of the tasks that learn (default: all of the model's).

    Differs from the paper: one process takes the tasks in turn, where theirs had workers for each task; which may
    share a machine.

    Source: https://arxiv.org/abs/1810.10703, sections 3 and 4.
    """

    paper = "Mudrakarta 2019"
    source = "https://arxiv.org/abs/1810.10703"
    citation = """@inproceedings{mudrakarta2019k,
  title = {K for the Price of 1: Parameter-efficient Multi-task and Transfer Learning},
  author = {Mudrakarta, Pramod Kaushik and Sandler, Mark and Zhmoginov, Andrey and Howard, Andrew},
  booktitle = {International Conference on Learning Representations},
  year = {2019}
}"""

    def groups(self) -> Mapping[str, Any]:
        """Two groups: the trunk, which tasks share, and their patches and heads."""
        own = []
        for task in self.tasks:
            own += self.model.trainable("patch" if task in self.model.patches else "head", task)
        return {"shared": self.shared_and_own()[0], "own": own}

    def watched(self) -> Mapping[str, float]:
        """No weights change."""
        return {}

    def loss(self, batch: AnyBatch) -> Terms:
        """Returns the loss of each task whose turn it is, under its name: scalars."""
        return task_losses(self.model, self.tasks, batch)

    def stages(self, scenario: MultiTask) -> Iterator[Stage]:
        """One stage, in which patches and heads learn, or the trunk with them."""
        trains = ("own",) if self.config.mode == "transfer" else ("shared", "own")
        data = task_streams(scenario, self.tasks, "ModelPatches")
        yield Stage(self.config.mode, data, [Descend(self.loss, trains=trains)])
