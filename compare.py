"""Measure what a report claims of two models: `python compare.py` after `gan.py` and `dcgan.py`.

`python compare.py FOLDER FOLDER` compares any runs, two variants of one model too. It runs the
script that lies in each folder: compare only folders that you trust. Images are judged in the
features of a classifier that is part of this repository, so that a number means the same on every
machine. Writes comparison.md and comparison_*.png.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import common  # first: it sets what torch reads when it is imported

# isort: split
import matplotlib.style
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

CLASSIFIER = Path(__file__).parent / "outputs" / "reference" / "classifier.pt"
N = 10_000  # images on each side of a comparison
PAIRS = 500  # of latent vectors, and the paths between them
STEPS = 32  # of each path
PERTURBED = 5000  # latent vectors, in one dimension by 2
COPIES = 1000  # images whose nearest training image is looked for
RESAMPLES = 50  # for the spread that chance gives a measure
REAL = "real images"
AT_ONCE = 100  # images that pass through a network together
K = 5  # nearest neighbours that make an image's neighbourhood, as in Naeem et al. (2020)
COMPARED_SEED = 2017  # of the images
PATHS_SEED = 2018
PERTURBED_SEED = 2019
RESAMPLES_SEED = 2020


# --------------------------------------------------------------------------------- the classifier


class Classifier(nn.Module):
    """Images (N, 1, 28, 28) in [-1, 1] to logits (N, 10) of garments; features: (N, 128)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *self.block(1, 32),
            *self.block(32, 64),
            *self.block(64, 128),
            nn.Flatten(),
            nn.Linear(128 * 3 * 3, 128),
            nn.ReLU(),
        )
        self.logits = nn.Sequential(nn.Dropout(0.4), nn.Linear(128, 10))

    @staticmethod
    def block(channels_in, channels_out):
        return (
            nn.Conv2d(channels_in, channels_out, 3, padding=1),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        )

    def forward(self, x):
        return self.logits(self.features(x))


def load_classifier():
    """The committed Classifier, made by tests/train_classifier.py, and its test accuracy."""
    classifier = Classifier().eval()
    saved = torch.load(CLASSIFIER, weights_only=True)
    classifier.load_state_dict(saved["weights"])
    return classifier.to(memory_format=torch.channels_last), saved["accuracy"]


@torch.no_grad()
def classify(classifier, images):
    """Features (N, 128) and classes (N,) of uint8 images (N, 28, 28)."""
    parts = [classifier.features(common.scale(part[:, None])) for part in images.split(AT_ONCE)]
    features = torch.cat(parts)
    return features, classifier.logits(features).argmax(1)


# -------------------------------------------------------------------------- what is measured with
# A measure is a statistic of items: one for each image, path, perturbation or epoch. The items of
# a run are a dictionary, {measure: tensor}.


def image_items(images, classifier, real):
    """Of uint8 images (N, 28, 28). real: features of as many test images, (N, 128), and radius of
    their neighbourhoods, (N,)."""
    features, classes = classify(classifier, images)
    filtered = median_filter(images)
    return {
        "Fréchet distance": torch.stack([features, real["features"]], dim=1),
        "precision": is_within(features, real["features"], real["radius"]),
        "sharpness": sharpness(filtered),
        "grain": (images[:, 1:-1, 1:-1] - filtered).abs().mean((1, 2)),
        "recall": is_within(real["features"], features, neighbourhood(features)),
        "imbalance": classes,
    }


def latent_items(G, latent_dim, classifier):
    """Of paths from one latent vector to another, but for those on which nothing changes, and of
    perturbations of one dimension. Undefined (nan) if G draws one image only."""
    z = find_paths(latent_dim, STEPS + 1)
    features, _ = classify(classifier, generate_in_parts(G, z.flatten(0, 1)))
    features = features.view(PAIRS, STEPS + 1, -1)
    changing = (features != features[:, :1]).any(dim=2).any(dim=1)
    features = features[changing] if changing.any() else torch.full_like(features[:1], math.nan)
    steps = features.diff(dim=1).norm(dim=2)
    straight = (features[:, -1] - features[:, 0]).norm(dim=1)
    return {
        "detour": steps.sum(1) / straight,
        "jumps": steps.amax(1) / steps.mean(1),
        "outliers": perturbation_lengths(G, latent_dim, classifier),
    }


