"""The model as it was: its answers do not follow the model, are looked up, and survive a checkpoint."""

import torch

from hubtransfer.methods.earlier_model import EarlierModel
from hubtransfer.models import ClassificationHead
from tests.tiny import batch, tiny_model


def logits(model, inputs):
    return (model(**inputs).logits,)


def test_it_stays_while_the_model_moves_and_follows_when_told():
    model, earlier, each = tiny_model().eval(), EarlierModel(), batch([0, 1, 2])
    assert not earlier
    first = model(**each.inputs).logits.detach()
    earlier.hold(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert earlier
    assert torch.equal(earlier.outputs(model, each, logits)[0], first)
    earlier.hold(model)
    (second,) = earlier.outputs(model, each, logits)
    assert torch.equal(second, model(**each.inputs).logits) and not second.requires_grad


def test_parts_that_the_model_no_longer_has_are_forgotten():
    earlier, each = EarlierModel(), batch([0, 1, 2])
    larger, model = tiny_model(), tiny_model(seed=3).eval()
    larger.add_task("other", ClassificationHead(2))
    earlier.hold(larger)
    earlier.hold(model)
    assert torch.equal(earlier.outputs(model, each, logits)[0], model(**each.inputs).logits)


def test_examples_that_stay_the_same_are_asked_once():
    model, earlier, calls = tiny_model(), EarlierModel(), []
    earlier.hold(model)

    def count(asked, inputs):
        calls.append(len(inputs["pixel_values"]))
        return logits(asked, inputs)

    kept = batch([0, 1], index=[3, 4], origin="data", size=8)
    one, two = earlier.outputs(model, kept, count), earlier.outputs(model, kept, count)
    assert torch.equal(one[0], two[0]) and calls == [2]
    earlier.outputs(model, batch([0, 1]), count)  # augmented or streamed: asked each time
    earlier.hold(model)
    earlier.outputs(model, kept, count)
    assert calls == [2, 2, 2]


def test_a_checkpoint_holds_it_once_and_gives_it_back():
    model, earlier, each = tiny_model(), EarlierModel(), batch([0, 1, 2])
    earlier.hold(model)
    (expected,) = earlier.outputs(model, each, logits)
    assert not list(earlier.parameters())
    other, moved = EarlierModel(), tiny_model(seed=7)
    other.hold(moved)
    other.outputs(moved, each, logits)
    other.load_state_dict(earlier.state_dict())
    assert torch.equal(other.outputs(moved, each, logits)[0], expected)
