"""What an example's gradients are taken of to tell which parameters matter: likelihoods and output norms."""

from typing import Literal

from torch import Tensor

FisherKind = Literal["exact", "sampled", "predicted", "label"]
FISHER_KINDS = ("exact", "sampled", "predicted", "label")


def likelihood_roots(
    logits: Tensor, kind: FisherKind = "exact", labels: Tensor | None = None, uniform: Tensor | None = None
) -> Tensor:
    r"""Returns scalars of each example whose squared gradients, added up, are its share of the Fisher diagonal.

    .. math:: F_j = \frac{1}{N} \sum_i \sum_y q_i(y) \Big(\frac{\partial \log p_i(y)}{\partial \theta_j}\Big)^2
       = \frac{1}{N} \sum_i \sum_y \Big(\frac{\partial \sqrt{q_i(y)} \log p_i(y)}{\partial \theta_j}\Big)^2

    with the model's probabilities p = softmax(z) and weights q that count as constants: those of the model itself
    ("exact", one column a class), or 1 for one class: drawn from the model ("sampled"), its most likely one
    ("predicted"), or the true one ("label", the empirical Fisher). The first two agree in the mean; the last two do not
    estimate the Fisher information but are often used.

    Args:
        logits: z, (batch, classes).
        kind: Which classes count, and how much.
        labels: True classes (batch,), for "label".
        uniform: Numbers in [0, 1), (batch,), for "sampled": class c is drawn where they lie between the cumulative
            probabilities of c - 1 and c.

    Returns:
        (batch, classes) for "exact", else (batch, 1).

    Raises:
        ValueError: if the kind is unknown or lacks its argument.

    >>> import torch
    >>> z = torch.tensor([[0.0, 0.0]])
    >>> likelihood_roots(z, "label", labels=torch.tensor([1]))
    tensor([[-0.6931]])
    >>> likelihood_roots(z, "exact")  # each times the root of 1/2
    tensor([[-0.4901, -0.4901]])
    """
    log_p = logits.log_softmax(-1)
    if kind == "exact":
        return log_p.detach().exp().sqrt() * log_p
    if kind == "label":
        if labels is None:
            raise ValueError("kind 'label' needs the true classes")
        chosen = labels.long()
    elif kind == "predicted":
        chosen = logits.argmax(-1)
    elif kind == "sampled":
        if uniform is None:
            raise ValueError("kind 'sampled' needs one uniform number for each example")
        below = (log_p.detach().exp().cumsum(-1) <= uniform[..., None]).sum(-1)
        chosen = below.clamp(max=logits.shape[-1] - 1)  # rounding may leave the last cumulative probability below 1
    else:
        raise ValueError(f"kind must be one of {', '.join(FISHER_KINDS)}, got {kind!r}")
    return log_p.gather(-1, chosen[..., None])


def squared_norm(outputs: Tensor) -> Tensor:
    r"""Returns :math:`\|f(x_i)\|_2^2` of each example, (batch, 1), for outputs (batch, ...).

    >>> import torch
    >>> squared_norm(torch.tensor([[3.0, 4.0]]))
    tensor([[25.]])
    """
    return outputs.flatten(1).square().sum(1, keepdim=True)
