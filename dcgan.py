"""DCGAN on FashionMNIST: convolutional networks (after Radford et al. 2015, arXiv:1511.06434).

Run `python dcgan.py` to train for 200 epochs and write figures and checkpoints to outputs/dcgan/;
`python dcgan.py --help` lists the options. How it is trained stands in common.py.
"""

import common  # first: it says in one line which package is missing

# isort: split
import torch
import torch.nn.functional as F
from torch import nn


class Generator(nn.Module):
    """G: latent vectors z, (N, latent_dim) from N(0, 1), to images, (N, 1, 28, 28) in [-1, 1]."""

    def __init__(self, latent_dim=100):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, 128 * 7 * 7),
            nn.Unflatten(1, (128, 7, 7)),
            # UpsampleConv is nn.Upsample(scale_factor=2) and nn.Conv2d(..., 3, padding=1, bias=False).
            UpsampleConv(128, 128),  # 14x14
            nn.BatchNorm2d(128),
            nn.LeakyReLU(0.2),
            UpsampleConv(128, 64),  # 28x28
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 1, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, z):
        return self.layers(z)


class Discriminator(nn.Module):
    """D: images x, (N, 1, 28, 28) in [-1, 1], to logits, (N, 1).

    The last layer, the Sigmoid, is part of the loss in common.py: D(x), the probability that x is real,
    is sigmoid(logit). The logarithm of it is exact when both are computed in one go.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *self.block(1, 32),  # 14x14
            *self.block(32, 64),  # 7x7
            *self.block(64, 128),  # 4x4
            *self.block(128, 256),  # 2x2
            nn.Flatten(),
            nn.Linear(256 * 2 * 2, 1),
        )

    @staticmethod
    def block(channels_in, channels_out):
        # The DCGAN paper has a BatchNorm here. Ours must not: real and fake images pass D in one batch.
        return (
            nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Dropout2d(0.1),
        )

    def forward(self, x):
        return self.layers(x)


# ---------------------------------------------------- the same layer, computed faster on the CPU


class UpsampleConv(nn.Conv2d):
    """Upsample x2 (nearest), then Conv 3x3: (N, channels_in, H, W) to (N, channels_out, 2H, 2W).

    Upsampling puts zeros between the pixels and then sums 2x2 neighbours. The sum may as well follow the
    convolution, and a convolution after putting in zeros is a transposed one of stride 2 with the kernel
    turned round: the same function with a quarter of the multiplications.
    """

    def __init__(self, channels_in, channels_out):
        super().__init__(channels_in, channels_out, 3, bias=False)  # BatchNorm would subtract a bias

    def forward(self, x):
        return self.fast(x) if x.device.type == "cpu" else self.plain(x)

    def plain(self, x):
        return F.conv2d(F.interpolate(x, scale_factor=2), self.weight, padding=1)

    def fast(self, x):
        x = x.contiguous(memory_format=torch.channels_last)  # the layout that convolutions here want
        kernel = self.weight.flip(2, 3).transpose(0, 1)
        return SumOf2x2.apply(F.conv_transpose2d(x, kernel, stride=2))


class SumOf2x2(torch.autograd.Function):
    """Sums of 2x2 neighbours, (N, C, H, W) to (N, C, H - 1, W - 1); their gradient is such a sum too."""

    @staticmethod
    def forward(_, x):
        return F.avg_pool2d(x, 2, stride=1, divisor_override=1)

    @staticmethod
    def backward(_, gradient):
        return F.avg_pool2d(gradient, 2, stride=1, padding=1, divisor_override=1)


if __name__ == "__main__":
    common.main("DCGAN", Generator, Discriminator)
