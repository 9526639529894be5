"""A patch a task: earlier tasks stay bit for bit, tasks are found, training re-derived, what a loaded model can do."""

import pytest
import torch
import torch.nn.functional as F

import hubtransfer as ht
from hubtransfer.data import TaskStream
from hubtransfer.methods.continual.l2 import L2
from hubtransfer.methods.continual.patch_per_task import PatchPerTask
from tests.methods.continual.streams import class_stream, domain_stream, task_stream
from tests.methods.steps import batches, changed, clone, descend, run, snapshot
from tests.tiny import tiny_backbone


def model(classes=3, tasks=2, dtype=torch.float32, seed=0):
    head = ht.NearestMeanHead(classes, prototypes=tasks, metric="euclidean")
    return ht.TransferModel(tiny_backbone("cnn", dtype, seed)).add_task("task", head)


def example(dtype=torch.float32, seed=0, n=24):
    return PatchPerTask(model(dtype=dtype, seed=seed)), domain_stream(n=n, seed=seed, dtype=dtype)


def test_each_task_gets_a_patch_and_a_head_over_its_own_classes():
    method = PatchPerTask(model(6, 3))
    before = snapshot(method.model.backbone)
    run(method, class_stream(3))
    assert method.experts == ["t0", "t1", "t2"]
    assert [method.model.tasks[name].head.labels for name in method.experts] == [("0", "1"), ("2", "3"), ("4", "5")]
    after = snapshot(method.model.backbone)
    assert all(torch.equal(before[name], after[name]) for name in before), "the trunk moved"


def test_nothing_of_an_earlier_task_moves():
    stream = class_stream(3)
    method, outputs = PatchPerTask(model(6, 3)), {}
    add = method.before_patch

    def spy(item, runtime):
        method.model.eval()
        for name in method.experts:
            with torch.no_grad():
                outputs.setdefault(name, method.model(pixel_values=stream[0].train["pixel_values"], task=name).logits)
        add(item, runtime)

    method.before_patch = spy
    run(method, stream)
    method.model.eval()
    assert list(outputs) == ["t0", "t1"]
    for name, logits in outputs.items():
        assert torch.equal(method.model(pixel_values=stream[0].train["pixel_values"], task=name).logits, logits)


def test_the_task_is_that_of_the_nearest_class_mean():
    stream = domain_stream(2, dtype=torch.float64)
    method = PatchPerTask(model(dtype=torch.float64))
    run(method, stream)
    pixels = torch.cat([item.train["pixel_values"] for item in stream])
    with torch.no_grad():
        features = method.model.backbone.trunk(pixels)
    parts = [(features[24 * t : 24 * t + 24], item.train["labels"]) for t, item in enumerate(stream)]
    means = torch.stack([part[labels == c].mean(0) for part, labels in parts for c in range(3)])
    expected = [f"t{number // 3}" for number in torch.cdist(features, means).argmin(1).tolist()]
    assert method.route(pixels) == expected
    assert expected.count("t0") > 20 < expected.count("t1")


def test_training_is_that_of_patch_and_head_on_the_own_classes():
    stream = class_stream(2, dtype=torch.float64)
    method = PatchPerTask(model(4, dtype=torch.float64))
    started = {}
    add = method.before_patch

    def spy(item, runtime):
        add(item, runtime)
        started["plain"] = clone(method.model)

    method.before_patch = spy
    run(method, stream)
    plain = started["plain"]
    parameters = [*plain.patches["t1"].parameters(), *plain.heads["t1"].parameters()]
    for each in batches(stream[1].train_source, stage=3):
        loss = F.cross_entropy(plain(**each.inputs, task="t1").logits, each.labels - 2)
        descend(parameters, loss)
    pixels = stream[1].train["pixel_values"]
    one, two = (m.eval()(pixel_values=pixels, task="t1").logits for m in (method.model, plain))
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_it_predicts_what_the_found_tasks_head_says():
    stream = class_stream(2)
    method = PatchPerTask(model(4))
    run(method, stream)
    (each,) = batches(stream[1].train_source, steps=1)
    method.eval()
    with torch.no_grad():
        logits, names = method.predict(each, "task"), method.route(each)
        for row, name in enumerate(names):
            first = 2 * int(name[1])
            own = method.model(pixel_values=each.inputs["pixel_values"][row : row + 1], task=name).logits[0]
            torch.testing.assert_close(logits[row, first : first + 2], own, rtol=1e-5, atol=1e-6)
            assert logits[row].argmax() in (first, first + 1)


def test_it_learns_all_classes():
    metrics = run(PatchPerTask(model(6, 3)), class_stream(3), steps=30, lr=0.3, evaluate="stage").evaluate()
    accuracies = [value for name, value in metrics.items() if name.endswith("/accuracy")]
    assert len(accuracies) == 3
    assert min(accuracies) > 0.9


def test_a_loaded_model_finds_tasks_and_learns_another(tmp_path):
    stream = class_stream(3)
    method = PatchPerTask(model(6, 3))
    run(method, TaskStream(stream.items[:2], kind="class"))
    method.model.save_pretrained(tmp_path)
    loaded = ht.TransferModel.from_pretrained(tmp_path, backbone=tiny_backbone("cnn", seed=7))
    again = PatchPerTask(loaded)
    pixels = stream[1].train["pixel_values"]
    assert again.route(pixels) == method.route(pixels)
    run(again, TaskStream(stream.items[2:], kind="class"))
    assert again.experts == ["t0", "t1", "t2"]
    assert loaded.tasks["t2"].head.labels == ("4", "5")


def test_streams_that_tell_the_task_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match="in a stream of kind 'task' it is told.*SequentialFineTune"):
        run(PatchPerTask(model()), task_stream())


def test_a_head_with_too_few_prototypes_is_refused():
    with pytest.raises(ValueError, match=r"has 2 prototypes for 3 tasks: NearestMeanHead.*prototypes=3"):
        run(PatchPerTask(model(6, 2)), class_stream(3))


def test_a_loaded_head_with_too_few_prototypes_for_further_tasks_is_refused_before_work_starts():
    stream = class_stream(4)
    method = PatchPerTask(model(8, 3))
    run(method, TaskStream(stream.items[:2], kind="class"))
    before = snapshot(method.model)
    with pytest.raises(ValueError, match=r"has 3 prototypes for 4 tasks"):
        run(PatchPerTask(method.model), TaskStream(stream.items[2:], kind="class"))
    assert not changed(before, method.model)


def test_a_patched_task_of_another_origin_is_refused_by_name():
    """It would be taken for the first task, whose examples then were counted as those of the second."""
    other = model(4).add_task("other", ht.ClassificationHead(2), patch=ht.ScaleBiasConfig()).set_task("task")
    with pytest.raises(ValueError, match=r"not counted examples of each of \['other'\]"):
        run(PatchPerTask(other), class_stream(2))


def test_penalties_are_refused_on_either_side():
    network = model()
    for add in (lambda: PatchPerTask(network) + L2(network), lambda: L2(network) + PatchPerTask(network)):
        with pytest.raises(TypeError, match="PatchPerTask and L2 cannot be added: of earlier tasks nothing moves"):
            add()
