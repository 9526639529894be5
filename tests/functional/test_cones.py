"""Projection to a cone: cases by hand, a QP solver, and the optimality conditions, degenerate cases included."""

import time

import numpy as np
import pytest
import torch

from hubtransfer.functional.cones import cone_weights, project_to_cone


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("g", "constraints", "expected"),
    [
        # met already
        ([1.0, 1.0], [[1.0, 0.0]], [1.0, 1.0]),
        # the part against the constraint goes
        ([-1.0, 1.0], [[2.0, 0.0]], [0.0, 1.0]),
        # g - (g.r / r.r) r = (-3, 1) + 2/2 (1, 1)
        ([-3.0, 1.0], [[1.0, 1.0]], [-2.0, 2.0]),
        # the nearest point of the quarter plane is its edge
        ([-1.0, 2.0], [[1.0, 0.0], [0.0, 1.0]], [0.0, 2.0]),
        # ... or its corner
        ([-1.0, -2.0], [[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0]),
        # opposite constraints leave a line
        ([3.0, 1.0], [[1.0, 0.0], [-1.0, 0.0]], [0.0, 1.0]),
        # a zero vector constrains nothing; a constraint given twice counts once
        ([-1.0, 1.0], [[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [0.0, 1.0]),
    ],
)
def test_by_hand(g, constraints, expected):
    found = project_to_cone(vector(*g), torch.tensor(constraints, dtype=torch.float64))
    torch.testing.assert_close(found, vector(*expected), atol=1e-12, rtol=0)


def test_the_margin_is_the_least_weight():
    """p = -1, M = 1: v = 1. With a margin of 3 it is 3, and g + 3 r = (-1, 1) + (3, 0). Met constraints: no margin."""
    assert cone_weights(torch.eye(1), vector(-1.0), margin=0.5).item() == pytest.approx(1.0)
    moved = project_to_cone(vector(-1.0, 1.0), torch.tensor([[1.0, 0.0]], dtype=torch.float64), margin=3.0)
    torch.testing.assert_close(moved, vector(2.0, 1.0))
    kept = vector(1.0, 1.0)
    assert project_to_cone(kept, torch.tensor([[1.0, 0.0]], dtype=torch.float64), margin=3.0) is kept


def cases():
    """Vectors of 1 to 50 tasks in more and in fewer dimensions than tasks; repeated, opposite, zero, long and short."""
    generator = torch.Generator().manual_seed(0)
    for tasks in (1, 2, 3, 5, 10, 20, 50):
        for kind in ("random", "twice", "opposite", "zero", "short", "long", "against all", "nearly equal"):
            for length in (3 * tasks + 5, max(1, tasks // 2)):
                rows = torch.randn(tasks, length, generator=generator, dtype=torch.float64)
                g = torch.randn(length, generator=generator, dtype=torch.float64)
                if kind == "twice":
                    rows[-1] = rows[0]
                elif kind == "opposite":
                    rows[-1] = -rows[0]
                elif kind == "zero":
                    rows[0] = 0
                elif kind == "short":
                    rows *= 1e-6
                elif kind == "long":
                    rows[0] *= 1e4
                elif kind == "against all":
                    g = -rows.sum(0)
                elif kind == "nearly equal":
                    rows = rows[:1] + 1e-4 * rows
                yield pytest.param(g, rows, id=f"{tasks} tasks, {length} long, {kind}")


@pytest.mark.parametrize(("g", "rows"), list(cases()))
def test_the_optimality_conditions_hold(g, rows):
    """x is the projection if it is in the cone, x - g is a non-negative combination, and (x - g).x = 0."""
    x = project_to_cone(g, rows)
    assert (rows @ x / (rows.norm(dim=1) * g.norm()).clamp(min=1e-30)).min().item() > -1e-7
    assert abs(((x - g) @ x).item()) < 1e-7 * g.norm().item() ** 2
    weights = cone_weights(rows @ rows.T, rows @ g)
    assert weights.min().item() >= 0
    if (rows @ g < 0).any():
        torch.testing.assert_close(g + weights @ rows, x, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 10, 20, 50])
@pytest.mark.parametrize(("margin", "ridge"), [(0.0, 1e-3), (0.5, 1e-3), (0.5, 0.0)])
def test_equal_to_a_quadratic_programming_solver(tasks, margin, ridge):
    """The dual problem as Goldfarb and Idnani's method solves it (which gives up where lengths differ by 1e3)."""
    quadprog = pytest.importorskip("quadprog", reason="the package quadprog is not installed")
    generator = torch.Generator().manual_seed(tasks)
    for case in range(20):
        rows = torch.randn(tasks, 200, generator=generator, dtype=torch.float64)
        g = torch.randn(200, generator=generator, dtype=torch.float64) - (case % 3) * rows.mean(0)
        if case % 4 == 1 and ridge:
            rows[-1] = rows[0]
        gram, products = rows @ rows.T + ridge * torch.eye(tasks), rows @ g
        if (products >= 0).all():
            continue
        identity, bound = np.eye(tasks), np.full(tasks, margin)
        dual = quadprog.solve_qp(gram.numpy(), -products.numpy(), identity, bound)[0]
        expected = g + torch.from_numpy(dual) @ rows
        found = project_to_cone(g, rows, margin, ridge)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_twenty_tasks_take_less_than_a_millisecond():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 500, generator=generator, dtype=torch.float64)
    gram, products = rows @ rows.T, rows @ torch.randn(500, generator=generator, dtype=torch.float64)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        cone_weights(gram, products, margin=0.5, ridge=1e-3)
        times.append(time.perf_counter() - began)
    assert min(times) < 1e-3  # the machine may be busy with something else for most of them


def test_single_precision_stays_single_precision():
    generator = torch.Generator().manual_seed(0)
    rows, g = torch.randn(5, 40_000, generator=generator), torch.randn(40_000, generator=generator)
    g -= rows.sum(0)
    found = project_to_cone(g, rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), project_to_cone(g.double(), rows.double()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("g", "rows", "words"),
    [
        (torch.zeros(3), torch.zeros(2, 4), "length"),
        (torch.zeros(3), torch.zeros(3), "shape"),
        (torch.tensor([float("nan"), 0.0]), torch.ones(1, 2), "finite"),
    ],
)
def test_bad_input_is_named(g, rows, words):
    with pytest.raises(ValueError, match=words):
        project_to_cone(g, rows)
    with pytest.raises(ValueError, match="gram"):
        cone_weights(torch.eye(2), torch.zeros(3))
