"""What gan.py and dcgan.py share, in this order: constants and seeds, FashionMNIST, the networks on
a CPU, training, sampling, figures, files, command line.

The names are the papers': z latent vectors, x images, G generator, D discriminator. G_ema is the
moving average of G; every generated image that is shown is drawn by it.
"""
# ruff: noqa: E402 (the first lines must be done before torch and matplotlib are imported)

import importlib.util
import os
from pathlib import Path

# Threads that wait for each other are busy waiting, and keep their cores from other programs. After
# so many turns they sleep. That is faster beside other programs in float32, but slower in bfloat16.
# It concerns GNU's OpenMP, which PyTorch has on Linux.
cpuinfo = Path("/proc/cpuinfo")
if cpuinfo.exists() and "bf16" not in cpuinfo.read_text():
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# A notebook hands the name of its backend to the programs that it starts. In an environment that
# lacks this module, matplotlib could not be imported.
backend = os.environ.get("MPLBACKEND", "").removeprefix("module://")
if "." in backend and importlib.util.find_spec(backend.split(".")[0]) is None:
    del os.environ["MPLBACKEND"]

import argparse
import contextlib
import copy
import csv
import difflib
import hashlib
import io
import json
import math
import platform
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import matplotlib.style
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn
from torch.optim.swa_utils import update_bn
from torchvision.datasets.utils import extract_archive
from torchvision.utils import make_grid
from tqdm import tqdm

# ----------------------------------------------------------------------------- constants and seeds

R1_EVERY = 4  # steps from one R1 penalty to the next
SETTINGS = ["batch_size", "learning_rate", "r1_gamma", "latent_dim", "seed", "precision", "limit"]
RECORDED = ["D_loss", "G_loss", "D_x", "D_G_z", "D_right"]  # in each step, see train_step

# Latent vectors that are the same in every run and for both models.
LATENT_SEED = 2014  # of all figures
BATCH_NORM_SEED = 2015  # to measure BatchNorm with


def seed_epoch(seed, epoch):
    """Set the random numbers of an epoch; those of the first weights are epoch 0's.

    They follow from the seed and the epoch alone, so a run that was stopped goes on as if it had
    not been. The factor keeps the epochs of one seed apart from those of the next.
    """
    torch.manual_seed(seed * 1_000_000 + epoch)


class UserError(Exception):
    """What the user can mend: printed as one line, without a traceback."""


# ------------------------------------------------------------------------------------ FashionMNIST

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where that package puts its files
TIMEOUT = 20  # seconds without an answer from the network
PIXELS_SHA256 = {
    "train": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
    "test": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
}


class FashionMNIST(torchvision.datasets.FashionMNIST):
    """torchvision's with a second address; it names the folder of the files after the class."""

    mirrors = [
        *torchvision.datasets.FashionMNIST.mirrors,
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ]


PACKED = [name for name, _ in FashionMNIST.resources]  # four names, ending in .gz


def load_fashion_mnist(folder):
    """The training set, 60,000 images, and the test set, 10,000 (Xiao et al. 2017).

    Of each, `data` are the images, uint8 (N, 28, 28), and `targets` their classes, (N,). They are
    read from `folder` in torchvision's layout, or unpacked, or downloaded into it. Raises UserError
    if they cannot be had, are damaged, or are those of MNIST, whose files have the same names.
    """
    raw = folder / "FashionMNIST" / "raw"
    try:
        if not all((raw / name).with_suffix("").exists() for name in PACKED):
            fetch_files(folder, raw)
        datasets = {split: FashionMNIST(folder, train=split == "train") for split in PIXELS_SHA256}
        for split, dataset in datasets.items():
            if hashlib.sha256(dataset.data.numpy()).hexdigest() != PIXELS_SHA256[split]:
                raise ValueError(f"the {split} images are not FashionMNIST's")
    except Exception as error:  # files and networks fail in many ways
        reason = " ".join(str(error).split())
        raise UserError(
            f"FashionMNIST cannot be read ({type(error).__name__}: {reason}): move "
            f"{folder / 'FashionMNIST'} away, if it is there, and put {', '.join(PACKED)} into "
            f"{folder}"
        ) from error
    return datasets["train"], datasets["test"]


def fetch_files(folder, raw):
    """Unpack or fetch the four files. They are moved to `raw` when they are whole, because another
    run may be reading there."""
    raw.mkdir(parents=True, exist_ok=True)
    places = [folder, raw, DEBIAN_FOLDER]
    packed = [place for place in places if all((place / name).exists() for name in PACKED)]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        new = Path(temporary)
        if packed:
            unpack(packed[0], new)
        else:
            download(new)
        for path in new.rglob("*-ubyte"):
            os.replace(path, raw / path.name)


def unpack(place, new):
    for name in PACKED:
        extract_archive(str(place / name), str(new))


