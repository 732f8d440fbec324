"""What gan.py and dcgan.py share: FashionMNIST, training, figures, files, command line.

In the names, as in the papers: z latent vectors, x images, G generator, D discriminator. G_ema is the
moving average of G; every image that is shown is drawn from it.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

if "IPython" not in sys.modules:  # in a notebook's own process its backend stays
    os.environ["MPLBACKEND"] = "agg"  # no window is opened: nobody else's choice may stop us
try:
    import matplotlib.backends.backend_agg  # with ImageFont and GifImagePlugin: what figures need later
    import matplotlib.style
    import numpy as np
    import torch
    import torch.nn.functional as F
    from matplotlib.figure import Figure
    from PIL import GifImagePlugin, Image, ImageDraw, ImageFont  # noqa: F401
    from PIL.PngImagePlugin import PngInfo
    from torch import nn
    from torch.optim.swa_utils import update_bn
    from tqdm import tqdm
except Exception as error:  # missing or broken: better known now than after an hour
    sys.exit(f"error: {error}: try pip install -r requirements.txt, in the virtual environment")


class UserError(Exception):
    """What the user can mend, printed as one line: a message and, if it is not 1, the exit status."""


# ------------------------------------------------------------------------------- FashionMNIST

SHA256 = {  # of the unpacked files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN_PACKAGE, DEBIAN_FOLDER = "dataset-fashion-mnist", Path("/usr/share/datasets/fashion-mnist")
MIRRORS = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
           "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/")
TIMEOUT = 20  # seconds without an answer from the network


def load_fashion_mnist(data, kind="images"):
    """Training and test set (Xiao et al. 2017), from the first source that has both undamaged.
    kind: "images", uint8 (60,000, 1, 28, 28) and (10,000, 1, 28, 28), or "labels", uint8 (60,000,) and
    (10,000,) in 0..9. Raises UserError, with a line a source, when none has them."""
    wanted, found, failures = [name for name in SHA256 if kind in name], {}, []
    with tempfile.TemporaryDirectory() as temporary:
        for source in (data, DEBIAN_FOLDER, *MIRRORS, DEBIAN_PACKAGE):
            local, reason = isinstance(source, Path), "not there"
            try:
                found |= verified_files(source if local else fetch(source, Path(temporary)))
            except Exception as error:  # however a source fails, the next one may do
                reason = " ".join(str(getattr(error, "stderr", error)).split())[:100]
            if all(name in found for name in wanted):
                break
            failures.append(f"{source}: {reason}")
        else:
            way_out = f"Put {' and '.join(wanted)}, packed or not, anywhere into {data}."
            raise UserError("\n  ".join(["FashionMNIST was not found.", *failures, way_out]))
    if not local:
        for name, content in found.items():
            save(data / "FashionMNIST" / "raw" / name, lambda file, content=content: file.write(content))
    header, shape = (16, (-1, 1, 28, 28)) if kind == "images" else (8, (-1,))  # of the IDX format
    return [torch.frombuffer(found[name], dtype=torch.uint8)[header:].view(shape) for name in wanted]


def verified_files(folder):
    """{name: unpacked bytes} of FashionMNIST's files anywhere in `folder`, whatever they are called."""
    names, found, seen = {digest: name for name, digest in SHA256.items()}, {}, set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(root)) in seen:  # a link has led back
            folders.clear(), files.clear()
        seen.add(place)
        for path in (Path(root, file) for file in files):
            content = b""
            with contextlib.suppress(Exception):  # unreadable or cut short
                content = read_idx(path) if path.is_file() else b""
            if name := names.get(hashlib.sha256(content).hexdigest()):
                found[name] = bytearray(content)  # writable, as torch wants it
            elif content or "ubyte" in path.name:
                say(f"{path} is not FashionMNIST's (its SHA-256 is another): left alone")
    return found