def history_items(history):
    """Of the last quarter of the epochs, if these are two or more. A runaway is one number."""
    items = {
        "change of the samples": common.column(history, "sample_change"),
        "deviation of G's loss": common.column(history, "G_loss_std"),
        "deviation of D's loss": common.column(history, "D_loss_std"),
    }
    quarter = math.ceil(len(history) / 4)
    for name, values in items.items():
        items[name] = values[-quarter:] if quarter > 1 else np.array([math.nan])
    D_loss = common.column(history, "D_loss_mean")
    G_loss = common.column(history, "G_loss_mean")
    runaway = max(D_loss.max() / np.median(D_loss), G_loss.max() / np.median(G_loss))
    items["runaway"] = np.array([runaway])
    return {name: torch.tensor(values) for name, values in items.items()}


def find_paths(latent_dim, stops):
    """Latent vectors on the paths between pairs of them, (PAIRS, stops, latent_dim)."""
    random = torch.Generator().manual_seed(PATHS_SEED)
    z_a = torch.randn(PAIRS, 1, latent_dim, generator=random)
    z_b = torch.randn(PAIRS, 1, latent_dim, generator=random)
    return interpolate(z_a, z_b, torch.linspace(0, 1, stops)[:, None])


def perturbation_lengths(G, latent_dim, classifier):
    """How far the features move when one dimension of z does, (PERTURBED,). The dimensions take
    turns."""
    z = torch.randn(PERTURBED, latent_dim, generator=torch.Generator().manual_seed(PERTURBED_SEED))
    moved = z.clone()
    moved[torch.arange(PERTURBED), torch.arange(PERTURBED) % latent_dim] += 2
    features, _ = classify(classifier, generate_in_parts(G, z))
    moved_features, _ = classify(classifier, generate_in_parts(G, moved))
    return (moved_features - features).norm(dim=1)


def generate_in_parts(G, z):
    """Images G(z) as uint8 (N, 28, 28)."""
    return torch.cat([common.generate(G, part) for part in z.split(AT_ONCE)])


def interpolate(a, b, t):
    """From latent vectors a (t = 0) to b (t = 1), (..., L), on a great circle (slerp; White 2016),
    so that they keep the usual length; of two or three numbers not always. One has no circle."""
    if a.shape[-1] == 1:
        return a + t * (b - a)
    angle = torch.acos(F.cosine_similarity(a, b, dim=-1).clamp(-1, 1))[..., None]
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def neighbourhood(features):
    """The distance (N,) of each point of (N, F) to its K-th nearest other point."""
    parts = [torch.cdist(part, features).kthvalue(K + 1).values for part in features.split(500)]
    return torch.cat(parts)


def is_within(points, centres, radius):
    """For each of `points` (N, F) whether it lies within the radius (M,) of at least one of
    `centres` (M, F); (N,)."""
    parts = [(torch.cdist(part, centres) <= radius).any(1) for part in points.split(500)]
    return torch.cat(parts)


def median_filter(images):
    """The median of 3x3 pixels, (N, 28, 28) to (N, 26, 26) floats: it removes single specks."""
    parts = []
    for part in images.float().split(500):
        windows = part.unfold(1, 3, 1).unfold(2, 3, 1)  # (500, 26, 26, 3, 3)
        parts.append(windows.flatten(3).median(dim=3).values)
    return torch.cat(parts)


def sharpness(x):
    """The variance (N,) of the Laplacian of images (N, H, W) (Pech-Pacheco et al. 2000)."""
    neighbours = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:]
    edges = neighbours - 4 * x[:, 1:-1, 1:-1]
    return edges.flatten(1).var(1, correction=0)


def find_nearest(images, others):
    """For each uint8 image (N, 28, 28) the index of its nearest among `others` (M, 28, 28), and the
    distance, both (N,): the root mean square difference of pixels, in grey levels of 0 to 255."""
    x = images.flatten(1).float()
    # 5,000 others at a time: all of them as floats take much memory.
    distances = [torch.cdist(x, part.flatten(1).float()) / 28 for part in others.split(5000)]
    smallest, indices = torch.cat(distances, dim=1).min(dim=1)
    return indices, smallest


