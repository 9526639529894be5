"""Dark experience replay with labels (Buzzega et al., 2020)."""

from dataclasses import dataclass
from typing import Any

from hubtransfer.data import Batch
from hubtransfer.methods.continual.der import DER, DERConfig
from hubtransfer.methods.update import Terms


@dataclass(frozen=True, kw_only=True)
class DERPlusPlusConfig(DERConfig):
    """Hyper-parameters of `DERPlusPlus`.

    Attributes:
        beta: Weight of the labels' term on remembered examples.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: naming the field and what it may be.
        """
        super().__post_init__()
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")


class DERPlusPlus(DER, name="der_plus_plus", config=DERPlusPlusConfig):
    r"""Dark experience replay that holds on to the labels of remembered examples too, in a draw of their own.

    .. math:: L = L_{CE}(B) + \alpha\, \frac{1}{|B_M|\, C} \sum_{(x, z) \in B_M} \|z - h(f(x))\|_2^2
       + \beta\, \frac{1}{|B'_M|} \sum_{(x, y) \in B'_M} L_{CE}(h(f(x)), y)

    with B_M and B'_M drawn independently from the memory, and z the logits (classes,) that the network gave for x in
    the step in which x entered it. Applies as `DER` does.

    Args:
        model: The model, with a head for each of the stream's tasks (kind "task") or one head.
        task: Task of a stream that names none (default: the active one).

    Differs from the paper: as in the authors' code the squared distance is a mean over classes too. Batch and both
    replays go through the network in one forward: normalisation layers see all three. Heads of earlier tasks stay as
    they are.

    Source: https://arxiv.org/abs/2004.07211, equation 6 and algorithm 2.
    """

    def __init__(self, model: Any, task: str | None = None, **config: Any) -> None:
        super().__init__(model, task=task, **config)

    def loss(self, batch: Batch) -> Terms:
        """Returns the batch's loss `labels` and, once there is a memory, `logits` and `replay`."""
        own, dark, labelled = self.run(batch, *self.draws(batch, 2))
        terms = self.current_loss(batch, own) | self.dark(dark)
        return terms | ({"replay": self.config.beta * self.loss_of(labelled)} if labelled else {})