def download(new):
    """Let torchvision download the files, or take them from Debian's package."""
    socket.setdefaulttimeout(TIMEOUT)
    try:
        print("downloading FashionMNIST")
        FashionMNIST(new, download=True)
    except Exception as error:  # a network fails in many ways
        print(f"that failed: {error}\nfetching the Debian package {DEBIAN_PACKAGE} instead")
        fetch_debian_package(new)
    finally:
        socket.setdefaulttimeout(None)


def fetch_debian_package(new):
    """Fetch the package on Debian and Ubuntu without installing it, so without being root."""
    apt_get = [
        "apt-get",
        f"-oDir::State={new}",
        "-oDir::State::status=/var/lib/dpkg/status",
        f"-oDir::Cache={new}",
        f"-oAcquire::http::Timeout={TIMEOUT}",
    ]
    for command in (["update"], ["download", DEBIAN_PACKAGE]):
        subprocess.run([*apt_get, *command], cwd=new, check=True, capture_output=True)
    (archive,) = new.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, new], check=True)
    unpack(new / DEBIAN_FOLDER.relative_to("/"), new)


# ----------------------------------------------------------------------------- networks on a CPU


def choose_dtype(precision, device):
    """The type to compute in; "auto": bfloat16 on CPUs that multiply it faster, else float32."""
    if precision == "auto":
        precision = "float32"
        if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # PyTorch 2.12
            cpu = torch.cpu.get_capabilities()
            if cpu.get("amx_bf16") or cpu.get("avx512_bf16"):
                precision = "bfloat16"
    return getattr(torch, precision)


def respect_cpu_quota():
    """No more threads than the cores that a container may use."""
    with contextlib.suppress(OSError, ValueError):  # there is no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = max(1, int(quota) // int(period))
        torch.set_num_threads(min(torch.get_num_threads(), cores))


def run_layers(layers, x):
    """layers(x), but on a CPU an Upsample and the Conv2d after it are computed together."""
    i = 0
    while i < len(layers):
        if x.device.type == "cpu" and is_upsample_and_conv(layers[i : i + 2]):
            x = upsample_and_conv(x, layers[i + 1].weight)
            i = i + 2
        else:
            x = layers[i](x)
            i = i + 1
    return x


def is_upsample_and_conv(layers):
    """Whether these are an Upsample x2 and a Conv2d 3x3 as in dcgan.py. All others are left to
    PyTorch, and so are layers with forward hooks, such as spectral_norm's."""
    if [type(layer) for layer in layers] != [nn.Upsample, nn.Conv2d]:
        return False
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
        return False
    upsample, conv = layers
    # Compared as they are printed, with size, stride, padding and so on. "meta": without weights.
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False, device="meta")
    return str(upsample) == str(nn.Upsample(scale_factor=2)) and str(conv) == str(plain)


