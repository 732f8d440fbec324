"""The training against the textbook's formulas, written out here."""

import copy
import math

import common  # before torch

# isort: split
import pytest
import torch
from torch import nn

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
    """One step of ours; returns what it records, {name: scalar}."""
    optimizers = descent(G, learning_rate), descent(D, learning_rate)
    training = common.Training(G, D, copy.deepcopy(G), *optimizers)
    recorded = common.train_step(training, real, z, r1_weight, dtype)
    return dict(zip(common.RECORDED, recorded, strict=True))


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
    pairs = zip(D_x.tolist(), D_G_z.tolist(), strict=True)
    D_right = torch.tensor(sum(x > y for (x,), (y,) in pairs) / len(real))
    return {
        "D_loss": D_loss,
        "G_loss": G_loss,
        "D_x": D_x.mean(),
        "D_G_z": D_G_z.mean(),
        "D_right": D_right,
    }


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
    for name in ("D_loss", "G_loss", "D_x", "D_G_z"):
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


SMALL = {"batch_size": 4, "learning_rate": 0.1, "r1_gamma": 0.0, "latent_dim": 5, "seed": 0}


def train_epochs(training, images, settings, epochs):
    """Train in epochs 1 to `epochs`; returns their rows."""
    numbers = range(1, epochs + 1)
    return [row for row, _ in common.train(training, images, settings, numbers, torch.float32)]


def new_training(Generator, Discriminator, settings):
    return common.new_training(Generator, Discriminator, settings, CPU)


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


@pytest.fixture
def after_each_step(monkeypatch):
    """A function to call after each step of a training, before the average follows."""
    functions = []
    update_average = common.update_average

    def update(G_ema, G, step):
        for function in functions:
            function(G)
        update_average(G_ema, G, step)

    monkeypatch.setattr(common, "update_average", update)
    return functions.append


def test_the_penalty_comes_every_fourth_step_four_times_as_much(after_each_step):
    settings = {**SMALL, "r1_gamma": 0.5, "batch_size": 2}
    training = new_training(WhiteGenerator, OnePixel, settings)
    weight = training.D.weight
    training.D_optimizer = torch.optim.SGD([weight], lr=0.1)
    found = []
    after_each_step(lambda G: found.append(weight.item()))
    white = torch.full((12, 1, 28, 28), 255, dtype=torch.uint8)
    train_epochs(training, white, settings, 2)  # of six steps each: the count goes on
    after_one = 1 - 0.1 * 4 * 0.5
    expected = [after_one] * 4 + [after_one**2] * 4 + [after_one**3] * 4
    assert found == pytest.approx(expected)


def test_an_epoch_shows_every_image_once_in_a_new_order():
    seen = []

    class Watching(OnePixel):
        def forward(self, x):
            seen.extend(x[:, 0, 0, 0].tolist())
            return super().forward(x)

    greys = [0, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200, 220]
    images = torch.tensor(greys, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 1, 28, 28)
    training = new_training(WhiteGenerator, Watching, SMALL)
    seen.clear()
    train_epochs(training, images, SMALL, 2)
    order = [round((pixel + 1) * 127.5) for pixel in seen if pixel != 1]  # 1 is a fake image
    first, second = order[:12], order[12:]
    assert sorted(first) == sorted(second) == greys
    assert first != greys
    assert first != second


def test_the_moving_average_follows_its_formula(after_each_step):
    training = new_training(SmallGenerator, gan.Discriminator, SMALL)
    average = training.G.linear.weight.detach().clone()
    weights = []
    after_each_step(lambda G: weights.append(G.linear.weight.detach().clone()))
    images = torch.randint(256, (12, 1, 28, 28), dtype=torch.uint8)
    train_epochs(training, images, SMALL, 3)
    assert len(weights) == 9
    for step, weight in enumerate(weights):
        d = (1 + step) / (10 + step)
        average = d * average + (1 - d) * weight
    torch.testing.assert_close(training.G_ema.linear.weight, average)


def test_batch_norm_of_the_average_is_measured_for_its_own_weights():
    """The sum w z + b of normally distributed z has the mean b and the variance |w|^2."""
    training = new_training(SmallGenerator, gan.Discriminator, SMALL)
    images = torch.randint(256, (12, 1, 28, 28), dtype=torch.uint8)
    train_epochs(training, images, SMALL, 1)
    linear = training.G_ema.linear
    norm = training.G_ema.norm
    variance = linear.weight.square().sum(1)
    torch.testing.assert_close(norm.running_mean, linear.bias, rtol=0, atol=0.1)
    torch.testing.assert_close(norm.running_var, variance, rtol=0.15, atol=0)


