"""Joint training: everything is in one stage, equal to a plain loop; heads of their own; cumulative growth."""

import torch
import torch.nn.functional as F

from hubtransfer.methods.continual.joint import Joint, together
from tests.methods.continual.streams import class_stream, domain_stream, model_for, task_stream
from tests.methods.steps import assert_same_parameters, batches, clone, descend, run


def example(dtype=torch.float32, seed=0, n=24):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    return Joint(model_for(stream, dtype=dtype, seed=seed)), stream


def test_one_stage_sees_all_tasks_and_equals_a_plain_loop():
    for stream in (domain_stream(3), class_stream(3)):
        method = Joint(model_for(stream))
        plain = clone(method.model)
        trainer = run(method, stream, steps=9)
        assert trainer.cursor.total == 9, "one stage"
        seen = []
        for each in batches(together(stream.items), steps=9):
            logits = plain.heads["task"](plain.backbone.trunk(each.inputs["pixel_values"]))
            descend(plain.parameters(), F.cross_entropy(logits, each.labels))
            seen.append(each.index)
        assert sorted(torch.cat(seen).tolist()) == list(range(72)), "one pass over 3 x 24 examples, no two alike"
        assert_same_parameters(method.model, plain, 1e-6)


def test_heads_of_their_own_learn_side_by_side():
    stream = task_stream(2)
    method = Joint(model_for(stream))
    before = {name: head.weight.clone() for name, head in method.model.heads.items()}
    trainer = run(method, stream, epochs=60, steps=None, lr=0.3)
    assert all(not torch.equal(before[name], head.weight) for name, head in method.model.heads.items())
    metrics = trainer.evaluate()
    assert metrics["t0/accuracy"] == metrics["t1/accuracy"] == 1


def test_the_mean_over_examples_is_that_of_all_tasks_together():
    stream = task_stream(2)
    method = Joint(model_for(stream))
    parts = {item.name: each for item in stream for each in batches(item.train_source, steps=1)}
    parts["t1"] = parts["t1"].rows(torch.arange(2))
    terms = method.loss(parts)
    losses = [
        F.cross_entropy(method.model(**part.inputs, task=name).logits, part.labels, reduction="sum")
        for name, part in parts.items()
    ]
    torch.testing.assert_close(sum(terms.values()), sum(losses) / 10)


def test_cumulative_training_has_a_stage_a_task_on_all_tasks_so_far():
    stream = domain_stream(3)
    method = Joint(model_for(stream), cumulative=True)
    stages = list(method.stages(stream))
    assert [stage.name for stage in stages] == ["t0", "t1", "t2"]
    assert [len(stage.data.table) for stage in stages] == [24, 48, 72]
