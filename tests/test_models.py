"""The networks against the tables of the two papers' layers, counted by hand."""

import pytest
import torch
from torch import nn

import dcgan
import gan

# weights + biases of each layer (convolutions before a BatchNorm have no biases), and 2 n for a BatchNorm of
# n features
PARAMETERS = {
    gan.Generator: (100 * 128 + 128)
    + (128 * 256 + 256 + 2 * 256)
    + (256 * 512 + 512 + 2 * 512)
    + (512 * 1024 + 1024 + 2 * 1024)
    + (1024 * 784 + 784),  # 1,510,032
    gan.Discriminator: (784 * 512 + 512) + (512 * 256 + 256) + (256 + 1),  # 533,505
    dcgan.Generator: (100 * 6272 + 6272)
    + (9 * 128 * 128 + 2 * 128)
    + (9 * 128 * 64 + 2 * 64)
    + (9 * 64 + 1),  # 855,617
    dcgan.Discriminator: (9 * 32 + 32)
    + (9 * 32 * 64 + 64)
    + (9 * 64 * 128 + 128)
    + (9 * 128 * 256 + 256)
    + (1024 + 1),  # 388,865
}


@pytest.mark.parametrize("network", PARAMETERS)
def test_number_of_parameters(network):
    assert sum(p.numel() for p in network().parameters()) == PARAMETERS[network]


@pytest.mark.parametrize("module", [gan, dcgan])
def test_generated_images_have_the_shape_and_range_of_real_ones(module):
    images = module.Generator(7)(50 * torch.randn(9, 7))
    assert images.shape == (9, 1, 28, 28)
    assert -1 <= images.min() < -0.2 and 0.2 < images.max() <= 1  # and the tanh is really driven


@pytest.mark.parametrize("module", [gan, dcgan])
def test_the_discriminator_gives_one_logit_an_image(module):
    logits = module.Discriminator()(torch.rand(5, 1, 28, 28))
    assert logits.shape == (5, 1) and logits.min() < 0.4  # a probability without training is near 0.5


def shapes(network, x, kinds):
    """The shapes, without the batch, that the layers of these kinds put out."""
    seen = []
    for layer in network.modules():
        if isinstance(layer, kinds):
            layer.register_forward_hook(lambda _layer, _x, y: seen.append(tuple(y.shape[1:])))
    network(x)
    return seen


def test_layer_shapes():
    z, x = torch.randn(2, 100), torch.randn(2, 1, 28, 28)
    weighted = (nn.Linear, nn.Conv2d)
    assert shapes(gan.Generator(), z, weighted) == [(128,), (256,), (512,), (1024,), (784,)]
    assert shapes(gan.Discriminator(), x, weighted) == [(512,), (256,), (1,)]
    assert shapes(dcgan.Generator(), z, weighted) == [(6272,), (128, 14, 14), (64, 28, 28), (1, 28, 28)]
    assert shapes(dcgan.Discriminator(), x, weighted) == [
        (32, 14, 14),
        (64, 7, 7),
        (128, 4, 4),
        (256, 2, 2),
        (1,),
    ]


@pytest.mark.parametrize("module", [gan, dcgan])
def test_slopes_dropout_and_batch_norm_are_the_designs(module):
    layers = [*module.Generator().modules(), *module.Discriminator().modules()]
    assert {layer.negative_slope for layer in layers if isinstance(layer, nn.LeakyReLU)} == {0.2}
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert [norm.num_features for norm in norms] == ([256, 512, 1024] if module is gan else [128, 64])
    assert {norm.eps for norm in norms} == {1e-5}
    dropouts = [layer.p for layer in layers if isinstance(layer, nn.modules.dropout._DropoutNd)]
    assert dropouts == ([] if module is gan else [0.1] * 4)


def function_and_gradients(layers, x):
    """What the layers make of x, and the gradients of its mean square: of x and of every parameter."""
    x = x.clone().requires_grad_()
    y = layers(x)
    return y, *torch.autograd.grad((y**2).mean(), (x, *layers.parameters()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("way", ["fast", "plain"])
def test_upsampling_is_that_of_the_table(way, dtype, tolerance):
    """The same function and the same gradients as torch's own layers that it stands for."""
    torch.manual_seed(0)
    ours, conv = dcgan.UpsampleConv(6, 5), nn.Conv2d(6, 5, 3, padding=1, bias=False)
    ours.forward = getattr(ours, way)
    torchs = nn.Sequential(nn.Upsample(scale_factor=2), conv)
    conv.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6, 7, 4, dtype=dtype)
    found, expected = (function_and_gradients(layers.to(dtype), x) for layers in (ours, torchs))
    assert found[0].shape == (3, 5, 14, 8)
    for ours, torchs in zip(found, expected, strict=True):
        largest = torchs.abs().max().item()
        torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize(("device", "way"), [("cpu", "fast"), ("meta", "plain")])
def test_another_device_than_the_cpu_has_torchs_own_layers(device, way, monkeypatch):
    called = []
    for name in ("fast", "plain"):
        method = getattr(dcgan.UpsampleConv, name)

        def noted(self, x, name=name, method=method):
            called.append(name)
            return method(self, x)

        monkeypatch.setattr(dcgan.UpsampleConv, name, noted)
    x = dcgan.Generator().to(device)(torch.randn(2, 100, device=device))
    assert called == [way, way] and x.shape == (2, 1, 28, 28)
