"""The training against the textbook's formulas, written out here."""

import copy
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BATCH_NORM_BATCHES
from torch import nn

import common
import dcgan
import gan

CPU = torch.device("cpu")


@pytest.fixture(params=[gan, dcgan], ids=["GAN", "DCGAN"])
def networks(request):
    torch.manual_seed(1)
    G = request.param.Generator(100)
    D = request.param.Discriminator()
    D.eval()  # as if there were no dropout
    return G, D


def descent(network, learning_rate):
    """Not Adam, which makes much of a gradient that is nearly 0 and not the same with both."""
    return torch.optim.SGD(network.parameters(), lr=learning_rate)


def real_and_z(count, dtype=torch.float32):
    real = torch.rand(count, 1, 28, 28, dtype=dtype) * 2 - 1
    z = torch.randn(count, 100, dtype=dtype)
    return real, z


def our_step(G, D, real, z, r1_weight=0, dtype=torch.float32, learning_rate=0.1):
    """One step of ours; returns what it records, {name: scalar}."""
    optimizers = descent(G, learning_rate), descent(D, learning_rate)
    training = common.Training(G, D, copy.deepcopy(G), *optimizers)
    recorded = common.train_step(training, real, z, r1_weight, dtype)
    return dict(zip(common.RECORDED, recorded, strict=True))


def textbook_step(G, D, real, z, r1_weight, learning_rate=0.1):
    """Goodfellow et al. (2014), Algorithm 1 with k = 1: probabilities, and a pass for each use. The
    penalty is that of Mescheder et al. (2018)."""
    G_optimizer = descent(G, learning_rate)
    D_optimizer = descent(D, learning_rate)
    cross_entropy = nn.BCELoss()
    one = torch.ones(len(real), 1)
    zero = torch.zeros(len(real), 1)

    D_x = D(real).sigmoid()
    D_G_z = D(G(z).detach()).sigmoid()
    D_loss = (cross_entropy(D_x, one) + cross_entropy(D_G_z, zero)) / 2
    pixels = real.clone().requires_grad_()
    (slope,) = torch.autograd.grad(D(pixels).sum(), pixels, create_graph=True)
    penalty = slope.flatten(1).norm(dim=1).square().mean() / 2
    (D_loss + r1_weight * penalty).backward()
    D_optimizer.step()

    G_loss = cross_entropy(D(G(z)).sigmoid(), one)
    G_loss.backward(inputs=list(G.parameters()))
    G_optimizer.step()
    means = {"D_x": D_x.mean(), "D_G_z": D_G_z.mean(), "D_right": (D_x > D_G_z).float().mean()}
    return {"D_loss": D_loss, "G_loss": G_loss, **means}


