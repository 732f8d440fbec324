"""What gan.py and dcgan.py share, in this order: constants and seeds, FashionMNIST, speed on a CPU,
training, sampling, figures, files, command line. To understand a GAN, read `training`.

The names are the papers': z latent vectors, x images, G generator, D discriminator. From step to
step G swings; G_ema is its moving average, which makes every generated image that is shown.
"""
# ruff: noqa: E402 (The checker of form expects all imports at the top. Some lines must come first.)

import os
import sys
from pathlib import Path

# Some processors have an instruction, avx512_bf16, for bfloat16, numbers of 16 bits: half as
# much to move, twice as many multiplied at once, but only two to three digits. Linux lists the
# instructions in /proc/cpuinfo.
cpuinfo = Path("/proc/cpuinfo")
FAST_BFLOAT16 = cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()

# PyTorch's threads (of a library called GOMP) wait for each other in a loop, which keeps their
# cores from other programs. This variable, read when torch is imported, lets them sleep after they
# have gone round 5,000 times instead of 300,000, unless the user has set it. On a busy machine the
# DCGAN is faster by it in float32, slower in bfloat16 (measured in outputs/README.md; the reason is
# not known). It changes no number. (--precision is not known yet; "auto" follows the processor.)
if not FAST_BFLOAT16:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# A notebook sets MPLBACKEND to its own way of drawing, and what it starts (!python gan.py) inherits
# it. If that Python lacks the package matplotlib_inline, `import matplotlib` fails. So there it is
# set to "agg", which draws into files. In the notebook itself, where ipykernel runs, it stays.
backend = os.environ.get("MPLBACKEND")
if backend == "module://matplotlib_inline.backend_inline" and "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"

import argparse
import ast
import contextlib
import copy
import csv
import difflib
import functools
import hashlib
import importlib
import io
import json
import math
import platform
import random
import runpy
import socket
import subprocess
import tempfile
import time
import tokenize
from dataclasses import dataclass

import matplotlib.style
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn
from torch.optim.swa_utils import update_bn
from torchvision.datasets import FashionMNIST
from torchvision.datasets.utils import download_and_extract_archive, extract_archive
from torchvision.utils import make_grid
from tqdm import tqdm

# ----------------------------------------------------------------------------- constants and seeds

# These decide the numbers of a run, together with its program. (So does the device, but a run may
# go on with another one if --precision is the same there.)
SETTINGS = ["batch_size", "learning_rate", "r1_gamma", "latent_dim", "seed", "precision", "limit"]
RECORDED = ["D_loss", "G_loss", "D_x", "D_G_z", "D_right"]  # in each step, see train_step
R1_EVERY = 4  # steps from one R1 penalty to the next

# Latent vectors that are the same in every run (of one --latent-dim) and for both models.
LATENT_SEED = 2014  # of those of all figures
BATCH_NORM_SEED = 2015  # of those to measure BatchNorm with
BATCH_NORM_BATCHES = 20  # of 128 of these each, enough for a steady mean and variance


def seed_epoch(seed, epoch):
    """Set the random numbers of an epoch; those of the first weights are epoch 0's.

    They follow from the seed and the epoch alone, so a run that was stopped goes on as if it never
    had been. The factor keeps the epochs of one seed apart from those of the next.
    """
    number = seed * 1_000_000 + epoch
    torch.manual_seed(number)
    # Nothing here takes numbers from these two, but what you add may.
    random.seed(number)
    np.random.seed(number % 2**32)  # it takes no larger ones


class UserError(Exception):
    """What the user can mend: printed as one line, without a traceback. (After `from error`, a
    debugger also shows what was raised first.)"""


@functools.cache  # called again with the same text, it does nothing
def warn_once(text):
    tqdm.write(f"warning: {text}", file=sys.stderr)  # print would write into the bar


# ------------------------------------------------------------------------------------ FashionMNIST

FILES = FashionMNIST.resources  # four pairs, (name, MD5 sum); the sum is a fingerprint
ADDRESSES = [
    *FashionMNIST.mirrors,
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
]
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where that package puts its files
TIMEOUT = 20  # seconds without an answer from the network
PIXELS_SHA256 = {  # a fingerprint of all pixels: if one pixel changes, it is another
    "train": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
    "test": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
}


def load_fashion_mnist(folder):
    """The training set, 60,000 images, and the test set, 10,000 (Xiao et al. 2017).

    Of each, `data` are the images, uint8 (N, 28, 28), and `targets` their classes, (N,). They are
    read from `folder` in torchvision's layout, or unpacked, or downloaded into it. Raises UserError
    if they cannot be had, are damaged, or are those of MNIST, whose files have the same names.

    compare.py and --redraw call this for all runs, so to leave out images here would change their
    numbers, too: choose them in `train`.
    """
    raw = folder / "FashionMNIST" / "raw"
    try:
        unpacked = [raw / name.removesuffix(".gz") for name, _ in FILES]
        if not all(path.exists() for path in unpacked):
            fetch_files(folder, raw)
        # Images are taken from `data`, so a transform= would do nothing: change them in `train`.
        train_set = FashionMNIST(folder, train=True)
        test_set = FashionMNIST(folder, train=False)
        for split, dataset in [("train", train_set), ("test", test_set)]:
            # The fingerprint is of the array's bytes, one for each pixel.
            if hashlib.sha256(dataset.data.numpy()).hexdigest() != PIXELS_SHA256[split]:
                raise ValueError(f"the {split} images are not FashionMNIST's")
    except Exception as error:  # files and networks fail in many ways
        names = ", ".join(name for name, _ in FILES)
        reason = " ".join(str(error).split())  # in one line
        raise UserError(
            f"FashionMNIST cannot be read ({type(error).__name__}: {reason}): move "
            f"{folder / 'FashionMNIST'} away, if it is there, and put {names} into {folder}"
        ) from error
    return train_set, test_set


def fetch_files(folder, raw):
    """Unpack or download the four files, and move them to `raw` when they are whole, because
    another run may be reading there. On the same disk, to move a file is only to rename it."""
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        new = Path(temporary)
        # The packed files, put there by hand, left there by torchvision, or Debian's.
        places = [place for place in [folder, raw, DEBIAN_FOLDER] if has_files(place)]
        if places:
            unpack(places[0], new)
        else:
            download(new)
        for name, _ in FILES:
            unpacked = name.removesuffix(".gz")
            os.replace(new / unpacked, raw / unpacked)


def has_files(place):
    return all((place / name).exists() for name, _ in FILES)


def unpack(place, new):
    for name, _ in FILES:
        extract_archive(str(place / name), str(new))


def download(new):
    """Take the files from the first address that has them, else from Debian's package. Raises what
    failed first."""
    socket.setdefaulttimeout(TIMEOUT)  # without it torchvision would wait for ever
    failures = []
    for source in [*ADDRESSES, DEBIAN_PACKAGE]:
        print(f"downloading FashionMNIST ({source})")
        try:
            if source == DEBIAN_PACKAGE:
                fetch_debian_package(new)
            else:
                for name, md5 in FILES:
                    download_and_extract_archive(source + name, str(new), md5=md5)
            return
        except Exception as error:  # a network fails in many ways
            print(f"that failed: {error}")
            failures.append(error)
    raise failures[0]  # the last says, on most machines, only that there is no apt-get


