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
    dcgan.Discriminator: (9 * 16 + 16)
    + (9 * 16 * 32 + 32)
    + (9 * 32 * 64 + 64)
    + (9 * 64 * 128 + 128)
    + (512 + 1),  # 97,665
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
def test_probability_is_the_sigmoid_of_the_logit(module):
    D, x = module.Discriminator().eval(), torch.rand(5, 1, 28, 28)
    logits = D(x)
    assert logits.shape == (5, 1)
    torch.testing.assert_close(D.probability(x), 1 / (1 + torch.exp(-logits)))


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
        (16, 14, 14),
        (32, 7, 7),
        (64, 4, 4),
        (128, 2, 2),
        (1,),
    ]


@pytest.mark.parametrize("module", [gan, dcgan])
def test_slopes_dropout_and_batch_norm_are_the_designs(module):
    layers = [*module.Generator().modules(), *module.Discriminator().modules()]
    assert {layer.negative_slope for layer in layers if isinstance(layer, nn.LeakyReLU)} == {0.2}
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert [norm.num_features for norm in norms] == ([256, 512, 1024] if module is gan else [128, 64])
    assert {norm.eps for norm in norms} == {1e-5}
    dropouts = [layer.p for layer in layers if isinstance(layer, gan.Dropout | nn.Dropout2d)]
    assert dropouts == ([26 / 256] * 2 if module is gan else [0.25] * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_a_tenth_scales_the_rest_and_passes_their_gradient(dtype):
    torch.manual_seed(0)
    x = torch.ones(1000, 512, dtype=dtype, requires_grad=True)
    y = gan.Dropout()(x)
    y.sum().backward()
    dropped = y == 0
    # of 512,000 elements, and of each of the eight whose random numbers are drawn together: 5 deviations
    assert abs(dropped.float().mean().item() - 26 / 256) < 5 * 0.302 / 512_000**0.5
    eights = dropped.float().view(-1, 8).mean(0)
    assert (eights - 26 / 256).abs().max() < 5 * 0.302 / 64_000**0.5
    torch.testing.assert_close(y[~dropped], torch.full_like(y[~dropped], 1 / (1 - 26 / 256)))
    assert torch.equal(x.grad, y)  # y is x times the mask, and x is 1
    pairs = dropped.float().view(-1, 8).T.corrcoef() - torch.eye(8)
    assert pairs.abs().max() < 0.02  # independent of one another
    assert not torch.equal(gan.Dropout()(x), y)
    assert torch.equal(gan.Dropout().eval()(x), x)


def function_and_gradients(layers, x):
    """What the layers make of x, and the gradients of its mean square: of x and of every parameter."""
    x = x.clone().requires_grad_()
    y = layers(x)
    return y, *torch.autograd.grad((y**2).mean(), (x, *layers.parameters()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("layer", ["UpsampleConv", "Conv"])
def test_convolutions_are_those_of_the_table(layer, dtype, tolerance):
    """The same function and the same gradients as torch's own layers that they stand for."""
    torch.manual_seed(0)
    if layer == "UpsampleConv":
        ours, shape = dcgan.UpsampleConv(6, 5), (3, 5, 14, 8)
        conv = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        torchs = nn.Sequential(nn.Upsample(scale_factor=2), conv)
    else:
        ours, shape = dcgan.Conv(6, 5, 3, padding=1), (3, 5, 7, 4)
        torchs = conv = nn.Conv2d(6, 5, 3, padding=1)
    conv.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6, 7, 4, dtype=dtype)
    found, expected = (function_and_gradients(layers.to(dtype), x) for layers in (ours, torchs))
    assert found[0].shape == shape
    for ours, torchs in zip(found, expected, strict=True):
        largest = torchs.abs().max().item()
        torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance * largest)