# ------------------------------------------------------------------------------------ the measures


def mean(items):
    return items.double().mean()


def median(items):
    return items.median()


def frechet_distance(items):
    """Of normal distributions fitted to both features of the items (N, 2, F) (Heusel et al. 2017):
    |mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) with the covariances A and B."""
    a, b = items.double().unbind(1)
    A = a.T.cov()
    B = b.T.cov()
    values, vectors = torch.linalg.eigh(A)
    root_A = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # (A B)^(1/2) has the trace of (A^(1/2) B A^(1/2))^(1/2), which is symmetric.
    trace_root = torch.linalg.eigvalsh(root_A @ B @ root_A).clamp(min=0).sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * trace_root


def garment_shares(classes):
    """The share of each garment in %, (10,)."""
    return 100 * torch.bincount(classes, minlength=10) / len(classes)


def imbalance(classes):
    """Half the sum of what the ten shares differ from 10%."""
    return (garment_shares(classes) - 10).abs().sum() / 2


def tail(lengths):
    """The 99th percentile over the median."""
    return lengths.quantile(0.99) / lengths.median()


class Measure(NamedTuple):
    claim: str  # of a report
    name: str
    statistic: Callable  # items to a number
    better: str  # "lower", "higher" or "like real"
    meaning: str


MEASURES = [
    Measure(
        "quality", "Fréchet distance", frechet_distance, "lower", "features of all images, as FID"
    ),
    Measure(
        "quality", "precision", mean, "like real", "share of images near a real one; blur raises it"
    ),
    Measure("sharper", "sharpness", mean, "like real", "edges: variance of the Laplacian"),
    Measure("sharper", "grain", mean, "like real", "fine detail: difference from the 3x3 median"),
    Measure("more varied", "recall", mean, "higher", "share of real images near a generated one"),
    Measure("more varied", "imbalance", imbalance, "lower", "of the ten garments, in %; 0: none"),
    Measure("smoother", "detour", median, "lower", "interpolation: path length over straight line"),
    Measure("smoother", "jumps", median, "lower", "interpolation: largest step over mean step"),
    Measure("smoother", "outliers", tail, "lower", "one z_i moved: largest changes over usual one"),
    Measure(
        "more stable",
        "change of the samples",
        mean,
        "lower",
        "of a pixel in an epoch, grey levels*",
    ),
    Measure("more stable", "deviation of G's loss", mean, "lower", "in an epoch*"),
    Measure("more stable", "deviation of D's loss", mean, "lower", "in an epoch*"),
    Measure("more stable", "runaway", mean, "lower", "largest loss of an epoch over the usual one"),
    Measure(
        "no copies", "nearest training image", median, "like real", "grey levels; 0 is copying"
    ),
]


def measure(items):
    """{measure: (value, spread)} of the items of a run. The spread is the standard deviation of the
    value if the items are drawn anew from themselves (bootstrap; Efron 1979)."""
    random = torch.Generator().manual_seed(RESAMPLES_SEED)
    results = {}
    for row in MEASURES:
        if row.name in items:
            drawn = items[row.name]
            values = []
            for _ in range(RESAMPLES):
                indices = torch.randint(len(drawn), (len(drawn),), generator=random)
                values.append(float(row.statistic(drawn[indices])))
            spread = float(np.std(values)) if len(drawn) > 1 else 0.0
            results[row.name] = (float(row.statistic(drawn)), spread)
    return results


def find_better(row, results):
    """The label of the run that is better than all others by more than chance, or None.

    results: {label: what `measure` returns}, those of real images among them.
    """
    scores = {}  # the lower, the better
    spreads = {}
    for label, values in results.items():
        value, spread = values.get(row.name, (math.nan, 0))
        if label == REAL or math.isnan(value):
            continue
        spreads[label] = spread
        scores[label] = value
        if row.better == "higher":
            scores[label] = -value
        if row.better == "like real":
            scores[label] = abs(value - results[REAL][row.name][0])
    if len(scores) < 2:
        return None
    best = min(scores, key=scores.get)
    for label in scores:
        chance = 2 * math.hypot(spreads[best], spreads[label])
        if label != best and not scores[label] - scores[best] > chance:
            return None
    return best