@pytest.mark.parametrize("r1_weight", [0, 10.0])
def test_a_step_is_the_textbooks(networks, r1_weight):
    textbook_G, textbook_D = copy.deepcopy(networks)
    real, z = real_and_z(16)
    found = our_step(*networks, real, z, r1_weight)
    expected = textbook_step(textbook_G, textbook_D, real, z, r1_weight)
    torch.testing.assert_close(found, expected)
    for ours, textbooks in zip(networks, (textbook_G, textbook_D), strict=True):
        for weight, same in zip(ours.parameters(), textbooks.parameters(), strict=True):
            torch.testing.assert_close(weight.grad, same.grad, rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(weight, same)


def test_bfloat16_is_float32_but_for_rounding(networks):
    exact_G, exact_D = copy.deepcopy(networks)
    real, z = real_and_z(32)
    exact = our_step(exact_G, exact_D, real, z, r1_weight=4.0)
    rounded = our_step(*networks, real, z, r1_weight=4.0, dtype=torch.bfloat16)
    for name in ("D_loss", "G_loss", "D_x", "D_G_z"):
        assert rounded[name].item() == pytest.approx(exact[name].item(), rel=0.02)
        assert rounded[name] != exact[name]
    for network, exact_network in zip(networks, (exact_G, exact_D), strict=True):
        assert {weight.dtype for weight in network.parameters()} == {torch.float32}
        gradients = [
            nn.utils.parameters_to_vector(weight.grad for weight in which.parameters())
            for which in (network, exact_network)
        ]
        assert torch.cosine_similarity(*gradients, dim=0) > 0.95


# -log sigmoid(-100) is 100; in two steps, sigmoid and then log, it would be infinite.
@pytest.mark.parametrize(
    ("logit", "D_loss", "G_loss"), [(0, math.log(2), math.log(2)), (-100, 50, 100), (100, 50, 0)]
)
def test_losses_of_an_undecided_and_of_a_confident_discriminator(logit, D_loss, G_loss):
    D = nn.Sequential(nn.Flatten(), nn.Linear(784, 1))
    nn.init.zeros_(D[1].weight)
    nn.init.constant_(D[1].bias, logit)
    losses = our_step(gan.Generator(100), D, *real_and_z(4), learning_rate=0)
    assert losses["D_loss"].item() == pytest.approx(D_loss)
    assert losses["G_loss"].item() == pytest.approx(G_loss)


def test_unequal_numbers_of_real_and_fake_images_are_not_taken_for_each_other(networks):
    """As when the last batch of an epoch, which is smaller, is not left out."""
    real, z = real_and_z(4)
    with pytest.raises(RuntimeError, match="size"):
        our_step(*networks, real[:3], z)


def test_r1_penalty_is_that_of_finite_differences(networks):
    D = networks[1].double()
    real, _ = real_and_z(1, torch.float64)
    h = 1e-6
    one_pixel_moved = real + h * torch.eye(784, dtype=torch.float64).view(784, 1, 28, 28)
    with torch.no_grad():
        gradient = (D(one_pixel_moved) - D(real)) / h
    expected = gradient.square().sum().item() / 2
    assert common.r1_penalty(D, real).item() == pytest.approx(expected, rel=1e-3)


SMALL = {"batch_size": 4, "learning_rate": 0.1, "r1_gamma": 0.0, "latent_dim": 5, "seed": 0}
SMALL |= {"precision": "float32", "limit": 60_000}


def new_training(Generator, Discriminator, **settings):
    return common.new_training(Generator, Discriminator, {**SMALL, **settings}, CPU)


def train_epochs(training, images, epochs, **settings):
    """Train in epochs 1 to `epochs`; returns their rows and their samples."""
    train_set = SimpleNamespace(data=images)
    return list(common.train(training, train_set, {**SMALL, **settings}, 1, epochs))


def SmallGenerator(latent_dim):
    linear = nn.Linear(latent_dim, 784)
    return nn.Sequential(linear, nn.BatchNorm1d(784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))


class WhiteGenerator(nn.Module):
    """Its images are white whatever z is."""

    def __init__(self, latent_dim):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, z):
        return torch.ones(len(z), 1, 28, 28) + 0 * self.unused


