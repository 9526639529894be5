"""NCM: means over the whole stream by a plain computation, in any order, classes that come later, no trunk moved."""

import pytest
import torch
import torch.nn.functional as F

import hubtransfer as ht
from hubtransfer.data import SingleTask, TaskStream
from hubtransfer.methods.continual.ncm import NCM
from tests.methods.continual.streams import class_stream, domain_stream
from tests.methods.steps import run, snapshot
from tests.tiny import tiny_backbone


def model(classes=3, dtype=torch.float32, seed=0, **head):
    return ht.TransferModel(tiny_backbone("mlp", dtype, seed)).add_task("task", ht.NearestMeanHead(classes, **head))


def example(dtype=torch.float32, seed=0, n=24):
    return NCM(model(dtype=dtype, seed=seed)), domain_stream(n=n, seed=seed, dtype=dtype)


def everything(stream):
    return (torch.cat([item.train[name] for item in stream]) for name in ("pixel_values", "labels"))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_it_is_the_mean_of_all_examples_of_a_class(metric):
    stream = class_stream(3, dtype=torch.float64)
    method = NCM(model(6, torch.float64, metric=metric))
    run(method, stream)
    pixels, labels = everything(stream)
    with torch.no_grad():
        features = method.model.backbone.trunk(pixels)
    means = torch.stack([features[labels == c].mean(0) for c in range(6)])
    if metric == "cosine":
        expected = F.normalize(features) @ F.normalize(means).T
    else:  # but for half of the example's own square
        expected = features.square().sum(1, keepdim=True) / 2 - torch.cdist(features, means).square() / 2
    torch.testing.assert_close(method.model(pixel_values=pixels).logits, expected, rtol=1e-9, atol=1e-9)


def test_order_does_not_matter():
    stream = class_stream(3, dtype=torch.float64)
    found = []
    for items, batch_size in ((stream.items, 8), (stream.items[::-1], 5)):
        method = NCM(model(6, torch.float64))
        run(method, TaskStream(items, kind="class"), batch_size=batch_size)
        found.append(method.model.heads["task"].sums)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_it_learns_without_moving_the_trunk_and_forgets_nothing():
    stream = class_stream(3)
    method = NCM(model(6))
    before = snapshot(method.model.backbone)
    metrics = run(method, stream, evaluate="stage").evaluate()
    assert {name: value for name, value in metrics.items() if name.endswith("/accuracy")} == {
        f"t{k}/accuracy": 1.0 for k in range(3)
    }
    after = snapshot(method.model.backbone)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_saved_model_goes_on_with_a_class_that_nobody_thought_of(tmp_path):
    stream = class_stream(3)
    first = NCM(model(4))
    run(first, TaskStream(stream.items[:2], kind="class"))
    first.model.save_pretrained(tmp_path)
    again = ht.TransferModel.from_pretrained(tmp_path, backbone=tiny_backbone("mlp", seed=9)).extend_head("task", 6)
    run(NCM(again), TaskStream(stream.items[2:], kind="class"))
    whole = NCM(model(6))
    run(whole, stream)
    torch.testing.assert_close(again.heads["task"].sums, whole.model.heads["task"].sums)


def test_examples_without_a_label_do_not_count():
    stream = domain_stream(1)
    data = {**stream[0].train, "labels": stream[0].train["labels"].clone()}
    data["labels"][:9] = -100
    method = NCM(model())
    run(method, TaskStream([SingleTask(data)], kind="domain"))
    assert method.model.heads["task"].counts.flatten().tolist() == [5, 5, 5]


def test_a_stream_of_unknown_length_counts_for_as_many_steps_as_the_run_has():
    data = domain_stream(1)[0].train

    def examples():
        return ({name: values[k] for name, values in data.items()} for k in range(24))

    method = NCM(model())
    run(method, TaskStream([SingleTask(examples)], kind="domain"), steps=3, batch_size=6)
    first = NCM(model())
    some = {name: values[:18] for name, values in data.items()}
    run(first, TaskStream([SingleTask(some)], kind="domain"), batch_size=6)
    assert method.model.heads["task"].counts.sum() == 18
    torch.testing.assert_close(method.model.heads["task"].sums, first.model.heads["task"].sums)


def test_features_of_evaluation_data_are_computed_once():
    stream = class_stream(3)
    method = NCM(model(6))
    seen = []
    method.model.backbone.trunk.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    run(method, stream, evaluate="stage")
    # each of 3 tasks: 24 examples to learn, and batches of 16 and 8 to evaluate, the second filled up to 16; once each,
    # though all are evaluated before the first task and after each. And one of each of the 6 sets to check its shape.
    assert sum(n for n in seen if n > 1) == 3 * (24 + 2 * 16)


def test_a_head_that_gradients_train_is_refused():
    plain = ht.TransferModel(tiny_backbone("mlp")).add_task("task", ht.ClassificationHead(3))
    with pytest.raises(ValueError, match="NCM fills a NearestMeanHead, but task 'task' has ClassificationHead"):
        run(NCM(plain), domain_stream())


def test_it_has_no_hyper_parameters():
    with pytest.raises(TypeError, match="no hyper-parameters"):
        NCM(model(), metric="cosine")