# ---------------------------------------------------------------------------------------- the text


def make_table(results):
    """Markdown, a row a measure, a column a run."""
    lines = [
        f"| claim | measure | better | {' | '.join(results)} | what it is |",
        f"|{'---|' * (len(results) + 4)}",
    ]
    for row in MEASURES:
        better = find_better(row, results)
        cells = [row.claim, row.name, row.better]
        for label, values in results.items():
            text = as_text(*values[row.name]) if row.name in values else ""
            cells.append(f"**{text}**" if label == better else text)
        lines.append(f"| {' | '.join(cells)} | {row.meaning}. |")
    return "\n".join(lines)


def as_text(value, spread):
    if not math.isfinite(value):
        return "undefined"  # after a single epoch, say, or if most perturbations change nothing
    text = f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    digit = np.format_float_positional(spread, precision=1, fractional=False, trim="-")
    return f"{text} ± {digit}" if spread > 0 else text


def make_verdicts(results):
    """A line a claim, of two runs or more: which is better in which of its measures."""
    if len(results) < 3:  # one run and real images
        return []
    lines = ["Which model is better in how many measures of a claim (none: within chance):", ""]
    for claim in dict.fromkeys(row.claim for row in MEASURES):
        rows = [row for row in MEASURES if row.claim == claim]
        names = {}
        for row in rows:
            names.setdefault(find_better(row, results) or "none", []).append(row.name)
        ranking = sorted(names, key=lambda label: (label == "none", -len(names[label])))
        parts = [f"{label} in {len(names[label])} ({', '.join(names[label])})" for label in ranking]
        lines.append(f"- **{claim}**, of {len(rows)}: {'; '.join(parts)}")
    return [*lines, ""]


def find_differences(runs):
    """What was not the same in the training of these runs, a line for each run but the first."""
    lines = []
    first = runs[0]
    for run in runs[1:]:
        changes = common.changed_settings(first.settings, run.settings)
        if run.model == first.model:
            changes += common.changed_networks(
                first.description["networks"], run.description["networks"]
            )
            versions = [other.description["machine"]["torch"] for other in (first, run)]
            if versions[0] != versions[1]:
                changes.append(f"printed by PyTorch {versions[0]} and {versions[1]}")
        if changes:
            lines.append(f"from {first.label} to {run.label}: {'; '.join(changes)}")
    return lines


# ------------------------------------------------------------------------------------- the figures

CAPTIONS = {  # for a report
    "losses": "Losses of each model (binary cross-entropy). Lines: mean of each epoch, "
    "discriminator solid, generator dashed; bands: one standard deviation to each side; dotted: "
    "ln 2, the loss of D(x) = D(G(z)) = 1/2.",
    "samples": "The first 16 images generated by each model and the first 16 test images; none is "
    "picked.",
    "neighbours": "The first 8 images generated by each model over the nearest training images. "
    f"Right: root mean square difference in grey levels of 0 to 255, median of {COPIES:,} images; "
    "near 0 would be copying, smooth images are nearer than others.",
    "interpolation": "Images on the path from one latent vector (left) to another (right), in "
    "equal steps; three paths for each model.",
    "smoothness": f"Above: {PAIRS} paths from one latent vector to another, in {STEPS} equal "
    "steps; how much larger the largest change of the classifier's features is than the mean one "
    "(1: all steps alike). Below: the first of these paths.",
    "garments": f"Share of each garment in {N:,} images, by the classifier; dashed: 10%.",
}