def fetch_debian_package(new):
    """Fetch the package on Debian and Ubuntu without installing it."""
    # Only root may bring the lists of packages up to date. Where that fails, the old ones may do.
    with contextlib.suppress(subprocess.SubprocessError):
        run_quietly(new, "apt-get", "update")
    run_quietly(new, "apt-get", "download", DEBIAN_PACKAGE)
    archive = next(new.glob("*.deb"))  # the only one
    run_quietly(new, "dpkg-deb", "--extract", archive.name, ".")  # into `new`
    # In the package the folder is usr/share/..., without the first slash; now it is below `new`.
    unpack(new / DEBIAN_FOLDER.relative_to("/"), new)


def run_quietly(folder, *command):
    """Run a program in a folder, without what it prints. Raises an error if it fails or takes more
    than five minutes."""
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)


# -------------------------------------------------------------------------------- speed on a CPU


def respect_cpu_quota():
    """No more threads than the cores that a container may use (PyTorch counts those of the whole
    machine). Linux says so in cpu.max: 200000 100000 are 200 ms of computing in each 100 ms, which
    two cores do."""
    with contextlib.suppress(OSError, ValueError):  # there is no such file, or "max" for no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = max(1, int(quota) // int(period))
        torch.set_num_threads(min(torch.get_num_threads(), cores))


class UpsampleConv2d(nn.Conv2d):
    """nn.Upsample(scale_factor=2), then nn.Conv2d(C, K, 3, padding=1, bias=False).

    x (N, C, H, W) to (N, K, 2H, 2W). There is no bias, since BatchNorm follows, which subtracts
    the mean, and so any bias. On a CPU the two are computed together, which is faster. In one
    dimension, of three pixels a b c and by a kernel p q r, Upsample and Conv make

        a a b b c c  and then  qa+ra  pa+qa+rb  pa+qb+rb  pb+qb+rc  pb+qc+rc  pc+qc

    These are the sums of neighbours of seven numbers (H = 3 pixels: 2H + 1 numbers and 2H sums),

        ra  qa  pa+rb  qb  pb+rc  qc  pc

    Here a has added ra, qa, pa to the first three, b its rb, qb, pb two places later, and so on.
    This is called a transposed convolution, by the kernel turned round, r q p. It multiplies half
    as often; in two dimensions, for the rows and for the columns, a quarter as often. To change
    anything, use nn.Upsample and nn.Conv2d: with a bias or another mode this would be wrong.
    """

    def __init__(self, channels_in, channels_out):
        super().__init__(channels_in, channels_out, 3, padding=1, bias=False)

    def forward(self, x):
        if x.device.type != "cpu":
            upsampled = F.interpolate(x, scale_factor=2)  # what nn.Upsample does
            return super().forward(upsampled)
        # The order in memory that is faster (see new_training); nn.Unflatten makes the other one.
        x = x.contiguous(memory_format=torch.channels_last)
        # Turned round in height and width. conv_transpose2d takes (C, K, 3, 3), not (K, C, 3, 3).
        turned = self.weight.flip(2, 3).transpose(0, 1)
        numbers = F.conv_transpose2d(x, turned, stride=2)  # (N, K, 2H + 1, 2W + 1)
        # PyTorch's way to call such a class: `forward` now, `backward` in loss.backward().
        return SumOfNeighbours.apply(numbers)


class SumOfNeighbours(torch.autograd.Function):
    """The sums of 2x2 neighbours, (N, C, H, W) to (N, C, H - 1, W - 1), and how PyTorch shall
    compute their gradient: loss.backward() calls `backward`.

    Only for speed: PyTorch finds the same gradient of the line in `forward` by itself, but on some
    processors that takes three times as long. In one dimension x y z becomes x + y, y + z. If g and
    h are the gradients of these two sums, the gradients of x y z are g, g + h, h: again sums of
    neighbours, those of 0 g h 0.
    """

    # staticmethod: there is no self, but a context, for what backward must know of forward. Here
    # that is nothing.
    @staticmethod
    def forward(context, x):
        # The mean of 2x2 neighbours, but divided by 1 instead of 4: their sum.
        return F.avg_pool2d(x, 2, stride=1, divisor_override=1)

    @staticmethod
    def backward(context, gradient):
        # padding=1 puts the zeros around.
        return F.avg_pool2d(gradient, 2, stride=1, padding=1, divisor_override=1)


# ---------------------------------------------------------------------------------------- training


@dataclass  # this writes the __init__ that takes the five
class Training:
    """What is trained: both networks, the moving average of G, and an optimizer for each.

    All of it is saved. What else remembers something from step to step, such as a schedule of the
    learning rate, must be here too, or it begins anew when a run goes on. A number that a network
    changes in `forward` must be a buffer of it (register_buffer).
    """

    G: nn.Module
    D: nn.Module
    G_ema: nn.Module
    G_optimizer: torch.optim.Optimizer
    D_optimizer: torch.optim.Optimizer


def new_training(Generator, Discriminator, settings, device):
    """Networks and optimizers as they are before the first step. Raises UserError for networks that
    cannot be trained like this."""
    seed_epoch(settings["seed"], 0)
    # Two orders in memory: channels_last has all channels of a pixel side by side, the usual one
    # has all pixels of a channel. On a CPU, convolutions are faster with the first.
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    G = Generator(settings["latent_dim"]).to(device, memory_format=layout)
    D = Discriminator().to(device, memory_format=layout)
    G_ema = copy.deepcopy(G).requires_grad_(False).eval()  # it is averaged, not trained
    check_generator(G_ema, torch.randn(64, settings["latent_dim"], device=device))
    D_again = Discriminator().to(device, memory_format=layout)
    check_discriminator(D, D_again, torch.randn(64, 1, 28, 28, device=device))
    options = {
        "lr": settings["learning_rate"],
        # 0: no momentum (the DCGAN paper has 0.5), because an older gradient was taken against an
        # opponent that has moved since. 0.999: the mean square is over some 1,000 steps.
        "betas": (0.0, 0.999),
        # Adam divides each weight's gradient by the root of its mean square, so if all gradients
        # become smaller, the steps soon are as large as before, and G and D never come to rest.
        # With amsgrad it is the largest mean square so far (Reddi et al. 2018, arXiv:1904.09237):
        # when gradients become smaller, so do the steps.
        "amsgrad": True,
        "fused": True,  # all weights are changed by one call, which is faster
    }
    G_optimizer = torch.optim.Adam(G.parameters(), **options)
    D_optimizer = torch.optim.Adam(D.parameters(), **options)
    return Training(G, D, G_ema, G_optimizer, D_optimizer)


def check_generator(G, z):
    """Raises UserError if G(z) are not images. z: latent vectors (N, latent_dim)."""
    images = try_network("the generator", G, z)
    if images.shape != (len(z), 1, 28, 28):
        raise UserError(
            f"the generator makes {tuple(images.shape)} of {len(z)} latent vectors, but images of "
            f"FashionMNIST are {(len(z), 1, 28, 28)}"
        )


