"""What goes into the networks and comes out, and common.run_layers against torch's own layers."""

import pytest
import torch
from torch import nn

import common
import dcgan
import gan


@pytest.fixture(autouse=True)
def same_random_numbers_in_every_test():
    torch.manual_seed(0)


@pytest.mark.parametrize("module", [gan, dcgan])
def test_shapes_and_ranges(module):
    images = module.Generator(7)(100 * torch.randn(9, 7))
    assert images.shape == (9, 1, 28, 28)
    assert -1 <= images.min() < -0.5
    assert 0.5 < images.max() <= 1
    logits = module.Discriminator()(1000 * torch.randn(50, 1, 28, 28))
    assert logits.shape == (50, 1)
    assert logits.abs().max() > 1  # which no probability is


def pair(upsample=None, conv=None):
    """The two layers that are computed together; either may be another one."""
    upsample = upsample or nn.Upsample(scale_factor=2)
    conv = conv or nn.Conv2d(4, 6, 3, padding=1, bias=False)
    return nn.Sequential(upsample, conv)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_values_and_all_gradients_are_torchs(dtype, tolerance):
    for layers, shape in [(pair(), (3, 4, 7, 5)), (dcgan.Generator(10).layers, (8, 10))]:
        layers.to(dtype)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        inputs = [x, *layers.parameters()]
        ours = common.run_layers(layers, x)
        torchs = layers(x)
        found = [ours, *torch.autograd.grad(ours.square().mean(), inputs)]
        expected = [torchs, *torch.autograd.grad(torchs.square().mean(), inputs)]
        for mine, own in zip(found, expected, strict=True):
            largest = own.abs().max().item()
            torch.testing.assert_close(mine, own, rtol=tolerance, atol=tolerance * largest)


def add_one(layer, x, y):
    return y + 1


def pair_with_forward_hook():
    layers = pair()
    layers[0].register_forward_hook(add_one)
    return layers


def pair_with_spectral_norm():
    layers = pair()
    torch.nn.utils.spectral_norm(layers[1])
    return layers.eval()  # in training it changes with every pass


CHANGED = {
    "kernel of 5": pair(conv=nn.Conv2d(4, 6, 5, padding=1, bias=False)),
    "bias": pair(conv=nn.Conv2d(4, 6, 3, padding=1)),
    "bilinear": pair(upsample=nn.Upsample(scale_factor=2, mode="bilinear")),
    "forward hook": pair_with_forward_hook(),
    "spectral norm": pair_with_spectral_norm(),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_pair_is_torchs(change):
    layers = CHANGED[change]
    x = torch.randn(3, 4, 7, 5)
    assert torch.equal(common.run_layers(layers, x), layers(x))
