"""DCGAN on FashionMNIST: convolutional networks (after Radford et al. 2015, arXiv:1511.06434).

Run `python dcgan.py` to train for 200 epochs and write figures and checkpoints to outputs/dcgan/;
`python dcgan.py --help` lists the options. common.py trains it.
"""

import common  # first: it sets what torch reads. The mark `isort: split` keeps it first.

# isort: split
from torch import nn


class Generator(nn.Module):
    """G: latent vectors z, (N, latent_dim) from N(0, 1), to images, (N, 1, 28, 28) in [-1, 1]."""

    def __init__(self, latent_dim):  # --latent-dim
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, 128 * 7 * 7),
            nn.Unflatten(1, (128, 7, 7)),
            common.UpsampleConv2d(128, 128),  # 14x14
            nn.BatchNorm2d(128),
            nn.LeakyReLU(0.2),
            common.UpsampleConv2d(128, 64),  # 28x28
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 1, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, z):
        return self.layers(z)


class Discriminator(nn.Module):
    """D: images x, (N, 1, 28, 28) in [-1, 1], to logits, (N, 1).

    Its last layer, the Sigmoid, is in the loss (common.train_step): D(x), the probability that x
    is real, is sigmoid(logit). For a logit of -200, D(x) rounds to 0, whose logarithm is infinite;
    from the logit itself log D(x) is -200.
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


if __name__ == "__main__":
    common.main("DCGAN", __file__, Generator, Discriminator)
