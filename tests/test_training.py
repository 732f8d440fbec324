"""The training against the textbook's formulas, written out here."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from tqdm import tqdm

import common
import dcgan
import gan

CPU = torch.device("cpu")


@pytest.fixture(params=[gan, dcgan], ids=["GAN", "DCGAN"])
def networks(request):
    torch.manual_seed(1)
    G = request.param.Generator()
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
    """One step of ours; returns its losses and probabilities."""
    optimizers = descent(G, learning_rate), descent(D, learning_rate)
    training = common.Training(G, D, copy.deepcopy(G), *optimizers)
    return common.train_step(training, real, z, r1_weight, dtype)


def textbook_step(G, D, real, z, learning_rate=0.1):
    """Goodfellow et al. (2014), Algorithm 1 with k = 1: probabilities, and a pass for each use."""
    G_optimizer = descent(G, learning_rate)
    D_optimizer = descent(D, learning_rate)
    cross_entropy = nn.BCELoss()
    one = torch.ones(len(real), 1)
    zero = torch.zeros(len(real), 1)

    D_x = D(real).sigmoid()
    D_G_z = D(G(z).detach()).sigmoid()
    D_loss = (cross_entropy(D_x, one) + cross_entropy(D_G_z, zero)) / 2
    D_loss.backward()
    D_optimizer.step()

    G_loss = cross_entropy(D(G(z)).sigmoid(), one)
    G_loss.backward(inputs=list(G.parameters()))
    G_optimizer.step()
    return {"D_loss": D_loss, "G_loss": G_loss, "D_x": D_x.mean(), "D_G_z": D_G_z.mean()}


def test_a_step_is_the_textbooks(networks):
    G, D = networks
    textbook_G, textbook_D = copy.deepcopy(networks)
    real, z = real_and_z(16)

    found = our_step(G, D, real, z)
    expected = textbook_step(textbook_G, textbook_D, real, z)

    torch.testing.assert_close(found, expected)
    for ours, textbooks in ((D, textbook_D), (G, textbook_G)):
        for weight, same in zip(ours.parameters(), textbooks.parameters(), strict=True):
            torch.testing.assert_close(weight.grad, same.grad, rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(weight, same)


def test_bfloat16_is_float32_but_for_rounding(networks):
    real, z = real_and_z(32)
    exact = our_step(*copy.deepcopy(networks), real, z, r1_weight=4.0)
    rounded = our_step(*networks, real, z, r1_weight=4.0, dtype=torch.bfloat16)
    for name in exact:
        assert rounded[name].item() == pytest.approx(exact[name].item(), rel=0.02)
        assert rounded[name] != exact[name]
    G, D = networks
    assert {weight.dtype for weight in [*G.parameters(), *D.parameters()]} == {torch.float32}


@pytest.mark.parametrize(
    ("logit", "D_loss", "G_loss"),
    [
        (0.0, math.log(2), math.log(2)),
        # -log sigmoid(-100) is 100; in two steps, sigmoid and then log, it would be infinite
        (-100.0, 50, 100),
        (100.0, 50, 0),
    ],
)
def test_losses_of_an_undecided_and_of_a_confident_discriminator(logit, D_loss, G_loss):
    D = nn.Sequential(nn.Flatten(), nn.Linear(784, 1))
    nn.init.zeros_(D[1].weight)
    nn.init.constant_(D[1].bias, logit)
    losses = our_step(gan.Generator(), D, *real_and_z(4), learning_rate=0)
    assert losses["D_loss"].item() == pytest.approx(D_loss)
    assert losses["G_loss"].item() == pytest.approx(G_loss)


# ------------------------------------------------------------------------------------ the penalty


def test_r1_penalty_of_a_linear_discriminator():
    """D(x) = w x has the gradient w everywhere, so the penalty is |w|^2 / 2, and its gradient w."""
    D = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    weight = D[1].weight
    penalty = common.r1_penalty(D, torch.randn(6, 1, 2, 2))
    assert penalty.item() == pytest.approx(weight.square().sum().item() / 2)
    penalty.backward()
    torch.testing.assert_close(weight.grad, weight.detach())


def test_r1_penalty_is_that_of_finite_differences(networks):
    D = networks[1].double()
    real, _ = real_and_z(1, torch.float64)
    h = 1e-6
    one_pixel_moved = real + h * torch.eye(784, dtype=torch.float64).view(784, 1, 28, 28)
    with torch.no_grad():
        gradient = (D(one_pixel_moved) - D(real)) / h
    expected = gradient.square().sum().item() / 2
    assert common.r1_penalty(D, real).item() == pytest.approx(expected, rel=1e-3)


def test_a_step_descends_on_the_loss_plus_gamma_times_the_penalty(networks):
    """Along the gradient of D's step, the textbook's loss grows as fast as it should."""
    G, D = networks
    G.double()
    D.double()
    real, z = real_and_z(16, torch.float64)
    fake = G(z).detach()
    our_step(G, D, real, z, r1_weight=10.0, learning_rate=0)

    def loss(h):
        moved = copy.deepcopy(D)
        for parameter, at_rest in zip(moved.parameters(), D.parameters(), strict=True):
            parameter.data += h * at_rest.grad
        pixels = real.clone().requires_grad_()
        D_x = moved(pixels).sigmoid()
        D_G_z = moved(fake).sigmoid()
        cross_entropy = -(D_x.log().mean() + (1 - D_G_z).log().mean()) / 2
        (gradient,) = torch.autograd.grad(moved(pixels).sum(), pixels)
        penalty = gradient.square().sum((1, 2, 3)).mean() / 2
        return (cross_entropy + 10.0 * penalty).item()

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    expected = sum(parameter.grad.square().sum().item() for parameter in D.parameters())
    assert slope == pytest.approx(expected, rel=1e-3)


# -------------------------------------------------------------------------------------- the epoch


SMALL = common.Settings(
    model="GAN",
    batch_size=4,
    learning_rate=0.1,
    r1_gamma=0.0,
    latent_dim=5,
    seed=0,
    precision="float32",
    limit=12,
)


def train_epoch(training, images, epoch, settings, bar=None):
    bar = bar or tqdm(disable=True)
    return common.train_epoch(training, images, epoch, settings, torch.float32, bar)


class SmallGenerator(nn.Module):
    def __init__(self, latent_dim):
        super().__init__()
        self.linear = nn.Linear(latent_dim, 784)
        self.norm = nn.BatchNorm1d(784)

    def forward(self, z):
        return self.norm(self.linear(z)).tanh().view(-1, 1, 28, 28)


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


class Noted:
    """Takes the place of the progress bar, and notes a value after every step."""

    def __init__(self, value):
        self.value = value
        self.values = []

    def update(self):
        self.values.append(self.value.detach().clone())


def test_the_penalty_comes_every_fourth_step_four_times_as_much():
    settings = replace(SMALL, r1_gamma=0.5, batch_size=2)
    training = common.new_training(WhiteGenerator, OnePixel, settings, CPU)
    weight = training.D.weight
    training.D_optimizer = torch.optim.SGD([weight], lr=0.1)
    white = torch.full((12, 1, 28, 28), 255, dtype=torch.uint8)
    bar = Noted(weight)
    for epoch in (1, 2):  # of six steps each: the count goes on
        train_epoch(training, white, epoch, settings, bar)
    after_one = 1 - 0.1 * 4 * 0.5
    expected = [after_one] * 4 + [after_one**2] * 4 + [after_one**3] * 4
    assert torch.cat(bar.values).tolist() == pytest.approx(expected)


def test_an_epoch_shows_every_image_once_in_a_new_order():
    seen = []

    class Watching(OnePixel):
        def forward(self, x):
            seen.extend(x[:, 0, 0, 0].tolist())
            return super().forward(x)

    greys = [0, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200, 220]
    images = torch.tensor(greys, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 1, 28, 28)
    training = common.new_training(WhiteGenerator, Watching, SMALL, CPU)
    orders = []
    for epoch in (1, 2):
        seen.clear()
        train_epoch(training, images, epoch, SMALL)
        order = [round((pixel + 1) * 127.5) for pixel in seen if pixel != 1]  # 1 is a fake image
        assert sorted(order) == greys
        assert order != greys
        orders.append(order)
    assert orders[0] != orders[1]


def test_the_moving_average_follows_its_formula():
    training = common.new_training(SmallGenerator, gan.Discriminator, SMALL, CPU)
    average = training.G.linear.weight.detach().clone()
    images = torch.randint(256, (12, 1, 28, 28), dtype=torch.uint8)
    bar = Noted(training.G.linear.weight)
    for epoch in (1, 2, 3):
        train_epoch(training, images, epoch, SMALL, bar)
    assert len(bar.values) == 9
    for step, weight in enumerate(bar.values):
        d = (1 + step) / (10 + step)
        average = d * average + (1 - d) * weight
    torch.testing.assert_close(training.G_ema.linear.weight, average)


def test_batch_norm_of_the_average_is_measured_for_its_own_weights():
    """The sum w z + b of normally distributed z has the mean b and the variance |w|^2."""
    training = common.new_training(SmallGenerator, gan.Discriminator, SMALL, CPU)
    images = torch.randint(256, (12, 1, 28, 28), dtype=torch.uint8)
    train_epoch(training, images, 1, SMALL)
    linear = training.G_ema.linear
    norm = training.G_ema.norm
    variance = linear.weight.square().sum(1)
    torch.testing.assert_close(norm.running_mean, linear.bias, rtol=0, atol=0.1)
    torch.testing.assert_close(norm.running_var, variance, rtol=0.15, atol=0)


# ------------------------------------------------------------------------ networks that are refused


@pytest.mark.parametrize(
    ("layer", "name"), [(nn.BatchNorm1d(1), "BatchNorm"), (nn.Sigmoid(), "Sigmoid")]
)
def test_a_batch_norm_or_a_final_sigmoid_in_the_discriminator_is_refused(layer, name):
    def Discriminator():
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 1), layer)

    with pytest.raises(common.UserError) as raised:
        common.new_training(gan.Generator, Discriminator, SMALL, CPU)
    message = str(raised.value)
    assert "discriminator" in message
    assert name in message
    assert "\n" not in message