def upsample_and_conv(x, kernel):
    """Upsample x2, then Conv 3x3: x (N, C, H, W) and kernel (K, C, 3, 3) to (N, K, 2H, 2W).

    What is the same: Upsample makes a b to a a b b, which is (a 0 b 0) + (0 a 0 b), in two
    dimensions a sum of four, and the convolution of a sum is the sum of the convolutions. Why it is
    faster: to put in zeros and convolve is a transposed convolution, which skips the zeros: a
    quarter of the multiplications. tests/test_models.py compares values and gradients.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    # A transposed convolution turns its kernel round and has its channels the other way.
    turned = kernel.flip(2, 3).transpose(0, 1)
    return SumOf2x2.apply(F.conv_transpose2d(x, turned, stride=2))


class SumOf2x2(torch.autograd.Function):
    """Sums of 2x2 neighbours, (N, C, H, W) to (N, C, H - 1, W - 1).

    Each pixel is in four sums, so its gradient is the sum of their four gradients: such a sum
    again, with zeros around. avg_pool2d's own backward is slower.
    """

    @staticmethod
    def forward(context, x):
        return F.avg_pool2d(x, 2, stride=1, divisor_override=1)

    @staticmethod
    def backward(context, gradient):
        return F.avg_pool2d(gradient, 2, stride=1, padding=1, divisor_override=1)


# ---------------------------------------------------------------------------------------- training


@dataclass
class Training:
    """What is trained: both networks, the moving average of G, and an optimizer for each."""

    G: nn.Module
    D: nn.Module
    G_ema: nn.Module
    G_optimizer: torch.optim.Optimizer
    D_optimizer: torch.optim.Optimizer


def new_training(Generator, Discriminator, settings, device):
    """Networks and optimizers as they are before the first step. Raises UserError for a
    discriminator that cannot be trained like this."""
    seed_epoch(settings["seed"], 0)
    # On a CPU it is faster to have the channels of a pixel side by side in memory.
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    G = Generator(settings["latent_dim"]).to(device, memory_format=layout)
    D = Discriminator().to(device, memory_format=layout)
    check_networks(G, D, torch.randn(2, settings["latent_dim"], device=device))
    G_ema = copy.deepcopy(G).requires_grad_(False).eval()
    # beta 1 is 0 (the DCGAN paper has 0.5): no momentum, because an older gradient was taken
    # against an opponent that has moved since.
    rate = settings["learning_rate"]
    G_optimizer = torch.optim.Adam(G.parameters(), lr=rate, betas=(0.0, 0.999), fused=True)
    D_optimizer = torch.optim.Adam(D.parameters(), lr=rate, betas=(0.0, 0.999), fused=True)
    return Training(G, D, G_ema, G_optimizer, D_optimizer)


def check_networks(G, D, z):
    """Try both networks once. Raises UserError if D has a BatchNorm or a Sigmoid."""
    if any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in D.modules()):
        raise UserError(
            "the discriminator has a BatchNorm, which would mix the statistics of real and fake "
            "images: take it out, or give each a pass of its own in common.train_step"
        )
    try_network("the generator", G, z)
    # Logits of such bright noise lie far from 0 on both sides, probabilities between 0 and 1.
    noise = 1000 * torch.randn(64, 1, 28, 28, device=z.device)
    outputs = try_network("the discriminator", D, noise)
    if outputs.min() >= 0 and outputs.max() <= 1:
        raise UserError(
            "all outputs of the discriminator lie between 0 and 1, as after a Sigmoid, which is in "
            "the loss already: end it with a Linear layer"
        )


@torch.no_grad()
def try_network(name, network, x):
    """The output of a network. If its layers do not fit, the error also prints the network."""
    try:
        return network.eval()(x)
    except RuntimeError as error:
        raise RuntimeError(f"{error}\nThis was {name}: {network}") from error


def r1_penalty(D, x):
    """R1 of Mescheder et al. (2018, arXiv:1801.04406): 1/2 E |grad D(x)|^2 of D's logit.

    x: real images (N, 1, 28, 28). Returns a scalar. The 1/2 is the paper's. But D_loss is half of
    the paper's loss, so a gamma of 1 here is one of 2 there.
    """
    x = x.detach().requires_grad_()
    logits = D(x)  # a second pass: in the first, x did not require a gradient
    # Without autocast: on CUDA it computes such a gradient in float16 (pytorch issue 105682).
    with torch.autocast(x.device.type, enabled=False):
        # An image's logit depends on no other image, so the gradient of the sum holds the gradient
        # of each. create_graph: the penalty is differentiated once more, for the weights of D.
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean() / 2


def train_step(training, real, z, r1_weight, dtype):
    """One iteration of Algorithm 1 of Goodfellow et al. (2014), with k = 1.

    real: images (N, 1, 28, 28) in [-1, 1]; z: latent vectors (N, latent_dim). Returns (5,), what
    RECORDED names: both losses without the penalty, the means of D(x) and D(G(z)), and the share of
    pairs of a real and a fake image in which the real one has the larger logit.
    """
    G, D = training.G, training.D
    autocast = torch.autocast(real.device.type, dtype, enabled=dtype is not torch.float32)

    # Discriminator: ascend log D(x) + log(1 - D(G(z))), that is, descend on binary cross-entropy.
    # As D = sigmoid(logit), -log D = softplus(-logit) and -log(1 - D) = softplus(logit).
    with autocast:
        fake = G(z)
        both = torch.cat([real, fake.detach()])  # one pass is faster than two
        logits = D(both).float()
        penalty = r1_penalty(D, real) if r1_weight > 0 else 0
    real_logits, fake_logits = logits.chunk(2)
    # Half of the sum: the mean over all images, which for an undecided D is ln 2, like G's loss.
    D_loss = (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2
    training.D_optimizer.zero_grad()
    (D_loss + r1_weight * penalty).backward()
    training.D_optimizer.step()

    # Generator, against the discriminator just updated: ascend log D(G(z)), the non-saturating
    # form. The fake images from above serve again: to make new ones would take longer.
    D.requires_grad_(False)  # G's step needs no gradients for the weights of D
    with autocast:
        logits_for_G = D(fake).float()
    G_loss = F.softplus(-logits_for_G).mean()
    training.G_optimizer.zero_grad()
    G_loss.backward()
    training.G_optimizer.step()
    D.requires_grad_(True)

    D_x = real_logits.sigmoid().mean()
    D_G_z = fake_logits.sigmoid().mean()
    D_right = (real_logits > fake_logits).float().mean()
    return torch.stack([D_loss, G_loss, D_x, D_G_z, D_right]).detach()


@torch.no_grad()
def update_average(G_ema, G, step):
    """G_ema <- d G_ema + (1 - d) G with d = (1 + step) / (10 + step), where step counts from 0.

    A fixed d averages over a fixed number of steps. With this one the weights of step s count as
    (s / t)^8 in the average after step t: their mean age is a tenth of all steps, however many.
    """
    d = (1 + step) / (10 + step)
    for average, weight in zip(G_ema.parameters(), G.parameters(), strict=True):
        average.lerp_(weight, 1 - d)


def measure_batch_norm(G_ema, latent_dim):
    """Measure BatchNorm's mean and variance anew, over 20 batches of 128 latent vectors: G's own do
    not fit the averaged weights."""
    z = torch.randn(20, 128, latent_dim, generator=torch.Generator().manual_seed(BATCH_NORM_SEED))
    update_bn(z, G_ema, next(G_ema.parameters()).device)


def scale(images):
    """uint8 images, 0..255, to float ones in [-1, 1], the range of the generator's tanh."""
    return images / 127.5 - 1


