"""Training on all tasks together: the upper bound of continual learning."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hubtransfer.data import Batch, Mixing, Mixture, Source, TaskStream
from hubtransfer.data.table_views import InARow
from hubtransfer.methods.continual_method import ContinualMethod
from hubtransfer.methods.stage import Stage
from hubtransfer.methods.update import AnyBatch, Descend, Terms
from hubtransfer.models import TransferModel


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """Hyper-parameters of `Joint`.

    Attributes:
        cumulative: False trains once, on all tasks; true trains after each task on all tasks so far, which costs the
            square of the number of tasks.
    """

    cumulative: bool = False


class Joint(ContinualMethod, name="joint", config=JointConfig):
    r"""Trains on the examples of all tasks at once: what could be reached if nothing had to be remembered.

    .. math:: \min_\theta \frac{1}{\sum_t n_t} \sum_t \sum_{i=1}^{n_t} L_t(h_t(f(x_{ti})), y_{ti})

    The other end of the scale. Applies to streams of every kind; with heads of their own, each step has examples of
    several tasks, each task with its share.

    Args:
        model: The model, with a head for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: nothing; it is every paper's upper bound. With `cumulative` weights go on from the tasks
    before, they do not start afresh.

    Source: https://arxiv.org/abs/1606.09282, section 4 ("joint training").
    """

    paper = "Li 2016"
    source = "https://arxiv.org/abs/1606.09282"
    citation = """@inproceedings{li2016learning,
  title = {Learning without Forgetting},
  author = {Li, Zhizhong and Hoiem, Derek},
  booktitle = {European Conference on Computer Vision},
  year = {2016}
}"""

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)

    def groups(self) -> dict[str, Any]:
        """One group: the whole model."""
        return {"model": self.model}

    def loss(self, batch: AnyBatch) -> Terms:
        """Returns the mean loss over the examples of one batch, or of one a task: the scalar `labels`."""
        if isinstance(batch, Batch):
            return super().loss(batch)
        total = sum(len(part) for part in batch.values())
        return {f"labels/{name}": super(Joint, self).loss(part)["labels"] * (len(part) / total)
                for name, part in batch.items()}  # fmt: skip

    def stages(self, scenario: TaskStream) -> Iterator[Stage]:
        """One stage on everything, or one an item on everything so far."""
        items = self.checked(scenario)
        for count in range(1 if self.config.cumulative else len(items), len(items) + 1):
            so_far = items[:count]
            name = so_far[-1].name if self.config.cumulative else "all tasks"
            yield Stage(name, together(so_far), [Descend(self.loss)], enter=partial(self.begin, so_far[-1]))


def together(items: Sequence[Any]) -> Source | Mixture:
    """All items' training data as one source, or as a mixture where they have heads of their own."""
    sources = {item.name: item.train_source for item in items}
    first = next(iter(sources.values()))
    if len({source.task for source in sources.values()}) > 1:
        return Mixture(sources, Mixing(batches="mixed"))
    if len(sources) == 1:
        return first
    return replace(first, dataset=InARow([source.table for source in sources.values()]), name="all tasks")
