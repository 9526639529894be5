"""Fixed weights: equal ones are the plain sum, others by hand and over whole steps, wrong ones are named."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import Mixing, MultiTask
from hubtransfer.methods.multitask.fixed_weights import FixedWeights
from tests.methods.multitask.tasks import batch_of, scenario, shared_data, streams, two_headed
from tests.methods.steps import assert_same_parameters, batches, changed, clone, run, snapshot
from tests.tiny import tiny_data


def example(dtype=torch.float32, seed=0, n=24):
    return FixedWeights(two_headed(dtype, seed), weights={"right": 0.5}), scenario(n, seed, dtype)


def test_terms_are_weighted_losses():
    model = two_headed(torch.float64)
    for head in model.heads.values():
        head.weight.data.zero_()
        head.bias.data.zero_()
    # three classes and two classes, all equally likely: losses log 3 and log 2
    terms = FixedWeights(model, weights={"right": 3.0}).loss(batch_of(shared_data(dtype=torch.float64)))
    assert terms["left"].item() == pytest.approx(1.0986122886681098)
    assert terms["right"].item() == pytest.approx(3 * 0.6931471805599453)


@pytest.mark.parametrize("weights", [None, {"left": 0.25, "right": 2.0}])
def test_steps_equal_a_plain_loop(weights):
    method = FixedWeights(two_headed(torch.float64), weights=weights)
    data, plain = scenario(dtype=torch.float64), clone(method.model)
    run(method, data)
    factors = weights or {"left": 1.0, "right": 1.0}
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    for batch in batches(data.train_source):
        z = plain.backbone.trunk(batch.inputs["pixel_values"])
        optimizer.zero_grad()
        sum(w * F.cross_entropy(plain.heads[t](z), batch.labels[t]) for t, w in factors.items()).backward()
        optimizer.step()
    assert_same_parameters(method.model, plain, 1e-7)  # the weights are single precision


def test_a_task_of_weight_zero_trains_nothing():
    method = FixedWeights(two_headed(), weights={"right": 0.0})
    before = snapshot(method.model)
    run(method, scenario())
    assert not [name for name in changed(before, method.model) if "right" in name]


@pytest.mark.parametrize("mixing", [None, Mixing(), Mixing(batches="mixed")])
def test_a_data_set_for_each_task_at_once_or_in_turns(mixing):
    data = {"left": tiny_data(24, 3), "right": tiny_data(16, 2, seed=1)}
    method = FixedWeights(two_headed())
    before = snapshot(method.model)
    run(method, MultiTask(datasets=data, mixing=mixing), steps=5)
    assert changed(before, method.model) == set(before)


def test_a_frozen_trunk_leaves_the_heads_to_train():
    model = two_headed()
    model.backbone.requires_grad_(False)
    before = snapshot(model)
    run(FixedWeights(model), streams())
    assert changed(before, model) == {n for n in before if n.startswith("heads")}


def test_wrong_weights_are_named():
    with pytest.raises(ValueError, match="'lefft'.*left"):
        FixedWeights(two_headed(), weights={"lefft": 1.0})
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"weights\['left'\]"):
            FixedWeights(two_headed(), weights={"left": bad})
    with pytest.raises(ValueError, match="FixedWeights trains task 'right'"):
        run(FixedWeights(two_headed()), MultiTask(train=shared_data(), labels={"left": "left"}))