def train(training, images, settings, epochs, dtype):
    """Train in these epochs (a range of their numbers) on images, uint8 (N, 1, 28, 28).

    A Python generator: after each epoch it yields the row of history.csv and the samples, uint8
    (64, 28, 28), and waits until they are saved. Raises UserError when numbers are not finite.
    """
    G, D, G_ema = training.G, training.D, training.G_ema
    batch_size = settings["batch_size"]
    latent_dim = settings["latent_dim"]
    device = images.device
    steps = len(images) // batch_size  # an incomplete last batch is left out
    done = epochs.start - 1
    samples = generate(G_ema, latent_vectors(latent_dim))  # to compare those of an epoch with
    interval = 1 if sys.stderr.isatty() else 60  # seconds: a log file need not have every update
    with tqdm(initial=done * steps, total=(epochs.stop - 1) * steps, mininterval=interval) as bar:
        for epoch in epochs:
            bar.set_description(f"epoch {epoch} of {epochs.stop - 1}", refresh=False)
            start = time.perf_counter()
            seed_epoch(settings["seed"], epoch)
            G.train()
            D.train()
            # In place of a DataLoader, which is slower: all images are in memory already.
            batches = torch.randperm(len(images), device=device).split(batch_size)
            recorded = torch.zeros(steps, len(RECORDED), device=device)
            for i in range(steps):
                step = (epoch - 1) * steps + i
                real = scale(images[batches[i]])
                z = torch.randn(batch_size, latent_dim, device=device)
                # R1 is another pass through D. Four times as much in every fourth step does nearly
                # the same (Karras et al. 2020, arXiv:1912.04958).
                r1_weight = R1_EVERY * settings["r1_gamma"] if step % R1_EVERY == 0 else 0
                recorded[i] = train_step(training, real, z, r1_weight, dtype)
                update_average(G_ema, G, step)
                bar.update()
            check_finite(recorded, training)
            measure_batch_norm(G_ema, latent_dim)

            samples_before = samples
            samples = generate(G_ema, latent_vectors(latent_dim))
            row = summarize(epoch, recorded, samples, samples_before, time.perf_counter() - start)
            losses = f"loss D {row['D_loss_mean']:.2f}, G {row['G_loss_mean']:.2f}"
            bar.set_postfix_str(losses, refresh=False)
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
    for name, values in zip(RECORDED, recorded.T.cpu(), strict=True):
        row[f"{name}_mean"] = values.mean().item()
        row[f"{name}_std"] = values.std(correction=0).item()
    sample_change = (samples.float() - samples_before.float()).abs().mean().item()
    row["sample_change"] = sample_change if epoch > 1 else math.nan
    row["seconds"] = seconds
    return {name: float(f"{value:.6g}") for name, value in row.items()}  # as they are written


# ---------------------------------------------------------------------------------------- sampling


def latent_vectors(latent_dim):
    """The 64 latent vectors (64, latent_dim) of all figures."""
    return torch.randn(64, latent_dim, generator=torch.Generator().manual_seed(LATENT_SEED))


@torch.no_grad()
def generate(G, z):
    """Images G(z) as uint8 (N, 28, 28) on the CPU, of a generator in eval mode."""
    x = G(z.to(next(G.parameters()).device))
    return ((x + 1) * 127.5).round().byte().squeeze(1).cpu()


def perturb(G, z, dims, offsets):
    """Move one latent dimension at a time: G(z + offset e_dim) for z (N, latent_dim).

    Returns uint8 images (dims, offsets, N, 28, 28), and the response (dims, offsets): the mean
    absolute change of a pixel against G(z), in % of its range.
    """
    moved = z.repeat(len(dims), len(offsets), 1, 1)
    for i, dim in enumerate(dims):
        for j, offset in enumerate(offsets):
            moved[i, j, :, dim] += offset
    images = generate(G, moved.flatten(0, 2)).view(*moved.shape[:3], 28, 28)
    change = images.float() - generate(G, z).float()
    return images, change.abs().mean((2, 3, 4)) / 255 * 100


# ----------------------------------------------------------------------------------------- figures

WIDTH = 12 / 2.54  # inches, the text width of a report
LARGEST_HEIGHT = 17 / 2.54
MARGIN = 0.1
STYLE = [
    "default",  # whatever the user's own settings are
    {
        "font.size": 7,
        "axes.titlesize": 8,
        "figure.titlesize": 8,
        "figure.constrained_layout.use": True,
        "legend.frameon": False,
        "image.cmap": "gray",
        "image.interpolation": "nearest",
        "savefig.dpi": 200,
    },
]
IMAGE_SIZE = 30  # pixels of an image in a grid: 28 and the margin to the next


