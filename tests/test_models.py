"""What goes into the networks and comes out, and UpsampleConv2d against torch's own layers."""

import pytest
import torch
from benchmark import plain_layers
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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_upsample_and_conv_are_torchs_in_values_and_gradients(dtype, tolerance):
    ours = common.UpsampleConv2d(4, 6).to(dtype)
    torchs = nn.Sequential(
        nn.Upsample(scale_factor=2), nn.Conv2d(4, 6, 3, padding=1, bias=False, dtype=dtype)
    )
    torchs[1].weight.data = ours.weight.data
    x = torch.randn(3, 4, 7, 5, dtype=dtype, requires_grad=True)
    found = ours(x)
    expected = torchs(x)
    assert found.shape == (3, 6, 14, 10)
    random = torch.randn(found.shape, dtype=dtype)
    found = [found, *torch.autograd.grad((found * random).sum(), [x, ours.weight])]
    expected = [expected, *torch.autograd.grad((expected * random).sum(), [x, torchs[1].weight])]
    for mine, own in zip(found, expected, strict=True):
        largest = own.abs().max().item()
        torch.testing.assert_close(mine, own, rtol=tolerance, atol=tolerance * largest)


def test_the_reports_layers_are_said_and_can_be_written_in_plain_torch():
    """README: nn.Upsample, nn.Conv2d in its place is the same."""
    G = dcgan.Generator(10)
    assert str(G).count("UpsampleConv2d(128, ") == 2
    plain = plain_layers(G.layers)
    assert len(plain) == 12
    assert "UpsampleConv2d" not in str(plain)
    z = torch.randn(8, 10)
    torch.testing.assert_close(G(z), plain(z), rtol=0, atol=1e-4)


def test_spectral_norm_and_hooks_of_upsample_and_conv_are_heard():
    layer = torch.nn.utils.spectral_norm(common.UpsampleConv2d(4, 6))
    layer.register_forward_hook(lambda module, x, y: y + 1)
    x = torch.randn(3, 4, 7, 5)
    for _ in range(30):
        y = layer(x)
    assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)
    expected = nn.functional.conv2d(
        x.repeat_interleave(2, 2).repeat_interleave(2, 3), layer.weight, padding=1
    )
    torch.testing.assert_close(y, expected + 1, rtol=1e-3, atol=1e-4)