def plot_losses(runs):
    """Both losses of each run on the same axes."""
    figure = Figure((common.WIDTH, common.WIDTH * 0.55))
    longest = max(len(run.history) for run in runs)
    figure.suptitle("Losses: mean of each epoch, and its standard deviation as a band")
    panels = figure.subplots(1, len(runs), sharex=True, sharey=True, squeeze=False)[0]
    limits = common.find_limits([run.history for run in runs])
    for axes, run in zip(panels, runs, strict=True):
        common.draw_losses(axes, run.history, limits)
        axes.set_title(run.label)
        axes.set_xlabel("Epoch")
        axes.set_xlim(0, longest + 1)
    panels[0].set_ylabel("Loss (binary cross-entropy)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def plot_samples(images):
    """The first images of each run and of the test set; images: {label: uint8 (N, 28, 28)}."""
    return common.plot_images(
        torch.cat([column[:16] for column in images.values()]),
        "Generated images and real ones, none of them picked",
        rows=list(images),
        blocks=len(images),
    )


def plot_neighbours(images, nearest, distances):
    """The first generated images over the nearest training images, {label: uint8 (N, 28, 28)}
    each; distances: {label: (COPIES,)} of generated and of test images."""
    grid = []
    rows = []
    right = []
    for label, generated in images.items():
        grid += [generated[:8], nearest[label][:8]]
        rows += [label, "nearest"]
        right += ["", f"{distances[label].median():.1f}"]
    return common.plot_images(
        torch.cat(grid),
        "Generated images and the nearest training images",
        rows,
        blocks=len(images),
        right=right,
        caption=f"Right: distance in grey levels, median of {COPIES:,} images\n"
        f"(real test images: {distances[REAL].median():.1f})",
    )


def path_images(run, count):
    """Eight images on each of the first paths from one latent vector to another."""
    z = find_paths(run.settings["latent_dim"], 8)[:count]
    return generate_in_parts(run.G, z.flatten(0, 1))


def plot_interpolation(runs):
    """Three paths between two latent vectors of each run, eight images each."""
    return common.plot_images(
        torch.cat([path_images(run, 3) for run in runs]),
        "From one latent vector (left) to another (right)",
        rows=[run.label for run in runs],
        blocks=len(runs),
    )


def plot_smoothness(runs, jumps):
    """How even the steps of many paths are, over one path of each run; jumps: {label: (PAIRS,)}."""
    figure = Figure((common.WIDTH, common.WIDTH * (0.55 + 0.13 * len(runs))))
    figure.suptitle("From one latent vector to another: how even are the steps?")
    histogram, *panels = figure.subplots(1 + len(runs), height_ratios=[4, *[1 for _ in runs]])
    largest = max([2.0, *[float(values.max()) for values in jumps.values() if len(values) > 1]])
    styles = ["-", "--", ":", "-."]
    for i, (label, values) in enumerate(jumps.items()):
        histogram.hist(
            values.numpy(),
            np.linspace(1, largest, 30),
            weights=np.full(len(values), 100 / len(values)),
            histtype="step",
            linewidth=1.6,
            linestyle=styles[i % 4],
            label=f"{label}: median {values.median():.2f}",
        )
    histogram.set_xlabel(
        "Largest step of a path, in mean steps (1: all alike; further right: jumps)"
    )
    histogram.set_ylabel("Paths, in %")
    histogram.legend()
    panels[0].set_title("The first path of each")
    for axes, run in zip(panels, runs, strict=True):
        common.draw_grid(axes, path_images(run, 1))
        axes.set_ylabel(run.label)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def plot_garments(classes):
    """The share of each garment; classes: {label: (N,)}."""
    figure = Figure((common.WIDTH, common.WIDTH))
    figure.suptitle("Share of each garment")
    axes = figure.subplots()
    thickness = 0.84 / len(classes)
    hatches = ["", "/////", ".....", "xxxxx"]
    for i, (label, column) in enumerate(classes.items()):
        places = np.arange(10) + (i - (len(classes) - 1) / 2) * thickness
        shares = garment_shares(column).numpy()
        hatch = hatches[i % 4]
        axes.barh(places, shares, thickness, label=label, hatch=hatch, edgecolor="white")
    axes.axvline(10, color="black", linewidth=1, linestyle="--", label="10%: all alike")
    axes.set_xlabel("Share of the images, in %")
    axes.set_yticks(range(10), common.FashionMNIST.classes)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=4)
    return figure


# ------------------------------------------------------------------------------------ command line


@dataclass
class Run:
    """What a run shows in its folder."""

    folder: Path
    label: str
    model: str
    settings: dict
    description: dict
    history: list
    G: nn.Module