def plot_images(images, title, rows, blocks=1, right=(), columns=(), caption=""):
    """A figure of uint8 images (N, 28, 28), 8 in a row, with a rule between blocks of rows.

    rows, right, columns: labels, spread evenly over the rows or columns.
    """
    count = len(images) // 8
    figure = Figure((WIDTH, LARGEST_HEIGHT - MARGIN))
    axes = figure.subplots()
    draw_grid(axes, images)
    axes.set_title(title)
    axes.set_xlabel(caption)
    axes.set_xticks(find_middles(columns, 8), columns)
    axes.set_yticks(find_middles(rows, count), rows)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    right_axis = axes.secondary_yaxis("right")
    right_axis.set_yticks(find_middles(right, count), right)
    right_axis.tick_params(length=0)
    right_axis.spines[:].set_visible(False)
    for block in range(1, blocks):
        edge = block * count // blocks * IMAGE_SIZE + 0.5
        axes.axhline(edge, color="black", linewidth=0.6)
    fit_height(figure)
    return figure


def draw_grid(axes, images):
    """uint8 images (N, 28, 28), 8 in a row, without a frame."""
    grid = make_grid(images[:, None], nrow=8, padding=2, pad_value=255)[0].numpy()
    axes.imshow(grid, vmin=0, vmax=255)
    axes.spines[:].set_visible(False)


def find_middles(labels, count):
    """Where the labels of `count` rows or columns of a grid stand, in its pixels."""
    return [IMAGE_SIZE * count / len(labels) * (i + 0.5) + 0.5 for i in range(len(labels))]


def fit_height(figure):
    """Make a figure as high as what is in it."""
    figure.draw_without_rendering()
    figure.set_figheight(figure.get_tightbbox().height + MARGIN)


def plot_samples(samples, title):
    return plot_images(samples, f"{title}: generated samples", rows=[])


def plot_real_and_generated(real, fake, title):
    """Two rows of real images over two of generated ones, uint8 (16, 28, 28) each."""
    return plot_images(
        torch.cat([real, fake]),
        f"{title}: real test images and generated ones",
        rows=["real", "generated"],
        blocks=2,
    )


def plot_perturbation(images, response, dims, offsets, title):
    """What `perturb` returns for 8 latent vectors: one row per offset, one block per dimension."""
    labels = []
    for dim in dims:
        for offset in offsets:
            moved = f" {offset:+.4g}" if offset != 0 else ""
            labels.append(f"z[{dim}]{moved}".replace("-", "\N{MINUS SIGN}"))
    return plot_images(
        images.flatten(0, 2),
        f"{title}: one latent dimension at a time, moved by an offset",
        rows=labels,
        blocks=len(dims),
        right=[f"{change:.1f}%" for change in response.flatten()],
        columns=range(1, 9),
        caption="Columns: 8 samples. Right: mean absolute change of a pixel in % of its range",
    )


def plot_losses(history, model):
    """Both losses over training."""
    figure = Figure((WIDTH, WIDTH * 0.6))
    figure.suptitle(f"{model}, epoch {len(history)}: losses")
    axes = figure.subplots()
    draw_losses(axes, history, find_limits([history]))
    axes.set_xlabel("Epoch (line: mean of its iterations; band: their standard deviation)")
    axes.set_ylabel("Loss (binary cross-entropy)")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def draw_losses(axes, history, limits):
    """The mean of each epoch, one standard deviation of its iterations to each side, and ln 2."""
    epochs = column(history, "epoch")
    marker = "o" if len(history) == 1 else ""  # one point makes no line
    networks = [
        ("D_loss", "Discriminator", "tab:blue", "-"),
        ("G_loss", "Generator", "tab:orange", "--"),  # dashed, for black and white
    ]
    for name, label, colour, line in networks:
        mean = column(history, f"{name}_mean")
        deviation = column(history, f"{name}_std")
        axes.fill_between(
            epochs, mean - deviation, mean + deviation, color=colour, alpha=0.25, linewidth=0
        )
        axes.plot(epochs, mean, line, color=colour, linewidth=1.6, marker=marker, label=label)
    # Dots far apart and in front: where D's line lies on ln 2, both can be seen.
    dots = (0, (1, 4))
    label = "ln 2: D(x) = D(G(z)) = 1/2"
    axes.axhline(math.log(2), color="black", linewidth=1, linestyle=dots, zorder=3, label=label)
    axes.set_ylim(limits)
    axes.set_xlim(0, len(history) + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    name_peak(axes, history, limits)


def find_limits(histories):
    """Limits of the loss axis that show the bulk of the epochs of all these runs, and ln 2: from
    the 1st to the 99th percentile of the means, and a usual deviation beyond."""
    ends = [math.log(2)]
    for history in histories:
        for name in ["D_loss", "G_loss"]:
            lowest, highest = np.quantile(column(history, f"{name}_mean"), [0.01, 0.99])
            deviation = np.median(column(history, f"{name}_std"))
            ends += [lowest - deviation, highest + deviation]
    margin = 0.05 * (max(ends) - min(ends)) + 1e-3
    return min(ends) - margin, max(ends) + margin


def name_peak(axes, history, limits):
    """Write the largest mean of an epoch at the upper edge if it is outside the limits."""
    means = [(max(row["D_loss_mean"], row["G_loss_mean"]), row["epoch"]) for row in history]
    peak, epoch = max(means)
    if peak > limits[1]:
        side = "left" if epoch < len(history) / 2 else "right"
        height = limits[1] - 0.02 * (limits[1] - limits[0])
        text = f" peak {peak:.2f} in epoch {epoch:.0f} "
        axes.text(epoch, height, text, horizontalalignment=side, verticalalignment="top")


def column(history, name):
    """A column of history.csv, (epochs,)."""
    return np.array([row[name] for row in history])


# ------------------------------------------------------------------------------------------- files


def save(path, content):
    """Write bytes, whole or not at all: a killed process or a full disk leaves what was there.

    Raises UserError when they cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            with contextlib.suppress(OSError):  # some network drives cannot
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(
            f"{path} cannot be written ({error.strerror}); what was there before is kept"
        ) from error


def save_or_warn(path, content):
    """Write what can be made again: if a spreadsheet holds it open, for example, that costs a line
    on the screen and not the run."""
    try:
        save(path, content)
    except UserError as error:
        tqdm.write(f"warning: {error}", file=sys.stderr)


def as_pt(content):
    """What torch.save writes, as bytes: straight to a file it would hide that the disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def as_png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer)
    return buffer.getvalue()