def read_idx(path):
    """The bytes, unpacked if need be, of a file in the IDX format; of any other, nothing."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with (gzip.open if packed else open)(path, "rb") as file:
        return file.read() if file.peek(3)[:3] == b"\0\0\x08" else b""


def fetch(source, folder):
    """Put the files of a mirror, or of the Debian package (without root), into `folder`; returns it."""
    say(f"fetching FashionMNIST from {source}")
    if source in MIRRORS:
        for name in SHA256:
            with urllib.request.urlopen(f"{source}{name}.gz", timeout=TIMEOUT) as answer:
                (folder / name).write_bytes(answer.read())
    else:
        apt = (f"apt-get -qq -oDir::State={folder} -oDir::State::status=/var/lib/dpkg/status "
               f"-oDir::Cache={folder} -oAcquire::http::Timeout={TIMEOUT}")
        subprocess.run(f"{apt} update && {apt} download {source} && dpkg-deb -x *.deb .", shell=True,
                       cwd=folder, check=True, capture_output=True, text=True, timeout=300)
    return folder


# ----------------------------------------------------------------------------------- training


@dataclass
class Training:
    """What is trained: both networks, the moving average of G, and an optimizer for each network."""

    G: nn.Module
    D: nn.Module
    G_ema: nn.Module
    G_optimizer: torch.optim.Optimizer
    D_optimizer: torch.optim.Optimizer


def new_training(Generator, Discriminator, settings, device):
    """Networks and optimizers, initialised from the seed. Raises UserError for a BatchNorm in D."""
    torch.manual_seed(settings["seed"] * 1_000_000)
    on_cpu = device.type == "cpu"
    # Tried and faster on the CPU only: images stored channel by channel last, and the fused Adam.
    layout = torch.channels_last if on_cpu else torch.contiguous_format
    G = Generator(settings["latent_dim"]).to(device, memory_format=layout)
    D = Discriminator().to(device, memory_format=layout)
    if any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in D.modules()):
        raise UserError("the discriminator has a BatchNorm, which would mix the statistics of real and "
                        "fake images: take it out, or give each a pass of its own in common.train_step")
    # No momentum (beta 1 is 0; in the DCGAN paper 0.5): each network moves what the other aims at.
    adam = {"lr": settings["learning_rate"], "betas": (0.0, 0.999), "fused": on_cpu}
    G_optimizer, D_optimizer = (torch.optim.Adam(network.parameters(), **adam) for network in (G, D))
    return Training(G, D, copy.deepcopy(G).requires_grad_(False), G_optimizer, D_optimizer)


def r1_penalty(D, x):
    """1/2 E |grad D(x)|^2 of D's logit at real images: R1 (Mescheder et al. 2018, arXiv:1801.04406)."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean() / 2


def train_step(training, real, z, r1_gamma, dtype):
    """One iteration of Algorithm 1 of Goodfellow et al. (2014), with k = 1.

    real: images (N, 1, 28, 28) in [-1, 1]; z: latent vectors (N, latent_dim). Returns scalars: D_loss,
    the mean over real and fake images without the penalty, G_loss, and the means of D(x) and D(G(z)).
    """
    G, D = training.G, training.D
    autocast = torch.autocast(real.device.type, dtype, enabled=dtype is not torch.float32)

    # Discriminator: ascend log D(x) + log(1 - D(G(z))), with -log D = softplus(-logit) and
    # -log(1 - D) = softplus(logit). D has no BatchNorm, so one pass over both is the same as two.
    with autocast:
        fake = G(z)
        logits = D(torch.cat([real, fake.detach()])).float()
        penalty = r1_gamma * r1_penalty(D, real) if r1_gamma else 0
    real_logits, fake_logits = logits.chunk(2)
    D_loss = (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()) / 2
    training.D_optimizer.zero_grad()
    (D_loss + penalty).backward()
    training.D_optimizer.step()

    # Generator, against the discriminator just updated: ascend log D(G(z)), the non-saturating form,
    # with the same z: another G(z) would take longer and gain nothing.
    D.requires_grad_(False)
    with autocast:
        logits = D(fake).float()
    G_loss = F.softplus(-logits).mean()
    training.G_optimizer.zero_grad()
    G_loss.backward()
    training.G_optimizer.step()
    D.requires_grad_(True)
    D_x, D_G_z = real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()
    losses = {"D_loss": D_loss, "G_loss": G_loss, "D_x": D_x, "D_G_z": D_G_z}
    return {name: value.detach() for name, value in losses.items()}


@torch.no_grad()
def update_average(G_ema, G, step):
    """G_ema <- d G_ema + (1 - d) G, d = (1 + step) / (10 + step): about the last tenth of all steps."""
    d = (1 + step) / (10 + step)
    for average, weight in zip(G_ema.parameters(), G.parameters(), strict=True):
        average.lerp_(weight, 1 - d)


def calibrate_batch_norm(G_ema, latent_dim):
    """Measure BatchNorm's mean and variance for the averaged weights: those of G do not fit them."""
    z = torch.randn(20, 128, latent_dim, generator=torch.Generator().manual_seed(2015))
    update_bn(z, G_ema, next(G_ema.parameters()).device)


def scale(images):
    """uint8 images, 0..255, to float ones in [-1, 1], the range of the generator's tanh."""
    return images / 127.5 - 1