def check_discriminator(D, D_again, noise):
    """Raises UserError if D does not give an output for each image, if one depends on the other
    images, if D gives probabilities, or if D_again, another new D, gives other logits with the same
    weights.

    noise: images (N, 1, 28, 28). What D does is tried, whatever its layers are called.
    """
    outputs = try_discriminator(D, noise)
    if len(outputs) != len(noise):
        raise UserError(f"the discriminator gives {len(outputs)} outputs for {len(noise)} images")
    rounding = 1e-4 * outputs.abs().max()  # computed otherwise, equal logits differ by less
    # As when a run goes on: D is made anew and gets the weights that a checkpoint holds.
    D_again.load_state_dict(D.state_dict())
    if (try_discriminator(D_again, noise) - outputs).abs().max() > rounding:
        raise UserError(
            "the discriminator, made once more and with the same weights, gives other logits: put "
            "layers that are in a list into nn.ModuleList, and give tensors to register_buffer"
        )
    # What D says of the first image among copies of itself, and not among the others.
    among_copies = try_discriminator(D, noise[:1].repeat(len(noise), 1, 1, 1))
    if (among_copies[0] - outputs[0]).abs().max() > rounding:
        raise UserError(
            "what the discriminator says of an image depends on the other images of its batch, as "
            "with BatchNorm, so real and fake ones must not share a pass: in common.py let "
            "train_step take D(real) and D(fake.detach()) apart, take check_discriminator out of "
            "new_training, and train with --r1-gamma 0, since R1 needs independent images too"
        )
    # With weights and images 1,000 times as large, a Sigmoid still gives 0 to 1, but logits leave
    # that range (unless all are 0, as after a last layer that begins with zeros).
    large_D = copy.deepcopy(D)
    with torch.no_grad():  # else weights may not be changed like this
        for weight in large_D.parameters():
            weight.mul_(1000)
    larger = try_discriminator(large_D, 1000 * noise)
    if outputs.min() > 0 and larger.min() >= 0 and larger.max() <= 1:
        raise UserError(
            "the discriminator gives probabilities, as after a Sigmoid, which is in the loss "
            "already: end it with a Linear layer"
        )


def try_discriminator(D, noise):
    """The output of a copy of D, since a pass may change what layers keep."""
    seed_epoch(0, 0)  # Dropout takes out the same each time
    return try_network("the discriminator", copy.deepcopy(D).train(), noise)


@torch.no_grad()
def try_network(name, network, x):
    """The output of a network. If its layers do not fit, the error also prints the network."""
    try:
        return network(x)
    except RuntimeError as error:
        raise RuntimeError(f"{error}\nThis was {name}: {network}") from error


def r1_penalty(D, x):
    """R1 of Mescheder et al. (2018, arXiv:1801.04406): half the mean, over real images, of the
    squared length of the gradient of D's logit with respect to the pixels.

    x: real images (N, 1, 28, 28). Returns a scalar. G follows D's gradient. If that is large where
    images are real already, G is driven past them and back again; if it is small, G can settle.
    In the paper D minimizes L + gamma R1. Here D_loss is L / 2 (see train_step), and so r1_gamma is
    gamma / 2: half of L + gamma R1 is D_loss + r1_gamma R1.
    """
    x = x.detach().requires_grad_()  # the same images, now with a gradient for each pixel
    logits = D(x)  # a pass of its own: in that of train_step the pixels have no gradient
    # train_step calls this under autocast, which lets layers compute in numbers of 16 bits (see
    # there). The gradient is taken without it: on CUDA it might be computed in float16 even when
    # bfloat16 was asked for (a fault of PyTorch, issue 105682), and in float16 small numbers are 0.
    with torch.autocast(x.device.type, enabled=False):
        # The gradient with respect to the images; [0]: `grad` returns one for each input. A logit
        # depends on its own image alone, so of the sum of logits each image gets its own gradient.
        # create_graph: the backward pass of train_step will differentiate the gradient once more.
        gradient = torch.autograd.grad(logits.sum(), x, create_graph=True)[0]
    return gradient.square().sum((1, 2, 3)).mean() / 2


