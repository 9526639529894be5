"""What a loss on a gradient asks of a network."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention by plain products within: the gradient of torch's fused attention has no gradient of its own.

    >>> import torch
    >>> x = torch.ones(1, 1, 2, 4, requires_grad=True)
    >>> with twice_differentiable():
    ...     out = torch.nn.functional.scaled_dot_product_attention(x, x, x).square().sum()
    >>> (slope,) = torch.autograd.grad(out, x, create_graph=True)
    >>> torch.autograd.grad(slope.sum(), x)[0].shape
    torch.Size([1, 1, 2, 4])
    """
    with sdpa_kernel(SDPBackend.MATH):
        yield
