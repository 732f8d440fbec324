"""Measure what a report claims of the two models: `python compare.py` after `gan.py` and `dcgan.py`.

Reads outputs/gan and outputs/dcgan (either alone will do), and writes outputs/comparison.png and
outputs/comparison.md. Quality and variety are judged in the features of a small classifier of FashionMNIST,
trained here once and kept in outputs/classifier.pt, as published measures do with Inception's features:
10,000 generated images against the 10,000 test images; what 10,000 training images score is the best that
can be expected. Every sample is of fixed random numbers; nothing is picked.
"""

import argparse
import importlib
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common
from common import UserError

GARMENTS = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")
MODELS = ("GAN", "DCGAN")
N = 10_000  # images on each side of a comparison
PAIRS = 1000  # of latent vectors, for the path length; a tenth of them for the interpolations
EPOCHS = 10  # of the judge
SAMPLE_EVERY = 50  # epochs between the sample grids that are compared
K = 5  # nearest neighbours that make an image's neighbourhood, as in Naeem et al. (2020)


# --------------------------------------------------------------------------------- the judge


class Judge(nn.Module):
    """A classifier: images (N, 1, 28, 28) in [-1, 1] to logits (N, 10); `features`: the last hidden layer."""

    def __init__(self):
        super().__init__()

        def block(channels_in, channels_out):
            conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
            return conv, nn.MaxPool2d(2), nn.BatchNorm2d(channels_out), nn.ReLU()

        self.features = nn.Sequential(*block(1, 32), *block(32, 64), *block(64, 128), nn.Flatten(),
                                      nn.Linear(128 * 3 * 3, 128), nn.ReLU())
        self.classify = nn.Sequential(nn.Dropout(0.4), nn.Linear(128, 10))

    def forward(self, x):
        return self.classify(self.features(x))


def train_judge(images, labels, epochs, progress):
    """A Judge trained on uint8 images (N, 1, 28, 28) and their labels; progress(): called every epoch."""
    torch.manual_seed(0)
    judge = Judge().to(memory_format=torch.channels_last)
    steps = epochs * math.ceil(len(images) / 128)
    optimizer = torch.optim.Adam(judge.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(128):
            x = common.scale(images[batch])
            mirrored = torch.rand(len(batch)) < 0.5  # a garment is the same garment seen in a mirror
            x[mirrored] = x[mirrored].flip(-1)
            optimizer.zero_grad()
            F.cross_entropy(judge(x), labels[batch]).backward()
            optimizer.step()
            schedule.step()
        progress()
    return judge.eval()


def in_parts(function, x):
    """function(x), 500 rows of x at a time: the 3,300 images of the interpolations at once took 1 GB more."""
    return torch.cat([function(part) for part in x.split(500)])


@torch.no_grad()
def judge_images(judge, images):
    """Features (N, 128) and class probabilities (N, 10) of uint8 images (N, 28, 28) or (N, 1, 28, 28).

    The probabilities are the mean of those of the image and of its mirror image: test accuracy 0.934
    instead of 0.931.
    """
    images = images.view(-1, 1, 28, 28)
    features, mirrored = (in_parts(lambda part: judge.features(common.scale(part)), view)
                          for view in (images, images.flip(-1)))
    return features, (judge.classify(features).softmax(1) + judge.classify(mirrored).softmax(1)) / 2


# ------------------------------------------------------------------------------- the measures


def frechet_distance(a, b):
    """Between normal distributions fitted to the features a (N, F) and b (M, F); Heusel et al. (2017).

    |mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) with the covariances A and B.
    """
    a, b = a.double(), b.double()
    A, B = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(A)
    root_A = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # (A B)^(1/2) has the trace of (A^(1/2) B A^(1/2))^(1/2), which is symmetric.
    trace_root = torch.linalg.eigvalsh(root_A @ B @ root_A).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * trace_root).item()


def neighbourhood(features):
    """The distance (N,) of each point of (N, F) to its K-th nearest other point."""
    return in_parts(lambda part: torch.cdist(part, features).kthvalue(K + 1).values, features)


