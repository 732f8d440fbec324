"""What gan.py and dcgan.py share: FashionMNIST, training, sampling, figures, files, command line.

In the names, as in the papers: z latent vectors, x images, G generator, D discriminator. G_ema is
the moving average of G; every image that is shown is drawn from it.
"""

import argparse
import contextlib
import copy
import csv
import gzip
import hashlib
import io
import json
import math
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path

import matplotlib.style
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import nn
from torch.optim.swa_utils import update_bn
from torchvision.utils import make_grid
from tqdm import tqdm


class UserError(Exception):
    """What the user can mend: printed as one line, without a traceback."""


# ----------------------------------------------------------------------------------- FashionMNIST

FILES = [name for name, _ in torchvision.datasets.FashionMNIST.resources]  # four, ending in .gz
MIRRORS = [
    *torchvision.datasets.FashionMNIST.mirrors,
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
]
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where that package puts its files
TIMEOUT = 20  # seconds without an answer from the network
PIXELS_SHA256 = {
    "train": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
    "test": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
}


class FashionMNIST(torchvision.datasets.FashionMNIST):
    """torchvision's: data are the images, uint8 (N, 28, 28), targets their classes, (N,).

    A class of our own, so that other mirrors can be set; torchvision names the folder after it.
    """


def load_fashion_mnist(folder):
    """The training set, 60,000 images, and the test set, 10,000 (Xiao et al. 2017).

    They are read from `folder` in torchvision's layout; what is not there is unpacked from the four
    .gz files, or fetched. Raises UserError if no source has them, or if they are damaged.
    """
    raw = folder / "FashionMNIST" / "raw"
    if not all((raw / name).with_suffix("").exists() for name in FILES):
        provide_files(folder, raw)
    return read_images(folder, "train"), read_images(folder, "test")


def provide_files(folder, raw):
    """Put the four unpacked files into `raw`, from the first source that has them."""
    sources = [
        (unpack, raw),
        (unpack, folder),
        (unpack, DEBIAN_FOLDER),
        *[(download, mirror) for mirror in MIRRORS],
        (fetch_debian_package, DEBIAN_PACKAGE),
    ]
    failures = []
    for provide, source in sources:
        try:
            provide(source, raw)
            return
        except Exception as error:  # however a source fails, the next one may do
            failures.append(f"\n  {source}: {' '.join(str(error).split())[:250]}")
    raise UserError(
        f"FashionMNIST was not found.{''.join(failures)}\n  Put {', '.join(FILES)} into {folder}."
    )


def unpack(source, raw):
    """Unpack the four .gz files that lie in the folder `source`."""
    contents = [gzip.decompress((source / name).read_bytes()) for name in FILES]
    raw.mkdir(parents=True, exist_ok=True)
    # Moved there when it is whole: another run, started at the same time, may read it at once.
    with tempfile.TemporaryDirectory(dir=raw) as folder:
        for name, content in zip(FILES, contents, strict=True):
            unpacked = (raw / name).with_suffix("")
            part = Path(folder, unpacked.name)
            part.write_bytes(content)
            os.replace(part, unpacked)


def download(mirror, raw):
    """Let torchvision fetch the files from one address.

    It would try several by itself, but not go on from one that takes the call and says nothing.
    """
    print(f"fetching FashionMNIST from {mirror}")
    FashionMNIST.mirrors = [mirror]
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with tempfile.TemporaryDirectory() as folder:
            FashionMNIST(folder, download=True)
            unpack(Path(folder, "FashionMNIST", "raw"), raw)
    finally:
        socket.setdefaulttimeout(timeout_before)


