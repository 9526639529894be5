"""RanPAC: the weights of a plain ridge regression on all examples, in any order, the penalty chosen by the head."""

import pytest
import torch

import hubtransfer as ht
from hubtransfer.data import TaskStream
from hubtransfer.methods.continual.ranpac import RanPAC
from tests.methods.continual.streams import class_stream, domain_stream
from tests.methods.continual.test_ncm import everything
from tests.methods.steps import run
from tests.tiny import tiny_backbone


def model(classes=3, dtype=torch.float32, seed=0):
    backbone = tiny_backbone("mlp", dtype, seed)
    return ht.TransferModel(backbone).add_task("task", ht.RidgeHead(classes, projection=20))


def example(dtype=torch.float32, seed=0, n=24):
    return RanPAC(model(dtype=dtype, seed=seed)), domain_stream(n=n, seed=seed, dtype=dtype)


def test_it_is_ridge_regression_on_everything_seen():
    stream = class_stream(3, dtype=torch.float64)
    method = RanPAC(model(6, torch.float64))
    run(method, stream)
    head = method.model.heads["task"]
    pixels, labels = everything(stream)
    with torch.no_grad():
        hidden = (method.model.backbone.trunk(pixels) @ head.projection).relu()
    targets = torch.nn.functional.one_hot(labels, 6).double()
    gram = hidden.T @ hidden + head.penalty * torch.eye(20, dtype=torch.float64)
    expected = hidden @ torch.linalg.solve(gram, hidden.T @ targets)
    torch.testing.assert_close(method.model(pixel_values=pixels).logits, expected, rtol=1e-7, atol=1e-9)
    assert head.penalty in [pytest.approx(10.0**power) for power in range(-8, 9)]
    assert method.watched() == {"penalty/task": head.penalty}


def test_about_a_fifth_is_held_out_whatever_the_order_of_labels():
    stream = class_stream(2, n=500)
    method = RanPAC(model(4))
    run(method, stream, batch_size=50)
    fitted, held_out = method.model.heads["task"].counts
    assert (fitted + held_out).tolist() == [250, 250, 250, 250]
    assert ((held_out > 30) & (held_out < 70)).all()


def test_order_does_not_matter():
    stream = class_stream(3, dtype=torch.float64)
    pixels, _ = everything(stream)
    found = []
    for items, batch_size in ((stream.items, 8), (stream.items[::-1], 5)):
        method = RanPAC(model(6, torch.float64))
        run(method, TaskStream(items, kind="class"), batch_size=batch_size)
        found.append((method.model.heads["task"].penalty, method.model(pixel_values=pixels).logits))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-7)


def test_it_learns_and_forgets_nothing():
    method = RanPAC(model(6))
    metrics = run(method, class_stream(3), evaluate="stage").evaluate()
    assert {name: value for name, value in metrics.items() if name.endswith("/accuracy")} == {
        f"t{k}/accuracy": 1.0 for k in range(3)
    }


def test_classes_that_have_not_come_are_never_predicted():
    stream = class_stream(3)
    method = RanPAC(model(6))
    run(method, TaskStream(stream.items[:1], kind="class"))
    pixels, _ = everything(stream)
    assert method.model(pixel_values=pixels).logits.argmax(1).max() <= 1


def test_a_head_that_gradients_train_is_refused():
    plain = ht.TransferModel(tiny_backbone("mlp")).add_task("task", ht.ClassificationHead(3))
    with pytest.raises(ValueError, match=r"model.add_task\('task', RidgeHead\(num_classes=...\)\)"):
        run(RanPAC(plain), domain_stream())