def test_the_row_of_an_epoch_is_that_of_its_steps(monkeypatch):
    """Means and standard deviations over the steps, the change of the samples between epochs."""
    steps = []
    train_step = common.train_step

    def step(*arguments):
        steps.append(train_step(*arguments))
        return steps[-1]

    monkeypatch.setattr(common, "train_step", step)
    training = new_training(SmallGenerator, gan.Discriminator, SMALL)
    images = torch.randint(256, (12, 1, 28, 28), dtype=torch.uint8)
    handed_out = list(common.train(training, images, SMALL, range(1, 3), torch.float32))
    (first, samples), (second, new_samples) = handed_out
    assert [first["epoch"], second["epoch"]] == [1, 2]
    recorded = torch.stack(steps[3:]).double()  # three steps an epoch
    for i, name in enumerate(common.RECORDED):
        assert second[f"{name}_mean"] == pytest.approx(recorded[:, i].mean().item(), rel=1e-4)
        deviation = recorded[:, i].std(correction=0).item()
        assert second[f"{name}_std"] == pytest.approx(deviation, rel=1e-3, abs=1e-7)
    assert math.isnan(first["sample_change"])
    change = (new_samples.double() - samples.double()).abs().mean().item()
    assert second["sample_change"] == pytest.approx(change, rel=1e-4)


def test_a_short_training_learns(data):
    """After a hundred steps the mean generated image is nearer to the mean real one."""
    train_set, _ = common.load_fashion_mnist(data)
    settings = {**SMALL, "batch_size": 32, "learning_rate": 1e-3, "latent_dim": 100}
    training = new_training(gan.Generator, gan.Discriminator, settings)
    mean = train_set.data.double().mean(0)

    def distance():
        fake = common.generate(training.G_ema, common.latent_vectors(100)).double().mean(0)
        return (fake - mean).abs().mean().item()

    before = distance()
    train_epochs(training, train_set.data[:, None], settings, 10)
    assert distance() < 0.5 * before


# ------------------------------------------------------------------- a checkpoint of another device


def contiguous(network):
    return network.to(memory_format=torch.contiguous_format)


def channels_last(network):
    return network.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("saved_as", "loaded_as"), [(contiguous, channels_last), (channels_last, contiguous)]
)
def test_a_checkpoint_with_another_memory_layout_goes_on_the_same(saved_as, loaded_as):
    """As after moving from a card to a CPU: the next step is that of Adam, written out."""
    torch.manual_seed(0)
    saved = saved_as(nn.Conv2d(3, 5, 3))
    optimizer = torch.optim.Adam(saved.parameters(), lr=0.1, betas=(0.0, 0.999), fused=True)
    gradients = [torch.randn(5, 3, 3, 3), torch.randn(5, 3, 3, 3)]
    expected = saved.weight.detach().clone()
    v = torch.zeros_like(expected)
    for t, g in enumerate(gradients, 1):  # Kingma and Ba (2015), Algorithm 1, with beta 1 = 0
        v = 0.999 * v + 0.001 * g.square()
        expected = expected - 0.1 * g / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    saved.weight.grad = torch.empty_like(saved.weight).copy_(gradients[0])
    optimizer.step()
    loaded = loaded_as(nn.Conv2d(3, 5, 3))
    loaded.load_state_dict(saved.state_dict())
    other = torch.optim.Adam(loaded.parameters(), lr=0.1, betas=(0.0, 0.999), fused=True)
    other.load_state_dict(optimizer.state_dict())
    common.match_layout(other)
    loaded.weight.grad = torch.empty_like(loaded.weight).copy_(gradients[1])
    other.step()
    torch.testing.assert_close(loaded.weight.detach(), expected)


# ------------------------------------------------------------------------ networks that are refused


class SigmoidInForward(gan.Discriminator):
    def forward(self, x):
        return super().forward(x).sigmoid()


def discriminator_with(layer):
    def Discriminator():
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 1), layer)

    return Discriminator


@pytest.mark.parametrize(
    ("Discriminator", "named"),
    [
        (discriminator_with(nn.BatchNorm1d(1)), "BatchNorm"),
        (discriminator_with(nn.Sigmoid()), "Sigmoid"),
        (SigmoidInForward, "Sigmoid"),
    ],
)
def test_a_batch_norm_or_a_sigmoid_in_the_discriminator_is_refused(Discriminator, named):
    with pytest.raises(common.UserError) as raised:
        common.new_training(gan.Generator, Discriminator, {**SMALL, "latent_dim": 100}, CPU)
    message = str(raised.value)
    assert "discriminator" in message
    assert named in message
    assert "\n" not in message


def test_layers_that_do_not_fit_are_shown_after_the_traceback():
    def Generator(latent_dim):
        return nn.Sequential(nn.Linear(latent_dim, 128), nn.Linear(127, 784))

    with pytest.raises(RuntimeError) as raised:
        common.new_training(Generator, gan.Discriminator, SMALL, CPU)
    message = str(raised.value)
    assert "cannot be multiplied" in message
    assert "the generator" in message
    assert "Linear(in_features=127, out_features=784, bias=True)" in message
