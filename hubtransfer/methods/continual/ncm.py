"""Nearest class means of frozen features (Mensink et al., 2013; Janson et al., 2022)."""

from typing import Any

from hubtransfer.methods.statistics_method import StatisticsMethod
from hubtransfer.models import NearestMeanHead, TransferModel


class NCM(StatisticsMethod, name="ncm"):
    r"""Predicts the class whose mean feature is nearest; learning is counting.

    .. math:: \hat y = \arg\max_c \cos(f(x), \mu_c), \qquad
       \mu_c = \frac{s_c}{n_c}, \quad
       s_c \leftarrow s_c + \sum_{i: y_i = c} f(x_i), \quad n_c \leftarrow n_c + \sum_{i: y_i = c} 1

    with pooled features f of the frozen trunk, (dim,); or the nearest in Euclidean distance. Sums do not depend on the
    order of examples, tasks or classes: nothing is forgotten. A class that comes later, in this run or in another that
    starts from the saved model, gets a mean of its own (`model.extend_head` widens the head for it). One pass over the
    data; needs no task at test time and no gradient; streams of every kind, any backbone, a `NearestMeanHead`.

    Args:
        model: The model, with a `NearestMeanHead` for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: the metric is the head's, cosine unless told otherwise; the papers measure Euclidean
    distance (the first in a learned metric).

    Source: https://arxiv.org/abs/2210.04428, section 3; https://inria.hal.science/hal-00817211.
    """

    paper = "Janson 2022"
    source = "https://arxiv.org/abs/2210.04428"
    citation = """@inproceedings{janson2022simple,
  title = {A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning},
  author = {Janson, Paul and Zhang, Wenxuan and Aljundi, Rahaf and Elhoseiny, Mohamed},
  booktitle = {NeurIPS Workshop on Distribution Shifts},
  year = {2022}
}"""
    head = NearestMeanHead

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)
