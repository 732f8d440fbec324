"""The training loop against the textbook's, written out here."""

import copy
import math

import pytest
import torch
from torch import nn

import common
import dcgan
import gan


@pytest.fixture(params=[gan, dcgan], ids=["GAN", "DCGAN"])
def networks(request):
    torch.manual_seed(1)
    G, D = request.param.Generator(), request.param.Discriminator()
    for layer in D.modules():
        if isinstance(layer, nn.Dropout2d):
            layer.eval()  # as if there were none
    return G, D


def our_step(G, D, x, z, r1_gamma=0, dtype=torch.float32, optimizer=None):
    """One step of ours; returns its four numbers."""
    optimizers = [optimizer(network) if optimizer else adam(network) for network in (G, D)]
    losses = common.train_step(common.Training(G, D, copy.deepcopy(G), *optimizers), x, z, r1_gamma, dtype)
    assert list(losses) == ["D_loss", "G_loss", "D_x", "D_G_z"]
    return torch.stack(list(losses.values()))


def textbook_step(G, D, G_optimizer, D_optimizer, x, z):
    """Goodfellow et al. (2014), Algorithm 1 with k = 1: probabilities, two passes, nothing shared."""
    loss, one, zero = nn.BCELoss(), torch.ones(len(x), 1), torch.zeros(len(x), 1)
    D_x, D_G_z = D(x).sigmoid(), D(G(z).detach()).sigmoid()
    D_loss = (loss(D_x, one) + loss(D_G_z, zero)) / 2
    D_optimizer.zero_grad()
    D_loss.backward()
    D_gradients = [p.grad.clone() for p in D.parameters()]
    D_optimizer.step()
    G_loss = loss(D(G(z)).sigmoid(), one)
    G_optimizer.zero_grad()
    G_loss.backward()
    G_gradients = [p.grad.clone() for p in G.parameters()]
    G_optimizer.step()
    return torch.stack([D_loss, G_loss, D_x.mean(), D_G_z.mean()]).detach(), D_gradients, G_gradients


def adam(network, **options):
    return torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.0, 0.999), **options)


def test_a_step_is_the_textbooks(networks):
    G, D = networks
    textbook_G, textbook_D = copy.deepcopy(networks)
    x, z = torch.rand(16, 1, 28, 28) * 2 - 1, torch.randn(16, 100)

    found = our_step(G, D, x, z)
    optimizers = adam(textbook_G), adam(textbook_D)
    expected, D_gradients, G_gradients = textbook_step(textbook_G, textbook_D, *optimizers, x, z)

    torch.testing.assert_close(found, expected)
    for network, gradients in ((D, D_gradients), (G, G_gradients)):
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            scale = gradient.abs().max().item()
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4 * scale + 1e-9)


def test_the_step_trains_both_networks(networks):
    G, D = networks
    before = copy.deepcopy(networks)
    x, z = torch.rand(16, 1, 28, 28) * 2 - 1, torch.randn(16, 100)
    our_step(G, D, x, z, r1_gamma=4.0)
    for network, old in zip(networks, before, strict=True):
        for (name, new), was in zip(network.named_parameters(), old.parameters(), strict=True):
            assert new.requires_grad and not torch.equal(new, was), name


def test_bfloat16_is_float32_but_for_rounding(networks):
    G, D = networks
    x, z = torch.rand(32, 1, 28, 28) * 2 - 1, torch.randn(32, 100)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        g, d = copy.deepcopy(networks)
        results.append(our_step(g, d, x, z, r1_gamma=4.0, dtype=dtype))
        assert all(p.dtype == torch.float32 for p in [*g.parameters(), *d.parameters()])
    assert results[1].dtype == torch.float32
    torch.testing.assert_close(results[1], results[0], rtol=0.02, atol=0)
    assert not torch.equal(results[0], results[1])


