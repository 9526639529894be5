"""Gradients of single examples: three ways to them agree, on every kind of network, and batches do not matter."""

import pytest
import torch
from torch import nn

import hubtransfer as ht
from hubtransfer.functional.fisher import likelihood_roots, squared_norm
from hubtransfer.models import example_gradients
from hubtransfer.models.example_gradients import sum_over_examples
from tests.tiny import SHAPE, tiny_backbone, tiny_model


def roots(logits, labels):
    return likelihood_roots(logits, "exact", labels)


def norms(outputs, labels):
    return squared_norm(outputs)


def batch(n=6, shape=SHAPE, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype)}


def by_loop(model, inputs, values, power, task="task"):
    """Each example alone, each scalar alone."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(next(iter(inputs.values())))):
        scalars = values(model(**{k: v[i : i + 1] for k, v in inputs.items()}, task=task).logits, None)
        for scalar in scalars[0]:
            model.zero_grad()
            scalar.backward(retain_graph=True)
            for name, p in model.named_parameters():
                if p.grad is not None:
                    total[name] += p.grad.square() if power == 2 else p.grad.abs()
    model.zero_grad()
    return total


def compare(model, inputs, task="task", only=None, monkeypatch=None, tolerance=1e-9):
    model.eval()
    if only is not None:
        for name in {"_linear_layers", "_vectorised", "_one_by_one"} - {only}:

            def refuse(*_, name=name):
                raise RuntimeError(f"{name} was not to be used")

            refuse.__name__ = name
            monkeypatch.setattr(example_gradients, name, refuse)
    for values, power in ((roots, 2), (norms, 1)):
        parameters = dict(model.named_parameters())
        labels = torch.zeros(len(next(iter(inputs.values()))), dtype=torch.long)
        found, count = sum_over_examples(model, task, [(inputs, (labels,))], values, parameters, power)
        assert count == len(labels)
        for name, expected in by_loop(model, inputs, values, power, task).items():
            torch.testing.assert_close(found[name], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", ["_linear_layers", "_vectorised", "_one_by_one"])
def test_all_ways_agree_on_a_perceptron(way, monkeypatch):
    compare(tiny_model(kind="mlp", dtype=torch.float64), batch(), only=way, monkeypatch=monkeypatch)


def test_nobody_needs_to_record_gradients(monkeypatch):
    monkeypatch.setattr(example_gradients, "_vectorised", None)
    model, inputs = tiny_model(kind="mlp").eval(), batch(dtype=torch.float32)
    with torch.no_grad():
        found, _ = sum_over_examples(model, "task", [(inputs, (None,))], norms, dict(model.named_parameters()), 1)
    assert all(value.abs().sum() > 0 and not value.requires_grad for value in found.values())


@pytest.mark.parametrize("way", ["_vectorised", "_one_by_one"])
def test_convolutions_and_normalisations(way, monkeypatch):
    compare(tiny_model(kind="cnn", dtype=torch.float64), batch(), only=way, monkeypatch=monkeypatch)


def test_a_patch_of_the_task(monkeypatch):
    model = tiny_model(kind="cnn", dtype=torch.float64, patch=ht.ScaleBiasConfig())
    compare(model.double(), batch(), only="_vectorised", monkeypatch=monkeypatch)


def test_batch_normalisation_in_evaluation_mode(monkeypatch):
    model = ht.TransferModel(ht.Backbone.from_pretrained("timm/test_resnet", pretrained=False))
    model.add_task("task", ht.ClassificationHead(3)).double()
    compare(model, batch(2, (3, 32, 32)), only="_vectorised", monkeypatch=monkeypatch)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_vision_transformer(monkeypatch):
    model = ht.TransferModel(ht.Backbone.from_pretrained("timm/test_vit", pretrained=False, image_size=32))
    model.add_task("task", ht.ClassificationHead(3)).double()
    compare(model, batch(2, (3, 32, 32)), only="_vectorised", monkeypatch=monkeypatch)


def test_a_text_encoder_whose_code_looks_at_values():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    model = ht.TransferModel(ht.Backbone.from_pretrained("bert", pretrained=False, num_hidden_layers=1, **sizes))
    model.add_task("task", ht.ClassificationHead(3)).double()
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, 3:] = 0
    compare(model, {"input_ids": torch.arange(10).view(2, 5) + 3, "attention_mask": mask})


def test_a_weight_used_in_two_places_is_noticed():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(192, 16)
            self.second = nn.Linear(16, 16)

        def forward(self, x):
            hidden = torch.tanh(self.first(x.flatten(1)))
            return torch.tanh(self.second(hidden)) + nn.functional.linear(hidden, self.second.weight)

    torch.manual_seed(0)
    backbone = ht.Backbone.from_module(Twice().double(), dim=16, sample=torch.zeros(1, *SHAPE, dtype=torch.float64))
    compare(ht.TransferModel(backbone).add_task("task", ht.ClassificationHead(3)).double(), batch())


def test_a_layer_that_sees_an_example_twice_is_noticed():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again = nn.Linear(192, 16), nn.Linear(16, 16)

        def forward(self, x):
            return torch.tanh(self.again(torch.tanh(self.again(self.first(x.flatten(1))))))

    torch.manual_seed(0)
    backbone = ht.Backbone.from_module(Loop().double(), dim=16, sample=torch.zeros(1, *SHAPE, dtype=torch.float64))
    compare(ht.TransferModel(backbone).add_task("task", ht.ClassificationHead(3)).double(), batch())


def test_batches_do_not_matter_but_squaring_their_mean_would():
    model = tiny_model(kind="mlp", dtype=torch.float64).eval()
    inputs, labels = batch(8), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])

    def empirical(logits, labels):
        return likelihood_roots(logits, "label", labels)

    parts = [({"pixel_values": inputs["pixel_values"][i : i + 3]}, (labels[i : i + 3],)) for i in (0, 3, 6)]
    parameters = dict(model.named_parameters())
    whole, _ = sum_over_examples(model, "task", [(inputs, (labels,))], empirical, parameters, 2)
    split, _ = sum_over_examples(model, "task", parts, empirical, parameters, 2)
    mean = torch.autograd.grad(empirical(model(**inputs).logits, labels).mean(), list(parameters.values()))
    for (name, value), gradient in zip(whole.items(), mean):
        torch.testing.assert_close(value, split[name])
        assert (value / 8).sum() > 2 * gradient.square().sum(), name


def test_frozen_parameters_can_be_measured_and_nothing_changes():
    model = tiny_model(kind="mlp").eval().requires_grad_(False)
    compare_flags = {name: p.requires_grad for name, p in model.named_parameters()}
    inputs = batch(dtype=torch.float32)
    found, _ = sum_over_examples(model, "task", [(inputs, (torch.zeros(6),))], norms, dict(model.named_parameters()), 1)
    assert all(value.abs().sum() > 0 for value in found.values())
    assert compare_flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(module._forward_hooks for module in model.modules())


def test_another_tasks_head_counts_nothing():
    model = ht.TransferModel(tiny_backbone("mlp"))
    model.add_task("a", ht.ClassificationHead(3)).add_task("b", ht.ClassificationHead(2)).eval()
    inputs = batch(dtype=torch.float32)
    found, _ = sum_over_examples(model, "a", [(inputs, (torch.zeros(6),))], norms, dict(model.named_parameters()), 1)
    assert found["heads.b.weight"].abs().sum() == 0 and found["heads.a.weight"].abs().sum() > 0


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="evaluation mode"):
        sum_over_examples(tiny_model().train(), "task", [], norms, {}, 1)
