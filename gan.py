"""GAN on FashionMNIST: fully connected networks (after Goodfellow et al. 2014, arXiv:1406.2661).

Run `python gan.py` to train for 200 epochs and write figures and checkpoints to outputs/gan/;
`python gan.py --help` lists the options. common.py trains it.
"""

import common  # first: it sets what torch reads. The mark `isort: split` keeps it first.

# isort: split
from torch import nn


class Generator(nn.Module):
    """G: latent vectors z, (N, latent_dim) from N(0, 1), to images, (N, 1, 28, 28) in [-1, 1]."""

    def __init__(self, latent_dim):  # --latent-dim
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

    Its last layer, the Sigmoid, is in the loss (common.train_step): D(x), the probability that x
    is real, is sigmoid(logit). For a logit of -200, D(x) rounds to 0, whose logarithm is infinite;
    from the logit itself log D(x) is -200.
    """

    def __init__(self):
        super().__init__()
        # No BatchNorm: real and fake images pass D in one batch and would share its statistics.
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(28 * 28, 512),
            nn.LeakyReLU(0.2),
            nn.Linear(512, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 1),
        )

    def forward(self, x):
        return self.layers(x)


if __name__ == "__main__":
    common.main("GAN", __file__, Generator, Discriminator)
