"""Attention distances against the naive formula, gradients too, and what scaling and silence do."""

import pytest
import torch

from hubtransfer.functional.attention import attention, attention_distance


def naive(student, teacher, power, form):
    total = 0.0
    for s, t in zip(student, teacher):
        s, t = (sum(channel.abs() ** power for channel in m).reshape(-1) for m in (s, t))
        difference = s / (s**2).sum().sqrt() - t / (t**2).sum().sqrt()
        total = total + ((difference**2).sum().sqrt() if form == "paper" else (difference**2).mean())
    return total / len(student)


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("power", [2.0, 3.0, 1.5])
def test_equals_the_naive_formula(form, power):
    torch.manual_seed(0)
    s, t = torch.randn(3, 4, 5, 2).double().requires_grad_(), torch.randn(3, 7, 5, 2).double()
    one, two = attention_distance(s, t, power, form), naive(s, t, power, form)
    assert one.item() == pytest.approx(two.item(), abs=1e-12)
    both = (torch.autograd.grad(value, s)[0] for value in (one, two))
    torch.testing.assert_close(*both, atol=1e-12, rtol=1e-12)


def test_scale_and_sign_do_not_matter():
    torch.manual_seed(0)
    maps = torch.randn(2, 4, 3, 3).double().requires_grad_()
    distance = attention_distance(maps, -5 * maps.detach(), form="paper")
    assert distance.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(distance, maps)[0].isfinite().all()


def test_silent_maps_have_finite_gradients():
    maps = torch.zeros(2, 4, 3, 3, requires_grad=True)
    attention_distance(maps, torch.randn(2, 4, 3, 3)).backward()
    assert maps.grad.isfinite().all()
    assert attention(maps).shape == (2, 3, 3)


def test_bf16_is_computed_in_32_bits():
    a, b = torch.randn(2, 4, 3, 3).bfloat16(), torch.randn(2, 4, 3, 3).bfloat16()
    assert attention_distance(a, b).dtype == torch.float32
    assert torch.equal(attention_distance(a, b), attention_distance(a.float(), b.float()))


def test_padding_is_no_place():
    """Lengths 2 and 1: q = (0.6, 0.8) beside (1, 0) gives (0.16 + 0.64) / 2; one place is (1) beside (1), zero."""
    own = torch.tensor([[3.0, 4.0, 0.0], [5.0, 0.0, 0.0]]).sqrt()[:, None, None]
    theirs = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]])[:, None, None]
    distance = attention_distance(own, theirs, places=torch.tensor([2, 1]))
    torch.testing.assert_close(distance, torch.tensor((0.4 + 0.0) / 2))
