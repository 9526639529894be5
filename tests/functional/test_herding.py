"""Herding: by hand, against the definition, better than chance at every length."""

import torch

from hubtransfer.functional.herding import herding_order


def test_four_numbers_by_hand():
    """0, 3, 4, 9 with mean 4: first 4 itself; then (4 + 3) / 2 is nearest, then 16 / 3 and 7 / 3: 9; last 0."""
    assert herding_order(torch.tensor([[0.0], [3.0], [4.0], [9.0]]), 9).tolist() == [2, 1, 3, 0]


def test_it_is_the_definition():
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = []
    for k in range(1, 16):
        distances = {
            row: (features.mean(0) - features[[*order, row]].sum(0) / k).norm().item()
            for row in range(40)
            if row not in order
        }
        order.append(min(distances, key=distances.get))
    assert herding_order(features, 15).tolist() == order


def test_every_beginning_is_nearer_the_mean_than_random_examples():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(500, 8, generator=generator)
    order = herding_order(features, 50)
    assert len(set(order.tolist())) == 50
    for count in (5, 20, 50):
        own = (features[order[:count]].mean(0) - features.mean(0)).norm()
        for _ in range(20):
            other = features[torch.randperm(500, generator=generator)[:count]].mean(0)
            assert own < (other - features.mean(0)).norm()


def test_twins_are_taken_one_after_the_other():
    assert sorted(herding_order(torch.ones(3, 2), 3).tolist()) == [0, 1, 2]
    assert herding_order(torch.ones(3, 2), 0).shape == (0,)
