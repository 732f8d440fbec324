"""What gan.py and dcgan.py share, in the order data flows: FashionMNIST, the training loop,
files and checkpoints, figures, the command line.

In the names, as in the papers: z latent vectors, x images, G generator, D discriminator; `averaged`
is the moving average of the generator, from which every figure is drawn.
"""

import argparse
import contextlib
import ctypes
import gzip
import hashlib
import io
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


class UserError(Exception):
    """A mistake or a fault the user can mend: `main` prints it as one line and exits with 1."""


class OptionError(UserError):
    """A wrong option: `main` exits with 2."""


# ------------------------------------------------------------------------------- FashionMNIST

SHA256 = {  # of the unpacked files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"  # Debian's and Ubuntu's
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# The data set's own repository: torchvision's only address fails for many (pytorch/vision #4829).
SECOND_MIRROR = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
NETWORK_TIMEOUT = 20  # seconds without an answer before the next mirror is tried


def load_fashion_mnist(data, split):
    """Images and labels of one split, from the first source that has them undamaged.

    data: folder that holds, or is to hold, FashionMNIST/raw/ (torchvision's layout).
    split: "train" (60,000 images) or "test" (10,000).
    Returns uint8 images (N, 1, 28, 28) in 0..255 and int64 labels (N,) in 0..9 (Xiao et al. 2017).
    Raises UserError, naming every source tried, when none has them.
    """
    if Path(data).is_file():
        raise UserError(f"--data {data} is a file: give a folder, empty or with FashionMNIST/raw/ in it")
    raw = Path(data, "FashionMNIST", "raw")
    prefix = {"train": "train", "test": "t10k"}[split]
    sources = {
        str(raw): lambda: raw,
        str(DEBIAN_FOLDER): lambda: DEBIAN_FOLDER,
        "download": lambda: download(raw),
        f"Debian package {DEBIAN_PACKAGE}": lambda: fetch_debian_package(raw),
    }
    failures = []
    for source, locate in sources.items():
        try:
            folder = locate()
            images = read_verified(folder, f"{prefix}-images-idx3-ubyte")
            labels = read_verified(folder, f"{prefix}-labels-idx1-ubyte")
        except Exception as error:  # however a source fails, the next one may do
            failures.append(f"{source}: {error}")
            continue
        for failure in failures:
            if "damaged" in failure:
                print(f"{failure}; took the images from {source}", file=sys.stderr)
        # IDX files: a header of 16 bytes before images, of 8 before labels
        images = torch.frombuffer(images, dtype=torch.uint8, offset=16).view(-1, 1, 28, 28)
        return images, torch.frombuffer(labels, dtype=torch.uint8, offset=8).long()
    way_out = f"Put the four files {', '.join(SHA256)} (or their .gz) into {raw}."
    raise UserError(f"FashionMNIST was not found. Tried {'; '.join(failures)}. {way_out}")


def read_verified(folder, name):
    """The bytes (mutable, as torch wants them) of an IDX file or its .gz, verified by SHA-256."""
    path = Path(folder, name)
    if not path.exists():
        path = path.with_name(f"{name}.gz")
    if not path.exists():
        raise FileNotFoundError(f"no {name}")
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256[name]:
        raise ValueError(f"{path} is damaged (SHA-256 {digest[:8]}, not {SHA256[name][:8]}): delete it")
    return bytearray(content)


def keep_verified(folder, raw):
    """Put the four files of `folder`, unpacked and verified, into `raw`; returns `raw`."""
    raw.mkdir(parents=True, exist_ok=True)
    for name in SHA256:
        content = read_verified(folder, name)
        save(raw / name, lambda file, content=content: file.write(content))
    return raw


def download(raw):
    """Have torchvision fetch the data set, mirror by mirror, into `raw`; returns `raw`."""
    from torchvision.datasets import FashionMNIST  # here: to import it takes a third of the start-up, 1.5 s

    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    failures = []
    for mirror in (*FashionMNIST.mirrors, SECOND_MIRROR):
        # One at a time: given both, torchvision gives up when the first one hangs.
        OneMirror = type("FashionMNIST", (FashionMNIST,), {"mirrors": [mirror]})
        with tempfile.TemporaryDirectory() as folder:
            try:
                OneMirror(folder, download=True)
                return keep_verified(Path(folder, "FashionMNIST", "raw"), raw)
            except Exception as error:  # of files, of the network, of torchvision
                failures.append(" ".join(str(error).split()))
    raise RuntimeError("; ".join(failures))


def fetch_debian_package(raw):
    """Fetch and unpack the Debian package without root, into `raw`; returns `raw`."""
    script = f"""
        mkdir -p state/lists/partial cache/archives/partial
        options="-o Dir::State=$PWD/state -o Dir::Cache=$PWD/cache -o Dir::State::status=/var/lib/dpkg/status"
        options="-qq $options -o Acquire::http::Timeout={NETWORK_TIMEOUT}"
        apt-get $options update && apt-get $options download {DEBIAN_PACKAGE} && dpkg-deb -x *.deb .
    """
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(["sh", "-c", script], cwd=folder, capture_output=True, text=True, timeout=300)
        if result.returncode != 0:
            raise RuntimeError(" ".join(result.stderr.split()) or "failed")
        return keep_verified(folder + str(DEBIAN_FOLDER), raw)


# ---------------------------------------------------------------------------------- training


def choose_device(name):
    """The torch.device of that name; "auto": CUDA, else Apple's MPS, else the CPU. Raises OptionError."""
    available = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name not in ("auto", *available):
        raise OptionError(f"--device {name}: not on this machine, only {', '.join(available)}")
    return torch.device(available[0] if name == "auto" else name)


def choose_dtype(precision, device):
    """The type to compute in; "auto" is bfloat16 only where the hardware multiplies it faster."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities()
        fast = device.type == "cpu" and (cpu.get("amx_bf16") or cpu.get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def keep_freed_memory():
    """Tell glibc to reuse freed memory instead of handing it back to the system: in a DCGAN step on two CPU
    cores no page fault instead of 10,000 to 24,000, and 304 ms instead of 324."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def train_step(G, D, G_optimizer, D_optimizer, real, z, dtype):
    """One iteration of Algorithm 1 of Goodfellow et al. (2014), k = 1.

    real: images (N, 1, 28, 28) in [-1, 1]; z: latent vectors (N, latent_dim).
    Returns D's loss, G's loss, mean D(x), mean D(G(z)) as one tensor (4,). D's loss is the mean over
    real and fake images, so that it is ln 2, as G's, when D is undecided.
    """
    autocast = torch.autocast(real.device.type, dtype, enabled=dtype is not torch.float32)

    # Discriminator: ascend log D(x) + log(1 - D(G(z))). With D = sigmoid(logit), -log D is softplus(-logit)
    # and -log(1 - D) is softplus(logit). D has no BatchNorm: one pass over real and fake is the same as two.
    with autocast:
        fake = G(z)
        logits = D(torch.cat([real, fake.detach()])).float()
    real_logits, fake_logits = logits.chunk(2)
    D_loss = (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2
    D_optimizer.zero_grad()
    D_loss.backward()
    D_optimizer.step()

    # Generator, against the discriminator just updated: ascend log D(G(z)), the paper's non-saturating
    # form. The same z as above: a second G(z) of fresh vectors takes a quarter more time and gains nothing.
    D.requires_grad_(False)
    with autocast:
        logits = D(fake).float()
    G_loss = F.softplus(-logits).mean()
    G_optimizer.zero_grad()
    G_loss.backward()
    G_optimizer.step()
    D.requires_grad_(True)
    D_x, D_G_z = real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()
    return torch.stack([D_loss, G_loss, D_x, D_G_z]).detach()


def update_average(averaged, G, step, decay):
    """averaged <- d averaged + (1 - d) G with d = min(decay, (1 + step) / (10 + step)).

    Without this warm-up it remembers the first weights: worse than the live ones for 5 DCGAN epochs. With it,
    it averages about the last tenth of the steps: Frechet distance of the GAN at 150 26, at d <= 0.999 36.
    """
    averaged.multi_avg_fn = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    averaged.update_parameters(G)


def settle_batch_norm(averaged, latent_dim):
    """Measure BatchNorm's mean and variance with the averaged weights, on 2,560 latent vectors: averaged like
    the weights, those of the live generator fit less well (Frechet distance of the GAN 43.5, not 39.5)."""
    z = torch.randn(20, 128, latent_dim, generator=torch.Generator().manual_seed(2015))
    update_bn(z, averaged, next(averaged.parameters()).device)


def scale(images):
    """uint8 images, 0..255, to float ones in [-1, 1], the range of the generator's tanh."""
    return images / 127.5 - 1


def train_epoch(training, images, epoch, settings, dtype, progress):
    """Train on every image once, in batches (an incomplete last one is left out for this epoch).

    images: uint8 (N, 1, 28, 28) on the device; epoch: from 1; progress(): called after every batch.
    Returns what train_step returned at each step, as one tensor (steps, 4) on the CPU.
    """
    # The random numbers of an epoch depend on its number alone, not on whether the run stopped before it.
    torch.manual_seed(settings["seed"] * 1_000_000 + epoch)
    networks = training["G"].train(), training["D"].train()
    optimizers = training["G_optimizer"], training["D_optimizer"]
    batch_size, latent_dim = settings["batch_size"], settings["latent_dim"]
    batches = torch.randperm(len(images), device=images.device).split(batch_size)
    batches = batches[: len(images) // batch_size]
    record = []
    for step, batch in enumerate(batches, (epoch - 1) * len(batches)):
        real = scale(images[batch])
        z = torch.randn(batch_size, latent_dim, device=images.device)
        record.append(train_step(*networks, *optimizers, real, z, dtype))
        update_average(training["averaged"], training["G"], step, settings["ema_decay"])
        progress()
    return torch.stack(record).cpu()


def train_epochs(training, images, done, epochs, settings, dtype):
    """Train epoch after epoch from done + 1 to `epochs` under a progress bar.

    After each, yields its number and its record: what train_step returned at each step, "steps"
    (steps, 4), and "seconds". Raises UserError when a loss is not finite.
    """
    steps = len(images) // settings["batch_size"]
    layout = "{n:.1f}/{total:.0f}{postfix} left {remaining} {bar}"  # 80 columns show all but the bar
    counts = {"initial": done * steps, "total": epochs * steps, "unit_scale": 1 / steps}
    interval = 1 if sys.stderr.isatty() else 30  # seconds between updates: a log file need not have them all
    with tqdm(**counts, bar_format=layout, mininterval=interval, dynamic_ncols=True) as bar:
        for epoch in range(done + 1, epochs + 1):
            start = time.perf_counter()
            record = train_epoch(training, images, epoch, settings, dtype, bar.update)
            settle_batch_norm(training["averaged"], settings["latent_dim"])
            seconds = time.perf_counter() - start
            if not record.isfinite().all():
                way_out = "a lower --learning-rate or --precision float32, with --fresh"
                raise UserError(f"epoch {epoch}: a loss is not finite; those before are kept; try {way_out}")
            D_loss, G_loss, D_x, D_G_z = record.mean(0).tolist()
            rate = steps * settings["batch_size"] / seconds
            bar.postfix = (f"loss D {D_loss:.2f} G {G_loss:.2f} D(x) {D_x:.2f} D(G(z)) {D_G_z:.2f} "
                           f"{rate:.0f} img/s")
            yield epoch, {"steps": record, "seconds": seconds}


@torch.no_grad()
def generate(G, z):
    """Images G(z) as uint8 (N, 28, 28) on the CPU, BatchNorm using its running statistics."""
    G.eval()
    x = G(z.to(next(G.parameters()).device))
    return ((x + 1) * 127.5).round().byte().squeeze(1).cpu()


def latent_vectors(latent_dim):
    """500 latent vectors, the same in every run and for both models; figures show the first ones."""
    return torch.randn(500, latent_dim, generator=torch.Generator().manual_seed(2014))


# -------------------------------------------------------------------- files and checkpoints

PARTIAL = ".partial-"  # what the names of files begin with while they are being written


def save(path, write):
    """Write what write(file) writes to `path`, whole or not at all: first to memory, because torch.save does
    not report a full disk as an OSError; then under another name, so that whatever happens `path` holds its
    old content or the new one. Raises UserError."""
    buffer = io.BytesIO()
    write(buffer)
    part = path.with_name(PARTIAL + path.name)
    try:
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        kept = "what was there before is intact"
        raise UserError(f"{path} could not be written: {error.strerror}; {kept}") from error
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def sole_use(folder):
    """Make the folder, keep it for this process, and remove what a killed one left half-written. Raises
    UserError when it cannot be written or another process has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 (closed below; the lock ends with the process)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; give another --outputs") from error
    with lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another run: wait, or give another --outputs") from None
        for leftover in folder.glob(PARTIAL + "*"):
            leftover.unlink()
        yield


def save_history(path, history):
    """Write one row an epoch to the CSV file `path`: mean and standard deviation over its steps."""
    rows = ["epoch,D_loss_mean,D_loss_std,G_loss_mean,G_loss_std,D_x_mean,D_G_z_mean,seconds"]
    means, stds = history["steps"].mean(1).tolist(), history["steps"].std(1, correction=0).tolist()
    for epoch, (mean, std, seconds) in enumerate(zip(means, stds, history["seconds"], strict=True), 1):
        values = mean[0], std[0], mean[1], std[1], mean[2], mean[3]
        rows.append(f"{epoch},{','.join(f'{value:.6f}' for value in values)},{seconds:.2f}")
    save(path, lambda file: file.write("\n".join([*rows, ""]).encode()))


def new_training(Generator, Discriminator, settings, device):
    """The networks, the moving average and the optimizers, freshly initialised from the seed."""
    torch.manual_seed(settings["seed"] * 1_000_000)
    # channels_last: the memory layout in which convolutions are fastest (see dcgan.UpsampleConv).
    G = Generator(settings["latent_dim"]).to(device, memory_format=torch.channels_last)
    D = Discriminator().to(device, memory_format=torch.channels_last)
    averaged = AveragedModel(G)
    # Adam without momentum (beta 1 = 0; the DCGAN paper has 0.5), as each network moves the other's target:
    # Frechet distance of the GAN after 20 epochs 44 instead of 85.
    G_optimizer, D_optimizer = (
        torch.optim.Adam(network.parameters(), settings["learning_rate"], (0.0, 0.999), fused=True)
        for network in (G, D))
    return {"G": G, "D": D, "averaged": averaged, "G_optimizer": G_optimizer, "D_optimizer": D_optimizer}


def read_checkpoint(path):
    """What torch.save wrote to `path`, data, no code; raises whatever Python and torch make of a bad file."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():  # torch.load does not look at the checksums
            raise ValueError("wrong checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


def damaged(path, error, way_out):
    """The UserError for a checkpoint at which Python or torch raised `error`."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return UserError(f"{path} is damaged or not ours ({reason}): {way_out}")


def load_checkpoint(path, training, settings, steps):
    """Put the checkpoint at `path` into `training`; returns its history, of epochs of so many steps. Raises
    UserError when the file is not such a checkpoint or its run had other settings."""
    try:
        checkpoint = read_checkpoint(path)
        before, history = checkpoint["settings"], checkpoint["history"]
        changed = {key: value for key, value in settings.items() if before[key] != value}
        if not changed:
            for name, part in training.items():
                part.load_state_dict(checkpoint[name])
            epochs = len(history["seconds"])
            shapes = [tuple(history[key].shape) for key in ("steps", "samples")]
            if shapes != [(epochs, steps, 4), (epochs, 64, 28, 28)]:
                raise ValueError(f"history of shapes {shapes}")
            return history
    except Exception as error:
        raise damaged(path, error, "move it away, or use --fresh") from error
    changes = "; ".join(f"{key} was {before[key]}, is now {changed[key]}" for key in changed)
    way_out = "give the old settings, another --outputs, or --fresh to start over"
    raise UserError(f"{path} is of a run with other settings ({changes}): {way_out}")


# ----------------------------------------------------------------------------------- figures

FIGURES = ("losses.png", "samples_epoch_*.png", "real_vs_generated.png", "nearest_neighbours.png",
           "latent_perturbation.png", "training.gif", "generator.pt")
WIDTH = 12 / 2.54  # inches: 12 cm, the text width of a report, so that figures print at their own size


def new_figure(height, title):
    """A figure 12 cm wide and `height` cm high, at 200 dpi, in type that reads at that size."""
    figure = Figure((WIDTH, height / 2.54), dpi=200, layout="constrained")
    figure.suptitle(title, fontsize=9)
    return figure


def mosaic(images):
    """uint8 images (N, 28, 28) as one image in rows of 8, with white gaps of 2 pixels."""
    from torchvision.utils import make_grid  # here, as in `download`

    return make_grid(images.unsqueeze(1), nrow=8, padding=2, pad_value=255)[0].numpy()


def show_images(axes, images, row_labels=(), column_labels=()):
    """Draw uint8 images (N, 28, 28) in rows of 8, the labels on the left and beneath."""
    axes.imshow(mosaic(images), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks(np.arange(len(column_labels)) * 30 + 15.5, column_labels)
    axes.set_yticks(np.arange(len(row_labels)) * 30 + 15.5, row_labels, va="center")
    axes.tick_params(length=0, labelsize=7)
    axes.spines[:].set_visible(False)


def losses_figure(history, name):
    """Both losses over training: every iteration thin, the mean of each epoch bold."""
    steps = history["steps"]
    epochs = len(steps)
    figure = new_figure(7.5, f"{name}: losses over {epochs} epochs (thin: every iteration; bold: epoch mean)")
    axes = figure.subplots()
    every = np.arange(1, steps[..., 0].numel() + 1) / steps.shape[1]
    curves = ((0, "Discriminator", "tab:blue", "-"), (1, "Generator", "tab:orange", "--"))
    for i, _, colour, _ in curves:  # D's, the narrower band, in front of G's
        axes.plot(every, steps[..., i].flatten(), color=colour, linewidth=0.3, alpha=0.35, zorder=2 - i)
    for i, label, colour, style in curves:  # on top; the dashes tell them apart in black and white
        means, middle = steps[..., i].mean(1).numpy(), np.arange(epochs) + 0.5
        marker = "o" if epochs == 1 else ""  # one point makes no line
        axes.plot(middle, means, style, color=colour, linewidth=1.6, marker=marker, label=label)
    axes.axhline(math.log(2), color="black", linewidth=0.8, linestyle=":", label="ln 2: D is undecided")
    axes.set_xlim(0, epochs)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("Epoch", fontsize=8)
    axes.set_ylabel("Loss (binary cross-entropy)", fontsize=8)
    axes.tick_params(labelsize=7)
    figure.legend(fontsize=7, loc="outside lower center", ncols=3, frameon=False)
    return figure


def images_figure(images, title, row_labels=(), column_labels=(), caption=None):
    """uint8 images (N, 28, 28) in rows of 8."""
    figure = new_figure(1 + 1.45 * (len(images) // 8) + 1.1 * bool(caption), title)
    axes = figure.subplots()
    show_images(axes, images, row_labels, column_labels)
    axes.tick_params(axis="y", rotation=90)
    axes.set_xlabel(caption, fontsize=7)
    return figure


def nearest(images, others):
    """For each uint8 image (N, 28, 28) the index of its nearest among `others` (M, 28, 28), (N,), and the
    distance, (N,): Euclidean, per pixel (the root mean square difference), in grey levels of 0 to 255."""
    flat = images.flatten(1).float()
    # In parts: 60,000 images at once, as floats, take 0.25 GB more.
    distances = torch.cat([torch.cdist(flat, part.flatten(1).float()) for part in others.split(5000)], 1) / 28
    return distances.argmin(1), distances.amin(1)


def nearest_neighbours_figure(fake, real, train, title):
    """The first 8 generated uint8 images (N, 28, 28) over their nearest training images (M, 28, 28).

    Beneath, the median distance over all N, and that of real test images for comparison: a generator
    that had memorised its data would lie far below.
    """
    indices, distances = nearest(fake, train)
    _, real_distances = nearest(real, train)
    caption = ("Distance (root mean square difference in grey levels of 0 to 255)\n"
               f"Median of {len(fake)} generated images {distances.median():.1f}, "
               f"of {len(real)} real test images {real_distances.median():.1f}")
    images = torch.cat([fake[:8], train[indices[:8]]])
    columns = [f"{distance:.1f}" for distance in distances[:8]]
    title += ": generated images and the nearest training images"
    return images_figure(images, title, ["generated", "nearest"], columns, caption)


def perturb(G, z, dims, offsets):
    """Images G(z + offset e_dim) for every dimension and offset; z: (N, latent_dim).

    Returns uint8 images (dims, offsets, N, 28, 28) and the response, (dims, offsets): the mean absolute
    change of a pixel against G(z), in percent of its range.
    """
    moved = z.repeat(len(dims), len(offsets), 1, 1)
    for i, dim in enumerate(dims):
        moved[i, :, :, dim] += torch.tensor(offsets)[:, None]
    images = generate(G, moved.flatten(0, 2)).view(*moved.shape[:3], 28, 28)
    return images, (images.float() - generate(G, z).float()).abs().mean((2, 3, 4)) / 255 * 100


def perturbation_figure(images, response, dims, offsets, title):
    """What `perturb` returns for 8 latent vectors: one panel a dimension, one row an offset."""
    height = 1.6 + 1.25 * len(dims) * len(offsets)  # higher, and the row labels are cut
    figure = new_figure(height, title + ": one latent dimension at a time, moved by an offset")
    panels = figure.subplots(len(dims), squeeze=False)[:, 0]
    for panel, dim, block, changes in zip(panels, dims, images, response, strict=True):
        labels = [f"z[{dim}] {offset:+g}".replace("-", "\N{MINUS SIGN}") for offset in offsets]
        panel.xaxis.tick_top()
        samples = [f"Sample {i}" for i in range(1, 9)] if panel is panels[0] else ()
        show_images(panel, block.flatten(0, 1), labels, samples)
        panel.tick_params(axis="x", labelsize=6)
        right = panel.secondary_yaxis("right")
        right.set_yticks(panel.get_yticks(), [f"{change:.1f}%" for change in changes])
        right.tick_params(length=0, labelsize=7)
        right.spines[:].set_visible(False)
    figure.supxlabel("Right: response, the mean absolute change of a pixel in % of its range", fontsize=7)
    return figure


def animation(history, name):
    """The grid of fixed samples over training, at most 50 PIL images (1 MB), the last epoch among them."""
    epochs = len(history["samples"])
    frames = []
    for epoch in reversed(range(epochs, 0, -math.ceil(epochs / 50))):
        grid = np.pad(mosaic(history["samples"][epoch - 1]), ((18, 0), (0, 0)), constant_values=255)
        frame = Image.fromarray(grid)
        ImageDraw.Draw(frame).text((4, 3), f"{name}, epoch {epoch}", fill=0)
        frames.append(frame.quantize(16))
    return frames


def draw_losses(folder, history, name):
    save(folder / "losses.png", losses_figure(history, name).savefig)


def draw_samples(folder, history, name, epoch):
    figure = images_figure(history["samples"][epoch - 1], f"{name}, epoch {epoch}: generated samples")
    save(folder / f"samples_epoch_{epoch:03d}.png", figure.savefig)


def draw_results(folder, G, history, train, test, name, args):
    """Every other figure, and the generator's weights alone; train, test: uint8 (N, 1, 28, 28)."""
    title = f"{name}, epoch {len(history['steps'])}"
    z = latent_vectors(args.latent_dim)
    fake, real = generate(G, z), test[:500, 0]
    images, rows = torch.cat([real[:8], fake[:8]]), ["real", "generated"]
    figure = images_figure(images, f"{title}: real test images and generated ones", rows)
    save(folder / "real_vs_generated.png", figure.savefig)
    figure = nearest_neighbours_figure(fake, real, train[:, 0], title)
    save(folder / "nearest_neighbours.png", figure.savefig)
    moved = args.perturb_dims, args.perturb_offsets
    figure = perturbation_figure(*perturb(G, z[:8], *moved), *moved, title)
    save(folder / "latent_perturbation.png", figure.savefig)
    first, *rest = animation(history, name)
    gif = {"format": "GIF", "save_all": True, "append_images": rest, "loop": 0}
    gif["duration"] = [100] * len(rest) + [2000]  # milliseconds; the last frame stays
    save(folder / "training.gif", partial(first.save, **gif))
    save(folder / "generator.pt", partial(torch.save, G.state_dict()))


# ------------------------------------------------------------------------------ command line


def number(kind, low, high=math.inf):
    """A parser, for argparse, of numbers of that kind from `low` to below `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value < high:
            below = f" and below {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not at least {low}{below}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


def parse_arguments(name, argv=None):
    """The command line of both scripts. Exits with status 2 and one line when it is wrong."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description=f"Train the {name} on FashionMNIST and draw its figures into OUTPUTS/{name.lower()}/. "
        "An unfinished run is continued, a finished one redrawn.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message} (see --help)\n")
    whole, folder = {"type": number(int, 1), "metavar": "N"}, {"type": Path, "metavar": "FOLDER"}

    add = parser.add_argument_group("this run").add_argument
    add("--epochs", **whole, default=200, help="train up to this epoch")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: GPU if there is one")
    add("--data", **folder, default="data", help="where the images are, or are to be put")
    add("--outputs", **folder, default="outputs", help="where all results are put")
    add("--fresh", action="store_true", default=argparse.SUPPRESS, help="start over instead of continuing")

    add = parser.add_argument_group("training (to continue a run, give the same)").add_argument
    add("--batch-size", type=number(int, 2), metavar="N", default=128, help="images per step")
    add("--learning-rate", type=number(float, 1e-9, 1), metavar="R", default=1e-3, help="of both Adams")
    add("--ema-decay", type=number(float, 0, 1), metavar="D", default=0.9999, help="of G's moving average")
    add("--latent-dim", **whole, default=100, help="length of the latent vector z")
    add("--seed", type=number(int, 0, 2**32), metavar="N", default=0, help="of all random numbers")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="auto: bfloat16 where the hardware has it")
    add("--limit", **whole, default=argparse.SUPPRESS, help="the first N images only (default: all)")

    add = parser.add_argument_group("figures").add_argument
    add("--sample-every", **whole, default=50, help="epochs between sample grids")
    add("--perturb-dims", type=number(int, 0), nargs="+", metavar="DIM", default=argparse.SUPPRESS,
        help="dimensions of z to move, counted from 0 (default: five spread over z)")
    add("--perturb-offsets", type=number(float, -1000, 1000), nargs="+", metavar="X",
        default=[-4.0, 0.0, 4.0], help="by how much to move them; z is drawn from N(0, 1)")

    args = parser.parse_args(argv, argparse.Namespace(limit=None, perturb_dims=None, fresh=False))
    if args.perturb_dims is None:
        args.perturb_dims = sorted({round(i * (args.latent_dim - 1) / 4) for i in range(5)})
    if max(args.perturb_dims) >= args.latent_dim:
        outside, last = max(args.perturb_dims), args.latent_dim - 1
        parser.error(f"argument --perturb-dims: {outside} is outside the latent vector, 0 to {last}")
    return args


def run(name, Generator, Discriminator, args):
    """Train, continue or only redraw the model as `args` say, and draw every figure."""
    device = choose_device(args.device)
    dtype = choose_dtype(args.precision, device)
    train = load_fashion_mnist(args.data, "train")[0][: args.limit]
    test = load_fashion_mnist(args.data, "test")[0]
    steps = len(train) // args.batch_size
    if steps == 0:
        raise OptionError(f"--batch-size {args.batch_size}: more than the {len(train)} images")

    keep_freed_memory()  # from here on: not what reading the files has freed
    kept = ("batch_size", "learning_rate", "ema_decay", "latent_dim", "seed", "precision", "limit")
    settings = {"model": name, **{key: getattr(args, key) for key in kept}}
    training = new_training(Generator, Discriminator, settings, device)
    folder = args.outputs / name.lower()
    checkpoint = folder / "checkpoint.pt"
    with sole_use(folder):
        if checkpoint.exists() and not args.fresh:
            history = load_checkpoint(checkpoint, training, settings, steps)
        else:  # of every epoch: what each step returned, the fixed samples, the seconds of training
            samples = torch.empty(0, 64, 28, 28, dtype=torch.uint8)
            history = {"steps": torch.empty(0, steps, 4), "samples": samples, "seconds": []}
        done = len(history["steps"])
        epochs = max(done, args.epochs)
        start = f"{name} on {device} in {dtype}, {len(train):,} images, {done} of {epochs} epochs done"
        print(start, flush=True)

        for epoch, record in train_epochs(training, train.to(device), done, epochs, settings, dtype):
            samples = generate(training["averaged"].module, latent_vectors(args.latent_dim)[:64])
            history["steps"] = torch.cat([history["steps"], record["steps"][None]])
            history["samples"] = torch.cat([history["samples"], samples[None]])
            history["seconds"].append(record["seconds"])
            # Everything needed to go on: the random state is that of the seed and of the epochs done.
            states = {part: training[part].state_dict() for part in training}
            save(checkpoint, partial(torch.save, {**states, "history": history, "settings": settings}))
            if args.fresh and epoch == 1:  # the figures of the run before go only now
                for stale in (stale for pattern in FIGURES for stale in folder.glob(pattern)):
                    stale.unlink()
            save_history(folder / "history.csv", history)
            if epoch % args.sample_every == 0:
                draw_losses(folder, history, name)
                draw_samples(folder, history, name, epoch)

        save_history(folder / "history.csv", history)
        for epoch in sorted({*range(args.sample_every, epochs, args.sample_every), epochs}):
            draw_samples(folder, history, name, epoch)
        draw_losses(folder, history, name)
        draw_results(folder, training["averaged"].module, history, train, test, name, args)
    print(f"figures in {folder}")


def main(name, Generator, Discriminator, argv=None):
    """Run a script's command line; `name` is the model's, for titles and the folder."""
    args = parse_arguments(name, argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    try:
        run(name, Generator, Discriminator, args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, OptionError) else 1)
    except KeyboardInterrupt:
        again = "the same command without --fresh" if args.fresh else "the same command"
        print(f"stopped: {again} goes on after the last finished epoch", file=sys.stderr)
        sys.exit(130)  # as shells have it for Ctrl-C
