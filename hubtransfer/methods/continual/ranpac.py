"""Random projections of frozen features (McDonnell et al., 2023)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hubtransfer.methods.statistics_method import StatisticsMethod
from hubtransfer.models import RidgeHead, TransferModel
from hubtransfer.models.statistic_heads import RandomRidge


class RanPAC(StatisticsMethod, name="ranpac"):
    r"""Ridge regression on a frozen random layer over frozen features, from two sums.

    .. math:: \hat y = \arg\max_c h(x)^\top (G + \lambda I)^{-1} q_c, \qquad
       G \leftarrow G + \sum_i h_i h_i^\top, \quad q_c \leftarrow q_c + \sum_{i: y_i = c} h_i, \qquad
       h = \max(0, P^\top f)

    with pooled features f of the trunk, (dim,), the random layer P, (dim, projection), and the Gram matrix G,
    (projection, projection). After each task lambda is the one of 10^-8 ... 10^8 whose weights, fitted on four fifths
    of the examples, have the least squared error on the fifth that was held out; then all examples count. Neither sums
    nor lambda depend on the order of examples, tasks or classes: nothing is forgotten, and a class that comes later
    gets its column (`model.extend_head`). One pass over the data; needs no task at test time and no gradient; streams
    of every kind, any backbone, a `RidgeHead`. A patch that the task has already, such as one trained on the first
    task alone, is part of the frozen trunk (the paper's first-session adaptation).

    Args:
        model: The model, with a `RidgeHead` for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: lambda is chosen on the fifth held out of all tasks so far, which second moments allow, not
    on that of the newest task; the projection is 2,000 wide unless the head says otherwise (paper: 10,000); the first
    task trains nothing.

    Source: https://arxiv.org/abs/2307.02251, algorithm 1.
    """

    paper = "McDonnell 2023"
    source = "https://arxiv.org/abs/2307.02251"
    citation = """@inproceedings{mcdonnell2023ranpac,
  title = {{RanPAC}: Random Projections and Pre-trained Models for Continual Learning},
  author = {McDonnell, Mark D. and Gong, Dong and Parveneh, Amin and Abbasnejad, Ehsan and van den Hengel, Anton},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023}
}"""
    head = RidgeHead

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)

    def watched(self) -> Mapping[str, Tensor | float]:
        """Returns the penalty that was chosen last, by task."""
        heads = {name: head for name, head in self.model.heads.items() if isinstance(head, RandomRidge)}
        return {f"penalty/{name}": head.penalty for name, head in heads.items()}
