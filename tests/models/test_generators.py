"""Generators: losses re-derived in a straight line, they learn to draw what they saw and as often, bad numbers."""

import pytest
import torch
import torch.nn.functional as F

from hubtransfer.data.noise import Noise
from hubtransfer.models.generators import VAE, WGANGP

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def build(config, shape=(1, 2, 3)):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return config.build(shape).double()


def inputs(count=3, shape=(1, 2, 3)):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_vae_loss():
    vae, x = build(VAE(hidden=(5,), latent=2)), inputs()
    a, b, c, d = vae.encoder[1], vae.encoder[3], vae.decoder[0], vae.decoder[2]
    code = b(F.relu(a(x.flatten(1))))
    mean, variance = code[:, :2], code[:, 2:].exp()
    z = mean + variance.sqrt() * Noise(3).normal(3, 2, like=x)
    p = torch.sigmoid(d(F.relu(c(z))))
    flat = x.flatten(1)
    pixels = -(flat * p.log() + (1 - flat) * (1 - p).log()).sum(1)
    unit = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    divergence = torch.distributions.kl_divergence(torch.distributions.Normal(mean, variance.sqrt()), unit).sum(1)
    expected = ((pixels + divergence) * WEIGHTS).sum()
    torch.testing.assert_close(vae.players()["generator"].loss(x, WEIGHTS, Noise(3)), expected)