def train_step(training, real, z, r1_weight, dtype):
    """One iteration of Algorithm 1 of Goodfellow et al. (2014), with one step of D (k = 1).

    real: images (N, 1, 28, 28) in [-1, 1]; z: latent vectors (N, latent_dim). Returns (5,), what
    RECORDED names: both losses without the penalty, the means of D(x) and D(G(z)), and the share of
    pairs of a real and a fake image in which the real one has the larger logit.

    If you change the loss, also change what find_limits and draw_losses (ln 2) and plot_losses (the
    label of the axis) say of it. For k above 1, repeat D's part here, with new real images and z.
    """
    G, D = training.G, training.D
    # In a block `with autocast`, Linear and Conv compute in `dtype`, and their outputs are of it.
    # Weights stay in float32, and float() makes the logits float32 again, for the losses. If dtype
    # is float32, it is switched off.
    autocast = torch.autocast(real.device.type, dtype, enabled=dtype is not torch.float32)

    # Discriminator: ascend log D(x) + log(1 - D(G(z))), that is, descend on binary cross-entropy.
    # As D = sigmoid(logit), -log D = softplus(-logit) and -log(1 - D) = softplus(logit), where
    # softplus(t) = log(1 + e^t).
    with autocast:
        fake = G(z)
        # detach: this pass is not to move G. One pass for both is faster than two.
        both = torch.cat([real, fake.detach()])
        logits = D(both).float()
        # Here, since a block of its own would make D's weights numbers of `dtype` once more.
        penalty = r1_penalty(D, real) if r1_weight > 0 else 0
    real_logits, fake_logits = logits.split([len(real), len(fake)])
    # Half of the sum: the mean over all images, which for an undecided D is ln 2, like G's loss.
    D_loss = (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2
    training.D_optimizer.zero_grad()
    (D_loss + r1_weight * penalty).backward()
    training.D_optimizer.step()

    # Generator, against the discriminator just updated: ascend log D(G(z)). (The algorithm has
    # descend log(1 - D(G(z))), which is flat where D is sure; the paper advises this form.) The
    # fake images from above serve again: to make new ones would take longer.
    with autocast:
        logits_for_G = D(fake).float()
    G_loss = F.softplus(-logits_for_G).mean()
    training.G_optimizer.zero_grad()
    # Only these weights get a gradient; D's need none here. Add those of any other network that
    # G_loss is to train.
    G_loss.backward(inputs=list(G.parameters()))
    training.G_optimizer.step()

    D_x = real_logits.sigmoid().mean()
    D_G_z = fake_logits.sigmoid().mean()
    D_right = (real_logits > fake_logits).float().mean()
    return torch.stack([D_loss, G_loss, D_x, D_G_z, D_right]).detach()


@torch.no_grad()
def update_average(G_ema, G, step):
    """Move each weight of G_ema by the share 9 / (10 + step) of its way to that of G.

    step counts from 0. With 1 / (1 + step), G_ema would be the plain mean of G over all steps, in
    which swings cancel. Nine times as much lets old weights fade. A step leaves 1 - 9 / (10 + step)
    = (1 + step) / (10 + step) of the average. In the product of these from step s to step t most
    factors cancel (1 + step is the 10 + step of nine steps before), and some (s / t)^9 is left. So
    half of the average comes from the last 7% of the steps (0.93^9 is about 1/2). The 10 keeps the
    share below 1 at first. (For no average, make the share 1.)
    """
    for average, weight in zip(G_ema.parameters(), G.parameters(), strict=True):
        average.lerp_(weight, 9 / (10 + step))  # average += share * (weight - average)


def complete_average(G_ema, G, latent_dim):
    """What layers keep beside their weights, their buffers, is taken from G. But the mean and the
    variance that BatchNorm keeps would not fit the averaged weights: they are measured."""
    for buffer, new in zip(G_ema.buffers(), G.buffers(), strict=True):
        buffer.copy_(new)
    # A torch.Generator makes random numbers (it is no G). One with a seed of its own: the same
    # latent vectors after every epoch.
    own = torch.Generator().manual_seed(BATCH_NORM_SEED)
    batches = torch.randn(BATCH_NORM_BATCHES, 128, latent_dim, generator=own)
    # update_bn puts BatchNorm back to the beginning and passes these batches through G_ema in train
    # mode, which averages their means and variances; then G_ema is in eval mode again.
    update_bn(batches, G_ema, device_of(G_ema))


def scale(images):
    """uint8 images, 0..255, to float ones in [-1, 1], the range of the generator's tanh. `generate`
    scales back."""
    return images / 127.5 - 1


def train(training, train_set, settings, first, last):
    """Train from epoch `first` to epoch `last` on the images of load_fashion_mnist's training set.

    A Python generator: `for row, samples in train(...)` runs it up to the next `yield`, after each
    epoch. row: the epoch's, for history.csv; samples: uint8 (64, 28, 28). Raises UserError when
    numbers are not finite. Nothing that trains may depend on `last`, or 20 epochs that go on to 200
    are not the run of 200.
    """
    G, D, G_ema = training.G, training.D, training.G_ema
    batch_size = settings["batch_size"]
    latent_dim = settings["latent_dim"]
    dtype = getattr(torch, settings["precision"])  # torch.float32 or torch.bfloat16
    device = device_of(G)
    images = train_set.data[: settings["limit"], None].to(device)  # uint8 (limit, 1, 28, 28)
    steps = len(images) // batch_size  # of an epoch; an incomplete last batch is left out
    samples = generate(G_ema, latent_vectors(latent_dim))  # as they are before these epochs
    # disable=None: no bar if the output is a file, not a terminal; it gets a line an epoch (below).
    # refresh=False: shown later.
    with tqdm(initial=(first - 1) * steps, total=last * steps, disable=None) as bar:
        for epoch in range(first, last + 1):
            bar.set_description(f"epoch {epoch} of {last}", refresh=False)
            start = time.perf_counter()
            seed_epoch(settings["seed"], epoch)
            # In train mode BatchNorm takes its statistics from the batch, and Dropout is on.
            G.train()
            D.train()
            # In place of a DataLoader, which is slower: all images are in memory already.
            batches = torch.randperm(len(images), device=device).split(batch_size)
            # On the device: to fetch them in each step would make it wait.
            recorded = torch.zeros(steps, len(RECORDED), device=device)
            for i in range(steps):
                step = (epoch - 1) * steps + i
                real = scale(images[batches[i]])
                # N(0, 1), as in all places that draw z. For another distribution, transform z at
                # the start of G's forward.
                z = torch.randn(batch_size, latent_dim, device=device)
                # R1 is another pass through D, so it comes in every fourth step, four times as much
                # (Karras et al. 2020, arXiv:1912.04958). The mean of its gradient stays the same;
                # its mean square is 4^2 / 4 = 4 times as large. Adam divides by the root of that of
                # the whole gradient, so D's steps are a little smaller.
                r1_weight = R1_EVERY * settings["r1_gamma"] if step % R1_EVERY == 0 else 0
                recorded[i] = train_step(training, real, z, r1_weight, dtype)
                update_average(G_ema, G, step)
                bar.update()
            check_finite(recorded, training)
            complete_average(G_ema, G, latent_dim)

            samples_before = samples
            samples = generate(G_ema, latent_vectors(latent_dim))
            row = summarize(epoch, recorded, samples, samples_before, time.perf_counter() - start)
            losses = f"loss D {row['D_loss_mean']:.2f}, G {row['G_loss_mean']:.2f}"
            bar.set_postfix_str(losses, refresh=False)
            if bar.disable:
                print(f"epoch {epoch} of {last}: {losses}, {row['seconds']:.0f} s", flush=True)
            yield row, samples


def check_finite(recorded, training):
    """Raise UserError when a recorded number, or a weight after the epoch, is not finite."""
    weights = [*training.G.parameters(), *training.D.parameters()]
    if not all(values.isfinite().all() for values in [recorded, *weights]):
        raise UserError(
            "a loss or a weight is not finite; the epochs before this one are kept. Try a lower "
            "--learning-rate or --precision float32, with another --outputs"
        )


def summarize(epoch, recorded, samples, samples_before, seconds):
    """The row of history.csv of an epoch; recorded: (steps, 5), what train_step returns."""
    row = {"epoch": epoch}
    for i, name in enumerate(RECORDED):
        values = recorded[:, i].cpu()
        row[f"{name}_mean"] = values.mean().item()
        row[f"{name}_std"] = values.std(correction=0).item()  # all steps are here: divided by N
    sample_change = (samples.float() - samples_before.float()).abs().mean().item()
    # In epoch 1 it would be the change from noise.
    row["sample_change"] = sample_change if epoch > 1 else math.nan
    row["seconds"] = seconds
    # Rounded as in history.csv, so that figures drawn now and with --redraw are the same.
    return {name: float(f"{value:.6g}") for name, value in row.items()}


# ---------------------------------------------------------------------------------------- sampling


def device_of(network):
    first_weight = next(network.parameters())
    return first_weight.device


def latent_vectors(latent_dim):
    """The 64 latent vectors (64, latent_dim) of all figures, from random numbers of their own."""
    own = torch.Generator().manual_seed(LATENT_SEED)
    return torch.randn(64, latent_dim, generator=own)


@torch.no_grad()
def generate(G, z):
    """Images G(z) as uint8 (N, 28, 28) on the CPU, of a generator in eval mode."""
    x = G(z.to(device_of(G)))
    if x.abs().max() > 1.01:  # a little more than 1 could not be seen
        warn_once("generated images leave [-1, 1] and are cut there: end G with nn.Tanh()")
    if x.min() >= 0:
        warn_once(
            "no pixel of the generator is below 0, as after a Sigmoid, but real images are from -1 "
            "(black) to 1 (white): end it with nn.Tanh()"
        )
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().squeeze(1).cpu()


def perturb(G, z, dims, offsets):
    """Move one latent dimension at a time: G of z (N, latent_dim) with an offset on z[:, dim].

    Returns uint8 images (dims, offsets, N, 28, 28), and the response (dims, offsets): the mean
    absolute change of a pixel against G(z), in % of its range.
    """
    unmoved = generate(G, z).float()
    images = torch.zeros(len(dims), len(offsets), len(z), 28, 28, dtype=torch.uint8)
    response = torch.zeros(len(dims), len(offsets))
    for i, dim in enumerate(dims):
        for j, offset in enumerate(offsets):
            moved = z.clone()
            moved[:, dim] += offset  # titles, rows and captions say that it is moved, not set
            images[i, j] = generate(G, moved)
            response[i, j] = (images[i, j].float() - unmoved).abs().mean() / 255 * 100
    return images, response


# ----------------------------------------------------------------------------------------- figures

WIDTH = 12 / 2.54  # inches, the text width of a report
LARGEST_HEIGHT = 17 / 2.54  # with a caption it fits on a page
MARGIN = 0.1  # inches, above and below together
STYLE = [
    "default",  # whatever the user's own settings are
    {
        "font.size": 7,
        "axes.titlesize": 8,
        "figure.titlesize": 8,
        "figure.constrained_layout.use": True,  # no text is cut or lies over another
        "legend.frameon": False,
        "image.cmap": "gray",
        "image.interpolation": "nearest",  # pixels stay squares
        "savefig.dpi": 200,
    },
]
IMAGE_SIZE = 30  # pixels of an image in a grid: 28 and the margin to the next
# In front of the curves (zorder), and with dots far apart: from 0 on, a length of 1 is drawn, then
# 4 are not. So where D's line lies on ln 2, both can be seen.
DOTTED = {"color": "black", "linewidth": 1, "linestyle": (0, (1, 4)), "zorder": 3}


def plot_images(images, title, rows=(), blocks=1, right=(), columns=(), caption=""):
    """A figure of uint8 images (N, 28, 28), 8 in a row, with a rule between blocks of rows.

    rows, right, columns: labels, spread evenly over the rows or columns.
    """
    if len(images) % (8 * blocks) != 0:  # labels would stand beside other images
        raise ValueError(f"{len(images)} images are not {blocks} blocks of full rows of 8")
    count = len(images) // 8
    # Without pyplot, which may want a screen. At first as high as may be, so that the grid gets the
    # whole width; at the end the height is made that of its content.
    figure = Figure((WIDTH, LARGEST_HEIGHT - MARGIN))
    axes = figure.subplots()
    grid = make_grid(images[:, None], nrow=8, padding=2, pad_value=255)  # (3, height, width)
    axes.imshow(grid[0].numpy(), vmin=0, vmax=255)  # the three colours are alike
    axes.spines[:].set_visible(False)  # no frame
    axes.set_title(title)
    axes.set_xlabel(caption)
    axes.set_xticks(find_middles(columns, 8), columns)
    axes.set_yticks(find_middles(rows, count), rows)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    right_axis = axes.secondary_yaxis("right")  # a second axis, for labels on the other side
    right_axis.set_yticks(find_middles(right, count), right)
    right_axis.tick_params(length=0)
    right_axis.spines[:].set_visible(False)
    rows_of_a_block = count // blocks
    for block in range(1, blocks):
        edge = block * rows_of_a_block * IMAGE_SIZE
        axes.axhline(edge, color="black", linewidth=0.6)
    # The figure becomes as high (in inches) as what is in it; that is known when it is laid out.
    figure.draw_without_rendering()
    figure.set_figheight(figure.get_tightbbox().height + MARGIN)
    return figure


def find_middles(labels, count):
    """Where the labels stand beside the grid, in its pixels. With 2 labels for 4 rows, each stands
    in the middle of two rows."""
    size = count * IMAGE_SIZE / len(labels) if labels else 0  # of the part that a label is for
    return [(i + 0.5) * size for i in range(len(labels))]


def plot_perturbation(images, response, dims, offsets, title):
    """What `perturb` returns for 8 latent vectors: one row per offset, one block per dimension."""
    rows = []
    right = []
    for i, dim in enumerate(dims):
        for j, offset in enumerate(offsets):
            if offset == 0:
                rows.append(f"z[{dim}]")
                right.append("")  # it is not moved
            else:
                rows.append(f"z[{dim}] {offset:+.4g}")
                right.append(f"{response[i, j]:.1f}%")
    return plot_images(
        images.flatten(0, 2),  # all rows below each other
        f"{title}: one latent dimension at a time, moved by an offset",
        rows,
        blocks=len(dims),
        right=right,
        columns=range(1, 9),
        caption="Columns: 8 samples. Right: mean absolute change of a pixel in % of its range",
    )


def plot_losses(history, model):
    """Both losses over training and, below, how often D is right."""
    figure = Figure((WIDTH, 0.75 * WIDTH))
    figure.suptitle(f"{model}, epoch {len(history)}: losses")
    axes, below = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    draw_D_right(below, history)
    draw_losses(axes, history, find_limits(history))
    axes.set_ylabel("Loss (binary cross-entropy)")
    below.set_xlabel("Epoch (line: mean of its iterations; band: their standard deviation)")
    lines, labels = axes.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3)
    return figure