class OnePixel(nn.Module):
    """A discriminator of one weight: its logit is the weight times how far one pixel is from white.

    The logit of white images is 0, at which real and fake ones balance, so their losses do not move
    the weight w. The gradient of the R1 penalty, |w|^2 / 2, is w.
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.weight * (x[:, :, 0, 0] - 1)


@pytest.fixture
def noise():
    """Training images: three batches of four."""
    return torch.randint(256, (12, 28, 28), dtype=torch.uint8)


@pytest.fixture
def steps(monkeypatch):
    """What each step of a training leaves: what it recorded, G and D."""
    done = []
    train_step = common.train_step

    def watched(training, *arguments):
        recorded = train_step(training, *arguments)
        done.append((recorded, copy.deepcopy(training.G), copy.deepcopy(training.D)))
        return recorded

    monkeypatch.setattr(common, "train_step", watched)
    return done


@pytest.mark.parametrize("name", ["G", "D"])
def test_small_gradients_after_a_large_one_make_small_steps(name):
    """Reddi et al. (2018), Algorithm 2, without momentum. The mean square of the gradient 1 is
    .001; after 1,000 zeros it would be a third of that, but the largest one counts."""
    training = new_training(WhiteGenerator, OnePixel, learning_rate=0.1)
    (weight,) = getattr(training, name).parameters()
    optimizer = getattr(training, f"{name}_optimizer")
    for gradient in [1, *[0] * 1000, 0.01]:
        weight.grad = torch.full_like(weight, gradient)
        before = weight.item()
        optimizer.step()
    largest = 0.001 / (1 - 0.999**1002)  # as Adam makes up for starting from 0
    assert before - weight.item() == pytest.approx(0.1 * 0.01 / math.sqrt(largest), rel=1e-3)


def test_the_penalty_comes_every_fourth_step_four_times_as_much(steps):
    training = new_training(WhiteGenerator, OnePixel)
    training.D_optimizer = descent(training.D, 0.1)
    white = torch.full((12, 28, 28), 255, dtype=torch.uint8)
    # Of six steps each: the count goes on in the second.
    train_epochs(training, white, 2, r1_gamma=0.5, batch_size=2)
    after_one = 1 - 0.1 * 4 * 0.5
    expected = [after_one] * 4 + [after_one**2] * 4 + [after_one**3] * 4
    assert [D.weight.item() for _, _, D in steps] == pytest.approx(expected)


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), random.random, np.random.rand])
def test_random_numbers_follow_from_the_seed_and_the_epoch(draw):
    """Also those of a student's own lines, which may be Python's or NumPy's."""
    numbers = []
    for seed, epoch in [(2**32, 5), (2**32, 5), (2**32, 6), (7, 5)]:
        common.seed_epoch(seed, epoch)
        numbers.append(float(draw()))
    assert numbers[0] == numbers[1]
    assert len(set(numbers)) == 3


def test_an_epoch_shows_every_image_once_in_a_new_order():
    seen = []

    class Watching(OnePixel):
        def forward(self, x):
            seen.extend(x[:, 0, 0, 0].tolist())
            return super().forward(x)

    greys = list(range(0, 240, 20))
    images = torch.tensor(greys, dtype=torch.uint8).view(12, 1, 1).expand(12, 28, 28)
    training = new_training(WhiteGenerator, Watching)
    seen.clear()
    train_epochs(training, images, 2)
    order = [round((pixel + 1) * 127.5) for pixel in seen if pixel != 1]  # 1 is a fake image
    first, second = order[:12], order[12:]
    assert sorted(first) == sorted(second) == greys
    assert first != greys
    assert first != second


def test_the_moving_average_follows_its_formula(steps, noise):
    training = new_training(SmallGenerator, gan.Discriminator)
    average = training.G[0].weight.detach().clone()
    train_epochs(training, noise, 3)
    assert len(steps) == 9
    for step, (_, G, _) in enumerate(steps):
        d = (1 + step) / (10 + step)
        average = d * average + (1 - d) * G[0].weight.detach()
    torch.testing.assert_close(training.G_ema[0].weight, average)


def test_batch_norm_of_the_average_is_measured_for_its_own_weights(noise, monkeypatch):
    """The sum w z + b of normally distributed z has the mean b and the variance |w|^2."""
    monkeypatch.setattr(common, "BATCH_NORM_BATCHES", BATCH_NORM_BATCHES)
    training = new_training(SmallGenerator, gan.Discriminator)
    train_epochs(training, noise, 1)
    linear, norm, *_ = training.G_ema
    variance = linear.weight.square().sum(1)
    torch.testing.assert_close(norm.running_mean, linear.bias, rtol=0, atol=0.1)
    torch.testing.assert_close(norm.running_var, variance, rtol=0.15, atol=0)