def train_epoch(training, images, epoch, settings, dtype, progress):
    """Train on every image once, in batches (an incomplete last one is left out). epoch: from 1.
    Returns what the steps returned, (steps,) each, on the CPU."""
    # The random numbers of an epoch depend on its number alone, so a continued run has the same.
    torch.manual_seed(settings["seed"] * 1_000_000 + epoch)
    training.G.train(), training.D.train()
    steps = len(images) // settings["batch_size"]
    batches = torch.randperm(len(images), device=images.device).split(settings["batch_size"])[:steps]
    record = []
    for step, batch in enumerate(batches, (epoch - 1) * steps):
        real = scale(images[batch])
        z = torch.randn(len(batch), settings["latent_dim"], device=images.device)
        # Lazily: every fourth step, four times as much (Karras et al. 2020, arXiv:1912.04958).
        r1_gamma = 4 * settings["r1_gamma"] if step % 4 == 0 else 0
        record.append(train_step(training, real, z, r1_gamma, dtype))
        update_average(training.G_ema, training.G, step)
        progress()
    return {name: torch.stack([losses[name] for losses in record]).cpu() for name in record[0]}


def train(training, history, images, epochs, settings, dtype, folder, sample_every):
    """Train from the last epoch of `history`, which grows, to `epochs`. images: uint8 (N, 1, 28, 28)."""
    z = latent_vectors(settings["latent_dim"])[:64]
    with progress_bar(len(history), epochs, history.D_loss.shape[1]) as bar:
        for epoch in range(len(history) + 1, epochs + 1):
            start = time.perf_counter()
            losses = train_epoch(training, images, epoch, settings, dtype, bar.update)
            calibrate_batch_norm(training.G_ema, settings["latent_dim"])
            seconds = time.perf_counter() - start
            check_losses(losses, epoch)
            history.append(losses, generate(training.G_ema, z), seconds)
            save_checkpoint(folder, training, history, settings)
            if epoch == 1:  # only now, what a run before this one left
                remove(folder, *RESULTS)
            save_tables(folder, history)
            due = [epoch] if epoch % sample_every == 0 else []
            draw_training(folder, history, settings["model"], due)
            D_loss, G_loss, D_x, D_G_z = (values.mean() for values in losses.values())
            bar.postfix = (f"loss D {D_loss:.2f} G {G_loss:.2f} D(x) {D_x:.2f} D(G(z)) {D_G_z:.2f} "
                           f"{len(images) / seconds:.0f} img/s")


@torch.no_grad()
def generate(G, z):
    """Images G(z) as uint8 (N, 28, 28) on the CPU, BatchNorm using its running statistics."""
    G.eval()
    x = G(z.to(next(G.parameters()).device))
    return ((x + 1) * 127.5).round().byte().squeeze(1).cpu()


def latent_vectors(latent_dim):
    """500 latent vectors, the same in every run and for both models; figures show the first ones."""
    return torch.randn(500, latent_dim, generator=torch.Generator().manual_seed(2014))


def perturb(G, z, dims, offsets):
    """uint8 images G(z + offset e_dim), (dims, offsets, N, 28, 28), of z (N, latent_dim); and the
    response, (dims, offsets): the mean absolute change of a pixel against G(z), in % of its range."""
    moved = z.repeat(len(dims), len(offsets), 1, 1)
    for i, dim in enumerate(dims):
        moved[i, :, :, dim] += torch.tensor(offsets)[:, None]
    images = generate(G, moved.flatten(0, 2)).view(*moved.shape[:3], 28, 28)
    return images, (images.float() - generate(G, z).float()).abs().mean((2, 3, 4)) / 255 * 100


# ------------------------------------------------------------------------------------ figures

STYLE = ["default", {  # whatever the user's own is
    "font.size": 7, "axes.titlesize": 7, "figure.titlesize": 9, "legend.frameon": False,
    "image.cmap": "gray", "image.interpolation": "nearest"}]


def new_figure(height, title):
    """A figure 12 cm wide, the text width of a report, and `height` cm high (17 at most), at 200 dpi."""
    figure = Figure((12 / 2.54, height / 2.54), dpi=200, layout="constrained")
    figure.suptitle(title)
    return figure


def mosaic(images):
    """uint8 images (N, 28, 28) as one, in rows of 8 with a white margin around each."""
    cells = F.pad(images, (1, 1, 1, 1), value=255).unflatten(0, (-1, 8))  # (rows, 8, 30, 30)
    return cells.transpose(1, 2).reshape(-1, 8 * 30).numpy()