def draw_losses(axes, history, limits):
    """The mean of each epoch, one standard deviation of its iterations to each side, and ln 2."""
    draw_band(axes, history, "D_loss", 1, "Discriminator", "tab:blue", "-")
    draw_band(axes, history, "G_loss", 1, "Generator", "tab:orange", "--")
    label = "ln 2: D(x) = D(G(z)) = 1/2"
    axes.axhline(math.log(2), **DOTTED, label=label)
    axes.set_ylim(limits)
    name_peak(axes, history, limits)


def draw_D_right(axes, history):
    """In how many pairs of a real and a fake image D gives the real one the larger logit."""
    draw_band(axes, history, "D_right", 100, "", "tab:blue", "-")
    axes.axhline(50, **DOTTED)
    axes.set_ylabel("D is right, %\n(dotted: chance)")


def draw_band(axes, history, name, factor, label, colour, line):
    """The mean of each epoch, and one standard deviation of its iterations to each side."""
    epochs = column(history, "epoch")
    mean = factor * column(history, f"{name}_mean")
    deviation = factor * column(history, f"{name}_std")
    low = mean - deviation
    axes.fill_between(epochs, low, mean + deviation, color=colour, alpha=0.25, linewidth=0)
    marker = "o" if len(history) == 1 else ""  # one point makes no line
    axes.plot(epochs, mean, line, color=colour, linewidth=1.6, marker=marker, label=label)
    axes.set_xlim(0, len(history) + 1)
    # Numbers at whole epochs, in steps of 1, 2, 5, 10 and so on.
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def find_limits(history):
    """Limits of the loss axis: 98% of the edges of both bands, means that lie beyond by up to half
    of that range, as in the first epochs, and ln 2. A loss that runs away is left out: the others
    would look flat."""
    means = []
    edges = []
    for name in ["D_loss", "G_loss"]:
        mean = column(history, f"{name}_mean")
        deviation = column(history, f"{name}_std")
        means += [*mean]
        edges += [*(mean - deviation), *(mean + deviation)]
    lowest, highest = np.quantile(edges, [0.01, 0.99])
    room = (highest - lowest) / 2
    near = [mean for mean in means if lowest - room < mean < highest + room]
    lowest = min(lowest, *near, math.log(2))
    highest = max(highest, *near, math.log(2))
    margin = 0.05 * (highest - lowest) + 0.001  # if all are ln 2, the two are equal
    return lowest - margin, highest + margin


def name_peak(axes, history, limits):
    """Write the largest mean of an epoch at the upper edge if it is outside the limits."""
    larger = np.maximum(column(history, "D_loss_mean"), column(history, "G_loss_mean"))
    peak = larger.max()
    epoch = larger.argmax() + 1
    if peak > limits[1]:
        # The text begins there ("left") or ends there, and so stays inside.
        side = "left" if epoch < len(history) / 2 else "right"
        height = limits[1] - 0.02 * (limits[1] - limits[0])  # a little below the upper edge
        text = f" peak {peak:.2f} in epoch {epoch} "
        axes.text(epoch, height, text, horizontalalignment=side, verticalalignment="top")


def column(history, name):
    """A column of history.csv, (epochs,)."""
    return np.array([row[name] for row in history])


# ------------------------------------------------------------------------------------------- files