def test_r1_penalty_of_a_linear_discriminator():
    """D(x) = w x has the gradient w everywhere, so the penalty is |w|^2 / 2, and its gradient w."""
    D = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    penalty = common.r1_penalty(D, torch.randn(6, 1, 2, 2))
    weight = D[1].weight
    assert penalty.item() == pytest.approx(weight.square().sum().item() / 2)
    torch.testing.assert_close(torch.autograd.grad(penalty, weight)[0], weight)


def test_r1_penalty_is_that_of_finite_differences(networks):
    _, D = networks
    D, x, h = D.double(), torch.rand(1, 1, 28, 28).double() * 2 - 1, 1e-6
    moved = x.repeat(784, 1, 1, 1) + h * torch.eye(784).double().view(784, 1, 28, 28)
    with torch.no_grad():
        gradient = (D(moved) - D(x)) / h
    assert common.r1_penalty(D, x).item() == pytest.approx(gradient.square().sum().item() / 2, rel=1e-3)


def test_a_step_descends_on_the_loss_plus_gamma_times_the_penalty(networks):
    """The gradient that D steps by, against finite differences of the textbook's loss along that gradient."""
    G, D = (network.double() for network in networks)
    before = copy.deepcopy(D)
    x, z = torch.rand(16, 1, 28, 28).double() * 2 - 1, torch.randn(16, 100).double()
    fake = G(z).detach()

    def loss(h):
        moved = copy.deepcopy(before)
        for parameter, trained in zip(moved.parameters(), D.parameters(), strict=True):
            parameter.data += h * trained.grad
        pixels = x.clone().requires_grad_()
        logits = moved(pixels)
        (gradient,) = torch.autograd.grad(logits.sum(), pixels)
        r1 = 10.0 / 2 * (gradient**2).sum((1, 2, 3)).mean()
        cross_entropy = -(logits.sigmoid().log().mean() + (1 - moved(fake).sigmoid()).log().mean()) / 2
        return (cross_entropy + r1).item()

    our_step(G, D, x, z, r1_gamma=10.0, dtype=torch.float32,
             optimizer=lambda network: torch.optim.SGD(network.parameters(), lr=0))  # fmt: skip
    squared = sum(parameter.grad.square().sum().item() for parameter in D.parameters())
    assert (loss(1e-5) - loss(-1e-5)) / 2e-5 == pytest.approx(squared, rel=1e-3)


def test_the_penalty_comes_every_fourth_step_times_four(monkeypatch):
    seen, step = [], common.train_step
    monkeypatch.setattr(common, "train_step", lambda *args: (seen.append(args[3]), step(*args))[1])
    settings = {"seed": 0, "latent_dim": 5, "learning_rate": 1e-3, "batch_size": 2, "r1_gamma": 0.5}
    training = common.new_training(gan.Generator, gan.Discriminator, settings, torch.device("cpu"))
    images = torch.zeros(12, 1, 28, 28, dtype=torch.uint8)
    for epoch in (1, 2):  # of six steps each: the count goes on
        common.train_epoch(training, images, epoch, settings, torch.float32, lambda: None)
    assert seen == [2.0, 0, 0, 0] * 3


def test_a_batch_norm_in_the_discriminator_is_refused():
    def Discriminator():
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))

    settings = {"seed": 0, "latent_dim": 5, "learning_rate": 1e-3}
    with pytest.raises(common.UserError, match="discriminator has a BatchNorm"):
        common.new_training(gan.Generator, Discriminator, settings, torch.device("cpu"))


def test_only_the_cpu_has_another_memory_layout_and_the_fused_adam():
    settings = {"seed": 0, "latent_dim": 5, "learning_rate": 1e-3}
    layouts = {}
    for device in ("cpu", "meta"):
        training = common.new_training(dcgan.Generator, dcgan.Discriminator, settings, torch.device(device))
        weight = training.D.layers[3].weight  # (64, 32, 3, 3)
        layouts[device] = weight.is_contiguous(), training.D_optimizer.defaults["fused"]
    assert layouts == {"cpu": (False, True), "meta": (True, False)}