def images_figure(images, title, rows=(), columns=(), caption="", right=()):
    """A page of uint8 images (N, 28, 28), 8 in a row, with labels left and right of the rows and above
    the columns."""
    height = 0.9 + 1.45 * (len(images) // 8) + 1.1 * bool(caption)
    figure = new_figure(min(17, height), title)
    axes = figure.subplots()
    axes.imshow(mosaic(images), vmin=0, vmax=255)
    axes.set_xticks(np.arange(len(columns)) * 30 + 14.5, columns)
    axes.set_yticks(np.arange(len(rows)) * 30 + 14.5, rows)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(caption)
    for row, label in enumerate(right):
        axes.text(244, row * 30 + 14.5, label, verticalalignment="center")
    return figure


def losses_figure(history, model):
    """Both losses over training: every iteration thin, the mean of each epoch bold."""
    epochs, steps = history.D_loss.shape
    title = f"{model}: losses over {epochs} epochs (thin: every iteration; bold: epoch mean)"
    figure = new_figure(7.5, title)
    axes = figure.subplots()
    iterations, middles = np.arange(1, epochs * steps + 1) / steps, np.arange(epochs) + 0.5
    # D, the narrower band, is in front; G is dashed, for print in black and white.
    curves = ((history.D_loss, "Discriminator", "tab:blue", "-", 2),
              (history.G_loss, "Generator", "tab:orange", "--", 1))
    for losses, label, colour, style, order in curves:
        axes.plot(iterations, losses.flatten(), color=colour, linewidth=0.3, alpha=0.35, zorder=order)
        axes.plot(middles, losses.mean(1), style, color=colour, linewidth=1.6, label=label, zorder=3,
                  marker="o" if epochs == 1 else "")  # one point makes no line
    axes.axhline(np.log(2), color="black", linewidth=0.8, linestyle=":", label="ln 2: D is undecided")
    axes.set(xlim=(0, epochs), xlabel="Epoch", ylabel="Loss (binary cross-entropy)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def nearest(images, others):
    """For each uint8 image (N, 28, 28) the index of its nearest among `others` (M, 28, 28), and the
    distance, both (N,): the root mean square difference of pixels, in grey levels of 0 to 255."""
    parts = (part.flatten(1).float() for part in others.split(5000))  # all at once take much memory
    distances = torch.cat([torch.cdist(images.flatten(1).float(), part) for part in parts], 1) / 28
    return distances.argmin(1), distances.amin(1)


def nearest_neighbours_figure(fake, real, train, title):
    """The first 8 generated images over their nearest training images, and the median distance of all:
    a generator that had learned its data by heart would lie far below real test images."""
    indices, distances = nearest(fake, train)
    caption = ("Distance (root mean square difference in grey levels of 0 to 255)\n"
               f"Median of {len(fake)} generated images {distances.median():.1f}, "
               f"of {len(real)} real test images {nearest(real, train)[1].median():.1f}")
    title += ": generated images and the nearest training images"
    columns = [f"{distance:.1f}" for distance in distances[:8]]
    pairs = torch.cat([fake[:8], train[indices[:8]]])
    return images_figure(pairs, title, ["generated", "nearest"], columns, caption)


def perturbation_figure(images, response, dims, offsets, title):
    """What `perturb` returns for 8 latent vectors: a row an offset, a block of rows a dimension."""
    rows = [f"z[{dim}] {offset:+.4g}" for dim in dims for offset in offsets]
    rows = [row.replace("-", "\N{MINUS SIGN}") for row in rows]
    columns = [f"Sample {i}" if len(rows) <= 16 else f"{i}" for i in range(1, 9)]
    title += ": one latent dimension at a time, moved by an offset"
    caption = "Right: response, the mean absolute change of a pixel in % of its range"
    right = [f"{change:.1f}%" for change in response.flatten()]
    figure = images_figure(images.flatten(0, 2), title, rows, columns, caption, right)
    edges = np.arange(1, len(dims)) * len(offsets) * 30 - 0.5
    figure.axes[0].hlines(edges, -0.5, 239.5, "black", linewidth=0.6)
    figure.axes[0].tick_params("x", labelsize=5)  # as wide as a column
    return figure


def picture(images, title):
    """uint8 images (N, 28, 28) in rows of 8 under a title, as a PIL image: quicker than a figure."""
    image = Image.fromarray(np.pad(mosaic(images), ((18, 0), (0, 0)), constant_values=255))
    ImageDraw.Draw(image).text((4, 3), title, fill=0)
    return image


def draw_training(folder, history, model, epochs):
    """samples_latest.png, and for these epochs, if any, their grids of samples and the losses."""
    latest = picture(history.samples[-1], f"{model}, epoch {len(history)}").resize((960, 1032), 0)
    save(folder / "samples_latest.png", lambda file: latest.save(file, "PNG", dpi=(200, 200)))
    for epoch in epochs:
        figure = images_figure(history.samples[epoch - 1], f"{model}, epoch {epoch}: generated samples")
        save(folder / f"samples_epoch_{epoch:03d}.png", figure.savefig)
    if epochs:
        save(folder / "losses.png", losses_figure(history, model).savefig)


def draw_results(folder, history, model, fake, real, train, perturbation):
    """The other figures. fake, real, train: generated, test and training images, uint8 (N, 28, 28);
    perturbation: what `perturbation_figure` takes before the title."""
    title, pairs = f"{model}, epoch {len(history)}", torch.cat([real[:8], fake[:8]])
    beside = images_figure(pairs, f"{title}: real test images and generated ones", ["real", "generated"])
    save(folder / "real_vs_generated.png", beside.savefig)
    save(folder / "nearest_neighbours.png", nearest_neighbours_figure(fake, real, train, title).savefig)
    save(folder / "latent_perturbation.png", perturbation_figure(*perturbation, title).savefig)
    shown = range(len(history), 0, -len(history) // 50)[::-1]  # at most 50, among them the last
    frames = (picture(history.samples[epoch - 1], f"{model}, epoch {epoch}") for epoch in shown)
    first, *rest = (frame.quantize(16) for frame in frames)  # grey levels: half the file
    options = {"append_images": rest, "loop": 0, "duration": [100] * len(rest) + [2000]}  # milliseconds
    save(folder / "training.gif", lambda file: first.save(file, "GIF", save_all=True, **options))


# -------------------------------------------------------------------------- files and checkpoints

RESULTS = ("losses.png", "samples_epoch_*.png", "real_vs_generated.png", "nearest_neighbours.png",
           "latent_perturbation.png", "training.gif", "generator.pt", "images")
PARTIAL = ".partial-"  # what names begin with while their files are being written
SOFTWARE = "GAN and DCGAN on FashionMNIST"  # what the PNGs of --images say that they are from


@dataclass
class History:
    """What is known of every epoch, and the text of settings.json."""

    D_loss: torch.Tensor  # (epochs, steps), as G_loss, D_x and D_G_z
    G_loss: torch.Tensor
    D_x: torch.Tensor
    D_G_z: torch.Tensor
    samples: torch.Tensor  # uint8 (epochs, 64, 28, 28), from the same latent vectors
    seconds: list
    settings_json: str

    def __len__(self):
        return len(self.seconds)

    def append(self, losses, samples, seconds):
        for name, values in {**losses, "samples": samples}.items():
            setattr(self, name, torch.cat([getattr(self, name), values[None]]))
        self.seconds.append(seconds)


def save(path, save_to, needed=False):
    """Write what save_to(file) writes, whole or not at all. A file that cannot be written, because a
    spreadsheet holds it open, say, costs a word and not the run; if it is `needed`, UserError."""
    buffer, part = io.BytesIO(), path.with_name(PARTIAL + path.name)
    save_to(buffer)  # not to the file: torch.save hides what a disk says
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            with contextlib.suppress(OSError):  # some network drives cannot
                os.fsync(file.fileno())
        for wait in (0.1, 0.3, 1):  # on Windows a virus scanner may hold a new file for a moment
            with contextlib.suppress(PermissionError):
                return os.replace(part, path)
            time.sleep(wait)
        os.replace(part, path)
    except OSError as error:
        message = f"{path} could not be written: {error.strerror}; what was there before is intact"
        if needed:
            raise UserError(message) from error
        say(message)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder):
    """Make the folder, keep other runs out of it, and remove what a killed one left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"{folder} is in use by another run: wait, or give another --outputs"
            raise UserError(message) from None
        except (ImportError, OSError):
            pass  # Windows and some network drives have no such locks
        remove(folder, PARTIAL + "*")
        yield


def remove(folder, *patterns):
    """Remove files of these names, and folders of nothing but our images."""
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        with contextlib.suppress(OSError):
            if not path.is_dir():
                path.unlink()
            elif not foreign_images(path):
                shutil.rmtree(path)


def save_tables(folder, history):
    """history.csv: a row an epoch, means and deviations over its steps; and settings.json."""
    columns = {"epoch": range(1, len(history) + 1)}
    for name in ("D_loss", "G_loss", "D_x", "D_G_z"):
        steps = getattr(history, name)
        columns |= {f"{name}_mean": steps.mean(1), f"{name}_std": steps.std(1, correction=0)}
    table = np.column_stack([*columns.values(), history.seconds])
    heading = {"header": ",".join([*columns, "seconds"]), "comments": ""}
    save(folder / "history.csv", lambda file: np.savetxt(file, table, "%.6g", ",", **heading))
    save(folder / "settings.json", lambda file: file.write(history.settings_json.encode()))


def save_checkpoint(folder, training, history, settings):
    """Everything needed to go on; the random numbers follow from the seed and the number of epochs."""
    states = {part: value.state_dict() for part, value in vars(training).items()}
    checkpoint = {**states, "settings": settings, "history": vars(history)}
    save(folder / "checkpoint.pt", lambda file: torch.save(checkpoint, file), needed=True)


def read_checkpoint(path):
    """What torch.save wrote to `path`; no code in it is run. A bad file raises all kinds of errors."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():  # torch.load does not look at the checksums
            raise ValueError("wrong checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(path, training, settings, steps):
    """Put the checkpoint at `path` into `training`; returns its History, of epochs of so many steps.
    Raises UserError when it is of other settings, of another network, or damaged."""
    way_out = "start over with --fresh, or give another --outputs"
    try:
        checkpoint = read_checkpoint(path)
        before = checkpoint["settings"]
        changes = [f"{name} was {before.get(name, 'unknown')}, is now {settings.get(name, 'unknown')}"
                   for name in before | settings if before.get(name) != settings.get(name)]
        if not changes:
            for part, value in vars(training).items():
                value.load_state_dict(checkpoint[part])
            history = History(**checkpoint["history"])
            for values in (history.D_loss, history.G_loss, history.D_x, history.D_G_z):
                values.view(len(history), steps)  # raises an error if some are missing
            history.samples.view(len(history), 64, 28, 28)
            return history
    except Exception as error:  # whatever Python and torch make of a bad file
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{path} is damaged or not ours ({reason}): {way_out}") from error
    more = f"; {len(changes) - 4} more" if len(changes) > 4 else ""
    raise UserError(f"{path} is of other settings or another network ({'; '.join(changes[:4])}{more}): "
                    f"undo that, {way_out}")


def foreign_images(folder):
    """The files in `folder` that `save_images` has not written; hidden ones do not count."""
    return [path for path in folder.glob("[!.]*") if SOFTWARE.encode() not in path.read_bytes()]


def save_images(folder, G, count, latent_dim):
    """Put `count` generated images into `folder`, 00000.png and so on, in the place of those in it."""
    part, tag = folder.with_name(PARTIAL + folder.name), PngInfo()
    tag.add_text("Software", SOFTWARE)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    random = torch.Generator().manual_seed(2016)
    for start in tqdm(range(0, count, 100), "images", unit_scale=100, mininterval=1):
        images = generate(G, torch.randn(100, latent_dim, generator=random))
        for number, image in enumerate(images[: count - start], start):
            Image.fromarray(image.numpy()).save(part / f"{number:05d}.png", pnginfo=tag)
    remove(folder.parent, folder.name)
    part.rename(folder)


# ------------------------------------------------------------------------------- command line

OPTIONS = (  # name, type, default, lowest value, value that is too high, help
    ("epochs", int, 200, 1, np.inf, "train up to this epoch"),
    ("batch-size", int, 128, 2, np.inf, "images per step"),
    ("learning-rate", float, 1e-3, 1e-9, 1, "of both networks"),
    ("r1-gamma", float, 1.0, 0, np.inf, "weight of the R1 penalty; 0: none"),
    ("latent-dim", int, 100, 1, np.inf, "length of the latent vector z"),
    ("seed", int, 0, 0, 2**32, "of all random numbers"),
    ("limit", int, 60_000, 1, np.inf, "train on the first so many images only"),
    ("sample-every", int, 50, 1, np.inf, "epochs between sample grids"),
    ("images", int, 0, 0, np.inf, "write so many generated images as single PNGs"),
    ("perturb-dims", int, None, 0, np.inf, "move these dimensions of z; None: five spread over z"),
    ("perturb-offsets", float, [-4.0, 0.0, 4.0], -1000, 1000, "by so much; z is from N(0, 1)"),
)


def parse_arguments(name, argv=None):
    """The command line of both scripts. Exits with status 2 and one line when it is wrong."""
    parser = argparse.ArgumentParser(
        description=f"Train the {name} on FashionMNIST and draw its figures. An unfinished run is "
                    "continued, a finished one redrawn.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message} (see --help)\n")
    add = parser.add_argument
    add("--data", type=Path, default="data", help="folder of the images (default: data)")
    add("--outputs", type=Path, default="outputs", help="folder of all results (default: outputs)")
    add("--fresh", action="store_true", help="start over instead of continuing")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: auto)")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="(default: auto)")
    for option, kind, default, _, _, use in OPTIONS:
        add(f"--{option}", type=kind, default=default, nargs="+" if "perturb" in option else None,
            metavar="N", help=f"{use} (default: {default})")
    # Before Python 3.14 argparse takes -1e-1 for an option; with a space in front it is a number.
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args([re.sub(r"^-(?=[\d.])", " -", text) for text in argv])
    args.data, args.outputs = args.data.expanduser(), args.outputs.expanduser()
    if args.perturb_dims is None:
        args.perturb_dims = sorted({round(i * (args.latent_dim - 1) / 4) for i in range(5)})
    for option, _, _, lowest, too_high, _ in OPTIONS:
        too_high = args.latent_dim if option == "perturb-dims" else too_high
        for value in np.ravel(getattr(args, option.replace("-", "_"))).tolist():
            if not lowest <= value < too_high:
                below = f" and below {too_high}" if too_high < np.inf else ""
                parser.error(f"argument --{option}: {value} is not at least {lowest}{below}")
    if len(args.perturb_dims) * len(args.perturb_offsets) > 40:
        parser.error("argument --perturb-dims: times the offsets, more than the 40 rows of a page")
    return args


def choose_device(name):
    """The torch.device of that name, if it can compute; "auto": CUDA, else Apple's MPS, else the CPU."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name not in ("auto", *there):
        raise UserError(f"--device {name}: not on this machine, only {', '.join(there)}", 2)
    for device in there if name == "auto" else [name]:
        try:
            F.conv2d(*torch.ones(2, 1, 1, 8, 8, device=device)).sum().item()
            return torch.device(device)
        except Exception as error:  # a card that is busy, or too old for this PyTorch
            reason = f"{device} cannot compute ({error})".partition("\n")[0]
            if name != "auto":
                raise UserError(f"{reason}: try --device cpu") from error
            say(f"{reason}: going on without it")


def choose_dtype(precision, device):
    """The type to compute in; "auto": bfloat16 on processors that multiply it faster, else float32."""
    if precision == "auto":
        cpu = torch.cpu.get_capabilities()
        fast = device.type == "cpu" and (cpu.get("amx_bf16") or cpu.get("avx512_bf16"))
        precision = "bfloat16" if fast else "float32"
    return getattr(torch, precision)


def use_the_cpu_well():
    """No more threads than a container's quota allows, and freed memory kept for the next step."""
    with contextlib.suppress(OSError, ValueError):  # there is no quota
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        torch.set_num_threads(min(torch.get_num_threads(), max(1, quota // period)))
    with contextlib.suppress(OSError, AttributeError):  # this is not glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@functools.cache  # nothing is said twice
def say(message):
    """A line that is no error, beside the progress bar."""
    tqdm.write(message, file=sys.stderr)


def progress_bar(done, epochs, steps):
    layout = "{n:.1f}/{total:.0f}{postfix} left {remaining} {bar}"  # 80 columns show all but the bar
    interval = 1 if sys.stderr.isatty() else 30  # seconds: a log file need not have every update
    return tqdm(initial=done * steps, total=epochs * steps, unit_scale=1 / steps, bar_format=layout,
                mininterval=interval, dynamic_ncols=True)


def check_losses(losses, epoch):
    """Raise UserError when a loss is not finite; say so, once, when one has run away."""
    way_out = "a lower --learning-rate or --precision float32, with --fresh, may help"
    largest = torch.stack([losses["D_loss"], losses["G_loss"]]).mean(1).max()
    if not largest.isfinite():
        raise UserError(f"epoch {epoch}: a loss is not finite; those before are kept; {way_out}")
    if largest > 20:
        say(f"warning: a loss has run away, its mean in an epoch is above 20; {way_out}")


def run(name, Generator, Discriminator, args):
    """Train, continue or only redraw the model as `args` say, and draw every figure."""
    if args.data.is_file():
        raise UserError(f"--data {args.data} is a file: give a folder, of the images or for them")
    device = choose_device(args.device)
    dtype = choose_dtype(args.precision, device)
    train_images, test_images = load_fashion_mnist(args.data)
    train_images = train_images[: args.limit]
    steps = len(train_images) // args.batch_size
    if steps == 0:
        raise UserError(f"--batch-size {args.batch_size}: more than the {len(train_images)} images", 2)
    use_the_cpu_well()
    kept = ("batch_size", "learning_rate", "r1_gamma", "latent_dim", "seed", "precision", "limit")
    settings = {"model": name, **{key: getattr(args, key) for key in kept}}
    training = new_training(Generator, Discriminator, settings, device)
    networks = nn.ModuleDict({"G": training.G, "D": training.D})
    layers = {path: layer for path, layer in networks.named_modules() if not list(layer.children())}
    settings |= {path: str(layer) for path, layer in layers.items()}  # a changed one will be noticed
    folder = args.outputs / name.lower()
    with locked(folder):
        if args.images and (foreign := foreign_images(folder / "images")):
            raise UserError(f"{foreign[0]} is not an image of ours: move it, or give another --outputs")
        if (folder / "checkpoint.pt").exists() and not args.fresh:
            history = load_checkpoint(folder / "checkpoint.pt", training, settings, steps)
        else:
            samples = torch.empty(0, 64, 28, 28, dtype=torch.uint8)
            history = History(*torch.empty(4, 0, steps), samples, [], "")
        epochs = max(len(history), args.epochs)
        print(f"{name} on {device} in {dtype}, {len(train_images):,} images, "
              f"{len(history)} of {epochs} epochs done", flush=True)
        if len(history) < epochs:
            history.settings_json = describe(args, networks, device, dtype)
            try:
                train(training, history, train_images.to(device), epochs, settings, dtype, folder,
                      args.sample_every)
            except KeyboardInterrupt:
                done, again = len(history), " without --fresh" if args.fresh else ""
                message = "stopped before the end of the first epoch: the same command starts again"
                if done:
                    message = (f"stopped after epoch {done}: the same command{again} goes on; "
                               f"with --epochs {done} it draws the figures of what is there")
                raise UserError(message, 130) from None
        due = [*range(args.sample_every, epochs, args.sample_every), epochs]
        save_tables(folder, history)
        draw_training(folder, history, name, due)
        finish(training.G_ema, history, name, folder, train_images, test_images, args)
    print(f"figures in {folder}")


def describe(args, networks, device, dtype):
    """The text of settings.json: every option, what "auto" became, and how large the networks are."""
    sizes = {key: sum(p.numel() for p in network.parameters()) for key, network in networks.items()}
    facts = {"options": vars(args), "device": device, "precision": dtype, "torch": torch.__version__,
             "python": sys.version.split()[0], "threads": torch.get_num_threads(), "parameters": sizes}
    return json.dumps(facts, default=str, indent=2)


def finish(G_ema, history, name, folder, train_images, test_images, args):
    """What the finished generator makes: the figures, the weights to take elsewhere, the images."""
    z, moved = latent_vectors(args.latent_dim), (args.perturb_dims, args.perturb_offsets)
    fake, perturbed = generate(G_ema, z), perturb(G_ema, z[:8], *moved)
    real, train = test_images[:500, 0], train_images[:, 0]
    draw_results(folder, history, name, fake, real, train, (*perturbed, *moved))
    weights = {key: value.cpu() for key, value in G_ema.state_dict().items()}
    save(folder / "generator.pt", lambda file: torch.save(weights, file))
    if args.images:
        save_images(folder / "images", G_ema, args.images, args.latent_dim)


class Terminal:
    """stdout or stderr, which may be closed, gone or of few letters: then words are lost, and no run."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115
        with contextlib.suppress(AttributeError):  # a notebook's has no such method
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text=""):
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
            self.stream.flush()

    flush = write


@contextlib.contextmanager
def errors_for_people():
    """Turn what stops a run into one line and an exit status, whatever the terminal and the user's
    matplotlib settings are like."""
    with contextlib.suppress(ValueError):  # this is not the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    say.cache_clear()  # of an earlier run in this notebook
    stdout, stderr = Terminal(sys.stdout), Terminal(sys.stderr)
    with (contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr),
          matplotlib.style.context(STYLE)):
        try:
            yield
            return
        except UserError as error:
            message, status = (*error.args, 1)[:2]
        except OSError as error:
            message, status = f"{error}; another --outputs or --data may help", 1
        except KeyboardInterrupt:
            message, status = "stopped", 130  # as shells have it for Ctrl-C
        except (MemoryError, RuntimeError) as error:
            trouble = "out of memory|allocate memory|MemoryError|busy|CUDA error|CUDNN|not currently"
            if not re.search(trouble, repr(error)):  # then it is a mistake in the code
                raise
            reason = (str(error) or "out of memory").partition("\n")[0]
            message, status = f"{reason}: try --device cpu or a smaller --batch-size", 1
        print("error: " * (status != 130) + message, file=sys.stderr)
        sys.exit(status)


def main(name, Generator, Discriminator, argv=None):
    """Run a script's command line; `name` is the model's, for titles and the folder."""
    args = parse_arguments(name, argv)
    with errors_for_people():
        run(name, Generator, Discriminator, args)