def save(path, content, needed=False):
    """Write bytes, whole or not at all: a killed process or a full disk leaves what was there.

    What cannot be written costs a line on the screen or, if it is needed, the run (UserError).
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            # From Python to the system, and from there to the disk (fsync, which knows the file by
            # its number). Else a power cut might leave neither this nor the old file.
            file.flush()
            with contextlib.suppress(OSError):  # some network drives cannot do this
                os.fsync(file.fileno())
        replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        text = f"{path} cannot be written ({error.strerror}); what was there before is kept"
        if needed:
            raise UserError(text) from error
        tqdm.write(f"warning: {text}", file=sys.stderr)


def replace(part, path):
    """os.replace; on Windows a virus scanner may hold a file, so it is tried for three seconds."""
    for _ in range(6):
        try:
            return os.replace(part, path)
        except PermissionError:
            time.sleep(0.5)
    return os.replace(part, path)


def as_bytes(write, *content):
    """What write(*content, file) writes, as in as_bytes(torch.save, weights). Straight into a file,
    torch.save would not say that the disk is full."""
    buffer = io.BytesIO()  # a file in memory
    write(*content, buffer)
    return buffer.getvalue()


def as_csv(history):
    """A row for each epoch, below the names of its columns."""
    text = ",".join(history[0]) + "\n"
    for row in history:
        text += ",".join(f"{value:g}" for value in row.values()) + "\n"
    return text.encode()


def lock(folder):
    """Make the folder and keep other runs out of it until the file that is returned is closed.
    Raises UserError if one is in it, or if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115 (ruff wants `with`; the caller closes it)
    except OSError as error:
        raise UserError(error) from error
    try:
        import fcntl

        # EX: one process at a time; NB: another one gets an error and does not wait. However the
        # process ends, its lock ends with it.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{folder} is in use by another run: give another --outputs") from error
    except (ImportError, OSError):
        pass  # Windows and some network drives have no such locks
    return file


def read_program(script):
    """The program that runs, {file: text}: the script, this file, and the modules of one's own that
    have been imported, which lie in the script's folder or below. Raises UserError if this file is
    not what runs."""
    folder = script.resolve().parent
    pythons = Path(os.__file__).parent  # where Python's own modules lie
    paths = {script.name: script, "common.py": Path(__file__)}
    for module in list(sys.modules.values()):  # all that has been imported; a copy of the list
        file = Path(getattr(module, "__file__", None) or "")  # "" for modules without a file
        # A .venv in the script's folder holds what pip has installed, in site-packages.
        is_installed = "site-packages" in file.parts or file.is_relative_to(pythons)
        # Some parts of PyTorch name a file that is not there, such as "_ops.py".
        if file.suffix == ".py" and file.is_absolute() and not is_installed:
            path = file.resolve()
            if path.is_relative_to(folder):
                paths[path.relative_to(folder).as_posix()] = path  # with / on Windows, too
    program = {name: read_text(path) for name, path in paths.items()}
    if program["common.py"] != TEXT:
        raise UserError("common.py was edited since Python has read it: start Python anew")
    return program


def read_text(path):
    with tokenize.open(path) as file:  # as Python reads it, in whatever encoding it says
        return file.read()


# This file as it runs. (After an edit, a notebook goes on with what Python has read before.)
TEXT = read_text(Path(__file__))


def save_program(folder, program):
    for name, text in program.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)  # as for package/module.py
        save(folder / name, text.encode())


def find_changes(before, now, labels):
    """What decides the numbers and is not the same in two runs, a text each.

    before, now: {"settings": {name: value}, "program": {file: text}}; labels: what the two are
    called, such as "before" and "now".
    """
    changes = []
    for name in {**before["settings"], **now["settings"]}:  # the names of either
        old_value = before["settings"].get(name)
        value = now["settings"].get(name)
        if old_value != value:
            changes.append(f"{name} {old_value} {labels[0]}, {value} {labels[1]}")
    for file in sorted(set(before["program"]) | set(now["program"])):  # the files of either
        old_text = before["program"].get(file, "")
        text = now["program"].get(file, "")
        if file == "common.py":  # up to the heading "figures", see README: above is what trains
            old_text = old_text.split("-- figures")[0]
            text = text.split("-- figures")[0]
        old_meaning, old_lines = read_code(old_text)
        meaning, lines = read_code(text)
        if meaning != old_meaning:
            named = name_lines(old_lines, lines, labels)
            if not named:  # only lines of a text between quotes that are blank or begin with #
                named = ["is not the same"]
            changes += [f"{file} {line}" for line in named]
    return changes


def read_code(text):
    """Returns (meaning, lines): what Python understands of a program, without comments, layout and
    docstrings, as a text; and its lines, of which those of docstrings are made empty."""
    lines = text.split("\n")
    try:
        # A tree: a function is a branch of the program, a statement one of the function, and so on.
        # Comments and blank lines are not in it.
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        # The file was edited after Python had read it: what lies there may be half an edit.
        return text, lines
    for branch in ast.walk(tree):  # each function, statement, expression
        # Functions, classes and loops have a list of statements; a lambda has one expression.
        statements = getattr(branch, "body", None)
        if isinstance(statements, list):
            for docstring in filter(is_text, statements):
                for i in range(docstring.lineno - 1, docstring.end_lineno):
                    lines[i] = ""
            branch.body = [each for each in statements if not is_text(each)]
    return ast.dump(tree), lines  # dump: the tree as a text, without the numbers of the lines


def is_text(statement):
    """Whether it is only a text: a docstring, or lines that somebody has put between quotes."""
    # In this tree a line "text" is Expr(value=Constant(value="text")), and a line x = "text" is
    # Assign(targets=[Name(id="x")], value=Constant(value="text")).
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return isinstance(statement.value.value, str)
    return False


def name_lines(old_lines, lines, labels):
    """The lines of a program that are not the same, with their numbers, without blank ones and
    comments."""
    changed = []
    # With autojunk, lines that come often in a long file, such as "else:", would be passed over.
    matcher = difflib.SequenceMatcher(a=old_lines, b=lines, autojunk=False)
    # Each of these says that old_lines[a:b] have become lines[c:d].
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind != "equal":
            changed += [(i + 1, labels[0], old_lines[i].strip()) for i in range(a, b)]
            changed += [(i + 1, labels[1], lines[i].strip()) for i in range(c, d)]
    return [f"line {i} {label}: {line}" for i, label, line in changed if line and line[0] != "#"]


def save_checkpoint(folder, training, settings, program, history):
    """What training needs to go on; the random numbers follow from the seed and the epoch."""
    # vars: {"G": training.G, "D": training.D, ...}
    checkpoint = {name: part.state_dict() for name, part in vars(training).items()}
    checkpoint |= {"settings": settings, "program": program, "history": history}
    save(folder / "checkpoint.pt", as_bytes(torch.save, checkpoint), needed=True)


def load_checkpoint(folder, training, settings, program):
    """Put the checkpoint into `training`, if there is one, and return its history, a list of rows.

    Raises UserError when it is damaged or of another run, or when training anew would replace
    results that have no checkpoint.
    """
    path = folder / "checkpoint.pt"
    table = folder / "history.csv"
    advice = "give another --outputs, or move that folder away"
    if not path.exists():
        # history.csv is written before the checkpoint. A run that was killed in between, in its
        # first epoch, leaves the names and one row, which is nothing worth keeping.
        if table.is_file() and len(table.read_bytes().splitlines()) > 2:
            raise UserError(f"{folder} holds results, but no checkpoint.pt to go on from: {advice}")
        return []
    now = {"settings": settings, "program": program}
    try:
        # map_location: tensors saved on a graphics card come to the CPU. weights_only: no code that
        # is in the file may run.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        history = checkpoint["history"]
        changes = find_changes(checkpoint, now, ["before", "now"])
        if not changes:
            for name, part in vars(training).items():
                part.load_state_dict(checkpoint[name])
    except Exception as error:  # a damaged file fails in many ways
        raise UserError(f"{path} cannot be read ({type(error).__name__}): {advice}") from error
    if changes:
        raise UserError(f"{path} is of another run ({shorten(changes)}): undo that, or {advice}")
    match_layout(training.G_optimizer)
    match_layout(training.D_optimizer)
    return history


