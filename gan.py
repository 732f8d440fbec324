"""GAN on FashionMNIST: fully connected networks (after Goodfellow et al. 2014, arXiv:1406.2661).

Run `python gan.py` to train for 200 epochs and write figures and checkpoints to outputs/gan/;
`python gan.py --help` lists the options. How it is trained stands in common.py.
"""

import common  # first: it says in one line which package is missing

# isort: split
from torch import nn


class Generator(nn.Module):
    """G: latent vectors z, (N, latent_dim) from N(0, 1), to images, (N, 1, 28, 28) in [-1, 1]."""

    def __init__(self, latent_dim=100):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, 128),
            nn.LeakyReLU(0.2),
            nn.Linear(128, 256),
            nn.BatchNorm1d(256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 512),
            nn.BatchNorm1d(512),
            nn.LeakyReLU(0.2),
            nn.Linear(512, 1024),
            nn.BatchNorm1d(1024),
            nn.LeakyReLU(0.2),
            nn.Linear(1024, 28 * 28),
            nn.Tanh(),
            nn.Unflatten(1, (1, 28, 28)),
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
            nn.Flatten(),
            nn.Linear(28 * 28, 512),
            nn.LeakyReLU(0.2),
            nn.Linear(512, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 1),
            # No BatchNorm anywhere in D: real and fake images pass it in one batch.
        )

    def forward(self, x):
        return self.layers(x)


if __name__ == "__main__":
    common.main("GAN", Generator, Discriminator)