def test_wgan_gp_losses():
    gan, x = build(WGANGP(hidden=(5,), latent=2, penalty=7.0)), inputs()
    noise = Noise(3)
    a, b = gan.critic[1], gan.critic[3]

    def judge(y):
        return b(F.leaky_relu(a(y.flatten(1)), 0.2)).flatten()

    c, d = gan.generator[0], gan.generator[2]
    made = torch.sigmoid(d(F.leaky_relu(c(noise.normal(3, 2, like=x)), 0.2))).view_as(x).detach()
    share = noise.uniform(3, like=x).view(3, 1, 1, 1)
    between = share * x + (1 - share) * made
    slopes = []
    for y in between.flatten(1):  # the slope of a perceptron by hand: W2 diag(leaky') W1
        active = torch.where(a(y) > 0, 1.0, 0.2).double()
        slopes.append(((b.weight[0] * active) @ a.weight).norm())
    penalty = (torch.stack(slopes) - 1).square()
    expected = ((judge(made) - judge(x) + 7 * penalty) * WEIGHTS).sum()
    players = gan.players()
    torch.testing.assert_close(players["critic"].loss(x, WEIGHTS, Noise(3)), expected)
    assert players["critic"].steps == 5
    torch.testing.assert_close(players["generator"].loss(x, WEIGHTS, Noise(3)), -judge(made).mean())


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 14), (2, 4, 7)])
@pytest.mark.parametrize("hidden", [(), (5,)])
def test_convolutions_suit_any_size_of_images(shape, hidden):
    """The encoder by hand, and a decoder whose output has the shape of the images."""
    vae, x = build(VAE(hidden=hidden, channels=(2, 3), latent=4), shape), inputs(2, shape)
    first, second, *linear = (layer for layer in vae.encoder if any(True for _ in layer.parameters()))
    maps = F.conv2d(x, first.weight, first.bias, stride=2, padding=1).relu()
    maps = F.conv2d(maps, second.weight, second.bias, stride=2, padding=1).relu()
    assert maps.shape[2:] == (shape[1] // 4, shape[2] // 4)
    code = maps.flatten(1)
    for number, layer in enumerate(linear):
        code = layer(code if number == 0 else code.relu())
    torch.testing.assert_close(vae.encoder(x), code)
    assert vae.encoder(x).shape == (2, 8)
    drawn = vae.draw(torch.zeros(2, 4, dtype=torch.float64))
    assert drawn.shape == x.shape
    assert drawn.min() > 0
    assert drawn.max() < 1
    units = [layer.out_features for layer in vae.decoder if hasattr(layer, "out_features")]
    assert units == [*hidden, 3 * (shape[1] // 4) * (shape[2] // 4)]


def test_the_decoder_ends_without_an_activation():
    for channels in ((), (3,)):
        last = list(build(WGANGP(hidden=(4,), channels=channels, latent=2), (1, 6, 5)).generator)[-1]
        assert isinstance(last, (torch.nn.Unflatten, torch.nn.ConvTranspose2d))


def test_the_slope_of_a_convolutional_critic_by_finite_differences():
    """The penalty falls along its own gradient as fast as the gradient says."""
    gan, x = build(WGANGP(hidden=(), channels=(2, 3), latent=2, penalty=1e6), (1, 8, 8)), inputs(3, (1, 8, 8))
    loss, parts = gan.players()["critic"].loss, list(gan.critic.parameters())
    gradients = torch.autograd.grad(loss(x, WEIGHTS, Noise(3)), parts)
    length = sum(g.square().sum() for g in gradients)
    values = []
    for step in (1e-8, -1e-8):
        with torch.no_grad():
            for p, g in zip(parts, gradients):
                p += step * g / length.sqrt()
        values.append(loss(x, WEIGHTS, Noise(3)).item())
        with torch.no_grad():
            for p, g in zip(parts, gradients):
                p -= step * g / length.sqrt()
    assert (values[0] - values[1]) / 2e-8 == pytest.approx(length.sqrt().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [(VAE(channels=(2,)), (7,), r"images \(channels, height, width\).*shape \(7,\)"),
     (WGANGP(channels=(2, 2)), (1, 3, 28), "images of 3 x 28 can be halved 1 times.* 2 convolutions")],
)  # fmt: skip
def test_inputs_that_convolutions_cannot_halve_are_refused(config, shape, message):
    with pytest.raises(ValueError, match=message):
        config.build(shape)


def test_only_the_critic_feels_the_critics_loss():
    gan, x = build(WGANGP(hidden=(5,), latent=2)), inputs()
    gan.players()["critic"].loss(x, WEIGHTS, Noise()).backward()
    assert all(p.grad is None for p in gan.generator.parameters())
    assert any(p.grad.abs().sum() > 0 for p in gan.critic.parameters())


@pytest.mark.parametrize(
    ("config", "steps"),
    [(VAE(hidden=(32,), latent=2, lr=5e-3), 600), (WGANGP(hidden=(32,), latent=2, lr=3e-3, critic_steps=3), 300),
     (VAE(hidden=(), channels=(16,), latent=2, lr=5e-3), 600)],
)  # fmt: skip
def test_they_draw_what_they_saw_as_often_as_the_weights_say(config, steps):
    """Two patterns, one of which weighs three times as much."""
    generator, noise = build(config).float(), Noise()
    patterns = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]).view(2, 1, 2, 3)
    x, weights = patterns.repeat(16, 1, 1, 1), torch.tensor([0.75, 0.25]).repeat(16) / 16
    adams = {
        name: torch.optim.Adam(p.part.parameters(), p.lr, betas=p.betas) for name, p in generator.players().items()
    }
    for _ in range(steps):
        for name, player in generator.players().items():
            for _ in range(player.steps):
                gradients = torch.autograd.grad(player.loss(x, weights, noise), list(player.part.parameters()))
                for parameter, gradient in zip(player.part.parameters(), gradients):
                    parameter.grad = gradient
                adams[name].step()
    with torch.no_grad():
        drawn = generator.draw(noise.normal(1000, 2, like=x))
    assert drawn.shape == (1000, 1, 2, 3)
    distances = (drawn[:, None] - patterns[None]).abs().flatten(2).mean(2)
    assert (distances.min(1).values < 0.2).float().mean() > 0.85
    assert 0.6 < (distances.argmin(1) == 0).float().mean() < 0.9


@pytest.mark.parametrize(
    ("kind", "bad"),
    [(VAE, {"hidden": ()}), (VAE, {"latent": 0}), (VAE, {"lr": 0.0}), (WGANGP, {"penalty": -1.0}),
     (VAE, {"channels": (0,)}), (WGANGP, {"critic_steps": 0})],
)  # fmt: skip
def test_bad_numbers_are_named(kind, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        kind(**bad)