class Decided(nn.Module):
    """A discriminator of one logit for every image."""

    def __init__(self, logit):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(logit))

    def forward(self, x):
        return self.logit + 0 * x.mean((1, 2, 3), keepdim=True).view(-1, 1)


def test_losses_of_an_undecided_and_of_a_confident_discriminator():
    x, z = torch.zeros(4, 1, 28, 28), torch.randn(4, 100)
    for logit, D_loss, G_loss in ((0.0, math.log(2), math.log(2)), (-100.0, 50, 100), (100.0, 50, 0)):
        # -log sigmoid(-100) is 100, where log(sigmoid) computed in two steps would be infinite
        G, D = gan.Generator(), Decided(logit)
        still = lambda network: torch.optim.SGD(network.parameters(), lr=0)  # noqa: E731
        losses = our_step(G, D, x, z, optimizer=still)[:2]
        assert losses.tolist() == pytest.approx([D_loss, G_loss])


def test_an_epoch_shows_every_image_once_in_a_new_order():
    seen = []

    class Recorder(gan.Discriminator):
        def forward(self, x):
            seen.append(x.detach()[: len(x) // 2, 0, 0, 0])  # the real half of the discriminator's batch
            return super().forward(x)

    settings = {"seed": 0, "latent_dim": 5, "learning_rate": 1e-3, "batch_size": 4, "r1_gamma": 0.0}
    training = common.new_training(gan.Generator, Recorder, settings, torch.device("cpu"))
    greys = [*range(11), 255]
    images = torch.tensor(greys, dtype=torch.uint8)[:, None, None, None].expand(12, 1, 28, 28)
    orders = []
    for epoch in (1, 2):
        seen.clear()
        losses = common.train_epoch(training, images, epoch, settings, torch.float32, lambda: None)
        assert {name: tuple(values.shape) for name, values in losses.items()} == {
            "D_loss": (3,), "G_loss": (3,), "D_x": (3,), "D_G_z": (3,)}  # fmt: skip
        orders.append([round(x) for x in ((torch.cat(seen[::2]) + 1) * 127.5).tolist()])
        assert sorted(orders[-1]) == greys  # black was seen as -1, white as 1
    assert orders[0] != orders[1] != greys


def test_moving_average_follows_its_formula():
    torch.manual_seed(0)
    G = gan.Generator()
    G_ema = copy.deepcopy(G)
    weight = G.layers[0].weight
    expected = weight.detach().double().clone()
    for step in range(30):
        with torch.no_grad():
            weight.copy_(torch.randn_like(weight))
        common.update_average(G_ema, G, step)
        d = (1 + step) / (10 + step)
        expected = d * expected + (1 - d) * weight.detach().double()
    torch.testing.assert_close(G_ema.layers[0].weight.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", [gan, dcgan])
def test_batch_norm_of_the_average_is_that_of_its_own_weights(module):
    """Once calibrated, BatchNorm puts out mean 0 and variance 1 for other latent vectors too."""
    torch.manual_seed(0)
    G_ema = module.Generator(50)
    norms = [layer for layer in G_ema.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:  # as if they had been left over from other weights
        norm.running_mean += 3
        norm.running_var *= 5
    seen = []
    for norm in norms:
        norm.register_forward_hook(lambda _norm, _x, y: seen.append(y.transpose(0, 1).flatten(1)))
    common.calibrate_batch_norm(G_ema, latent_dim=50)
    seen.clear()
    G_ema.eval()(torch.randn(500, 50))
    assert len(seen) == len(norms) > 0
    for y in seen:
        assert y.mean(1).abs().max() < 0.2 and (y.var(1) - 1).abs().max() < 0.4


def test_auto_precision_is_bfloat16_only_where_the_processor_has_it(monkeypatch):
    cpu = torch.device("cpu")
    for capabilities, dtype in (({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert common.choose_dtype("auto", cpu) is dtype
    assert common.choose_dtype("float32", cpu) is torch.float32
    assert common.choose_dtype("bfloat16", cpu) is torch.bfloat16