def shorten(changes):
    """The first six at most, in one line."""
    more = f" | {len(changes) - 6} more" if len(changes) > 6 else ""
    return " | ".join(changes[:6]) + more


def match_layout(optimizer):
    """Put Adam's averages into memory in the same order as their weights (see new_training). If a
    card saved them and a CPU goes on, or the other way round, they are in the other order. Fused
    Adam pairs weights and averages by their place in memory, so the pairs would be wrong ones."""
    # {weight: {"step": ..., "exp_avg": ..., "exp_avg_sq": ..., "max_exp_avg_sq": ...}}
    for weight, state in optimizer.state.items():
        for name, average in state.items():
            # Not the number of steps, which Adam keeps, too, nor a None, as other optimizers may.
            if isinstance(average, torch.Tensor) and average.shape == weight.shape:
                state[name] = torch.empty_like(weight).copy_(average)  # in weight's order


def load_history(folder):
    """The rows of history.csv, a dictionary of numbers each."""
    with open(folder / "history.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(value) for name, value in row.items()} for row in rows]


def load_run(folder):
    """Returns (description, history, G): settings.json of a run's folder, the rows of history.csv,
    and the averaged generator, which is made by running the script there.

    Raises UserError if something is missing or damaged.
    """
    if not (folder / "settings.json").exists():
        raise UserError(f"there is no run in {folder}: it has no settings.json")
    try:
        description = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        latent_dim = description["settings"]["latent_dim"]
        script = folder / description["script"]
        script.stat()  # fails if it is not there
        history = load_history(folder)
        if not history:
            raise ValueError("history.csv has no epoch")
        weights = torch.load(folder / "generator.pt", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        raise UserError(
            f"{folder} is not a run that can be read ({type(error).__name__}: {error}), or it is "
            "of an older version of this repository"
        ) from error
    G = make_generator(script, latent_dim)
    try:
        G.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{folder / 'generator.pt'} is not of the network in {script}") from error
    # The order in memory in which a CPU is faster (see new_training).
    return description, history, G.to(memory_format=torch.channels_last).eval()


def make_generator(script, latent_dim):
    """A new Generator of the script. Raises UserError if there is none."""
    try:
        names = run_script(script)
        if "Generator" not in names:
            raise UserError(f"{script} has no class of the name Generator")
        return names["Generator"](latent_dim)
    except SystemExit as error:  # it has called common.main
        raise UserError(
            f'{script}: what trains must stand below `if __name__ == "__main__":`'
        ) from error
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{script} cannot be run ({type(error).__name__}: {error})") from error


def run_script(script):
    """What a script defines, {name: object}. It does not train, since its __name__ is not
    "__main__".

    When it imports common or a module of one's own, it shall get the one that lies beside it, not
    today's. So modules of these names are put aside meanwhile.
    """
    folder = script.parent.resolve()
    # What `import` can find beside the script.
    names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or is_package(path)}
    imported = dict(sys.modules)  # a copy, {name: module}, to be put back
    forget_modules(names)  # else `import` would take what is imported already
    sys.path.insert(0, str(folder))  # where `import` looks first
    importlib.invalidate_caches()  # it remembers what a folder held; it shall look again
    try:
        return runpy.run_path(str(script))
    finally:
        sys.path.remove(str(folder))
        forget_modules(names)
        sys.modules.update(imported)


def is_package(path):
    """Whether a folder is an imported package: it has the name of one, and holds .py files, which a
    folder of data does not. (Other names are not searched for such files: that may take long.)"""
    return path.is_dir() and path.name in sys.modules and any(path.rglob("*.py"))


def check_script(script, G, latent_dim):
    """Make the generator once more, as --redraw and compare.py do: by running the script and with
    the weights of G, a generator in eval mode. Raises UserError if it gives other images than G, or
    if an image depends on the other latent vectors that G is given."""
    G = copy.deepcopy(G).cpu()
    again = make_generator(script, latent_dim)
    z = latent_vectors(latent_dim)
    with torch.no_grad():
        # All weights are moved a little: some may be 0 at first and hide what they multiply.
        for weight in G.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
        again.load_state_dict(G.state_dict())
        again.eval()
        # The first 8 alone and among all 64: an image must not depend on the other latent vectors.
        largest = (again(z[:8]) - G(z)[:8]).abs().max()
    if not largest < 1e-4:  # more than rounding, or nan
        raise UserError(
            f"the Generator of {script.name}, made once more and with the same weights, gives "
            "other images, or other ones of 8 latent vectors than of 64: give this class to "
            "common.main, put layers that are in a list into nn.ModuleList, take no random numbers "
            "in forward (F.dropout needs training=self.training), and keep latent vectors apart"
        )


def forget_modules(names):
    for name in list(sys.modules):
        if name.split(".")[0] in names:  # it is one of these, or part of one
            del sys.modules[name]


# ------------------------------------------------------------------------------------ command line


LIMITS = {  # from, to
    "epochs": (1, math.inf),
    "batch_size": (2, math.inf),  # BatchNorm needs two
    "learning_rate": (1e-9, 1),
    "r1_gamma": (0, 1e6),
    "latent_dim": (1, math.inf),
    "seed": (0, 2**32),  # times a million (see seed_epoch) it is below 2**64, PyTorch's limit
    "limit": (2, math.inf),  # the smallest batch
    "sample_every": (1, math.inf),
    "perturb_dims": (0, math.inf),
    "perturb_offsets": (-1000, 1000),
}


def parse_arguments(model, argv):
    """The command line of both scripts."""
    parser = argparse.ArgumentParser(
        description=f"Train the {model} on FashionMNIST and draw its figures. The same command "
        "again goes on with an unfinished run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,  # --help names the defaults
        allow_abbrev=False,  # --seed, but not --se
    )
    add = parser.add_argument
    precisions = ["auto", "float32", "bfloat16"]
    add("--data", type=Path, default=Path("data"), help="folder of the images")
    add("--outputs", type=Path, default=Path("outputs"), help="folder of all results")
    add("--redraw", action="store_true", help="train nothing, draw the figures of the run again")
    add("--device", default="auto", help="where to compute: auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=precisions, default="auto", help="numbers to compute with")
    add("--epochs", type=int, default=200, help="train up to this epoch")
    add("--batch-size", type=int, default=128, help="images per step")
    add("--learning-rate", type=float, default=1e-3, help="of both networks")
    add("--r1-gamma", type=float, default=1.0, help="weight of the R1 penalty")
    add("--latent-dim", type=int, default=100, help="length of the latent vector z")
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--limit", type=int, default=60_000, help="train on the first so many images")
    add("--sample-every", type=int, default=50, help="epochs between sample grids")
    add("--perturb-dims", type=int, nargs="+", help="of z; None: five, spread over z")
    add("--perturb-offsets", type=float, nargs="+", default=[-2.0, 0.0, 2.0], help="how far")
    args = parser.parse_args(argv)
    for name, (lowest, highest) in LIMITS.items():
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        if value is not None and not all(lowest <= each <= highest for each in values):
            option = name.replace("_", "-")
            end = f" to {highest:g}" if highest < math.inf else ""
            # Prints this and ends the program.
            parser.error(f"--{option} {value}: it must be from {lowest:g}{end}")
    if args.redraw:
        for name in ["epochs", "device", "sample_every", *SETTINGS]:
            if getattr(args, name) != parser.get_default(name):
                print(f"--redraw trains nothing: --{name.replace('_', '-')} is not used")
    return args


def choose_device(name):
    """The torch.device of that name; "auto": CUDA, else Apple's MPS, else the CPU. Raises UserError
    if it cannot compute."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        torch.ones(1, device=name).item()  # item: waits until the device has done it
    except (RuntimeError, AssertionError) as error:  # PyTorch raises either
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used ({reason}): try --device cpu") from error
    return torch.device(name)


def choose_precision(name, device):
    """The name; for "auto" bfloat16 on CPUs that are faster with it, else float32."""
    if name != "auto":
        return name
    return "bfloat16" if device.type == "cpu" and FAST_BFLOAT16 else "float32"


def choose_dims(dims, latent_dim):
    """The latent dimensions to move: those given, or five spread over z."""
    if dims is None:
        # A set, since in a z of less than five dimensions some would come twice.
        return sorted({round(i * (latent_dim - 1) / 4) for i in range(5)})
    if max(dims) >= latent_dim:
        raise UserError(f"--perturb-dims {max(dims)}: z has the dimensions 0 to {latent_dim - 1}")
    return dims


def warn_if_busy(device):
    """Two programs that compute on the same cores slow each other down."""
    # How many threads, on average, computed in the last minute; Windows does not say.
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    is_busy = load > os.cpu_count() / 2  # more than half of the cores are taken
    # OMP_NUM_THREADS, in the text below, is the number of threads that PyTorch computes with.
    if device.type == "cpu" and is_busy and torch.get_num_threads() > 1:
        print(
            f"in the last minute this machine was busy (load {load:.1f}): if another program "
            "computes here, put OMP_NUM_THREADS=1 before the command, so that no thread waits for "
            "another",
            flush=True,
        )


def describe(model, script, program, training, settings, device):
    """settings.json: the model, what decides the numbers, how many weights there are and, for
    information, the machine."""
    parameters = {}
    for name in ["G", "D"]:
        network = getattr(training, name)
        parameters[name] = sum(weight.numel() for weight in network.parameters())
    machine = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return {
        "model": model,
        "script": script.name,
        "program": list(program),
        "settings": settings,
        "parameters": parameters,
        "machine": machine,
    }


def save_results(folder, G_ema, history):
    """What people, compare.py and --redraw read; training itself goes on from checkpoint.pt."""
    weights = {name: value.cpu() for name, value in G_ema.state_dict().items()}
    save(folder / "generator.pt", as_bytes(torch.save, weights))
    save(folder / "history.csv", as_csv(history))


def save_samples(folder, samples, model, epoch, args):
    """The samples of an epoch; each --sample-every epochs, and at the end, a copy that is kept."""
    figure = plot_images(samples, f"{model}, epoch {epoch}: generated samples")
    grid = as_bytes(figure.savefig)
    save(folder / "samples_latest.png", grid)
    if epoch % args.sample_every == 0 or epoch == args.epochs:
        save(folder / f"samples_epoch_{epoch:03d}.png", grid)


def save_figures(folder, description, history, G, test_set, args, needed=False):
    """Draw the figures of a whole run. description: what settings.json says; needed: whether it is
    an error if one cannot be written (see `save`)."""
    model = description["model"]
    title = f"{model}, epoch {len(history)}"
    latent_dim = description["settings"]["latent_dim"]
    z = latent_vectors(latent_dim)
    real_and_generated = torch.cat([test_set.data[:16], generate(G, z)[:16]])
    dims = choose_dims(args.perturb_dims, latent_dim)
    offsets = args.perturb_offsets
    images, response = perturb(G, z[:8], dims, offsets)
    figures = {
        "losses.png": plot_losses(history, model),
        "real_vs_generated.png": plot_images(
            real_and_generated,
            f"{title}: real test images and generated ones",
            rows=["real", "generated"],
            blocks=2,
        ),
        "latent_perturbation.png": plot_perturbation(images, response, dims, offsets, title),
    }
    for name, figure in figures.items():
        save(folder / name, as_bytes(figure.savefig), needed)


def redraw(folder, args):
    """Draw the figures of a run from the files in its folder."""
    description, history, G = load_run(folder)
    _, test_set = load_fashion_mnist(args.data)
    save_figures(folder, description, history, G, test_set, args, needed=True)


def run_model(model, script, Generator, Discriminator, folder, args):
    """Train a model, or go on training it, and draw its figures."""
    program = read_program(script)  # first, since it may be edited while it runs
    device = choose_device(args.device)
    respect_cpu_quota()
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["precision"] = choose_precision(args.precision, device)
    choose_dims(args.perturb_dims, args.latent_dim)  # rather now than after the training
    train_set, test_set = load_fashion_mnist(args.data)
    count = min(args.limit, len(train_set))
    if args.batch_size > count:
        raise UserError(f"--batch-size {args.batch_size}: more than the {count} images")
    with lock(folder):
        training = new_training(Generator, Discriminator, settings, device)
        history = load_checkpoint(folder, training, settings, program)
        check_script(script, training.G_ema, args.latent_dim)
        try:
            first = len(history) + 1
            where = f"{model} on {device} in {settings['precision']}, results in {folder}"
            print(f"{where}: {len(history)} epochs done", flush=True)
            warn_if_busy(device)
            description = describe(model, script, program, training, settings, device)
            if first > args.epochs:
                print(f"--epochs {args.epochs}: nothing to train")
            else:
                save(folder / "settings.json", json.dumps(description, indent=2).encode())
                save_program(folder, program)
                for row, samples in train(training, train_set, settings, first, args.epochs):
                    longer = [*history, row]
                    # The checkpoint comes last: if the run is killed in between, the epoch is
                    # trained and saved again. If it came first, the samples would be missing.
                    save_results(folder, training.G_ema, longer)
                    save_samples(folder, samples, model, len(longer), args)
                    save_checkpoint(folder, training, settings, program, longer)
                    history = longer
        except KeyboardInterrupt:
            print(f"\nstopped, {len(history)} epochs done: the same command goes on")
            if history:  # from the files: G_ema itself is in the middle of an epoch
                redraw(folder, args)
            sys.exit(130)  # the status by which shells know Ctrl-C
        # Once more: a spreadsheet may have held history.csv open before.
        save_results(folder, training.G_ema, history)
        save_figures(folder, description, history, training.G_ema, test_set, args)


def run_for_people(function, arguments, when_out_of_memory):
    """Call function(*arguments) with our style of figures. What the user can mend ends the program
    with one line; a mistake keeps its traceback. when_out_of_memory: what may help then."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")  # prints "?" for a letter that a console lacks
    try:
        with matplotlib.style.context(STYLE):
            function(*arguments)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        sys.exit(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        # A CPU, CUDA and Apple's MPS say it in different words; CUDA's is an OutOfMemoryError.
        text = f"{type(error).__name__} {error}"
        if "MemoryError" in text or "out of memory" in text or "tried to allocate" in text:
            sys.exit(f"error: out of memory: {when_out_of_memory}")
        raise


def main(model, script, Generator, Discriminator, argv=None):
    """Run a script's command line. model: the name for titles and the folder; script: its file,
    which is kept beside the results; argv: the options, or None for those of the terminal."""
    args = parse_arguments(model, argv)
    folder = args.outputs / model.lower()
    if args.redraw:
        run_for_people(redraw, [folder, args], "fewer programs at a time may help")
    else:
        arguments = [model, Path(script), Generator, Discriminator, folder, args]
        advice = "--device cpu or, with another --outputs, a smaller --batch-size may help"
        run_for_people(run_model, arguments, advice)
    print(f"figures in {folder.resolve()}")