def fetch_debian_package(package, raw):
    """Fetch the package on Debian and Ubuntu without installing it, so without being root."""
    print(f"fetching FashionMNIST from the Debian package {package}")
    with tempfile.TemporaryDirectory() as folder:
        apt_get = [
            "apt-get",
            f"-oDir::State={folder}",
            "-oDir::State::status=/var/lib/dpkg/status",
            f"-oDir::Cache={folder}",
            f"-oAcquire::http::Timeout={TIMEOUT}",
        ]
        subprocess.run([*apt_get, "update"], cwd=folder, check=True, capture_output=True)
        subprocess.run([*apt_get, "download", package], cwd=folder, check=True, capture_output=True)
        (archive,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
        unpack(Path(folder, DEBIAN_FOLDER.relative_to("/")), raw)


def read_images(folder, split):
    """The data set "train" or "test". Raises UserError unless its pixels are FashionMNIST's."""
    try:
        dataset = FashionMNIST(folder, train=split == "train")
        found = hashlib.sha256(dataset.data.numpy()).hexdigest()
    except (OSError, MemoryError):
        raise
    except Exception:  # a file cut short fails in many ways
        found = "unreadable"
    if found != PIXELS_SHA256[split]:
        raise UserError(
            f"the files in {folder / 'FashionMNIST'} are damaged or not FashionMNIST's (those of "
            f"MNIST have the same names): move that folder away, and such .gz files in {folder}"
        )
    return dataset


# --------------------------------------------------------------------------------------- training

R1_EVERY = 4  # steps from one R1 penalty to the next


@dataclass
class Settings:
    """What decides the numbers of a training: a run goes on with the same settings only."""

    model: str
    batch_size: int
    learning_rate: float
    r1_gamma: float
    latent_dim: int
    seed: int
    precision: str  # as asked for: "auto" may be another type on another machine
    limit: int


@dataclass
class Training:
    """What is trained: both networks, the moving average of G, and an optimizer for each."""

    G: nn.Module
    D: nn.Module
    G_ema: nn.Module
    G_optimizer: torch.optim.Optimizer
    D_optimizer: torch.optim.Optimizer


@dataclass
class Epoch:
    """What is kept of an epoch."""

    D_loss: torch.Tensor  # (steps,), like the next three
    G_loss: torch.Tensor
    D_x: torch.Tensor
    D_G_z: torch.Tensor
    samples: torch.Tensor  # uint8 (64, 28, 28), made of the same latent vectors in every epoch
    seconds: float


def new_training(Generator, Discriminator, settings, device):
    """Networks and optimizers as they are before the first step.

    Raises UserError if D has a BatchNorm, or a Sigmoid as its last layer.
    """
    torch.manual_seed(settings.seed * 1_000_000)
    on_cpu = device.type == "cpu"
    # Faster on the CPU only: the channels of a pixel side by side in memory, and the fused Adam.
    layout = torch.channels_last if on_cpu else torch.contiguous_format
    G = Generator(settings.latent_dim).to(device, memory_format=layout)
    D = Discriminator().to(device, memory_format=layout)
    check_discriminator(D)
    G_ema = copy.deepcopy(G).requires_grad_(False)
    # No momentum (beta 1 is 0; in the DCGAN paper 0.5): each network moves what the other aims at.
    adam = {"lr": settings.learning_rate, "betas": (0.0, 0.999), "fused": on_cpu}
    G_optimizer = torch.optim.Adam(G.parameters(), **adam)
    D_optimizer = torch.optim.Adam(D.parameters(), **adam)
    return Training(G, D, G_ema, G_optimizer, D_optimizer)


def check_discriminator(D):
    layers = list(D.modules())
    if any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in layers):
        raise UserError(
            "the discriminator has a BatchNorm, which would mix the statistics of real and fake "
            "images: take it out, or give each a pass of its own in common.train_step"
        )
    if isinstance(layers[-1], nn.Sigmoid):
        raise UserError(
            "the discriminator ends with a Sigmoid, which is in the loss already: take it out"
        )


def r1_penalty(D, x):
    """R1 of Mescheder et al. (2018, arXiv:1801.04406): 1/2 E |grad D(x)|^2 of D's logit.

    x: real images (N, 1, 28, 28). Returns a scalar.
    """
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean() / 2


