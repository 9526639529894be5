"""Fine-tuning on one task after another: the lower bound of continual learning."""

from typing import Any

from hubtransfer.methods.continual_method import ContinualMethod
from hubtransfer.models import TransferModel


class SequentialFineTune(ContinualMethod, name="sequential"):
    r"""Fine-tunes on each task in turn and does nothing against forgetting.

    .. math:: \theta \leftarrow \theta - \eta \nabla_\theta L_t(h_t(f(x)), y)

    on the examples (x, y) of task t alone. The end of the scale: what every other strategy has to beat. Applies to
    streams of every kind, any head, backbone and optimiser; terms (penalties, teachers) join it with `+`.

    Args:
        model: The model, with a head for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: nothing; optimisers start afresh with each task.

    Source: https://arxiv.org/abs/1312.6211, which measures what is forgotten so.
    """

    paper = "Goodfellow 2013"
    source = "https://arxiv.org/abs/1312.6211"
    citation = """@article{goodfellow2013empirical,
  title = {An Empirical Investigation of Catastrophic Forgetting in Gradient-Based Neural Networks},
  author = {Goodfellow, Ian J. and Mirza, Mehdi and Xiao, Da and Courville, Aaron and Bengio, Yoshua},
  journal = {arXiv preprint arXiv:1312.6211},
  year = {2013}
}"""

    def __init__(self, model: TransferModel, task: str | None = None, **config: Any) -> None:
        super().__init__(model, self.configure(config), task=task)