def test_the_row_of_an_epoch_is_that_of_its_steps(steps, noise):
    """Means and standard deviations over the steps, the change of the samples between epochs."""
    training = new_training(SmallGenerator, gan.Discriminator)
    (first, samples), (second, new_samples) = train_epochs(training, noise, 2)
    assert [first["epoch"], second["epoch"]] == [1, 2]
    recorded = np.array([numbers.tolist() for numbers, _, _ in steps[3:]])  # three an epoch
    for name, values in zip(common.RECORDED, recorded.T, strict=True):
        assert second[f"{name}_mean"] == pytest.approx(values.mean(), rel=1e-4)
        assert second[f"{name}_std"] == pytest.approx(values.std(), rel=1e-3, abs=1e-7)
    assert math.isnan(first["sample_change"])
    change = (new_samples.double() - samples.double()).abs().mean().item()
    assert second["sample_change"] == pytest.approx(change, rel=1e-4)


def test_a_short_training_learns(data):
    """After a hundred steps the mean generated image is nearer to the mean real one."""
    train_set, _ = common.load_fashion_mnist(data)
    settings = {"batch_size": 32, "learning_rate": 1e-3, "latent_dim": 100}
    training = new_training(gan.Generator, gan.Discriminator, **settings)
    mean = train_set.data.double().mean(0)

    def distance():
        fake = common.generate(training.G_ema, common.latent_vectors(100)).double().mean(0)
        return (fake - mean).abs().mean().item()

    before = distance()
    train_epochs(training, train_set.data, 10, **settings)
    assert distance() < 0.5 * before


class SigmoidInForward(gan.Discriminator):
    def forward(self, x):
        return super().forward(x).sigmoid()


class BatchNorm(gan.Discriminator):
    def __init__(self):
        super().__init__()
        self.layers.insert(2, nn.BatchNorm1d(512))


class MinibatchDeviation(gan.Discriminator):
    """A layer of Karras et al. (2018), which has no name in torch.nn."""

    def forward(self, x):
        return super().forward(x) + x.std(dim=0).mean()


class MinibatchDiscrimination(gan.Discriminator):
    """How near the other images are (Salimans et al. 2016)."""

    def forward(self, x):
        features = self.layers[:2](x)[:, :8]
        return super().forward(x) + torch.exp(-torch.cdist(features, features)).sum(1, keepdim=True)


class LayersInList(nn.Module):
    """Which PyTorch does not find: they are neither trained nor saved."""

    def __init__(self):
        super().__init__()
        self.hidden = [nn.Linear(784, 8), nn.Linear(8, 8)]
        self.last = nn.Linear(8, 1)

    def forward(self, x):
        x = x.flatten(1)
        for layer in self.hidden:
            x = layer(x).relu()
        return self.last(x)


class FourRowsAnImage(gan.Discriminator):
    """A wrong view, of the pixels of all images."""

    def __init__(self):
        super().__init__()
        self.layers[1] = nn.Linear(196, 512)

    def forward(self, x):
        return self.layers[1:](x.reshape(-1, 196))