def train_step(training, real, z, r1_weight, dtype):
    """One iteration of Algorithm 1 of Goodfellow et al. (2014), with k = 1.

    real: images (N, 1, 28, 28) in [-1, 1]; z: latent vectors (N, latent_dim). Returns scalars:
    D_loss, the mean over real and fake images without the penalty, G_loss, and the means of D(x)
    and D(G(z)), which are sigmoids of D's logits.
    """
    G, D = training.G, training.D
    autocast = torch.autocast(real.device.type, dtype, enabled=dtype is not torch.float32)

    # Discriminator: ascend log D(x) + log(1 - D(G(z))), that is, descend on binary cross-entropy.
    # As D = sigmoid(logit), -log D = softplus(-logit) and -log(1 - D) = softplus(logit).
    with autocast:
        fake = G(z)
        both = torch.cat([real, fake.detach()])  # one pass is faster than two
        logits = D(both).float()
        penalty = r1_weight * r1_penalty(D, real) if r1_weight else 0
    real_logits, fake_logits = logits.chunk(2)
    D_loss = (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2
    training.D_optimizer.zero_grad()
    (D_loss + penalty).backward()
    training.D_optimizer.step()

    # Generator, against the discriminator just updated: ascend log D(G(z)), the non-saturating
    # form. The same z serves again: another G(z) would take longer.
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
    return {
        "D_loss": D_loss.detach(),
        "G_loss": G_loss.detach(),
        "D_x": D_x.detach(),
        "D_G_z": D_G_z.detach(),
    }


@torch.no_grad()
def update_average(G_ema, G, step):
    """G_ema <- d G_ema + (1 - d) G with d = (1 + step) / (10 + step), where step counts from 0.

    A fixed d averages over a fixed number of steps; this one over about the last tenth of the run.
    """
    d = (1 + step) / (10 + step)
    for average, weight in zip(G_ema.parameters(), G.parameters(), strict=True):
        average.lerp_(weight, 1 - d)


def calibrate_batch_norm(G_ema, latent_dim):
    """Measure BatchNorm's mean and variance for the averaged weights: G's do not fit them."""
    # 20 batches of 128
    z = torch.randn(20, 128, latent_dim, generator=torch.Generator().manual_seed(BATCH_NORM_SEED))
    update_bn(z, G_ema, next(G_ema.parameters()).device)


def scale(images):
    """uint8 images, 0..255, to float ones in [-1, 1], the range of the generator's tanh."""
    return images / 127.5 - 1


def train_epoch(training, images, number, settings, dtype, bar):
    """Train on every image once, in batches; an incomplete last one is left out.

    images: uint8 (N, 1, 28, 28) on the device; number: of the epoch, from 1; bar: tqdm's.
    Returns an Epoch.
    """
    start = time.perf_counter()
    # The random numbers of an epoch depend on its number alone, so a continued run has the same.
    torch.manual_seed(settings.seed * 1_000_000 + number)
    training.G.train()
    training.D.train()
    steps = len(images) // settings.batch_size
    batches = torch.randperm(len(images), device=images.device).split(settings.batch_size)
    records = []
    for i in range(steps):
        step = (number - 1) * steps + i
        real = scale(images[batches[i]])
        z = torch.randn(settings.batch_size, settings.latent_dim, device=images.device)
        # Lazily: not in every step, but then as much more (Karras et al. 2020, arXiv:1912.04958).
        r1_weight = R1_EVERY * settings.r1_gamma if step % R1_EVERY == 0 else 0
        records.append(train_step(training, real, z, r1_weight, dtype))
        update_average(training.G_ema, training.G, step)
        bar.update()
    calibrate_batch_norm(training.G_ema, settings.latent_dim)
    recorded = {
        name: torch.stack([record[name] for record in records]).cpu() for name in records[0]
    }
    samples = generate(training.G_ema, latent_vectors(settings.latent_dim)[:64])
    return Epoch(**recorded, samples=samples, seconds=time.perf_counter() - start)


def check_finite(epoch, training):
    """Raise UserError when a loss of this Epoch, or a weight after it, is not finite."""
    weights = [*training.G.parameters(), *training.D.parameters()]
    if not all(values.isfinite().all() for values in [epoch.D_loss, epoch.G_loss, *weights]):
        raise UserError(
            "a loss or a weight is not finite; the epochs before this one are kept. Try a lower "
            "--learning-rate or --precision float32, with another --outputs"
        )


def train(run, training, images, epochs, dtype, sample_every):
    """Train from the last epoch of run.history, which grows, to the epoch of number `epochs`."""
    done = len(run.history)
    steps = len(images) // run.settings.batch_size
    interval = 1 if sys.stderr.isatty() else 60  # seconds: a log file need not have every update
    with tqdm(initial=done * steps, total=epochs * steps, mininterval=interval) as bar:
        for number in range(done + 1, epochs + 1):
            bar.set_description(f"epoch {number} of {epochs}", refresh=False)
            epoch = train_epoch(training, images, number, run.settings, dtype, bar)
            check_finite(epoch, training)
            losses = f"loss D {epoch.D_loss.mean():.2f}, G {epoch.G_loss.mean():.2f}"
            bar.set_postfix_str(losses, refresh=False)
            run.history.append(epoch)
            save_checkpoint(run, training)
            publish_epoch(run, training.G_ema, sample_every)


# --------------------------------------------------------------------------------------- sampling

# Each purpose has random numbers of its own, the same in every run and for both models.
LATENT_SEED = 2014
BATCH_NORM_SEED = 2015
IMAGES_SEED = 2016


def latent_vectors(latent_dim):
    """The 500 latent vectors (500, latent_dim) of all figures, which show the first ones."""
    return torch.randn(500, latent_dim, generator=torch.Generator().manual_seed(LATENT_SEED))


@torch.no_grad()
def generate(G, z):
    """Images G(z) as uint8 (N, 28, 28) on the CPU, BatchNorm using its running statistics."""
    G.eval()
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


def nearest(images, others):
    """For each uint8 image (N, 28, 28) the index of its nearest among `others` (M, 28, 28), and the
    distance, both (N,): the root mean square difference of pixels, in grey levels of 0 to 255."""
    x = images.flatten(1).float()
    # 5,000 others at a time: all of them as floats take much memory.
    distances = [torch.cdist(x, part.flatten(1).float()) / 28 for part in others.split(5000)]
    smallest, indices = torch.cat(distances, dim=1).min(dim=1)
    return indices, smallest


# ---------------------------------------------------------------------------------------- figures

WIDTH = 12  # cm, the text width of a report
LARGEST_HEIGHT = 17  # cm
STYLE = [
    "default",  # whatever the user's own settings are
    {
        "font.size": 7,
        "axes.titlesize": 7,
        "figure.titlesize": 8,
        "legend.frameon": False,
        "image.cmap": "gray",
        "image.interpolation": "nearest",
    },
]


def new_figure(height, layout=None):
    """A figure of the text width and `height` cm, at 200 dpi."""
    return Figure((WIDTH / 2.54, height / 2.54), dpi=200, layout=layout)


def image_grid(images):
    """uint8 images (N, 28, 28) as one, (H, W), 8 in a row with a white margin around each."""
    return make_grid(images[:, None], nrow=8, padding=2, pad_value=255)[0].numpy()


def images_figure(images, title, left_labels=(), right_labels=(), column_labels=(), caption=""):
    """uint8 images (N, 28, 28), 8 in a row, with labels beside the rows and above the columns."""
    rows = len(images) // 8
    letter_width = 0.16  # cm, like the next ones
    left = 0.3 + letter_width * letters_of_longest(left_labels)
    right = 0.3 + letter_width * letters_of_longest(right_labels)
    top = 1.1 if column_labels else 0.7
    bottom = 0.3 + 0.35 * len(caption.splitlines())
    image_size = min((WIDTH - left - right) / 8, (LARGEST_HEIGHT - top - bottom) / rows)
    free_width = WIDTH - left - right - 8 * image_size
    height = top + rows * image_size + bottom

    figure = new_figure(height)
    figure.suptitle(title, y=1 - 0.15 / height, verticalalignment="top")
    figure.text(0.5, 0.15 / height, caption, horizontalalignment="center")
    axes = figure.add_axes(
        (
            (left + free_width / 2) / WIDTH,
            bottom / height,
            8 * image_size / WIDTH,
            rows * image_size / height,
        )
    )
    axes.imshow(image_grid(images), vmin=0, vmax=255, extent=(0, 8, rows, 0), aspect="auto")
    axes.set_xticks([i + 0.5 for i in range(len(column_labels))], column_labels)
    axes.set_yticks([i + 0.5 for i in range(len(left_labels))], left_labels)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    for row, label in enumerate(right_labels):
        axes.text(8.1, row + 0.5, label, verticalalignment="center")
    return figure


def letters_of_longest(labels):
    """The number of letters in the longest line."""
    return max((len(line) for label in labels for line in label.splitlines()), default=0)


def losses_figure(history, model):
    """Both losses over training: the mean of each epoch, and the range of its steps as a band."""
    figure = new_figure(7.5, layout="constrained")
    figure.suptitle(f"{model}: losses over {len(history)} epochs")
    axes = figure.subplots()
    D_losses = torch.stack([epoch.D_loss for epoch in history])
    G_losses = torch.stack([epoch.G_loss for epoch in history])
    draw_loss(axes, D_losses, "Discriminator", "tab:blue", "-")
    draw_loss(axes, G_losses, "Generator", "tab:orange", "--")  # dashed, for black and white
    draw_ln_2(axes, "ln 2: D is undecided")
    axes.set_xlim(0, len(history) + 1)
    axes.set_xlabel("Epoch (line: mean of its iterations; band: 5% to 95% of them)")
    axes.set_ylabel("Loss (binary cross-entropy)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def draw_loss(axes, losses, label, colour, line):
    """losses: (epochs, steps)."""
    epochs = range(1, len(losses) + 1)
    low = losses.quantile(0.05, dim=1)
    high = losses.quantile(0.95, dim=1)
    draw_band(axes, epochs, losses.mean(1), low, high, label, colour, line)


def draw_band(axes, epochs, mean, low, high, label, colour, line):
    """A line of means in a band from low to high, each of the length of epochs."""
    marker = "o" if len(mean) == 1 else ""  # one point makes no line
    axes.fill_between(epochs, low, high, color=colour, alpha=0.25, linewidth=0)
    axes.plot(epochs, mean, line, color=colour, linewidth=1.6, marker=marker, label=label)


def draw_ln_2(axes, label):
    """The loss of a discriminator that is undecided."""
    # Dots far apart and in front: where D's line lies on ln 2, both can be seen.
    dots = (0, (1, 4))
    axes.axhline(math.log(2), color="black", linewidth=1, linestyle=dots, zorder=3, label=label)


def nearest_neighbours_figure(fake, real, train, title):
    """The first 8 generated images over their nearest training images, and the median distance of
    all: a generator that had learned its data by heart would lie far below real test images."""
    indices, distances = nearest(fake, train)
    _, real_distances = nearest(real, train)
    return images_figure(
        torch.cat([fake[:8], train[indices[:8]]]),
        f"{title}: generated images and the nearest training images",
        left_labels=["generated", "nearest"],
        column_labels=[f"{distance:.1f}" for distance in distances[:8]],
        caption=(
            "Numbers: root mean square difference in grey levels of 0 to 255\n"
            f"Median of {len(fake)} generated images {distances.median():.1f}, "
            f"of {len(real)} real test images {real_distances.median():.1f}"
        ),
    )


def perturbation_figure(images, response, dims, offsets, title):
    """What `perturb` returns for 8 latent vectors: a row an offset, a block of rows a dimension."""
    labels = [f"z[{dim}] {offset:+.4g}" for dim in dims for offset in offsets]
    sample = "Sample " if len(labels) <= 17 else ""  # the columns of more rows are narrow
    figure = images_figure(
        images.flatten(0, 2),
        f"{title}: one latent dimension at a time, moved by an offset",
        left_labels=[label.replace("-", "\N{MINUS SIGN}") for label in labels],
        right_labels=[f"{change:.1f}%" for change in response.flatten()],
        column_labels=[f"{sample}{i}" for i in range(1, 9)],
        caption="Right: response, the mean absolute change of a pixel in % of its range",
    )
    axes = figure.axes[0]
    axes.tick_params("x", labelsize=5)  # as wide as a column
    for block in range(1, len(dims)):
        axes.axhline(block * len(offsets), color="black", linewidth=0.6)
    return figure


def samples_image(images, title):
    """uint8 images (N, 28, 28) under a title, as a PIL image: quicker than a figure."""
    grid = image_grid(images)
    height, width = grid.shape
    page = Image.new("L", (2 * width, 2 * height + 36), "white")
    page.paste(
        Image.fromarray(grid).resize((2 * width, 2 * height), Image.Resampling.NEAREST), (0, 36)
    )
    ImageDraw.Draw(page).text((8, 8), title, fill="black", font_size=20)
    return page


def samples_animation(history, model):
    """The frames of training.gif: the samples of at most 25 epochs, the last one among them."""
    every = math.ceil(len(history) / 25)
    last = len(history)
    shown = [n for n in range(1, last + 1) if (last - n) % every == 0]
    frames = [samples_image(history[n - 1].samples, f"{model}, epoch {n}") for n in shown]
    return [frame.quantize(16) for frame in frames]  # 16 grey levels: half the file


# ---------------------------------------------------------------------------- files and checkpoints


@dataclass
class Run:
    """A run and its folder."""

    folder: Path
    settings: Settings
    layers: dict  # what describe_layers says
    facts: dict  # what else settings.json says
    history: list  # an Epoch for each that is finished


@contextlib.contextmanager
def not_fatal(path):
    """Around the writing of what can be made again: when a spreadsheet holds the file open, for
    example, that costs a line on the screen and not the run."""
    try:
        yield
    except OSError as error:
        tqdm.write(f"warning: {path} was not written: {error}", file=sys.stderr)


def save_whole(path, content):
    """torch.save, whole or not at all: a killed process or a full disk leaves what was there."""
    buffer = io.BytesIO()
    torch.save(content, buffer)  # straight to a file it hides that the disk is full
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            with contextlib.suppress(OSError):  # some network drives cannot
                os.fsync(file.fileno())
    except OSError as error:
        part.unlink(missing_ok=True)  # half of it
        reason = f"{error.strerror}; what was there before is kept"
        raise OSError(error.errno, reason, str(path)) from error
    try:
        os.replace(part, path)
    except PermissionError:  # on Windows something may hold a new file for a moment
        time.sleep(1)
        os.replace(part, path)


@contextlib.contextmanager
def locked(folder):
    """Make the folder and keep other runs out of it. Raises UserError if one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is in use by another run: wait, or give another --outputs"
            ) from None
        except (ImportError, OSError):
            pass  # Windows and some network drives have no such locks
        yield


def describe_layers(G, D):
    """{layer: {name: value}} of both networks, by which a changed layer is noticed: its type, the
    shapes of its weights, and its public numbers and words, such as a slope. A changed forward is
    not noticed."""
    layers = {}
    for path, layer in nn.ModuleDict({"G": G, "D": D}).named_modules():
        shapes = {
            name: tuple(weight.shape) for name, weight in layer.named_parameters(recurse=False)
        }
        described = {"type": type(layer).__name__, "weights": str(shapes)}
        for name, value in vars(layer).items():
            is_plain = isinstance(value, bool | int | float | str | tuple | None)
            if is_plain and not name.startswith("_") and name != "training":
                described[name] = str(value)
        layers[path] = described
    return layers


def differences(before, now):
    """A line for each value that is another one in `now`, or whose layer is in one of them only."""
    found = []
    for path in {**before, **now}:
        old = before.get(path, {"type": "not there"})
        new = now.get(path, {"type": "not there"})
        # A name that only one of them knows is one that another PyTorch gives its layers.
        for name in old:
            if name in new and old[name] != new[name]:
                found.append(f"{path} {name} was {old[name]}, is now {new[name]}")
    return found


def save_checkpoint(run, training):
    """Everything needed to go on; the random numbers follow from the seed and the epoch."""
    checkpoint = {name: part.state_dict() for name, part in vars(training).items()}
    checkpoint["settings"] = vars(run.settings)
    checkpoint["layers"] = run.layers
    checkpoint["facts"] = run.facts
    checkpoint["history"] = [vars(epoch) for epoch in run.history]
    save_whole(run.folder / "checkpoint.pt", checkpoint)


def read_checkpoint(path):
    """What save_checkpoint wrote, with its Settings and the list of its Epochs.

    Raises UserError if it cannot be read.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        trained = [field.name for field in fields(Training)]
        for part in [*trained, "layers", "facts"]:
            if part not in checkpoint:
                raise KeyError(part)
        checkpoint["settings"] = Settings(**checkpoint["settings"])
        checkpoint["history"] = [Epoch(**epoch) for epoch in checkpoint["history"]]
        return checkpoint
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged file fails in many ways
        raise UserError(
            f"{path} is damaged, or of another version of this script ({type(error).__name__}): "
            "move its folder away, or give another --outputs"
        ) from error


def continue_run(run, training, checkpoint):
    """Put what the checkpoint holds into `training` and `run`.

    Raises UserError when it is of other settings or of another network.
    """
    before = {"setting": vars(checkpoint["settings"])}
    changes = differences(before, {"setting": vars(run.settings)})
    changes += differences(checkpoint["layers"], run.layers)
    if changes:
        more = f"; {len(changes) - 4} more" if len(changes) > 4 else ""
        raise UserError(
            f"{run.folder / 'checkpoint.pt'} is of other settings or another network "
            f"({'; '.join(changes[:4])}{more}): undo that, or train anew with another --outputs "
            "(with --fresh, in place of this run)"
        )
    for name, part in vars(training).items():
        part.load_state_dict(checkpoint[name])
    run.facts = checkpoint["facts"]
    run.history = checkpoint["history"]


def save_history(run):
    """history.csv: a row an epoch, with means and standard deviations over its steps."""
    rows = []
    previous = None
    for number, epoch in enumerate(run.history, 1):
        row = {"epoch": number}
        for name in ("D_loss", "G_loss", "D_x", "D_G_z"):
            values = getattr(epoch, name)
            row[f"{name}_mean"] = f"{values.mean():.6g}"
            row[f"{name}_std"] = f"{values.std(correction=0):.6g}"
        row["sample_change"] = ""  # of a pixel since the epoch before, in grey levels
        if previous is not None:
            change = (epoch.samples.float() - previous.samples.float()).abs().mean()
            row["sample_change"] = f"{change:.6g}"
        row["seconds"] = f"{epoch.seconds:.6g}"
        rows.append(row)
        previous = epoch
    path = run.folder / "history.csv"
    with not_fatal(path), open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def save_settings(run):
    """settings.json: what is needed to repeat the run, and the machine that trained last."""
    path = run.folder / "settings.json"
    finished = {"model": run.settings.model, "epochs": len(run.history)}
    with not_fatal(path):
        path.write_text(json.dumps({**finished, **run.facts, "layers": run.layers}, indent=2))


def save_generator(run, G_ema):
    """generator.pt: the average alone, which compare.py or any other program can load."""
    path = run.folder / "generator.pt"
    with not_fatal(path):
        save_whole(path, {name: value.cpu() for name, value in G_ema.state_dict().items()})


def save_figure(figure, path):
    with not_fatal(path):
        figure.savefig(path)


def draw_samples(run, number):
    """samples_epoch_050.png and so on: the samples after the epoch of this number."""
    title = f"{run.settings.model}, epoch {number}: generated samples"
    figure = images_figure(run.history[number - 1].samples, title)
    save_figure(figure, run.folder / f"samples_epoch_{number:03d}.png")


def draw_latest(run):
    path = run.folder / "samples_latest.png"
    image = samples_image(
        run.history[-1].samples, f"{run.settings.model}, epoch {len(run.history)}"
    )
    with not_fatal(path):
        image.save(path, dpi=(200, 200))


def draw_losses(run):
    save_figure(losses_figure(run.history, run.settings.model), run.folder / "losses.png")


def draw_animation(run):
    """training.gif: 0.2 s a frame, the last one 2 s."""
    path = run.folder / "training.gif"
    first, *others = samples_animation(run.history, run.settings.model)
    durations = [200 for _ in others]  # milliseconds
    durations.append(2000)
    with not_fatal(path):
        first.save(path, save_all=True, append_images=others, loop=0, duration=durations)


def draw_generated(run, G_ema, train_images, test_images, dims, offsets):
    """The figures for which the generator makes images. The other images: uint8 (N, 28, 28)."""
    title = f"{run.settings.model}, epoch {len(run.history)}"
    z = latent_vectors(run.settings.latent_dim)
    fake = generate(G_ema, z)
    real = test_images[: len(fake)]
    beside = images_figure(
        torch.cat([real[:8], fake[:8]]),
        f"{title}: real test images and generated ones",
        left_labels=["real", "generated"],
    )
    save_figure(beside, run.folder / "real_vs_generated.png")
    neighbours = nearest_neighbours_figure(fake, real, train_images, title)
    save_figure(neighbours, run.folder / "nearest_neighbours.png")
    images, response = perturb(G_ema, z[:8], dims, offsets)
    grid = perturbation_figure(images, response, dims, offsets, title)
    save_figure(grid, run.folder / "latent_perturbation.png")


def publish_latest(run, G_ema):
    """What is written anew after every epoch."""
    save_history(run)
    save_settings(run)
    save_generator(run, G_ema)
    draw_latest(run)


def publish_epoch(run, G_ema, sample_every):
    """What appears during training."""
    number = len(run.history)
    if number == 1:  # only now: until then the folder may hold an earlier run and its checkpoint
        remove_results(run.folder)
    publish_latest(run, G_ema)
    if number % sample_every == 0:
        draw_samples(run, number)
        draw_losses(run)


def publish_run(run, G_ema, train_images, test_images, sample_every, dims, offsets):
    """Every table and figure, and the generator."""
    publish_latest(run, G_ema)
    draw_losses(run)
    last = len(run.history)
    for number in range(1, last + 1):
        if number % sample_every == 0 or number == last:
            draw_samples(run, number)
    draw_animation(run)
    draw_generated(run, G_ema, train_images, test_images, dims, offsets)


def remove_results(folder):
    """Remove what an earlier run left: figures and numbered images."""
    names = ["losses.png", "real_vs_generated.png", "nearest_neighbours.png"]
    names += ["latent_perturbation.png", "training.gif"]
    for path in folder.glob("samples_epoch_*.png"):
        if path.stem.removeprefix("samples_epoch_").isdigit():
            names.append(path.name)
    for name in names:
        with not_fatal(folder / name):
            (folder / name).unlink(missing_ok=True)
    remove_numbered(folder / "images")


def remove_numbered(folder):
    """Remove 00000.png and so on, and nothing else."""
    for path in folder.glob("*.png"):
        if path.stem.isdigit() and len(path.stem) >= 5:
            with not_fatal(path):
                path.unlink()


def save_images(folder, G, count, latent_dim):
    """Put so many generated images into `folder`, 00000.png and so on, instead of earlier ones."""
    folder.mkdir(exist_ok=True)
    remove_numbered(folder)
    random = torch.Generator().manual_seed(IMAGES_SEED)
    for start in range(0, count, 100):  # always whole hundreds: image 7 is the same of any count
        images = generate(G, torch.randn(100, latent_dim, generator=random))
        for number, image in enumerate(images[: count - start], start):
            Image.fromarray(image.numpy()).save(folder / f"{number:05d}.png")


# ----------------------------------------------------------------------------------- command line


def between(kind, lowest, highest=math.inf):
    """A type for argparse: an int or a float in a range."""

    def number(text):
        value = kind(text)
        if not lowest <= value <= highest:
            limits = f"from {lowest} to {highest}" if highest < math.inf else f"at least {lowest}"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    return number


def parse_arguments(name, argv):
    """The command line of both scripts."""
    parser = argparse.ArgumentParser(
        description=f"Train the {name} on FashionMNIST and draw its figures. The same command "
        "again goes on with an unfinished run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, default="data", help="folder of the images")
    add("--outputs", type=Path, default="outputs", help="folder of all results")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--fresh", action="store_true", help="start over and replace the run")
    way.add_argument(
        "--redraw",
        action="store_true",
        help="draw every figure of the epochs there are and train nothing; the settings of the "
        "training are the run's own and need not be given",
    )
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 on CPUs that are faster in it, else float32",
    )
    add("--epochs", type=between(int, 1), default=200, help="train up to this epoch")
    add("--batch-size", type=between(int, 2), default=128, help="images per step")
    add("--learning-rate", type=between(float, 1e-9, 1), default=1e-3, help="of both networks")
    add(
        "--r1-gamma",
        type=between(float, 0),
        default=1.0,
        help="weight of the R1 penalty; 0: none. Our loss is the mean of its halves, so 1 is 2 in "
        "the paper's scale",
    )
    add("--latent-dim", type=between(int, 1), default=100, help="length of the latent vector z")
    add("--seed", type=between(int, 0, 2**32), default=0, help="of all random numbers")
    add("--limit", type=between(int, 2), default=60_000, help="train on the first so many images")
    add("--sample-every", type=between(int, 1), default=50, help="epochs between sample grids")
    add("--images", type=between(int, 0), default=0, help="write so many images as single PNGs")
    add(
        "--perturb-dims",
        type=between(int, 0),
        nargs="+",
        help="dimensions of z to move; if None, five spread over z",
    )
    add(
        "--perturb-offsets",
        type=between(float, -1000, 1000),
        nargs="+",
        default=[-2.0, 0.0, 2.0],
        help="how far to move them, in standard deviations of z",
    )
    args = parser.parse_args(argv)
    dims = 5 if args.perturb_dims is None else len(args.perturb_dims)
    if dims * len(args.perturb_offsets) > 40:
        parser.error("--perturb-dims times --perturb-offsets: a page has room for 40 rows")
    return args


def choose_device(name):
    """The torch.device of that name; "auto": CUDA, else Apple's MPS, else the CPU, the first that
    computes. Raises UserError if it does not."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    names = list(available) if name == "auto" else [name]
    for candidate in names:
        if not available[candidate]:
            continue
        try:
            x = torch.ones(1, 1, 8, 8, device=candidate)
            F.conv2d(x, x).item()
            return torch.device(candidate)
        except RuntimeError as error:  # a card that is busy, or too old for this PyTorch
            print(f"{candidate} cannot compute: {str(error).splitlines()[0]}", file=sys.stderr)
    raise UserError(f"--device {name} cannot be used on this machine: try --device cpu")


def choose_dtype(precision, device):
    """The type to compute in; "auto": bfloat16 on CPUs that multiply it faster, else float32."""
    if precision == "auto":
        cpu = torch.cpu.get_capabilities()
        is_fast = cpu.get("amx_bf16") or cpu.get("avx512_bf16")
        precision = "bfloat16" if device.type == "cpu" and is_fast else "float32"
    return getattr(torch, precision)


def respect_cpu_quota():
    """No more threads than the cores that a container may use."""
    with contextlib.suppress(OSError, ValueError):  # there is no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = max(1, int(quota) // int(period))
        torch.set_num_threads(min(torch.get_num_threads(), cores))


def describe_run(args, training, device, dtype):
    """What settings.json says beside the settings of the training."""
    return {
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()
        },
        "device": device.type,
        "precision": str(dtype).removeprefix("torch."),
        "torch": str(torch.__version__),  # its own type is not for a checkpoint
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "parameters": {
            "G": sum(weight.numel() for weight in training.G.parameters()),
            "D": sum(weight.numel() for weight in training.D.parameters()),
        },
    }


def choose_dims(dims, latent_dim):
    """The latent dimensions to move: those given, or five spread over z."""
    if dims is None:
        return sorted({round(i * (latent_dim - 1) / 4) for i in range(5)})
    if max(dims) >= latent_dim:
        raise UserError(f"--perturb-dims {max(dims)}: z has the dimensions 0 to {latent_dim - 1}")
    return dims


def choose_settings(name, args):
    """The Settings of the training that the command line asks for."""
    return Settings(
        model=name,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        r1_gamma=args.r1_gamma,
        latent_dim=args.latent_dim,
        seed=args.seed,
        precision=args.precision,
        limit=args.limit,
    )


def run_model(name, Generator, Discriminator, args):
    """Train, continue or only redraw the model as `args` say, and draw every figure."""
    folder = args.outputs / name.lower()
    path = folder / "checkpoint.pt"
    if args.redraw and not path.exists():
        raise UserError(f"{path} is not there: nothing to redraw before an epoch is finished")
    if not path.exists() and (folder / "generator.pt").is_file() and not args.fresh:
        raise UserError(
            f"{folder} holds the results of a run, but no checkpoint.pt to go on from: give "
            "another --outputs, or replace them with --fresh"
        )
    device = choose_device(args.device)
    respect_cpu_quota()
    train_set, test_set = load_fashion_mnist(args.data)
    with locked(folder):
        checkpoint = None
        if path.exists() and not args.fresh:
            checkpoint = read_checkpoint(path)
        settings = checkpoint["settings"] if args.redraw else choose_settings(name, args)
        dtype = choose_dtype(settings.precision, device)
        train_images = train_set.data[: settings.limit]
        if settings.batch_size > len(train_images):
            raise UserError(
                f"--batch-size {settings.batch_size}: more than the {len(train_images)} images"
            )
        dims = choose_dims(args.perturb_dims, settings.latent_dim)

        training = new_training(Generator, Discriminator, settings, device)
        facts = describe_run(args, training, device, dtype)
        layers = describe_layers(training.G, training.D)
        run = Run(folder, settings, layers, facts, history=[])
        if checkpoint is not None:
            continue_run(run, training, checkpoint)
        done = len(run.history)
        print(f"{name} on {device} in {facts['precision']}: {done} epochs done", flush=True)
        if done < args.epochs and not args.redraw:
            run.facts = facts  # a run that trains no more keeps those of its training
            images = train_images[:, None].to(device)
            train(run, training, images, args.epochs, dtype, args.sample_every)

        G_ema = training.G_ema
        offsets = args.perturb_offsets
        publish_run(run, G_ema, train_images, test_set.data, args.sample_every, dims, offsets)
        if args.images:
            save_images(folder / "images", G_ema, args.images, settings.latent_dim)
    print(f"figures in {folder}")


@contextlib.contextmanager
def errors_for_people(when_stopped, when_out_of_memory):
    """What the user can mend ends the program with one line; a mistake keeps its traceback.

    when_stopped, when_out_of_memory: what to say after Ctrl-C, and what needs less memory.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped: {when_stopped}", file=sys.stderr)
        sys.exit(130)  # as shells have it
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except MemoryError:
        sys.exit(f"error: out of memory: {when_out_of_memory}")
    except RuntimeError as error:
        if "out of memory" in str(error) or "tried to allocate" in str(error):
            sys.exit(f"error: out of memory: {when_out_of_memory}")
        raise


def main(name, Generator, Discriminator, argv=None):
    """Run a script's command line; `name` is the model's, for titles and the folder."""
    args = parse_arguments(name, argv)
    when_stopped = (
        "the same command goes on after the last finished epoch, if there is one; with --redraw it "
        "draws the figures of the epochs there are"
    )
    if args.fresh:
        when_stopped = (
            "without --fresh the same command goes on from checkpoint.pt, which is still the one "
            "of the run before if no epoch was finished; with --redraw it draws the figures"
        )
    when_out_of_memory = "--device cpu or, with another --outputs, a smaller --batch-size may help"
    with (
        errors_for_people(when_stopped, when_out_of_memory),
        matplotlib.style.context(STYLE),
    ):
        run_model(name, Generator, Discriminator, args)