def load_runs(folders):
    """The Runs in these folders. Raises UserError if one cannot be read."""
    runs = []
    for folder in folders:
        description, history, G = common.load_run(folder)
        model = description["settings"]["model"]
        settings = {**description["settings"], "epochs": len(history)}
        del settings["model"]
        settings["precision"] = description["machine"]["precision"]  # what "auto" became
        runs.append(Run(folder, model, model, settings, description, history, G))
    for model in {run.model for run in runs}:
        variants = [run for run in runs if run.model == model]
        if len(variants) > 1:
            for number, run in enumerate(variants, 1):
                run.label = f"{model} {number}"
    return runs


def compare(folders, outputs, data):
    """Measure the runs; writes comparison.md and figures."""
    runs = load_runs(folders)
    common.make_folder(outputs)
    common.respect_cpu_quota()
    classifier, accuracy = load_classifier()
    train_set, test_set = common.load_fashion_mnist(data)
    features, _ = classify(classifier, test_set.data[:N])
    real = {"features": features, "radius": neighbourhood(features)}

    images = {}
    nearest = {}
    items = {}
    for run in tqdm(runs, "measuring"):
        latent_dim = run.settings["latent_dim"]
        z = torch.randn(N, latent_dim, generator=torch.Generator().manual_seed(COMPARED_SEED))
        images[run.label] = generate_in_parts(run.G, z)
        indices, to_training = find_nearest(images[run.label][:COPIES], train_set.data)
        nearest[run.label] = train_set.data[indices]
        items[run.label] = {
            **image_items(images[run.label], classifier, real),
            **latent_items(run.G, latent_dim, classifier),
            **history_items(run.history),
            "nearest training image": to_training,
        }
    items[REAL] = image_items(train_set.data[:N], classifier, real)
    _, to_training = find_nearest(test_set.data[:COPIES], train_set.data)
    items[REAL]["nearest training image"] = to_training

    report = make_report(runs, {label: measure(items[label]) for label in items}, accuracy)
    print(report)
    common.save(outputs / "comparison.md", report.encode())
    distances = {label: items[label]["nearest training image"] for label in items}
    jumps = {run.label: items[run.label]["jumps"] for run in runs}
    figures = {
        "losses": plot_losses(runs),
        "samples": plot_samples({**images, "real": test_set.data}),
        "neighbours": plot_neighbours(images, nearest, distances),
        "interpolation": plot_interpolation(runs),
        "smoothness": plot_smoothness(runs, jumps),
        "garments": plot_garments({label: items[label]["imbalance"] for label in items}),
    }
    for name, figure in figures.items():
        common.save_or_warn(outputs / f"comparison_{name}.png", common.as_png(figure))


def make_report(runs, results, accuracy):
    """comparison.md."""
    lines = [
        f"{N:,} images of each, compared with the test images by a classifier of accuracy "
        f"{accuracy:.4f}. Real images: training images, which it was trained on (no copies: test "
        "images).",
        "",
        *[f"- {run.label}: {run.folder}, after epoch {len(run.history)}" for run in runs],
        *[f"- **Not the same conditions**, {line}" for line in find_differences(runs)],
        "",
        make_table(results),
        "",
        "Bold: better. ±: standard deviation if images, paths, perturbations or epochs are drawn "
        "anew (of the Fréchet distance at most). Differences below twice that of both count as "
        "none; of runaway, any difference counts. What another seed gives is not in it.",
        "",
        "Fréchet distance, precision, recall, paths and perturbations are taken in the 128 "
        "features of the classifier; sharpness after a 3x3 median filter, which removes single "
        "specks. Usual: the median. A copy moved by a pixel is not found.",
        "",
        "\\* Last quarter of the run. Samples change less in a longer run; losses deviate least "
        "where D cannot decide.",
        "",
        *make_verdicts(results),
        "Figures and captions:",
        "",
        *[f"- comparison_{name}.png: {caption}" for name, caption in CAPTIONS.items()],
        "",
    ]
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = [Path("outputs/gan"), Path("outputs/dcgan")]
    parser.add_argument("folders", nargs="*", type=Path, default=default, help="of the runs")
    parser.add_argument("--outputs", type=Path, default="outputs", help="where to write")
    parser.add_argument("--data", type=Path, default="data", help="folder of the images")
    args = parser.parse_args(argv)
    with (
        common.errors_for_people("fewer runs at a time may help"),
        matplotlib.style.context(common.STYLE),
    ):
        compare(args.folders, args.outputs, args.data)


if __name__ == "__main__":
    main()
