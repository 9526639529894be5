"""Inner products of single examples' gradients: against a loop over examples, on every kind of network."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.models.gradient_products import ExampleGradients, GradientsOfExamples
from tests.tiny import SHAPE, tiny_model


def losses(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


def images(n, seed=0):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loop(model, pixels, labels, parameters):
    rows = []
    for x, y in zip(pixels, labels):
        found = torch.autograd.grad(F.cross_entropy(model(pixel_values=x[None]).logits, y[None]), parameters)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("mlp", "_traced"),
        ("mlp", "_vectorised"),
        ("mlp", "_one_by_one"),
        ("cnn", "_vectorised"),
        ("cnn", "_one_by_one"),
    ],
)
def test_every_way_equals_a_loop(kind, way):
    model = tiny_model(3, kind=kind, dtype=torch.float64).eval()
    gradients = GradientsOfExamples(model, losses)
    gradients._ways = [getattr(gradients, way)]
    one, two = images(5), images(4, seed=1)
    y, z = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 2, 1, 0])
    parameters = dict(model.named_parameters())
    found = [gradients.of("task", {"pixel_values": x}, labels, parameters) for x, labels in ((one, y), (two, z))]
    rows = [by_loop(model, x, labels, list(parameters.values())) for x, labels in ((one, y), (two, z))]
    torch.testing.assert_close(found[0].products(found[1]), rows[0] @ rows[1].T)
    torch.testing.assert_close(found[0].norms(), rows[0].norm(dim=1))
    expected = F.cosine_similarity(rows[0][:, None], rows[1][None], dim=2)
    torch.testing.assert_close(found[0].cosines(found[1]), expected)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_cheapest_way_that_does_is_taken():
    ways = {}
    for kind in ("mlp", "cnn"):
        model = tiny_model(3, kind=kind).eval()
        gradients = GradientsOfExamples(model, losses)
        labels = torch.tensor([0, 1])
        gradients.of("task", {"pixel_values": images(2).float()}, labels, dict(model.named_parameters()))
        ways[kind] = gradients._ways[0].__name__
    assert ways == {"mlp": "_traced", "cnn": "_vectorised"}


def test_two_layers_by_hand():
    """delta (1, 2) and (0, 1), a (3,) and (4,): <d d'> = 2, <a a'> = 12: weight 24, bias 2; norms 5^.5 * (9 + 1)^.5."""
    left = ExampleGradients(
        {"w": (torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])), "b": (torch.tensor([[1.0, 2.0]]), None)}, 1
    )
    right = ExampleGradients(
        {"w": (torch.tensor([[0.0, 1.0]]), torch.tensor([[4.0]])), "b": (torch.tensor([[0.0, 1.0]]), None)}, 1
    )
    assert left.products(right).item() == 26
    assert left.norms().item() == pytest.approx(50**0.5)
    flat = ExampleGradients({"w": (torch.tensor([[0.0, 4.0]]), None), "other": (torch.ones(1, 9), None)}, 1)
    assert left.products(flat).item() == 24, "what one side alone has does not count"
    nothing = ExampleGradients({"w": (torch.zeros(1, 2), None)}, 1)
    assert left.cosines(nothing).item() == 0


def test_training_mode_is_refused():
    model = tiny_model(3).train()
    with pytest.raises(ValueError, match="evaluation mode"):
        GradientsOfExamples(model, losses).of("task", {"pixel_values": images(1).float()}, torch.zeros(1).long(), {})
