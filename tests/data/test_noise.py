"""Noise: a function of seed and count alone, saved and resumed, of mean 0 and variance 1."""

import torch

from hubtransfer.data.noise import Noise


def test_the_numbers_depend_on_seed_and_count_alone():
    one, two, like = Noise(5), Noise(5), torch.zeros(1)
    first = one.normal(4, 2, like=like)
    torch.rand(3)
    assert torch.equal(first, two.normal(4, 2, like=like))
    assert not torch.equal(one.normal(4, 2, like=like), first)
    assert not torch.equal(Noise(6).normal(4, 2, like=like), first)


def test_it_goes_on_where_it_was():
    noise, again, like = Noise(1), Noise(), torch.zeros(1, dtype=torch.float64)
    noise.uniform(3, like=like)
    again.load_state_dict(noise.state_dict())
    assert torch.equal(noise.uniform(3, like=like), again.uniform(3, like=like))


def test_the_distributions():
    noise, like = Noise(), torch.zeros(1)
    normal, uniform = noise.normal(20000, like=like), noise.uniform(20000, like=like)
    assert abs(normal.mean()) < 0.03
    assert abs(normal.var() - 1) < 0.05
    assert 0 <= uniform.min() < 0.001 < 0.999 < uniform.max() < 1