def precision_recall_density_coverage(real, fake):
    """Of features real (N, F) and fake (M, F), each 1 at its best, density a little more by chance.

    precision: the share of fake images within the neighbourhood of a real one; recall: the share of real
    ones within that of a fake one (Kynkäänniemi et al. 2019). density: in how many real neighbourhoods a
    fake image lies, over K; coverage: the share of real images with a fake one in their neighbourhood
    (Naeem et al. 2020).
    """
    real_radius, fake_radius = neighbourhood(real), neighbourhood(fake)
    precise, density = [], []
    recalled, covered = torch.zeros(2, len(real), dtype=torch.bool)
    for part, radius in zip(fake.split(1000), fake_radius.split(1000), strict=True):
        distance = torch.cdist(part, real)
        inside_real = distance <= real_radius
        precise.append(inside_real.any(1))
        density.append(inside_real.sum(1) / K)
        recalled |= (distance <= radius[:, None]).any(0)
        covered |= inside_real.any(0)
    return {
        "precision": torch.cat(precise).float().mean().item(),
        "recall": recalled.float().mean().item(),
        "density": torch.cat(density).float().mean().item(),
        "coverage": covered.float().mean().item(),
    }


def sharpness(images):
    """Of uint8 images (N, 28, 28), in grey levels squared: the variance of an image's Laplacian, the measure
    by which microscopes focus (Pech-Pacheco et al. 2000), averaged over the images."""
    laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    edges = F.conv2d(images[:, None].float(), laplacian)
    return edges.flatten(1).var(1, correction=0).mean().item()


def class_entropy(shares):
    """Of the shares (10,) of the classes, in nats over ln 10: 1 when all are equal, 0 when there is one."""
    shares = shares[shares > 0]
    return (-(shares * shares.log()).sum() / math.log(10)).item()


def spread_within_classes(features, classes):
    """The mean distance between features (N, F) of images of one class, averaged over the classes."""
    groups = [features[classes == label][:500] for label in range(10)]
    return torch.stack([F.pdist(group).mean() for group in groups if len(group) > 1]).mean().item()


def interpolate(a, b, t):
    """Between latent vectors a and b (..., L) on the great circle, the way of vectors from N(0, 1): at t = 0
    a, at t = 1 b (slerp; White 2016)."""
    angle = torch.acos(F.cosine_similarity(a, b, dim=-1).clamp(-1, 1))[..., None]
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


@torch.no_grad()
def path_length(G, judge, z_a, z_b, t, epsilon=1e-3):
    """Perceptual path length (Karras et al. 2019): the mean of |f(G(z(t + e))) - f(G(z(t)))|^2 / e^2 with the
    judge's features f, over pairs of latent vectors (N, L) and places t (N, 1) on the way between them."""
    here, there = (in_parts(lambda z: judge.features(G(z)), interpolate(z_a, z_b, place))
                   for place in (t, t + epsilon))
    return ((here - there).square().sum(1) / epsilon**2).mean().item()


@torch.no_grad()
def interpolation_steps(G, judge, z_a, z_b, steps):
    """Images (N, steps + 1, 1, 28, 28) on the way between latent vectors (N, L), and the distances (N, steps)
    of the judge's features from one to the next."""
    t = torch.linspace(0, 1, steps + 1)[None, :, None]
    z = interpolate(z_a[:, None], z_b[:, None], t)
    x = in_parts(G, z.flatten(0, 1))
    features = in_parts(judge.features, x).view(*z.shape[:2], -1)
    return x.view(*z.shape[:2], 1, 28, 28), features.diff(dim=1).norm(dim=2)


def stability(history, sample_every):
    """How a run's losses and samples move, over its last 50 epochs (or all, if they are fewer).

    history: as common.run keeps it. Grids are `sample_every` epochs apart, in grey levels of 0 to 255.
    """
    steps = history["steps"][-50:]
    grids = history["samples"][sample_every - 1 :: sample_every].float()
    changes = grids.diff(dim=0).abs().mean().item() if len(grids) > 1 else math.nan
    return {
        "D loss: deviation within an epoch": steps[..., 0].std(1).mean().item(),
        "G loss: deviation within an epoch": steps[..., 1].std(1).mean().item(),
        "D loss: deviation of the epoch means": steps[..., 0].mean(1).std().item(),
        "G loss: deviation of the epoch means": steps[..., 1].mean(1).std().item(),
        "D(x): distance from 1/2": (steps[..., 2].mean() - 0.5).abs().item(),
        "D(G(z)): distance from 1/2": (steps[..., 3].mean() - 0.5).abs().item(),
        "change of the samples from grid to grid": changes,
    }


