"""Measure what a report claims of two models: `python compare.py` after `gan.py` and `dcgan.py`.

`python compare.py FOLDER FOLDER` compares any runs, two variants of one model too. Images are
judged in the features of a classifier that is part of this repository, so that a number means the
same on every machine. Writes comparison.md and comparison_*.png.
"""

import argparse
import hashlib
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import matplotlib.style
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common
import dcgan
import gan

SCRIPTS = {"GAN": gan, "DCGAN": dcgan}
CLASSIFIER = Path(__file__).parent / "outputs" / "reference" / "classifier.pt"
HISTORY_COLUMNS = [
    "epoch",
    "D_loss_mean",
    "D_loss_std",
    "G_loss_mean",
    "G_loss_std",
    "sample_change",
]
N = 10_000  # images on each side of a comparison
PAIRS = 500  # of latent vectors, and the ways between them
STEPS = 32  # of each way
MOVES = 5000  # of one dimension of a latent vector by 2
COPIES = 1000  # images whose nearest training image is looked for
REAL = "real images"
AT_ONCE = 50  # images that pass through a network together: more are slower
K = 5  # nearest neighbours that make an image's neighbourhood, as in Naeem et al. (2020)
COMPARED_SEED = 2017  # of the images
WAYS_SEED = 2018
MOVES_SEED = 2019


# ---------------------------------------------------------------------------------- the classifier


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


