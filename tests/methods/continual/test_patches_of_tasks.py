"""Strategies on a model in which each task has a patch and a head of its own: trunk and finished tasks stand still."""

import pytest
import torch

from hubtransfer.methods.continual.hal import HAL
from hubtransfer.methods.registry import load_all
from hubtransfer.patches import ScaleBiasConfig, WidenConfig
from tests.methods.continual.streams import model_for, task_stream
from tests.methods.steps import batches, run

STRATEGIES = (
    "er",
    "der",
    "der_plus_plus",
    "fdr",
    "hal",
    "gss",
    "gem",
    "a_gem",
    "ewc",
    "online_ewc",
    "mas",
    "si",
    "lwf",
)
OPTIONS = {"hal": {"anchor_steps": 2}, "lwf": {"trains": "patch"}}
MOVES_OLD_HEADS = ("gem", "a_gem")


@pytest.mark.parametrize("patch", [ScaleBiasConfig(), WidenConfig()], ids=["scale_bias", "widen"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_later_task_changes_nothing_of_an_earlier_one(name, patch):
    """Where what is remembered does not depend on what learns, the gradient is zero, not an error."""
    stream = task_stream(2)
    model = model_for(stream, kind="cnn", patch=patch)
    images = stream[0].train["pixel_values"][:8]
    answers, trunk = [], [p.detach().clone() for p in model.backbone.parameters()]
    method = load_all()[name](model, **OPTIONS.get(name, {}))
    after_task = method.after_task

    def noting(item, runtime):
        after_task(item, runtime)
        answers.append(model.eval()(pixel_values=images, task="t0").logits.detach())

    method.after_task = noting
    run(method, stream)
    assert len(answers) == 2
    if name not in MOVES_OLD_HEADS:
        assert torch.equal(*answers)
    assert all(map(torch.equal, trunk, model.backbone.parameters()))


def test_hal_means_features_as_wide_as_the_patch_makes_them():
    """beta = 1/2 and one batch: half of its mean feature, of which the widened task has more than the trunk."""
    stream = task_stream(1, dtype=torch.float64)
    model = model_for(stream, kind="cnn", dtype=torch.float64, patch=WidenConfig())
    method = HAL(model, anchor_steps=0)
    run(method, stream, steps=1, lr=0.0)
    inputs = batches(stream[0].train_source, 1)[0].inputs["pixel_values"]
    features = model.eval()(pixel_values=inputs, task="t0").features.pooled
    assert features.shape[1] > model.backbone.dim
    torch.testing.assert_close(method.phi, features.mean(0).detach() / 2)