# ------------------------------------------------------------------------- from runs to a table


def load_run(outputs, name):
    """The averaged generator, the history and the settings of the run in outputs/NAME. Raises UserError."""
    path = outputs / name.lower() / "checkpoint.pt"
    try:
        checkpoint = common.read_checkpoint(path)
        settings = checkpoint["settings"]
        G = importlib.import_module(name.lower()).Generator(settings["latent_dim"])
        G.load_state_dict({key.removeprefix("module."): value for key, value in checkpoint["averaged"].items()
                           if key.startswith("module.")})
        return G.eval(), checkpoint["history"], settings
    except Exception as error:  # whatever Python and torch make of a damaged file
        raise common.damaged(path, error, f"run {name.lower()}.py again") from error


def load_judge(outputs, train, progress):
    """The judge of outputs/classifier.pt, trained first where it is not there."""
    path = outputs / "classifier.pt"
    judge = Judge()
    try:
        judge.load_state_dict(common.read_checkpoint(path))
        judge.eval()
        progress(EPOCHS)
    except Exception:  # there is none, or a damaged one
        judge = train_judge(*train, EPOCHS, progress)
        common.save(path, partial(torch.save, judge.state_dict()))
    return judge


def measure_images(judge, images, real):
    """Quality and variety of uint8 images (N, 28, 28) against `real`, what judge_images says of real ones."""
    features, probabilities = judge_images(judge, images)
    real_features, real_probabilities = real
    classes = probabilities.argmax(1)
    shares = torch.bincount(classes, minlength=10) / len(classes)
    real_spread = spread_within_classes(real_features, real_probabilities.argmax(1))
    measures = {
        "Frechet distance": frechet_distance(features, real_features),
        **precision_recall_density_coverage(real_features, features),
        "confidence": probabilities.amax(1).mean().item(),
        "sharpness": sharpness(images),
        "entropy of the garments": class_entropy(shares),
        "smallest share of a garment": shares.min().item(),
        "largest share of a garment": shares.max().item(),
        "spread within a garment": spread_within_classes(features, classes) / real_spread,
    }
    return measures, shares


