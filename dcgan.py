"""DCGAN on FashionMNIST: convolutional networks (after Radford et al. 2015, arXiv:1511.06434).

Run `python dcgan.py` to train for 200 epochs and write figures and checkpoints to outputs/dcgan/;
`python dcgan.py --help` lists the options. How it is trained stands in common.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

import common


class Generator(nn.Module):
    """G: latent vectors z, (N, latent_dim) from N(0, 1), to images, (N, 1, 28, 28) in [-1, 1]."""

    def __init__(self, latent_dim=100):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, 128 * 7 * 7),
            nn.Unflatten(1, (128, 7, 7)),
            nn.Upsample(scale_factor=2),  # 14x14
            nn.Conv2d(128, 128, 3, padding=1, bias=False),  # BatchNorm would subtract a bias
            nn.BatchNorm2d(128),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),  # 28x28
            nn.Conv2d(128, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 1, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, z):
        return apply_layers(self.layers, z)  # the same as self.layers(z), faster on the CPU


class Discriminator(nn.Module):
    """D: images x, (N, 1, 28, 28) in [-1, 1], to logits, (N, 1).

    Its last layer, the Sigmoid, is in the loss (common.train_step): D(x), the probability that x
    is real, is sigmoid(logit), and log D(x) is exact only if both are computed in one go.
    """

    def __init__(self):
        super().__init__()
        # No BatchNorm, which the DCGAN paper has after each of these convolutions but the first:
        # real and fake images pass D in one batch and would share its statistics.
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1),  # 14x14
            nn.LeakyReLU(0.2),
            nn.Dropout2d(0.1),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),  # 7x7
            nn.LeakyReLU(0.2),
            nn.Dropout2d(0.1),
            nn.Conv2d(64, 128, 3, stride=2, padding=1),  # 4x4
            nn.LeakyReLU(0.2),
            nn.Dropout2d(0.1),
            nn.Conv2d(128, 256, 3, stride=2, padding=1),  # 2x2
            nn.LeakyReLU(0.2),
            nn.Dropout2d(0.1),
            nn.Flatten(),
            nn.Linear(256 * 2 * 2, 1),
        )

    def forward(self, x):
        return self.layers(x)


# --------------------------------------------- the same generator, computed faster on the CPU


def apply_layers(layers, x):
    """layers(x), but on the CPU an Upsample and the Conv2d after it are computed together."""
    i = 0
    while i < len(layers):
        if x.device.type == "cpu" and is_upsample_and_conv(layers[i : i + 2]):
            x = upsample_and_conv(x, layers[i + 1].weight)
            i += 2
        else:
            x = layers[i](x)
            i += 1
    return x


def is_upsample_and_conv(layers):
    """Whether this is the pair above, as it stands there: a changed one is left to torch."""
    if [type(layer) for layer in layers] != [nn.Upsample, nn.Conv2d]:
        return False
    # A hook, such as spectral_norm's, is only called by torch.
    for layer in layers:
        if layer._forward_hooks or layer._forward_pre_hooks:
            return False
        if layer._backward_hooks or layer._backward_pre_hooks:
            return False
    upsample, conv = layers
    return (
        upsample.scale_factor == 2
        and upsample.mode == "nearest"
        and conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.padding == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.bias is None
    )


def upsample_and_conv(x, kernel):
    """Upsample x2, then Conv 3x3: x (N, C, H, W) and kernel (K, C, 3, 3) to (N, K, 2H, 2W).

    To upsample is to put zeros between the pixels and then to sum over neighbours; in a row,
    a b -> a a b b is (a 0 b 0) + (0 a 0 b). The sum may as well follow the convolution, and to put
    in zeros and convolve is a transposed convolution of stride 2 with the kernel turned round. It
    skips the zeros: a quarter of the multiplications.
    """
    x = x.contiguous(memory_format=torch.channels_last)  # the layout that is fastest on the CPU
    turned = kernel.flip(2, 3).transpose(0, 1)
    return SumOf2x2.apply(F.conv_transpose2d(x, turned, stride=2))


class SumOf2x2(torch.autograd.Function):
    """Sums of 2x2 neighbours, (N, C, H, W) to (N, C, H - 1, W - 1).

    Each pixel is in four sums, so its gradient is the sum of their four gradients: such a sum
    again, with zeros around. PyTorch's own way back is slower.
    """

    @staticmethod
    def forward(context, x):
        return F.avg_pool2d(x, 2, stride=1, divisor_override=1)

    @staticmethod
    def backward(context, gradient):
        return F.avg_pool2d(gradient, 2, stride=1, padding=1, divisor_override=1)


if __name__ == "__main__":
    common.main("DCGAN", Generator, Discriminator)