def train_classifier(images, labels, epochs):
    """A Classifier trained on uint8 images (N, 28, 28) and their labels (N,)."""
    torch.manual_seed(0)
    classifier = Classifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=5e-3, epochs=epochs, steps_per_epoch=math.ceil(len(images) / 128)
    )
    for _ in tqdm(range(epochs), "training the classifier"):
        for batch in torch.randperm(len(images)).split(128):
            x = common.scale(images[batch][:, None])
            mirrored = torch.rand(len(batch)) < 0.5  # a garment is the same garment in a mirror
            x[mirrored] = x[mirrored].flip(-1)
            optimizer.zero_grad()
            F.cross_entropy(classifier(x), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


@torch.no_grad()
def look_at(classifier, images):
    """Features (N, 128) and classes (N,) of uint8 images (N, 28, 28)."""
    parts = [classifier.features(common.scale(part[:, None])) for part in images.split(AT_ONCE)]
    features = torch.cat(parts)
    return features, classifier.logits(features).argmax(1)


def save_classifier(path, data, epochs=20):
    """Train a Classifier and keep it with its test accuracy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    train_set, test_set = common.load_fashion_mnist(data)
    classifier = train_classifier(train_set.data, train_set.targets, epochs)
    _, classes = look_at(classifier, test_set.data)
    accuracy = (classes == test_set.targets).float().mean().item()
    common.save_whole(path, {"weights": classifier.state_dict(), "accuracy": accuracy})
    print(f"{path}: test accuracy {accuracy:.4f}")


def load_classifier(path):
    """The Classifier at `path`, its test accuracy, and the first letters of the file's SHA-256.

    Raises UserError if there is none in it.
    """
    classifier = Classifier().eval()
    try:
        kept = torch.load(path, weights_only=True)
        classifier.load_state_dict(kept["weights"])
        accuracy = kept["accuracy"]
    except (OSError, MemoryError):
        raise
    except Exception as error:  # another file fails in many ways
        raise common.UserError(
            f"--judge {path} is not a classifier that --train-judge made ({type(error).__name__})"
        ) from error
    return classifier, accuracy, hashlib.sha256(path.read_bytes()).hexdigest()[:12]


# -------------------------------------------------------------------------------- what is measured


@dataclass
class Published:
    """What a training has published in its folder."""

    folder: Path
    label: str
    model: str
    G: nn.Module
    history: np.ndarray  # the columns of history.csv, by name
    conditions: dict  # what should be the same in runs that are compared, by name
    layers: dict  # of both networks, as common.describe_layers has them


@dataclass
class Evidence:
    """What the measures are taken from. Real images have no history, ways and moves."""

    images: torch.Tensor = None  # uint8 (N, 28, 28)
    features: torch.Tensor = None  # (N, 128)
    radius: torch.Tensor = None  # (N,), the reach of each image's neighbourhood in the features
    classes: torch.Tensor = None  # (N,)
    history: np.ndarray = None
    ways: torch.Tensor = None  # (PAIRS, STEPS + 1, 128), features from one z to another
    moves: torch.Tensor = None  # (MOVES,), the change of the features when one z_i moves by 2
    kept: torch.Tensor = None  # (MOVES,), whether the garment is the same then
    to_training: torch.Tensor = None  # (COPIES,), distance to the nearest training image


def gather(run, classifier, training_images):
    """The Evidence of a Published run."""
    latent_dim = run.conditions["latent_dim"]
    z = torch.randn(N, latent_dim, generator=torch.Generator().manual_seed(COMPARED_SEED))
    evidence = gather_images(generate_in_parts(run.G, z), classifier)
    evidence.history = run.history
    evidence.ways = gather_ways(run.G, latent_dim, classifier)
    evidence.moves, evidence.kept = gather_moves(run.G, latent_dim, classifier)
    evidence.to_training = distance_to_training(evidence.images, training_images)
    return evidence


def gather_ways(G, latent_dim, classifier):
    """The features on the ways between pairs of latent vectors, (PAIRS, STEPS + 1, 128)."""
    random = torch.Generator().manual_seed(WAYS_SEED)
    z_a = torch.randn(PAIRS, 1, latent_dim, generator=random)
    z_b = torch.randn(PAIRS, 1, latent_dim, generator=random)
    z = interpolate(z_a, z_b, torch.linspace(0, 1, STEPS + 1)[:, None])
    features, _ = look_at(classifier, generate_in_parts(G, z.flatten(0, 1)))
    return features.view(PAIRS, STEPS + 1, -1)


def gather_moves(G, latent_dim, classifier):
    """How far the features move when one dimension of z does, and whether the garment stays the
    same, (MOVES,) each. The dimensions take turns."""
    z = torch.randn(MOVES, latent_dim, generator=torch.Generator().manual_seed(MOVES_SEED))
    moved = z.clone()
    moved[torch.arange(MOVES), torch.arange(MOVES) % latent_dim] += 2
    features, garments = look_at(classifier, generate_in_parts(G, z))
    moved_features, moved_garments = look_at(classifier, generate_in_parts(G, moved))
    return (moved_features - features).norm(dim=1), moved_garments == garments


def gather_images(images, classifier):
    """The Evidence of images alone, uint8 (N, 28, 28)."""
    features, classes = look_at(classifier, images)
    return Evidence(images, features, neighbourhood(features), classes)


def distance_to_training(images, training_images):
    """In grey levels, of the first images, (COPIES,)."""
    parts = images[:COPIES].split(500)
    return torch.cat([common.nearest(part, training_images)[1] for part in parts])


def generate_in_parts(G, z):
    """Images G(z) as uint8 (N, 28, 28)."""
    return torch.cat([common.generate(G, part) for part in z.split(AT_ONCE)])


def interpolate(a, b, t):
    """From latent vectors a (t = 0) to b (t = 1), (..., L), on a great circle (slerp; White 2016),
    so that they keep the usual length. A single number has no circle."""
    if a.shape[-1] == 1:
        return a + t * (b - a)
    angle = torch.acos(F.cosine_similarity(a, b, dim=-1).clamp(-1, 1))[..., None]
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def neighbourhood(features):
    """The distance (N,) of each point of (N, F) to its K-th nearest other point."""
    parts = [torch.cdist(part, features).kthvalue(K + 1).values for part in features.split(500)]
    return torch.cat(parts)


# ------------------------------------------------------------------------------------ the measures
# Each is a function of the Evidence of a column of the table and of that of real test images. Its
# name is the name of its row, its docstring what the row says.


def frechet_distance(evidence, real):
    """Between the features of generated and of test images; lower is better."""
    # Between normal distributions fitted to both (Heusel et al. 2017): |mean_a - mean_b|^2 +
    # trace(A + B - 2 (A B)^(1/2)) with the covariances A and B.
    a = evidence.features.double()
    b = real.features.double()
    A = a.T.cov()
    B = b.T.cov()
    values, vectors = torch.linalg.eigh(A)
    root_A = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # (A B)^(1/2) has the trace of (A^(1/2) B A^(1/2))^(1/2), which is symmetric.
    trace_root = torch.linalg.eigvalsh(root_A @ B @ root_A).clamp(min=0).sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * trace_root


def precision(evidence, real):
    """Share of generated images that lie among real ones, which a blur raises; closer to real is
    better."""
    # Kynkäänniemi et al. 2019
    return share_within(evidence.features, real.features, real.radius)


def sharpness(evidence, real):
    """Variance of the Laplacian after a 3x3 median filter; closer to real is better."""
    x = median_filter(evidence.images)  # Pech-Pacheco et al. 2000
    neighbours = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:]
    edges = neighbours - 4 * x[:, 1:-1, 1:-1]
    return edges.flatten(1).var(1, correction=0).mean()


def grain(evidence, real):
    """Mean difference of a pixel from the median-filtered image, in grey levels of 0 to 255; closer
    to real is better."""
    inside = evidence.images[:, 1:-1, 1:-1].float()
    return (inside - median_filter(evidence.images)).abs().mean()


def recall(evidence, real):
    """Share of real images that lie among generated ones; higher is better."""
    # Kynkäänniemi et al. 2019
    return share_within(real.features, evidence.features, evidence.radius)


def coverage(evidence, real):
    """Share of real images with a generated one in their neighbourhood; higher is better."""
    parts = [torch.cdist(part, evidence.features).amin(1) for part in real.features.split(500)]
    return (torch.cat(parts) <= real.radius).float().mean()  # Naeem et al. 2020


def rarest_garment(evidence, real):
    """Share of the rarest garment in all images, in %; closer to 10 is better."""
    return garment_shares(evidence.classes).min()


def most_frequent_garment(evidence, real):
    """Share of the most frequent garment in all images, in %; closer to 10 is better."""
    return garment_shares(evidence.classes).max()


def detour(evidence, real):
    """Length of the way of the features from one z to another over the straight distance of its
    ends, median of many ways; lower is smoother."""
    straight = (evidence.ways[:, -1] - evidence.ways[:, 0]).norm(dim=1)
    return (step_lengths(evidence.ways).sum(1) / straight).median()


def jumps(evidence, real):
    """Largest of 32 steps of the features from one z to another over the mean step, median of many
    ways; lower is smoother."""
    steps = step_lengths(evidence.ways)
    return (steps.amax(1) / steps.mean(1)).median()


def outliers(evidence, real):
    """Change of the features when one dimension of z moves by 2: 99th percentile over median; lower
    is smoother."""
    return evidence.moves.quantile(0.99) / evidence.moves.median()


def kept_garment(evidence, real):
    """Share of images that stay the same garment when one dimension of z moves by 2, in %; higher
    is smoother, and highest if all images are one garment."""
    return 100 * evidence.kept.float().mean()


def change_of_the_samples(evidence, real):
    """Mean change of a pixel from epoch to epoch, in the last quarter of the run, in grey levels of
    0 to 255; lower is steadier. It falls as a run gets longer: compare equal ones."""
    return last_quarter(evidence.history, "sample_change")


def deviation_of_the_generator_loss(evidence, real):
    """Standard deviation of the loss within an epoch, mean of the last quarter of the run; lower is
    steadier, but lowest where D cannot decide. Earlier breakdowns: comparison_losses.png."""
    return last_quarter(evidence.history, "G_loss_std")


def deviation_of_the_discriminator_loss(evidence, real):
    """Standard deviation of the loss within an epoch, mean of the last quarter of the run; lower is
    steadier, but lowest where D cannot decide. Earlier breakdowns: comparison_losses.png."""
    return last_quarter(evidence.history, "D_loss_std")


def nearest_training_image(evidence, real):
    """Median distance to it in grey levels of 0 to 255; near 0 is copying. A blur lowers it a
    little, and a copy moved by a pixel is not found."""
    return evidence.to_training.median()


MEASURES = {  # by the claim of a report that they are for
    "quality": [frechet_distance, precision],
    "sharper": [sharpness, grain],
    "more varied": [recall, coverage, rarest_garment, most_frequent_garment],
    "smoother": [detour, jumps, outliers, kept_garment],
    "more stable": [
        change_of_the_samples,
        deviation_of_the_generator_loss,
        deviation_of_the_discriminator_loss,
    ],
    "no copies": [nearest_training_image],
}
NOT_FOR_REAL_IMAGES = ["smoother", "more stable"]  # they have no latent space and no training


def share_within(points, centres, radius):
    """The share of `points` (N, F) within the radius (M,) of at least one of `centres` (M, F)."""
    parts = [(torch.cdist(part, centres) <= radius).any(1) for part in points.split(500)]
    return torch.cat(parts).float().mean()


def median_filter(images):
    """The median of 3x3 pixels, (N, 28, 28) to (N, 26, 26) floats: it removes single specks."""
    parts = []
    for part in images.float().split(500):
        windows = part.unfold(1, 3, 1).unfold(2, 3, 1)  # (500, 26, 26, 3, 3)
        parts.append(windows.flatten(3).median(dim=3).values)
    return torch.cat(parts)


def garment_shares(classes):
    """The share of each garment in %, (10,)."""
    return 100 * torch.bincount(classes, minlength=10) / len(classes)


def step_lengths(ways):
    """(PAIRS, STEPS) from the features on ways."""
    return ways.diff(dim=1).norm(dim=2)


def last_quarter(history, column):
    """The mean of a column of history.csv over the last quarter of the epochs."""
    quarter = math.ceil(len(history) / 4)
    return history[column][-quarter:].mean()


# --------------------------------------------------------------------------------------- the table


def comparison_table(evidence, real):
    """Markdown, a row a measure. evidence: {label: Evidence}, a column each."""
    heading = ["claim", "measure", *evidence, "what it is"]
    lines = [f"| {' | '.join(heading)} |", f"|{'|'.join('---' for _ in heading)}|"]
    for claim, measures in MEASURES.items():
        for measure in measures:
            cells = [claim, measure.__name__.replace("_", " ")]
            for label, of_label in evidence.items():
                has_value = label != REAL or claim not in NOT_FOR_REAL_IMAGES
                cells.append(as_text(measure(of_label, real)) if has_value else "")
            cells.append(" ".join(measure.__doc__.split()))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def as_text(value):
    value = float(value)
    if not math.isfinite(value):
        return "undefined"  # as after a single epoch, or of images that are all the same
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def conditions_of(settings):
    """What should be the same in runs that are compared, by name; settings: of settings.json."""
    conditions = {"epochs": settings["epochs"]}
    for field in fields(common.Settings):
        if field.name not in ("model", "precision"):
            conditions[field.name] = settings["options"][field.name]
    conditions["precision"] = settings["precision"]  # what "auto" became
    return conditions


def unequal(runs):
    """What the runs do not have in common, a line each: epochs, settings, networks."""
    found = []
    for name in runs[0].conditions:
        values = [run.conditions[name] for run in runs]
        if any(value != values[0] for value in values):
            each = [f"{run.conditions[name]} ({run.label})" for run in runs]
            found.append(f"{name}: {', '.join(each)}")
    for i, run in enumerate(runs):
        for other in runs[i + 1 :]:
            if other.model == run.model:
                changes = common.differences(run.layers, other.layers)
                if changes:
                    found.append(f"from {run.label} to {other.label}: {'; '.join(changes)}")
    return found


# -------------------------------------------------------------------------------------- the figures

CAPTIONS = {  # for a report
    "losses": "Losses of each model (binary cross-entropy). Lines: mean of each epoch, "
    "discriminator solid, generator dashed; bands: one standard deviation to each side, cut at "
    "the frame; dotted: ln 2, the loss of a discriminator that is undecided.",
    "samples": "The first 16 images generated by each model and the first 16 test images; none is "
    "picked.",
    "interpolation": "Images on the way from one latent vector (left) to another (right), in equal "
    "steps; three ways for each model.",
    "perturbation": f"One of the dimensions of z moved by 2, {MOVES:,} times: the share of moves "
    "that change the classifier's features of the image more than so many times the median. A long "
    "tail: a few moves change the image abruptly.",
    "garments": f"Share of each garment in {N:,} images, by the classifier. Line: 10%.",
}


def losses_figure(runs):
    """Both losses of each run on the same axes."""
    figure = common.new_figure(6.5, layout="constrained")
    figure.suptitle("Losses: mean of each epoch, and its standard deviation as a band")
    panels = figure.subplots(1, len(runs), sharex=True, sharey=True, squeeze=False)[0]
    for axes, run in zip(panels, runs, strict=True):
        draw_loss(axes, run.history, "D_loss", "Discriminator", "tab:blue", "-")
        draw_loss(axes, run.history, "G_loss", "Generator", "tab:orange", "--")
        common.draw_ln_2(axes, "ln 2")
        axes.set_title(run.label)
        axes.set_xlabel("Epoch")
    # The lines decide what is seen: the band of a loss that ran away would dwarf all others.
    columns = ("D_loss_mean", "G_loss_mean")
    means = np.concatenate([run.history[column] for run in runs for column in columns])
    panels[0].set_ylim(means.min() - 0.1, means.max() + 0.1)
    panels[0].set_ylabel("Loss (binary cross-entropy)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def draw_loss(axes, history, column, label, colour, line):
    mean = history[f"{column}_mean"]
    deviation = history[f"{column}_std"]
    low = mean - deviation
    high = mean + deviation
    common.draw_band(axes, history["epoch"], mean, low, high, label, colour, line)


def samples_figure(images):
    """The first images of each run and of the test set; images: {label: uint8 (N, 28, 28)}."""
    labels = []
    for label in images:
        labels += [label, ""]
    return common.images_figure(
        torch.cat([column[:16] for column in images.values()]),
        "Generated images and real ones, none of them picked",
        left_labels=labels,
    )


def interpolation_figure(runs):
    """Three ways between two latent vectors of each run, eight images each."""
    images = []
    labels = []
    for run in runs:
        random = torch.Generator().manual_seed(WAYS_SEED)
        z_a, z_b = torch.randn(2, 3, 1, run.conditions["latent_dim"], generator=random)
        z = interpolate(z_a, z_b, torch.linspace(0, 1, 8)[:, None])
        images.append(generate_in_parts(run.G, z.flatten(0, 1)))
        labels += [run.label, "", ""]
    return common.images_figure(
        torch.cat(images),
        "From one latent vector (left) to another (right)",
        left_labels=labels,
    )


def perturbation_figure(moves):
    """How the response to one z_i moved by 2 is distributed; moves: {label: (MOVES,)}."""
    figure = common.new_figure(7, layout="constrained")
    figure.suptitle("One latent dimension moved by 2: how much the image changes")
    axes = figure.subplots()
    styles = ["-", "--", ":", "-."]
    for i, (label, changes) in enumerate(moves.items()):
        largest_first = (changes / changes.median()).sort(descending=True).values
        share = 100 * torch.arange(1, len(changes) + 1) / len(changes)
        axes.plot(largest_first, share, styles[i % 4], label=label)
    axes.axhline(1, color="black", linewidth=0.6)
    axes.text(0.02, 1, "1 in 100", transform=axes.get_yaxis_transform(), verticalalignment="bottom")
    axes.set_yscale("log")
    axes.set_ylim(0.1, 100)
    axes.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    axes.set_xlim(0, None)
    axes.set_xlabel("Change of the classifier's features, in medians of the model")
    axes.set_ylabel("Moves that change it more, in %")
    axes.legend()
    return figure


def garments_figure(classes):
    """The share of each garment; classes: {label: (N,)}."""
    figure = common.new_figure(8, layout="constrained")
    figure.suptitle("Share of each garment, in %")
    axes = figure.subplots()
    width = 0.8 / len(classes)
    hatches = ["", "/////", ".....", "xxxxx"]
    for i, (label, column) in enumerate(classes.items()):
        places = np.arange(10) + (i - (len(classes) - 1) / 2) * width
        axes.barh(
            places,
            garment_shares(column).numpy(),
            width,
            label=label,
            hatch=hatches[i % 4],
            edgecolor="white",
        )
    axes.axvline(10, color="black", linewidth=0.6)
    axes.set_yticks(range(10), common.FashionMNIST.classes)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3)
    return figure


# ----------------------------------------------------------------------------------- command line


def load_run(folder):
    """The Published run in a folder. Raises UserError if it cannot be compared."""
    if not (folder / "generator.pt").exists():
        raise common.UserError(f"{folder} is left out: there is no generator.pt in it")
    try:
        settings = json.loads((folder / "settings.json").read_text())
        model = settings["model"]
        module = SCRIPTS[model]
        conditions = conditions_of(settings)
        layers = settings["layers"]
        history = np.genfromtxt(
            folder / "history.csv", delimiter=",", names=True, usecols=HISTORY_COLUMNS
        )
        weights = torch.load(folder / "generator.pt", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise common.UserError(f"{folder} is left out: it cannot be read ({reason})") from error

    G = module.Generator(conditions["latent_dim"])
    layers_now = common.describe_layers(G, module.Discriminator())
    changes = common.differences(generator_layers(layers), generator_layers(layers_now))
    if changes:
        raise common.UserError(
            f"{folder} is left out: its generator is not the one of {module.__name__}.py as it is "
            f"now ({changes[0]}); with the {module.__name__}.py that made it, it can be compared"
        )
    try:
        G.load_state_dict(weights)
    except RuntimeError as error:
        raise common.UserError(
            f"{folder} is left out: generator.pt is not of the network in settings.json"
        ) from error
    return Published(
        folder=folder,
        label=model,
        model=model,
        G=G.eval(),
        history=np.atleast_1d(history),  # one epoch makes no array
        conditions=conditions,
        layers=layers,
    )


def generator_layers(layers):
    return {path: facts for path, facts in layers.items() if path.startswith("G.")}


def load_runs(folders):
    """The Published runs in these folders, and a line for each that cannot be compared.

    Raises UserError if none can.
    """
    runs = []
    left_out = []
    for folder in folders:
        try:
            runs.append(load_run(folder))
        except common.UserError as error:
            print(error)
            left_out.append(str(error))
    if not runs:
        raise common.UserError("no run to compare: gan.py and dcgan.py make them")
    for model in SCRIPTS:
        variants = [run for run in runs if run.model == model]
        if len(variants) > 1:
            for number, run in enumerate(variants, 1):
                run.label = f"{model} {number}"
    return runs, left_out


def compare(folders, judge, outputs, data):
    """Measure the runs by the classifier in the file `judge`; writes comparison.md and figures."""
    runs, left_out = load_runs(folders)
    outputs.mkdir(parents=True, exist_ok=True)
    common.respect_cpu_quota()
    classifier, accuracy, fingerprint = load_classifier(judge)
    train_set, test_set = common.load_fashion_mnist(data)
    real = gather_images(test_set.data[:N], classifier)
    evidence = {}
    for run in tqdm(runs, "measuring"):
        evidence[run.label] = gather(run, classifier, train_set.data)
    evidence[REAL] = gather_images(train_set.data[:N], classifier)
    evidence[REAL].to_training = distance_to_training(test_set.data, train_set.data)

    origins = []
    for run in runs:
        origins.append(f"{run.label}: {run.folder}, after epoch {run.conditions['epochs']}.")
    report = "\n".join(
        [
            f"{N:,} images each, compared with the test images. Real images: training images, on "
            "which the classifier was trained.",
            f"Classifier {fingerprint}, test accuracy {accuracy:.4f}.",
            *origins,
            *[f"**{line}.**" for line in left_out],
            *[f"**Not the same conditions:** {line}." for line in unequal(runs)],
            "",
            comparison_table(evidence, real),
            "",
            *[f"- comparison_{name}.png: {caption}" for name, caption in CAPTIONS.items()],
            "",
        ]
    )
    print(report)
    path = outputs / "comparison.md"
    with common.not_fatal(path):
        path.write_text(report, encoding="utf-8")
    draw(runs, evidence, test_set.data, outputs)


def draw(runs, evidence, test_images, outputs):
    """All figures of the comparison."""
    samples = {run.label: evidence[run.label].images for run in runs}
    samples["real test images"] = test_images
    moves = {run.label: evidence[run.label].moves for run in runs}
    classes = {label: of_label.classes for label, of_label in evidence.items()}
    figures = {
        "losses": losses_figure(runs),
        "samples": samples_figure(samples),
        "interpolation": interpolation_figure(runs),
        "perturbation": perturbation_figure(moves),
        "garments": garments_figure(classes),
    }
    for name, figure in figures.items():
        common.save_figure(figure, outputs / f"comparison_{name}.png")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = ["outputs/gan", "outputs/dcgan"]
    parser.add_argument("folders", nargs="*", default=default, help="of the runs")
    parser.add_argument("--outputs", type=Path, default="outputs", help="where to write")
    parser.add_argument("--data", type=Path, default="data", help="folder of the images")
    parser.add_argument("--judge", type=Path, default=CLASSIFIER, help="file of the classifier")
    parser.add_argument("--train-judge", type=Path, help="only train a classifier, into this file")
    args = parser.parse_args(argv)
    with (
        common.errors_for_people("the same command starts again", "fewer runs at a time may help"),
        matplotlib.style.context(common.STYLE),
    ):
        if args.train_judge:
            save_classifier(args.train_judge, args.data)
        else:
            folders = [Path(folder) for folder in args.folders]
            compare(folders, args.judge, args.outputs, args.data)


if __name__ == "__main__":
    main()
