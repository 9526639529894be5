"""Missing labels where tasks have networks or patches of their own: means over labelled rows, and nothing from none."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import MultiTask
from hubtransfer.methods.multitask.cross_stitch import CrossStitch
from hubtransfer.methods.multitask.ensemble import Ensemble
from hubtransfer.methods.multitask.model_patches import ModelPatches
from hubtransfer.patches import ScaleBiasConfig
from tests.methods.multitask.tasks import shared_data, two_headed
from tests.methods.steps import batches, begin, changed, snapshot

MISSING = {"left": [0, 3, 4], "right": [1, 2, 3, 6, 7]}


def patches_for_both():
    return ModelPatches(two_headed(torch.float64, left=ScaleBiasConfig(), right=ScaleBiasConfig()), mode="simultaneous")


METHODS = {
    "cross_stitch": lambda: CrossStitch(two_headed(torch.float64)),
    "ensemble": lambda: Ensemble(two_headed(torch.float64)),
    "model_patches": patches_for_both,
}


def eight(missing, own):
    """Eight examples with labels for both tasks, but for the rows named: on shared inputs, or a data set a task."""
    data = shared_data(8, dtype=torch.float64)
    for task, rows in missing.items():
        data[task][rows] = -100
    if own:
        sets = {task: {"pixel_values": data["pixel_values"], "labels": data[task]} for task in ("left", "right")}
        return data, MultiTask(datasets=sets)
    columns = {key: data[key] for key in ("pixel_values", "left", "right")}
    return data, MultiTask(train=columns, labels={"left": "left", "right": "right"})


def own_tensors(method, task, before):
    """Names of what belongs to one task alone."""
    places = [f"model.heads.{task}.", f"model.patches.{task}."]
    if isinstance(method, Ensemble):
        number = method.tasks.index(task)
        places += [f"heads.{number}."]
        networks = {id(p) for network in method.model.backbone.networks(task) for p in network.parameters()}
        places += [name for name, p in method.named_parameters() if id(p) in networks]
    return {name for name in before if name.startswith(tuple(places))}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_loss_is_the_mean_over_its_labelled_rows(name, own):
    method = METHODS[name]()
    data, scenario = eight(MISSING, own)
    begin(method, scenario)
    sources = scenario.train_sources if own else scenario.train_source
    (batch,) = batches(sources, 1)
    found = method.loss(batch)
    for task, rows in MISSING.items():
        kept = [row for row in range(8) if row not in rows]
        images, labels = data["pixel_values"][kept], data[task][kept]
        if name == "ensemble":
            pairs = method.members(task)
            expected = sum(F.cross_entropy(head(network(images).pooled), labels) for network, head in pairs)
        else:
            expected = F.cross_entropy(method.model(images, task=task).logits, labels)
        torch.testing.assert_close(found[task], expected)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_without_labels_leaves_what_is_the_tasks_own(name, own):
    method = METHODS[name]()
    _, scenario = eight({"right": slice(None)}, own)
    runtime, stage = begin(method, scenario)
    sources = scenario.train_sources if own else scenario.train_source
    (batch,) = batches(sources, 1)
    before = snapshot(method)
    terms = stage.updates[0].apply(batch, runtime)
    assert terms["right"].item() == 0 < terms["left"].item()
    moved = changed(before, method)
    of_left, of_right = own_tensors(method, "left", before), own_tensors(method, "right", before)
    assert len(of_right) == len(of_left) >= 2
    assert of_left <= moved and not of_right & moved
