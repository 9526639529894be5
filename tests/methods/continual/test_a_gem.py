"""A-GEM: the projection by hand, whole tasks re-derived, and it is GEM with one memory."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data import Ring
from hubtransfer.methods.continual.a_gem import AGEM, AGEMProjection
from hubtransfer.methods.continual.gem import GEM
from tests.methods.continual.streams import class_stream, domain_stream, model_for, task_stream
from tests.methods.steps import assert_same_parameters, batches_of, clone, gradients_of, move, run


def example(dtype=torch.float32, seed=0, n=24):
    stream = domain_stream(n=n, seed=seed, dtype=dtype)
    return AGEM(model_for(stream, dtype=dtype, seed=seed), memory=Ring(8)), stream


def project(*rows):
    rows = [[torch.tensor(row, dtype=torch.float64)] for row in rows]
    return AGEMProjection().from_rows(rows, torch.zeros(len(rows)))[0].tolist()


def test_the_projection_by_hand():
    """(-3, 1) against (1, 1): -3 + 1 = -2, divided by 2: one (1, 1) is added. With the reference nothing changes."""
    assert project([-3.0, 1.0], [1.0, 1.0]) == [-2.0, 2.0]
    assert project([3.0, 1.0], [1.0, 1.0]) == [3.0, 1.0]
    assert project([3.0, 1.0], [0.0, 0.0]) == [3.0, 1.0]
    assert project([3.0, 1.0]) == [3.0, 1.0]


@pytest.mark.parametrize("make", [domain_stream, class_stream, task_stream])
def test_three_tasks_equal_a_plain_loop(make):
    stream = make(3, seed=1, dtype=torch.float64)
    method = AGEM(model_for(stream, dtype=torch.float64), memory=Ring(6), reference=4)
    plain, drawn = clone(method.model), []
    draw = method.memory.draw

    def spy(count):
        found = draw(count)
        if found is not None:
            drawn.append((found.inputs["pixel_values"], found.labels, found.tasks))
        return found

    method.memory.draw = spy
    run(method, stream, steps=9)
    names = [item.task or "task" for item in stream]
    references, against = iter(drawn), 0
    for t, item in enumerate(stream):
        heads = [plain.heads[name] for name in dict.fromkeys(names[: t + 1])]
        parameters = [p for m in (plain.backbone.trunk, *heads) for p in m.parameters()]

        def gradient(x, y, tasks, parameters=parameters):
            logits = [plain(pixel_values=x[i][None], task=names[int(k)]).logits for i, k in enumerate(tasks)]
            loss = torch.stack([F.cross_entropy(z, y[i][None]) for i, z in enumerate(logits)]).mean()
            return torch.cat([g.flatten() for g in gradients_of(loss, parameters)])

        for each in batches_of(stream, item, steps=9):
            g = gradient(each.inputs["pixel_values"], each.labels, [t] * len(each))
            if t:
                r = gradient(*next(references))
                if g @ r < 0:
                    against += 1
                    g = g - (g @ r) / (r @ r) * r
            parts = g.split([p.numel() for p in parameters])
            move(parameters, [part.view_as(p) for p, part in zip(parameters, parts)])
    assert against, "the projection was never needed"
    assert_same_parameters(method.model, plain, 1e-9)


def test_with_the_whole_memory_of_one_task_it_is_gem_without_a_margin():
    stream = domain_stream(2, dtype=torch.float64)
    one = AGEM(model_for(stream, dtype=torch.float64), memory=Ring(8))
    two = GEM(model_for(stream, dtype=torch.float64), memory=Ring(8), margin=0.0, ridge=0.0)
    run(one, stream)
    run(two, stream)
    assert_same_parameters(one.model, two.model, 1e-9)


def test_a_bad_reference_is_named():
    with pytest.raises(ValueError, match="reference"):
        AGEM(model_for(domain_stream()), reference=0)
