"""The evidence bound against an importance-sampled likelihood, the gradient penalty against finite differences."""

import math

import torch

from hubtransfer.functional.generative import gaussian_evidence_bound, gradient_penalty, negative_evidence_bound


def test_the_bound_is_the_likelihood_where_the_code_tells_nothing():
    """A decoder that ignores its code and a posterior equal to the prior: -ln p(x) = -ln 0.25 - ln 0.5."""
    logits = torch.tensor([[math.log(1 / 3), 0.0]])  # probabilities 0.25 and 0.5
    bound = negative_evidence_bound(torch.tensor([[1.0, 1.0]]), logits, torch.zeros(1, 3), torch.zeros(1, 3))
    torch.testing.assert_close(bound, torch.tensor([math.log(8)]))


def test_pixels_of_unit_gaussians_are_torchs_own():
    random = torch.Generator().manual_seed(0)
    inputs, mean, log_variance = (torch.randn(4, 5, generator=random, dtype=torch.float64) for _ in range(3))
    decoded = torch.randn(4, 3, 5, generator=random, dtype=torch.float64)
    likelihood = torch.distributions.Normal(decoded, 1).log_prob(inputs[:, None]).sum(2).mean(1)
    code, prior = torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    divergence = torch.distributions.kl_divergence(code, prior).sum(1)
    bound = gaussian_evidence_bound(inputs, decoded, mean, log_variance)
    torch.testing.assert_close(bound, likelihood - divergence)


def test_the_divergence_is_torchs_own():
    random = torch.Generator().manual_seed(0)
    mean, log_variance = (torch.randn(4, 5, generator=random, dtype=torch.float64) for _ in range(2))
    nothing = torch.zeros(4, 1, dtype=torch.float64)
    found = negative_evidence_bound(nothing, nothing - 1000, mean, log_variance)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mean, (log_variance / 2).exp()), normal(torch.zeros_like(mean), 1.0)
    )
    torch.testing.assert_close(found, expected.sum(1))


def test_the_penalty_of_a_curved_critic_by_finite_differences():
    random = torch.Generator().manual_seed(0)
    real, made = (torch.randn(3, 2, 2, generator=random, dtype=torch.float64) for _ in range(2))
    share = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)

    def critic(x):
        return x.flatten(1).pow(3).sum(1)

    between = [made[0], 0.3 * real[1] + 0.7 * made[1], real[2]]
    expected = []
    for x in between:
        steps = 1e-6 * torch.eye(4, dtype=torch.float64).view(4, 2, 2)
        slope = (critic(x + steps) - critic(x - steps)) / 2e-6
        expected.append((slope.norm() - 1).square())
    torch.testing.assert_close(gradient_penalty(critic, real, made, share), torch.stack(expected), atol=1e-6, rtol=1e-6)


def test_its_gradient_reaches_the_critic():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    points = torch.zeros(1, 2)
    gradient_penalty(lambda x: x @ weight, points, points, torch.tensor([0.5])).sum().backward()
    # (|w| - 1)^2 has gradient 2 (|w| - 1) w / |w| = 8 (0.6, 0.8)
    torch.testing.assert_close(weight.grad, torch.tensor([4.8, 6.4]))