@pytest.mark.parametrize(
    ("Discriminator", "named"),
    [
        (LayersInList, "nn.ModuleList"),
        (FourRowsAnImage, "256 outputs for 64 images"),
        (SigmoidInForward, "as after a Sigmoid"),
        (BatchNorm, "depends on the other images"),
        (MinibatchDeviation, "depends on the other images"),
        (MinibatchDiscrimination, "depends on the other images"),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_what_a_discriminator_may_not_do_is_one_line(Discriminator, named, seed):
    with pytest.raises(common.UserError) as raised:
        new_training(gan.Generator, Discriminator, seed=seed)
    assert re.fullmatch(f".*discriminator.*{named}.*", str(raised.value))  # one line


def normed(norm):
    """A discriminator whose logits all but agree at the start: what is pooled is normed."""

    def Discriminator():
        conv = nn.Conv2d(1, 8, 3)
        pool = nn.AdaptiveAvgPool2d(1)
        layers = [conv, norm, nn.LeakyReLU(0.2), nn.Dropout(), pool, nn.Flatten(), nn.Linear(8, 1)]
        return nn.Sequential(*layers)

    return Discriminator


def spectrally_normed():
    """What it keeps changes with each pass."""
    D = gan.Discriminator()
    for i in (1, 3, 5):
        D.layers[i] = nn.utils.spectral_norm(D.layers[i])
    return D


def last_layer_zero():
    D = gan.Discriminator()
    nn.init.zeros_(D.layers[-1].weight)
    nn.init.zeros_(D.layers[-1].bias)
    return D


@pytest.mark.parametrize(
    "Discriminator",
    [
        normed(nn.InstanceNorm2d(8)),
        normed(nn.GroupNorm(2, 8)),
        last_layer_zero,
        dcgan.Discriminator,
        spectrally_normed,
    ],
    ids=["InstanceNorm", "GroupNorm", "zero", "DCGAN", "spectral norm"],
)
def test_other_discriminators_are_let_in(Discriminator):
    G = gan.Generator(2)
    for seed in range(12):
        new_training(lambda latent_dim: G, Discriminator, seed=seed, latent_dim=2)


def test_batch_norm_is_let_in_where_the_message_was_followed(monkeypatch, noise):
    """Which says what to take out of new_training, and to pass real and fake images apart."""
    monkeypatch.setattr(common, "check_discriminator", lambda *_: None)
    training = new_training(gan.Generator, BatchNorm)
    assert len(train_epochs(training, noise, 1)) == 1


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 28, 28), (784,)])
def test_a_generator_of_no_images_is_one_line(shape):
    def Generator(latent_dim):
        return nn.Sequential(nn.Linear(latent_dim, math.prod(shape)), nn.Unflatten(1, shape))

    with pytest.raises(common.UserError) as raised:
        new_training(Generator, gan.Discriminator)
    assert re.fullmatch(".*generator.*", str(raised.value))
    assert str((64, *shape)) in str(raised.value)
    assert "(64, 1, 28, 28)" in str(raised.value)


def test_a_generator_without_tanh_is_cut_and_one_with_sigmoid_is_said(capsys):
    def brightness(*layers):
        linear = nn.Linear(1, 784, bias=False)
        nn.init.ones_(linear.weight)
        return nn.Sequential(linear, *layers, nn.Unflatten(1, (1, 28, 28)))

    common.warn_once.cache_clear()
    greys = torch.tensor([[-3.0], [-1.02], [-1.0], [0.0], [1.0], [1.02], [3.0]])
    for _ in range(2):
        images = common.generate(brightness(), greys)
    assert images[:, 5, 5].tolist() == [0, 0, 0, 128, 255, 255, 255]
    (line,) = capsys.readouterr().err.splitlines()  # it is said once
    assert "leave [-1, 1]" in line
    common.generate(brightness(nn.Sigmoid()), greys)
    (line,) = capsys.readouterr().err.splitlines()
    assert "as after a Sigmoid" in line


@pytest.mark.parametrize(
    "spectral_norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm]
)
def test_what_a_layer_keeps_beside_its_weights_is_the_generators_in_the_average(
    spectral_norm, noise
):
    def Generator(latent_dim):
        linear = spectral_norm(nn.Linear(latent_dim, 784))
        return nn.Sequential(linear, nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))

    training = new_training(Generator, gan.Discriminator, learning_rate=0.05)
    train_epochs(training, noise, 30)
    training.G_ema(torch.randn(3, 5))  # with hooks, the weight is computed in a pass
    largest = torch.linalg.matrix_norm(training.G_ema[0].weight, 2).item()
    assert largest == pytest.approx(1, abs=0.3)


def test_layers_that_do_not_fit_are_shown_after_the_traceback():
    def Generator(latent_dim):
        return nn.Sequential(nn.Linear(latent_dim, 128), nn.Linear(127, 784))

    with pytest.raises(RuntimeError) as raised:
        new_training(Generator, gan.Discriminator)
    layer = "Linear(in_features=127, out_features=784, bias=True)"
    for part in ["cannot be multiplied", "the generator", layer]:
        assert part in str(raised.value)
