"""MAS: a linear model by hand, magnitudes of single examples, whole tasks re-derived, no label used."""

import pytest
import torch
import torch.nn.functional as F

import hubtransfer as ht
from hubtransfer.data import SingleTask, TaskStream
from hubtransfer.methods.continual.mas import MAS
from hubtransfer.models import DenseHead, TransferModel
from tests.methods.continual.streams import domain_stream, model_for
from tests.methods.steps import assert_same_parameters, batches_of, clone, descend, run
from tests.tiny import tiny_backbone, tiny_data


def example(dtype=torch.float32, seed=0, n=24):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    return MAS(model_for(stream, dtype=dtype, seed=seed), strength=0.5), stream


def importance(model, data):
    """Examples one by one."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for x in data["pixel_values"]:
        found = torch.autograd.grad(model(pixel_values=x[None]).logits.square().sum(), parameters)
        total = [t + g.abs() for t, g in zip(total, found)]
    return [t / len(data["pixel_values"]) for t in total]


def test_a_linear_head_by_hand():
    """f = W h + b, W = 3, b = 0, h = 1 and -1: 2 f h = 6 twice for W, 2 f = 6 and -6 for b: magnitudes 6 and 6."""
    network = torch.nn.Flatten()
    backbone = ht.Backbone.from_module(network, dim=1, sample=torch.zeros(1, 1))
    model = ht.TransferModel(backbone).add_task("task", ht.RegressionHead(1))
    with torch.no_grad():
        model.heads["task"].weight.fill_(3.0)
        model.heads["task"].bias.zero_()
    data = {"pixel_values": torch.tensor([[1.0], [-1.0]]), "labels": torch.zeros(2)}
    method = MAS(model)
    run(method, TaskStream([SingleTask(data)], kind="domain"), steps=1, lr=0.0)
    assert method.importance.tensors()["heads.task.weight"].item() == pytest.approx(6.0)
    assert method.importance.tensors()["heads.task.bias"].item() == pytest.approx(6.0)


def test_three_tasks_equal_a_plain_loop():
    stream = domain_stream(3, dtype=torch.float64)
    method = MAS(model_for(stream, dtype=torch.float64), strength=0.5)
    plain = clone(method.model)
    run(method, stream)
    parameters, omega, anchor = list(plain.parameters()), None, None
    for item in stream:
        for each in batches_of(stream, item):
            loss = F.cross_entropy(plain(**each.inputs).logits, each.labels)
            if anchor is not None:
                loss = loss + 0.5 * sum((o * (p - a).square()).sum() for o, p, a in zip(omega, parameters, anchor))
            descend(parameters, loss)
        new = importance(plain, item.train)
        omega = new if omega is None else [o + n for o, n in zip(omega, new)]
        anchor = [p.detach().clone() for p in parameters]
    assert_same_parameters(method.model, plain, 1e-10)


def test_labels_do_not_matter_for_the_importance():
    stream = domain_stream(1)
    other = TaskStream([SingleTask(stream[0].train | {"labels": stream[0].train["labels"].flip(0)})], kind="domain")
    found = []
    for data in (stream, other):
        method = MAS(model_for(stream))
        run(method, data, steps=1, lr=0.0)
        found.append(method.importance.tensors())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])


@pytest.mark.parametrize("bad", [{"strength": -1.0}, {"samples": 0}])
def test_bad_hyper_parameters_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        MAS(model_for(domain_stream()), **bad)


def test_a_map_of_classes_has_a_norm_over_all_its_places():
    """The head's bias has the gradient 2 sum over places of its output, and |that| is its importance."""
    images = {"pixel_values": tiny_data(8, dtype=torch.float64)["pixel_values"], "labels": torch.zeros(8, 8, 8).long()}
    model = TransferModel(tiny_backbone(dtype=torch.float64)).add_task("task", DenseHead(2))
    method = MAS(model)
    run(method, TaskStream([SingleTask(images, name="one")], kind="domain"), steps=1)
    (name, bias) = list(model.named_parameters())[-1]
    model.eval()
    gradients = []
    for image in images["pixel_values"]:
        norm = model(pixel_values=image[None], task="task").logits.square().sum()
        gradients.append(torch.autograd.grad(norm, bias)[0].abs())
    torch.testing.assert_close(method.importance.like(name, bias), torch.stack(gradients).mean(0))