def as_csv(history):
    text = ",".join(history[0]) + "\n"
    for row in history:
        text += ",".join(f"{value:g}" for value in row.values()) + "\n"
    return text.encode()


def make_folder(folder):
    """Raises UserError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(error) from error


@contextlib.contextmanager
def locked(folder):
    """Make the folder and keep other runs out of it. Raises UserError if one is in it."""
    make_folder(folder)
    with open(folder / ".lock", "w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder} is in use by another run: give another --outputs") from error
        except (ImportError, OSError):
            pass  # Windows and some network drives have no such locks
        yield


def save_checkpoint(folder, training, description, history):
    """What training needs to go on; the random numbers follow from the seed and the epoch."""
    checkpoint = {name: part.state_dict() for name, part in vars(training).items()}
    checkpoint["description"] = description
    checkpoint["history"] = history
    save(folder / "checkpoint.pt", as_pt(checkpoint))


def load_checkpoint(folder, training, description):
    """Put the checkpoint into `training`, if there is one, and return its history, a list of rows.

    Raises UserError when it is damaged or of another run, or when training anew would replace
    results that have no checkpoint.
    """
    path = folder / "checkpoint.pt"
    table = folder / "history.csv"
    advice = "give another --outputs, or move that folder away"
    if not path.exists():
        # One row may be there already: the first epoch is shown before its checkpoint.
        if table.is_file() and len(table.read_text().splitlines()) > 2:
            raise UserError(f"{folder} holds results, but no checkpoint.pt to go on from: {advice}")
        return []
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        before = checkpoint["description"]
        changes = changed_settings(before["settings"], description["settings"])
        # Another PyTorch may print the same network otherwise.
        if before["machine"]["torch"] == description["machine"]["torch"]:
            changes += changed_networks(before["networks"], description["networks"])
        history = checkpoint["history"]
        if not changes:
            for name, part in vars(training).items():
                part.load_state_dict(checkpoint[name])
    except Exception as error:  # a damaged file fails in many ways
        reason = f"cannot be read ({type(error).__name__}), or does not fit these networks"
        raise UserError(f"{path} {reason}: {advice}") from error
    if changes:
        more = f"; {len(changes) - 6} more" if len(changes) > 6 else ""
        named = "; ".join(changes[:6]) + more
        raise UserError(f"{path} is of another run ({named}): undo that, or {advice}")
    match_layout(training.G_optimizer)
    match_layout(training.D_optimizer)
    return history


def changed_settings(before, now):
    """The settings that differ, a text each."""
    changes = []
    for name, value in now.items():
        if before[name] != value:
            changes.append(f"{name} was {before[name]}, is now {value}")
    return changes


def changed_networks(before, now):
    """The lines that PyTorch prints otherwise of networks and optimizers, {name: lines} each."""
    changes = []
    for name, lines in now.items():
        for line in difflib.ndiff(before[name], lines):
            if line.startswith(("-", "+")):  # only before, or only now
                changes.append(f"{name} {' '.join(line.split())}")
    return changes


def match_layout(optimizer):
    """Give each average of Adam the memory layout of its parameter: a checkpoint of another device
    has another one, and the fused Adam does not check that they agree."""
    for parameter, state in optimizer.state.items():
        for name in ["exp_avg", "exp_avg_sq"]:
            if name in state:
                state[name] = torch.empty_like(parameter).copy_(state[name])


def save_script(folder, model, Generator):
    """Put the script that defines the generator beside its results."""
    script = getattr(sys.modules[Generator.__module__], "__file__", None)
    if script is None:
        print("the generator has no script, so this run cannot be redrawn or compared later")
    else:
        save_or_warn(folder / f"{model.lower()}.py", Path(script).read_bytes())


def load_history(folder):
    """The rows of history.csv, a dictionary of numbers each."""
    with open(folder / "history.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(value or "nan") for name, value in row.items()} for row in rows]


def load_run(folder):
    """What a run shows in its folder: what `describe` says, the rows of its history, and its
    averaged generator, which is made by running the script there.

    Raises UserError if something is missing or damaged.
    """
    if not (folder / "settings.json").exists():
        raise UserError(f"there is no run in {folder}: it has no settings.json")
    try:
        description = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        settings = description["settings"]
        history = load_history(folder)
        if not history or not all(name in settings for name in SETTINGS):
            raise ValueError("a part is missing")
        weights = torch.load(folder / "generator.pt", weights_only=True)
        script = folder / f"{settings['model'].lower()}.py"
        script.stat()  # fails if it is not there
    except Exception as error:  # a damaged file fails in many ways
        raise UserError(f"{folder} is not a run that can be read ({error})") from error
    G = runpy.run_path(str(script))["Generator"](settings["latent_dim"])
    try:
        G.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{folder / 'generator.pt'} is not of the network in {script}") from error
    return description, history, G.to(memory_format=torch.channels_last).eval()


# ------------------------------------------------------------------------------------ command line


def number(kind, lowest, highest=math.inf):
    """A type for argparse: an int or a float in a range."""

    def convert(text):
        with contextlib.suppress(ValueError):
            if lowest <= kind(text) <= highest:
                return kind(text)
        kind_of_number = "a whole number" if kind is int else "a number"
        limits = f"from {lowest}" if highest == math.inf else f"from {lowest} to {highest}"
        hint = " (put spaces between several)" if "," in text else ""
        raise argparse.ArgumentTypeError(f"{text} is not {kind_of_number} {limits}{hint}")

    return convert


def parse_arguments(model, argv):
    """The command line of both scripts."""
    parser = argparse.ArgumentParser(
        description=f"Train the {model} on FashionMNIST and draw its figures. The same command "
        "again goes on with an unfinished run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", type=Path, default="data", help="folder of the images")
    add("--outputs", type=Path, default="outputs", help="folder of all results")
    add("--redraw", action="store_true", help="train nothing, draw the figures of the run again")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    add(
        "--precision", choices=["auto", "float32", "bfloat16"], default="auto", help="to compute in"
    )
    add("--epochs", type=number(int, 1), default=200, help="train up to this epoch")
    add("--batch-size", type=number(int, 2), default=128, help="images per step")
    add("--learning-rate", type=number(float, 1e-9, 1), default=1e-3, help="of both networks")
    add("--r1-gamma", type=number(float, 0, 1e6), default=1.0, help="weight of the R1 penalty")
    add("--latent-dim", type=number(int, 1), default=100, help="length of the latent vector z")
    add("--seed", type=number(int, 0, 2**32), default=0, help="of all random numbers")
    add("--limit", type=number(int, 2), default=60_000, help="train on the first so many images")
    add("--sample-every", type=number(int, 1), default=50, help="epochs between sample grids")
    add(
        "--perturb-dims", type=number(int, 0), nargs="+", help="dimensions of z to move; None: five"
    )
    offset = number(float, -1000, 1000)
    add("--perturb-offsets", type=offset, nargs="+", default=[-2.0, 0.0, 2.0], help="how far")
    args = parser.parse_args(argv)
    unused = ["epochs", "device", "sample_every", *SETTINGS] if args.redraw else []
    for name in unused:
        if getattr(args, name) != parser.get_default(name):
            print(f"--redraw trains nothing: --{name.replace('_', '-')} is not used")
    return args


def choose_device(name):
    """The torch.device of that name; "auto": CUDA, else Apple's MPS, else the CPU. Raises UserError
    if it cannot compute."""
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # not there, busy, or too old for this PyTorch
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used ({reason}): try --device cpu") from error
    return torch.device(name)


def choose_dims(dims, latent_dim):
    """The latent dimensions to move: those given, or five spread over z."""
    if dims is None:
        return sorted({round(i * (latent_dim - 1) / 4) for i in range(5)})
    if max(dims) >= latent_dim:
        raise UserError(f"--perturb-dims {max(dims)}: z has the dimensions 0 to {latent_dim - 1}")
    return dims


def describe(training, settings, device, dtype):
    """What settings.json says: the settings, the networks and optimizers as PyTorch prints them,
    and the machine, for information."""
    networks = {}
    for name in ["G", "D", "G_optimizer", "D_optimizer"]:
        networks[name] = str(getattr(training, name)).splitlines()
    machine = {
        "device": device.type,
        "precision": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # its own type is not for a checkpoint
    }
    return {"settings": settings, "networks": networks, "machine": machine}


def save_epoch(folder, G_ema, model, history, samples, sample_every):
    """Save an epoch's results, for people, compare.py and --redraw: training itself goes on from
    checkpoint.pt."""
    weights = {name: value.cpu() for name, value in G_ema.state_dict().items()}
    save_or_warn(folder / "generator.pt", as_pt(weights))
    save_or_warn(folder / "history.csv", as_csv(history))
    grid = as_png(plot_samples(samples, f"{model}, epoch {len(history)}"))
    save_or_warn(folder / "samples_latest.png", grid)
    if len(history) % sample_every == 0:
        save_or_warn(folder / f"samples_epoch_{len(history):03d}.png", grid)


def draw_figures(G, history, settings, test_images, args):
    """The figures of a whole run, {file name: PNG}; test_images: uint8 (N, 28, 28)."""
    title = f"{settings['model']}, epoch {len(history)}"
    z = latent_vectors(settings["latent_dim"])
    samples = generate(G, z)
    dims = choose_dims(args.perturb_dims, settings["latent_dim"])
    offsets = args.perturb_offsets
    images, response = perturb(G, z[:8], dims, offsets)
    figures = {
        "losses.png": plot_losses(history, settings["model"]),
        f"samples_epoch_{len(history):03d}.png": plot_samples(samples, title),
        "real_vs_generated.png": plot_real_and_generated(test_images[:16], samples[:16], title),
        "latent_perturbation.png": plot_perturbation(images, response, dims, offsets, title),
    }
    return {name: as_png(figure) for name, figure in figures.items()}


def redraw(folder, args):
    """Draw the figures of a run from the files in its folder."""
    description, history, G = load_run(folder)
    _, test_set = load_fashion_mnist(args.data)
    figures = draw_figures(G, history, description["settings"], test_set.data, args)
    for name, figure in figures.items():
        save(folder / name, figure)


def run_model(model, Generator, Discriminator, folder, args):
    """Train a model, or go on training it, and draw its figures."""
    device = choose_device(args.device)
    respect_cpu_quota()
    dtype = choose_dtype(args.precision, device)
    settings = {"model": model, **{name: getattr(args, name) for name in SETTINGS}}
    choose_dims(args.perturb_dims, args.latent_dim)  # rather now than after the training
    train_set, test_set = load_fashion_mnist(args.data)
    images = train_set.data[: args.limit, None].to(device)
    if args.batch_size > len(images):
        raise UserError(f"--batch-size {args.batch_size}: more than the {len(images)} images")
    with locked(folder):
        training = new_training(Generator, Discriminator, settings, device)
        description = describe(training, settings, device, dtype)
        history = load_checkpoint(folder, training, description)
        done = len(history)
        precision = description["machine"]["precision"]
        print(f"{model} on {device} in {precision}: {done} epochs done", flush=True)
        if done < args.epochs:
            save_or_warn(folder / "settings.json", json.dumps(description, indent=2).encode())
            save_script(folder, model, Generator)
            epochs = range(done + 1, args.epochs + 1)
            for row, samples in train(training, images, settings, epochs, dtype):
                history.append(row)
                # Before the checkpoint: killed in between, the epoch is trained again.
                save_epoch(folder, training.G_ema, model, history, samples, args.sample_every)
                save_checkpoint(folder, training, description, history)
        else:
            print(f"--epochs {args.epochs}: nothing to train")
        # Once more, if a file could not be written before: a spreadsheet may have held it open.
        samples = generate(training.G_ema, latent_vectors(args.latent_dim))
        save_epoch(folder, training.G_ema, model, history, samples, args.sample_every)
        figures = draw_figures(training.G_ema, history, settings, test_set.data, args)
        for name, figure in figures.items():
            save_or_warn(folder / name, figure)


@contextlib.contextmanager
def errors_for_people(when_out_of_memory):
    """What the user can mend ends the program with one line; a mistake keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; give the same command to go on", file=sys.stderr)
        sys.exit(130)  # as shells have it
    except UserError as error:
        sys.exit(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        text = f"{type(error).__name__} {error}"
        if "MemoryError" in text or "out of memory" in text or "tried to allocate" in text:
            sys.exit(f"error: out of memory: {when_out_of_memory}")
        raise


def main(model, Generator, Discriminator, argv=None):
    """Run a script's command line; `model` is the name for titles and the folder."""
    args = parse_arguments(model, argv)
    folder = args.outputs / model.lower()
    advice = "--device cpu or, with another --outputs, a smaller --batch-size may help"
    with errors_for_people(advice), matplotlib.style.context(STYLE):
        if args.redraw:
            redraw(folder, args)
        else:
            run_model(model, Generator, Discriminator, folder, args)
    print(f"figures in {folder.resolve()}")
