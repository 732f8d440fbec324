"""What goes into the networks and comes out, and common.run_layers against torch's own layers."""

import common  # before torch

# isort: split
import pytest
import torch
from torch import nn

import dcgan
import gan


@pytest.fixture(autouse=True)
def same_random_numbers_in_every_test():
    torch.manual_seed(0)


@pytest.mark.parametrize("module", [gan, dcgan])
def test_generated_images_have_the_shape_and_range_of_real_ones(module):
    images = module.Generator(7)(100 * torch.randn(9, 7))
    assert images.shape == (9, 1, 28, 28)
    assert -1 <= images.min() < -0.5
    assert 0.5 < images.max() <= 1


@pytest.mark.parametrize("module", [gan, dcgan])
def test_the_discriminator_gives_one_logit_an_image(module):
    logits = module.Discriminator()(1000 * torch.randn(50, 1, 28, 28))
    assert logits.shape == (50, 1)
    assert logits.abs().max() > 1  # which no probability is


# ------------------------------------------------------------ the DCGAN's generator on the CPU


def pair(upsample=None, conv=None):
    """The two layers that are computed together; either may be another one."""
    upsample = upsample or nn.Upsample(scale_factor=2)
    conv = conv or nn.Conv2d(4, 6, 3, padding=1, bias=False)
    return nn.Sequential(upsample, conv)


def check_same(layers, x, tolerance):
    """apply_layers gives what the layers themselves do, and the same gradients of everything."""
    x.requires_grad_()
    inputs = [x, *layers.parameters()]
    ours = common.run_layers(layers, x)
    torchs = layers(x)
    found = [ours, *torch.autograd.grad(ours.square().mean(), inputs)]
    expected = [torchs, *torch.autograd.grad(torchs.square().mean(), inputs)]
    for mine, own in zip(found, expected, strict=True):
        largest = own.abs().max().item()
        torch.testing.assert_close(mine, own, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_pair_is_computed_as_torch_does(dtype, tolerance):
    x = torch.randn(3, 4, 7, 5, dtype=dtype)
    check_same(pair().to(dtype), x, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_the_whole_generator_is_computed_as_torch_does(dtype, tolerance):
    layers = dcgan.Generator(10).layers.to(dtype)
    check_same(layers, torch.randn(8, 10, dtype=dtype), tolerance)


def add_one(layer, x, y):
    return y + 1


def pair_with_forward_hook(hooked):
    layers = pair()
    layers[hooked].register_forward_hook(add_one)
    return layers


def pair_with_spectral_norm():
    layers = pair()
    torch.nn.utils.spectral_norm(layers[1])
    return layers.eval()  # in training it changes with every pass


CHANGED = {
    "kernel of 5": pair(conv=nn.Conv2d(4, 6, 5, padding=1, bias=False)),
    "stride": pair(conv=nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False)),
    "no padding": pair(conv=nn.Conv2d(4, 6, 3, bias=False)),
    "reflected padding": pair(
        conv=nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False)
    ),
    "dilation": pair(conv=nn.Conv2d(4, 6, 3, padding=1, dilation=2, bias=False)),
    "groups": pair(conv=nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)),
    "bias": pair(conv=nn.Conv2d(4, 6, 3, padding=1)),
    "bilinear": pair(upsample=nn.Upsample(scale_factor=2, mode="bilinear")),
    "three times as large": pair(upsample=nn.Upsample(scale_factor=3)),
    "size": pair(upsample=nn.Upsample(size=(9, 9))),
    "forward hook of the first": pair_with_forward_hook(0),
    "forward hook of the second": pair_with_forward_hook(1),
    "spectral norm": pair_with_spectral_norm(),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_pair_is_torchs(change):
    layers = CHANGED[change]
    x = torch.randn(3, 4, 7, 5)
    assert torch.equal(common.run_layers(layers, x), layers(x))


def test_bfloat16_is_computed_but_for_rounding():
    """As in the training on a CPU that is faster in it."""
    layers = dcgan.Generator(10).layers.to(memory_format=torch.channels_last)
    z = torch.randn(8, 10)
    exact = layers(z)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = common.run_layers(layers, z).float()
    assert 0 < (rounded - exact).abs().mean() < 0.02
    exact_gradient = torch.autograd.grad(exact.square().mean(), layers[0].weight)[0]
    gradient = torch.autograd.grad(rounded.square().mean(), layers[0].weight)[0]
    assert torch.cosine_similarity(gradient.flatten(), exact_gradient.flatten(), dim=0) > 0.95


def test_the_generator_is_a_list_of_torchs_own_layers():
    layers = dcgan.Generator().layers
    assert type(layers) is nn.Sequential
    for layer in layers:
        assert type(layer).__module__.startswith("torch.nn.")
