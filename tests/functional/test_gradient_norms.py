"""Norms of a convolution's weight gradients: by hand, and against automatic differentiation for every shape."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.functional.gradient_norms import convolution_gradient_norms, worth_it


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 2)])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [((1, 1), (0, 0), (1, 1)), ((2, 1), (1, 2), (1, 2))])
def test_equals_autograd(kernel, stride, padding, dilation):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 7, 8, dtype=torch.float64)
    weight = torch.randn(5, 4, *kernel, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, weight, None, stride, padding, dilation)
    slopes = [torch.randn_like(y) for _ in range(3)]
    expected = [torch.autograd.grad(y, weight, slope, retain_graph=True)[0].norm() for slope in slopes]
    found = convolution_gradient_norms(x, slopes, kernel, stride, padding, dilation)
    torch.testing.assert_close(found, torch.stack(expected))


def test_places_that_cancel_leave_nothing():
    """Both examples read 2, with slopes +1 and -1: the gradient is 2 - 2 = 0, and rounding gives no NaN."""
    x, slope = torch.full((2, 1, 1, 1), 2.0), torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    assert convolution_gradient_norms(x, [slope], (1, 1), (1, 1), (0, 0), (1, 1)).tolist() == [0.0]


def test_it_is_worth_it_where_places_are_few():
    """32 examples of 2 x 2: 128 places of 2304 reads and 512 outputs; the other way round for 32 x 32."""
    few = torch.zeros(32, 256, 2, 2), torch.zeros(32, 512, 2, 2)
    many = torch.zeros(32, 3, 32, 32), torch.zeros(32, 16, 32, 32)
    assert worth_it(*few, (3, 3), 8)
    assert not worth_it(*many, (3, 3), 8)
