"""The least similar subset: by hand, against all subsets, no single exchange helps."""

from itertools import combinations

import pytest
import torch

from hubtransfer.functional.subsets import least_similar


def cosines(n, d, seed):
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = rows / rows.norm(dim=1, keepdim=True)
    return rows @ rows.T


def value(similarity, kept):
    w = kept.double()
    return (w @ similarity @ w).item()


def test_of_three_twins_and_a_stranger_two_differ():
    """Directions 0, 0, 0 and 90 degrees: any twin with the stranger has w'Sw = 2, two twins 4."""
    similarity = torch.ones(4, 4)
    similarity[3, :3] = similarity[:3, 3] = 0
    kept = least_similar(similarity, 2)
    assert kept[3]
    assert value(similarity.double(), kept) == 2


def test_it_is_the_best_of_all_subsets_or_near_it():
    """Of ten: the gap to the best is never more than a seventh of that of a random subset, and often there is none."""
    hits = 0
    for seed in range(20):
        similarity = cosines(10, 4, seed)
        kept = least_similar(similarity, 5)
        assert kept.sum() == 5
        every = []
        for chosen in combinations(range(10), 5):
            w = torch.zeros(10, dtype=torch.bool)
            w[list(chosen)] = True
            every.append(value(similarity, w))
        gap, best = value(similarity, kept) - min(every), min(every)
        assert gap <= (sum(every) / len(every) - best) / 7
        hits += gap < 1e-9
    assert hits >= 10


def test_no_exchange_of_two_helps_and_random_subsets_are_worse():
    similarity = cosines(60, 5, 0)
    kept = least_similar(similarity, 25)
    best = value(similarity, kept)
    for out in kept.nonzero().flatten():
        for into in (~kept).nonzero().flatten():
            other = kept.clone()
            other[out], other[into] = False, True
            assert value(similarity, other) >= best - 1e-8
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        other = torch.zeros(60, dtype=torch.bool)
        other[torch.randperm(60, generator=generator)[:25]] = True
        assert value(similarity, other) > best


def test_a_first_choice_is_made_better_or_stays():
    similarity = cosines(30, 4, 2)
    start = torch.arange(30) < 12
    kept = least_similar(similarity, 12, start=start)
    assert kept.sum() == 12
    assert value(similarity, kept) < value(similarity, start)
    assert torch.equal(least_similar(similarity, 12, start=kept), kept)
    assert start.tolist() == [k < 12 for k in range(30)], "what was given stays as it was"


def test_all_none_and_what_cannot_be():
    similarity = cosines(4, 2, 0)
    assert least_similar(similarity, 4).all()
    assert not least_similar(similarity, 0).any()
    for bad, count, message in ((similarity[:3], 2, "square"), (similarity, 5, "5 cannot be chosen of 4")):
        with pytest.raises(ValueError, match=message):
            least_similar(bad, count)
    with pytest.raises(ValueError, match="start must choose 2 of 4, but it chooses 3 of 4"):
        least_similar(similarity, 2, start=torch.arange(4) < 3)