def measure_latent_space(G, judge, latent_dim):
    """Smoothness of one model's latent space, and what to draw of an interpolation."""
    random = torch.Generator().manual_seed(2018)
    z_a, z_b = torch.randn(2, PAIRS, latent_dim, generator=random)
    lengths = path_length(G, judge, z_a, z_b, torch.rand(PAIRS, 1, generator=random))
    images, jumps = interpolation_steps(G, judge, z_a[: PAIRS // 10], z_b[: PAIRS // 10], 32)
    jumps = jumps / jumps.mean(1, keepdim=True)
    return {"path length": lengths, "largest jump": jumps.amax(1).mean().item()}, images[:2, ::2, 0], jumps


MEANINGS = {  # claim: measure: what it means, and which way is better
    "Quality": {
        "Frechet distance": "between the judge's features of generated and of real images; lower is better",
        "precision": "share of generated images that lie among real ones; higher is better",
        "density": "how many real images each of them lies among; closer to real data's is better",
        "confidence": "mean probability of the garment that the judge sees; closer to real data's is better",
        "sharpness": "variance of the images' Laplacian; closer to real data's is better",
    },
    "Variety": {
        "recall": "share of real images that lie among generated ones; higher is better",
        "coverage": "share of real images with a generated one close by; higher is better",
        "entropy of the garments": "1: all ten equally frequent, 0: only one; higher is better",
        "smallest share of a garment": "of ten; closer to 0.1 is better",
        "largest share of a garment": "of ten; closer to 0.1 is better",
        "spread within a garment": "distance within a class over that of real images; closer to 1 is better",
    },
    "Stability": {
        "D loss: deviation within an epoch": "mean of the last 50 epochs; lower is steadier",
        "G loss: deviation within an epoch": "mean of the last 50 epochs; lower is steadier",
        "D loss: deviation of the epoch means": "over the last 50 epochs; lower is steadier",
        "G loss: deviation of the epoch means": "over the last 50 epochs; lower is steadier",
        "D(x): distance from 1/2": "0: the two networks are in balance; lower is better",
        "D(G(z)): distance from 1/2": "0: the two networks are in balance; lower is better",
        "change of the samples from grid to grid": "of a pixel, in grey levels; lower is steadier",
    },
    "Smoothness of the latent space": {
        "path length": "squared change of the features per squared step of z; lower is smoother",
        "largest jump": "of 32 steps between two z, over the mean step; closer to 1 is smoother",
    },
    "Memorisation": {
        "distance to the nearest training image": "in grey levels; far below real test images' is copying",
    },
}


def comparison_table(columns):
    """Markdown: a row a measure, a column each of `columns` ({name: {measure: value}})."""
    lines = [f"| measure | {' | '.join(columns)} | what it means |", "|---" * (len(columns) + 2) + "|"]
    for claim, measures in MEANINGS.items():
        lines.append(f"| **{claim}** |" + " |" * (len(columns) + 1))
        for measure, meaning in measures.items():
            values = [values.get(measure, math.nan) for values in columns.values()]
            cells = ["" if math.isnan(value) else f"{value:.4g}" if value < 1000 else f"{value:,.0f}"
                     for value in values]
            lines.append(f"| {measure} | {' | '.join(cells)} | {meaning} |")
    return "\n".join([*lines, ""])


def draw_losses(axes, history, title):
    """The mean of both losses in every epoch, and their standard deviation within it as a band."""
    steps = history["steps"]
    epochs = np.arange(1, len(steps) + 1)
    curves = ((0, "Discriminator", "tab:blue", "-"), (1, "Generator", "tab:orange", "--"))
    for i, label, colour, style in curves:
        mean, std = steps[..., i].mean(1).numpy(), steps[..., i].std(1, correction=0).numpy()
        axes.plot(epochs, mean, style, color=colour, linewidth=1.2, label=label)
        axes.fill_between(epochs, mean - std, mean + std, color=colour, alpha=0.25, linewidth=0)
    axes.axhline(math.log(2), color="black", linewidth=0.8, linestyle=":", label="ln 2")
    axes.set_title(f"{title}: losses", fontsize=7)
    axes.set_xlabel("Epoch", fontsize=7)


def draw_paths(axes, images, title):
    """Images (N, steps, 28, 28) in [-1, 1]: one row for each way from one latent vector to another."""
    rows = [torch.cat(list(F.pad(path, (1, 1, 1, 1), value=1)), dim=1) for path in images]
    axes.imshow(torch.cat(rows).numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(f"{title}: from one latent vector to another", fontsize=7)


def draw_jumps(axes, jumps):
    """The step-to-step change along interpolations, {name: (N, steps)}: mean and largest of N."""
    for (name, changes), style in zip(jumps.items(), ("-", "--"), strict=False):
        place = np.arange(1, changes.shape[1] + 1)
        (line,) = axes.plot(place, changes.mean(0).numpy(), style, label=f"{name}, mean of {len(changes)}")
        axes.plot(place, changes.amax(0).numpy(), style, color=line.get_color(), linewidth=0.6,
                  label=f"{name}, largest")
    axes.set_title("Interpolation: change from step to step", fontsize=7)
    axes.set_xlabel("Step", fontsize=7)
    axes.set_ylabel("relative to the mean step", fontsize=7)
    axes.set_ylim(0, None)


def draw_shares(axes, shares):
    """The share of each of the ten garments, {name: (10,)}."""
    for i, (name, values) in enumerate(shares.items()):
        place = np.arange(10) + (i - (len(shares) - 1) / 2) * 0.27
        hatch = ("", "/////", ".....")[i]  # tells the bars apart in black and white
        axes.barh(place, values.numpy() * 100, 0.25, label=name, hatch=hatch, edgecolor="black", linewidth=0)
    axes.set_yticks(np.arange(10), GARMENTS)
    axes.invert_yaxis()
    axes.set_title("Share of each garment in %", fontsize=7)


def comparison_figure(runs, real, shares):
    """One page: losses, samples beside real images, interpolations with their steps, garments.

    runs: {name: {"history", "samples" (32, 28, 28), "path" (N, steps, 28, 28), "jumps" (N, steps)}};
    real: uint8 (32, 28, 28); shares: {name: (10,)}, real data's among them.
    """
    titles = [f"{name}, epoch {len(run['history']['steps'])}" for name, run in runs.items()]
    figure = common.new_figure(22, f"{' and '.join(runs)} on FashionMNIST")
    top, middle, paths, bottom = figure.subfigures(4, height_ratios=(5, 2.6, 0.4 + 1.9 * len(runs), 6.5))
    losses = top.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    samples = middle.subplots(1, len(runs) + 1)
    ways = paths.subplots(len(runs), squeeze=False)[:, 0]
    for title, run, *axes in zip(titles, runs.values(), losses, samples[:-1], ways, strict=True):
        draw_losses(axes[0], run["history"], title)
        common.show_images(axes[1], run["samples"])
        axes[1].set_title(title, fontsize=7)
        draw_paths(axes[2], run["path"], title)
    common.show_images(samples[-1], real)
    samples[-1].set_title("real test images", fontsize=7)
    jumps_axes, shares_axes = bottom.subplots(1, 2)
    draw_jumps(jumps_axes, {name: run["jumps"] for name, run in runs.items()})
    draw_shares(shares_axes, shares)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2, "frameon": False}
    for axes, place in (*((axes, {}) for axes in losses), (jumps_axes, below), (shares_axes, below)):
        axes.tick_params(labelsize=6)
        axes.legend(fontsize=6, **place)
    return figure


def compare(outputs, data, bar):
    """Measure the runs in `outputs`; write comparison.png and comparison.md there; returns the table."""
    names = [name for name in MODELS if (outputs / name.lower() / "checkpoint.pt").exists()]
    if not names:
        raise UserError(f"{outputs} has no checkpoint of gan.py or dcgan.py: run one of them first")
    loaded = {name: load_run(outputs, name) for name in names}
    train, test = (common.load_fashion_mnist(data, split) for split in ("train", "test"))
    common.keep_freed_memory()
    bar.total = EPOCHS + 1 + 2 * len(names)
    judge = load_judge(outputs, train, bar.update)
    real = judge_images(judge, test[0])
    accuracy = (real[1].argmax(1) == test[1]).float().mean().item()

    runs, columns, shares = {}, {}, {}
    for name, (G, history, settings) in loaded.items():
        z = torch.randn(N, settings["latent_dim"], generator=torch.Generator().manual_seed(2017))
        images = in_parts(partial(common.generate, G), z)
        bar.update()
        columns[name], shares[name] = measure_images(judge, images, real)
        columns[name] |= nearest_distance(images, train[0])
        smoothness, path, jumps = measure_latent_space(G, judge, settings["latent_dim"])
        columns[name] |= smoothness | stability(history, SAMPLE_EVERY)
        runs[name] = {"history": history, "samples": images[:32], "path": path, "jumps": jumps}
        bar.update()
    columns["real data"], shares["real data"] = measure_images(judge, train[0][:N, 0], real)
    columns["real data"] |= nearest_distance(test[0][:, 0], train[0])
    bar.update()

    table = comparison_table(columns)
    heading = f"{N:,} images each; real data: training images. The judge's test accuracy: {accuracy:.4f}.\n\n"
    common.save(outputs / "comparison.md", lambda file: file.write((heading + table).encode()))
    common.save(outputs / "comparison.png", comparison_figure(runs, test[0][:32, 0], shares).savefig)
    return heading + table


def nearest_distance(images, train):
    """The median distance of uint8 images (N, 28, 28) to the nearest of `train` (M, 1, 28, 28)."""
    distances = [common.nearest(part, train[:, 0])[1] for part in images[:2000].split(500)]
    return {"distance to the nearest training image": torch.cat(distances).median().item()}


def main():
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, description=__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=Path, default="outputs", metavar="FOLDER", help="of the runs")
    parser.add_argument("--data", type=Path, default="data", metavar="FOLDER", help="of the images")
    args = parser.parse_args()
    try:
        with tqdm(desc="comparing", mininterval=1) as bar:
            table = compare(args.outputs, args.data, bar)
        print(table)
        print(f"table and figure in {args.outputs}")
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


if __name__ == "__main__":
    main()
