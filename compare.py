"""Measure what a report claims of two models: `python compare.py` after `gan.py` and `dcgan.py`.

`python compare.py FOLDER FOLDER ...` compares any runs, two variants of one model too. Runs that
differ in nothing but the seed are one column of the table. It runs the script that lies in each
folder: compare only folders that you trust. Images are judged in the features of a classifier that
is part of this repository, so that a number means the same on every machine. Writes comparison.md
and comparison_*.png.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common  # first: it sets what torch reads. The mark `isort: split` keeps it first.

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

CLASSIFIER = Path(__file__).parent / "outputs" / "reference" / "classifier.pt"
IMAGES = 10_000  # on each side of a comparison ("by chance 1.2" below is of so many)
PAIRS = 500  # of latent vectors, and the paths between them
STEPS = 32  # of each path
PERTURBED = 5000  # latent vectors that are moved, each in one dimension
COPIES = 1000  # images whose nearest training image is looked for
PARTS = 10  # into which items are divided, see find_spread
REAL = "real images"
AT_ONCE = 100  # images that pass through a network together, to save memory
ROWS = 500  # of a table of distances, or images of a filter, that are computed together
K = 5  # the neighbourhood of an image reaches to its fifth nearest other, as in Naeem et al. (2020)
COMPARED_SEED = 2017  # of the images
PATHS_SEED = 2018
PERTURBED_SEED = 2019


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
            nn.Linear(128 * 3 * 3, 128),  # 28, 14, 7, 3: each MaxPool2d halves, rounding down
            nn.ReLU(),
        )
        self.logits = nn.Sequential(nn.Dropout(0.4), nn.Linear(128, 10))

    @staticmethod
    def block(channels_in, channels_out):
        # Pooled first, which leaves a quarter of the numbers for what follows.
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
    saved = torch.load(CLASSIFIER, weights_only=True)  # numbers only: no code of the file is run
    classifier.load_state_dict(saved["weights"])
    # An order in memory with which convolutions are faster (see common.new_training).
    return classifier.to(memory_format=torch.channels_last), saved["accuracy"]


@torch.no_grad()
def classify(classifier, images):
    """Features (N, 128) and classes (N,) of uint8 images (N, 28, 28)."""
    parts = []
    for part in images.split(AT_ONCE):
        # Scaled as when it was trained, not by common.scale, which a reader may edit.
        x = part[:, None] / 127.5 - 1
        parts.append(classifier.features(x))
    features = torch.cat(parts)
    return features, classifier.logits(features).argmax(1)


# ---------------------------------------------------------------------------------- items of a run
# Items are what a measure is computed from: a tensor with one entry, a number or the features, for
# each image, path or perturbation. Some measures compare two such tensors, of generated and of real
# images. So items are {measure: (tensor,)} or {measure: (tensor, other)}.


def image_items(images, classifier, real_features):
    """Of uint8 images (N, 28, 28). real_features: of test images, (N, 128)."""
    features, classes = classify(classifier, images)
    filtered = median_filter(images)  # else single specks would pass for edges
    return {
        "Fréchet distance": (features, real_features),
        "precision": (features, real_features),
        "sharpness": (sharpness(filtered),),
        "grain": ((images[:, 1:-1, 1:-1] - filtered).abs().mean((1, 2)),),
        "recall": (real_features, features),
        "imbalance": (classes,),
    }


def latent_items(G, latent_dim, classifier):
    """Of paths from one latent vector to another, and of perturbations of one dimension. Paths on
    which the features never change are left out; if all are such, the items are nan."""
    z = find_paths(latent_dim, STEPS + 1)
    features, _ = classify(classifier, generate_in_parts(G, z.flatten(0, 1)))
    features = features.view(PAIRS, STEPS + 1, -1)
    is_changing = (features != features[:, :1]).flatten(1).any(dim=1)  # (PAIRS,)
    # nan becomes "undefined" in the table, and all else is measured.
    features = features[is_changing] if is_changing.any() else torch.full_like(features, math.nan)
    steps = features.diff(dim=1).norm(dim=2)
    straight = (features[:, -1] - features[:, 0]).norm(dim=1)
    return {
        "detour": (steps.sum(1) / straight,),
        "jumps": (steps.amax(1) / steps.mean(1),),  # amax: max, without the index
        "outliers": (perturbation_lengths(G, latent_dim, classifier),),
    }


def history_numbers(history):
    """{measure: number} of the rows of history.csv.

    Three are means over the last quarter of the epochs, or nan if that is only one. Runaway is the
    largest mean loss of an epoch over the median one. The seconds are those of all epochs.
    """
    numbers = {}
    quarter = math.ceil(len(history) / 4)
    for name, its_column in [
        ("change of the samples", "sample_change"),
        ("deviation of G's loss", "G_loss_std"),
        ("deviation of D's loss", "D_loss_std"),
    ]:
        last = common.column(history, its_column)[-quarter:]
        numbers[name] = float(last.mean()) if quarter > 1 else math.nan
    D_loss = common.column(history, "D_loss_mean")
    G_loss = common.column(history, "G_loss_mean")
    numbers["runaway"] = math.nan
    # In a short run the median would come from the first epochs, in which losses change most. A
    # ratio means nothing for losses that can be 0 or less, as some others than ours can.
    if len(history) >= 20 and min(D_loss.min(), G_loss.min()) > 0:
        ratios = [losses.max() / np.median(losses) for losses in (D_loss, G_loss)]
        numbers["runaway"] = float(max(ratios))
    numbers["seconds"] = float(common.column(history, "seconds").sum())
    return numbers


def find_paths(latent_dim, stops):
    """Latent vectors on the paths between pairs of them, (PAIRS, stops, latent_dim)."""
    random = torch.Generator().manual_seed(PATHS_SEED)
    z_a = torch.randn(PAIRS, 1, latent_dim, generator=random)
    z_b = torch.randn(PAIRS, 1, latent_dim, generator=random)
    t = torch.linspace(0, 1, stops)[:, None]  # (stops, 1), so that each pair meets each t
    return interpolate(z_a, z_b, t)


def perturbation_lengths(G, latent_dim, classifier):
    """How far the features move when one dimension of z moves by 2, (PERTURBED,). The dimensions
    take turns."""
    z = torch.randn(PERTURBED, latent_dim, generator=torch.Generator().manual_seed(PERTURBED_SEED))
    moved = z.clone()
    rows = torch.arange(PERTURBED)
    moved[rows, rows % latent_dim] += 2  # in each row one dimension
    features, _ = classify(classifier, generate_in_parts(G, z))
    moved_features, _ = classify(classifier, generate_in_parts(G, moved))
    return (moved_features - features).norm(dim=1)


def generate_in_parts(G, z):
    """Images G(z) as uint8 (N, 28, 28)."""
    return torch.cat([common.generate(G, part) for part in z.split(AT_ONCE)])


def interpolate(a, b, t):
    """From latent vectors a (t = 0) to b (t = 1), (..., latent_dim): equal steps of t turn by equal
    angles around the origin (slerp; White 2016, arXiv:1609.04468), and the length changes evenly.

    Latent vectors of many numbers have nearly the same length: its square is a sum of 100 squares,
    which have the mean 1 and the variance 2, so it is 100 +- 14 (the root of 200). In the middle of
    a straight line they would be shorter than nearly all that G was trained with.
    """
    if a.shape[-1] == 1:  # the angle between numbers is 0 or 180 degrees, and its sine 0
        return a + t * (b - a)
    length_a = a.norm(dim=-1, keepdim=True)
    length_b = b.norm(dim=-1, keepdim=True)
    cosine = F.cosine_similarity(a, b, dim=-1)
    cosine = cosine.clamp(-1, 1)  # by rounding it may be 1.0000001, which has no angle
    angle = torch.acos(cosine)[..., None]  # (..., 1), as the lengths
    # The sum of both parts has length 1: a / length_a at t = 0, b / length_b at t = 1. If they are
    # 90 degrees apart, it is cos(s) a / length_a + sin(s) b / length_b, with s = 90 t.
    part_a = torch.sin((1 - t) * angle) / torch.sin(angle) * a / length_a
    part_b = torch.sin(t * angle) / torch.sin(angle) * b / length_b
    return (part_a + part_b) * (length_a + t * (length_b - length_a))


def neighbourhood(features):
    """The distance (N,) of each point of (N, F) to its K-th nearest other point."""
    # cdist: the distance of each row of the one to each row of the other. The nearest point of all
    # is the point itself, so the fifth other one is the sixth.
    parts = [torch.cdist(part, features).kthvalue(K + 1).values for part in features.split(ROWS)]
    return torch.cat(parts)


def share_near(points, centres):
    """The share of `points` (N, F) that lie within the neighbourhood of at least one of `centres`
    (M, F). Of generated images among real ones it is the precision, the other way round the recall
    of Kynkäänniemi et al. (2019, where K is 3)."""
    radius = neighbourhood(centres)  # of each centre its own
    parts = [(torch.cdist(part, centres) <= radius).any(1) for part in points.split(ROWS)]
    return torch.cat(parts).double().mean()


def median_filter(images):
    """The median of 3x3 pixels, (N, 28, 28) to (N, 26, 26) floats: it removes single specks."""
    parts = []
    for part in images.float().split(ROWS):
        # unfold(dimension, size, step): all windows of 3 rows, and in them all of 3 columns, make
        # (ROWS, 26, 26, 3, 3).
        windows = part.unfold(1, 3, 1).unfold(2, 3, 1)
        parts.append(windows.flatten(3).median(dim=3).values)  # of the nine pixels of each
    return torch.cat(parts)


def sharpness(x):
    """The variance (N,) of the Laplacian of images (N, H, W) (Pech-Pacheco et al. 2000).

    The Laplacian is the sum of the four neighbours of a pixel minus four times itself: nearly 0 in
    even areas and on slopes, large at edges, the larger the harder they are.
    """
    neighbours = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:]
    laplacian = neighbours - 4 * x[:, 1:-1, 1:-1]
    return laplacian.flatten(1).var(1, correction=0)  # divided by their number


def find_nearest(images, others):
    """For each uint8 image (N, 28, 28) the index of its nearest among `others` (M, 28, 28), and the
    distance, both (N,): the root mean square difference of pixels, in grey levels of 0 to 255."""
    distances = torch.cdist(images.flatten(1).float(), others.flatten(1).float())
    nearest = distances.min(dim=1)
    return nearest.indices, nearest.values / 28  # 28 is the root of the number of pixels


# ------------------------------------------------------------------------------------ the measures


def mean(items):
    return items.double().mean()


def median(items):
    return items.median()


def frechet_distance(a, b):
    """Of normal distributions fitted to two sets of features (N, F) (Heusel et al. 2017):
    |mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) with the covariances A and B.

    R is M^(1/2) if R R = M. So with one feature this is (mean_a - mean_b)^2 + (std_a - std_b)^2,
    the square of a distance, as an FID is. Features are not normal, but only their means and
    covariances are compared.
    """
    a = a.double()  # 16 digits instead of 7
    b = b.double()
    A = a.T.cov()  # cov takes a row for each feature
    B = b.T.cov()
    # The trace is the sum of the eigenvalues, and those of a root are the roots of the eigenvalues:
    # if R v = r v, then R R v = r^2 v. Those of A B are the same as of A^(1/2) B A^(1/2), which is
    # symmetric like a covariance, so they are real and not below 0, but for rounding. eigvals
    # returns complex numbers, of which the imaginary part is left out.
    roots = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt()
    return (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * roots.sum()


def garment_shares(classes):
    """The share of each garment in %, (10,)."""
    return 100 * torch.bincount(classes, minlength=10) / len(classes)


def imbalance(classes):
    """The sum of what some garments have above 10%. The others lack as much, so it is half the sum
    of all differences from 10%."""
    return (garment_shares(classes) - 10).abs().sum() / 2


def tail(lengths):
    """The 99th percentile over the median."""
    return lengths.quantile(0.99) / lengths.median()


@dataclass
class Measure:
    claim: str  # of a report; "" is said, but not judged
    name: str
    statistic: Callable | None  # a function of items; None: history or settings.json say it
    better: str  # "lower", "higher" or "like real"
    meaning: str


# Blur takes odd details away, so blurred images lie near real ones more often than real images do:
# a precision above theirs is no better. Noise raises grain, and a hard seam, as between halves of
# two garments, raises sharpness, so more of these is no better, either.
MEASURES = [
    Measure("quality", "Fréchet distance", frechet_distance, "lower", "to test images, squared"),
    Measure("quality", "precision", share_near, "like real", "near a real one; raised by blur"),
    Measure("sharper", "sharpness", mean, "like real", "edges: variance of the Laplacian"),
    Measure("sharper", "grain", mean, "like real", "fine detail: difference from the 3x3 median"),
    Measure("more varied", "recall", share_near, "higher", "share of real ones near a generated"),
    Measure("more varied", "imbalance", imbalance, "lower", "of ten garments, %; by chance 1.2"),
    Measure("smoother", "detour", median, "lower", "paths: length over straight line"),
    Measure("smoother", "jumps", median, "lower", "paths: largest step over mean step"),
    Measure("smoother", "outliers", tail, "lower", "one z_i moved: 99th percentile over median"),
    Measure("more stable", "change of the samples", None, "lower", "grey levels an epoch*"),
    Measure("more stable", "deviation of G's loss", None, "lower", "within an epoch*"),
    Measure("more stable", "deviation of D's loss", None, "lower", "within an epoch*"),
    Measure("", "runaway", None, "", "largest mean loss of an epoch over the median one"),
    Measure("", "nearest training image", median, "", "grey levels, median; 0 is copying"),
    Measure("", "parameters of G", None, "", "numbers that are trained"),
    Measure("", "parameters of D", None, "", "numbers that are trained"),
    Measure("", "seconds", None, "", "of training, on the machine used, busy or not"),
]
NEEDED = {  # without it, the measures of a claim are undefined
    "smoother": "images that change with z (outliers: in half of the perturbations)",
    "more stable": "five epochs",
    "": "20 epochs and losses above 0",  # for runaway
}


@dataclass
class Result:
    values: list  # one for each seed
    spread: float  # one value: by find_spread; several: standard deviation; nan: not known


def measure(items):
    """{measure: number} of the items of a run."""
    numbers = {}
    for row in MEASURES:
        if row.name in items:
            numbers[row.name] = float(row.statistic(*items[row.name]))
    return numbers


def find_spread(statistic, sides):
    """The standard deviation of a statistic if all its items, such as images, were drawn anew.

    sides: one tensor of items or two. Each is divided into ten parts, and the statistic is taken of
    each part. A mean of a tenth of the items deviates more than one of all, by the root of 10. For
    other statistics that is right within a factor of two, but for a distance near 0 it is too much
    (outputs/README.md).
    """
    if min(len(side) for side in sides) < PARTS:
        return math.nan
    divided = [side.tensor_split(PARTS) for side in sides]
    # zip: the first part of each side, then the second of each, and so on.
    values = [float(statistic(*part)) for part in zip(*divided, strict=True)]
    deviation = np.std(values, ddof=1)  # squares divided by 9, not by 10: few numbers
    return float(deviation / math.sqrt(PARTS))


def find_better(row, results):
    """The label of the runs that are better than all others that are defined, or None.

    The difference must be more than two of its standard deviations and, of several seeds, each must
    be better than each of the others' seeds. If both numbers are written alike, neither is better.
    results: {label: {measure: Result}}, real images among them.
    """
    if row.claim == "":  # not judged
        return None
    scores = {}  # {label: (seeds,)}: the lower, the better
    for label, column in results.items():
        if label == REAL or not np.isfinite(column[row.name].values).all():
            continue
        scores[label] = np.array(column[row.name].values)
        if row.better == "higher":
            scores[label] = -scores[label]
        if row.better == "like real":
            scores[label] = abs(scores[label] - results[REAL][row.name].values[0])
    if len(scores) < 2:
        return None
    best = min(scores, key=lambda label: scores[label].mean())
    best_result = results[best][row.name]
    for label in scores:
        if label == best:
            continue
        other = results[label][row.name]
        deviation = deviation_of_difference(best_result, other)
        if row.better == "like real":
            # Let b be the better number, o the other one, r the real one. If both are above r, the
            # difference of their distances is (o - r) - (b - r): r cancels. If b is below r, it is
            # (o - r) - (r - b) = o + b - 2r, and the deviation of r counts twice.
            real = results[REAL][row.name]
            lower, upper = sorted([np.mean(best_result.values), np.mean(other.values)])
            if lower < real.values[0] < upper:
                # hypot is the root of the sum of squares: variances add.
                deviation = math.hypot(deviation, 2 * real.spread)
        is_better = scores[label].min() > scores[best].max()
        difference = scores[label].mean() - scores[best].mean()
        is_sure = difference > 2 * deviation  # False if the deviation is nan
        is_same_text = mean_as_text(best_result) == mean_as_text(other)
        if not is_better or not is_sure or is_same_text:
            return None
    return best


def deviation_of_difference(a, b):
    """The standard deviation of the difference of the means of two Results.

    They are taken as independent: variances add, and that of a mean of n seeds is an n-th of one
    seed's. (One seed each: if the test images, which both are compared with, happen to be odd, both
    numbers move alike, so the difference deviates rather less.) A run alone beside several seeds is
    taken to deviate as these do.
    """
    spread_a, spread_b = a.spread, b.spread
    if len(a.values) == 1 and len(b.values) > 1:
        spread_a = b.spread
    if len(b.values) == 1 and len(a.values) > 1:
        spread_b = a.spread
    return math.hypot(spread_a / math.sqrt(len(a.values)), spread_b / math.sqrt(len(b.values)))


# ---------------------------------------------------------------------------------------- the text


def make_table(results):
    """Markdown, a row a measure, a column for each label."""
    lines = [
        f"| claim | measure | better | {' | '.join(results)} | what it is |",
        f"|{'---|' * (len(results) + 4)}",
    ]
    for row in MEASURES:
        winner = find_better(row, results)
        cells = [row.claim, row.name, row.better]
        for label, column in results.items():
            text = as_text(column[row.name]) if row.name in column else ""
            cells.append(f"**{text}**" if label == winner else text)
        lines.append(f"| {' | '.join(cells)} | {row.meaning}. |")
    return "\n".join(lines)


def mean_as_text(result):
    """The mean of the seeds, with three digits, from 1,000 on with all before the point: 0.900,
    4.86, 26.1, 513 and 4,384."""
    value = np.mean(result.values)
    if not math.isfinite(value):
        return "undefined"
    if abs(value) >= 999.5:  # the last line would write 1.00e+03
        return f"{value:,.0f}"
    # With # zeros at the end are kept, as in 0.900, but so is the point of 513., which goes.
    return f"{value:#.3g}".rstrip(".")


def as_text(result):
    """The mean of the seeds and, if it is known, the spread, with one digit."""
    text = mean_as_text(result)
    if text == "undefined" or math.isnan(result.spread) or result.spread == 0:  # 0: all alike
        return text
    # As 0.00002, not as 2e-05. fractional=False: one digit, from the first that is not 0; trim: no
    # point at the end.
    digit = np.format_float_positional(result.spread, precision=1, fractional=False, trim="-")
    return f"{text} ± {digit}"


def explain_undefined(results):
    """A line for each measure that is undefined for some run."""
    lines = []
    for row in MEASURES:
        cells = [column[row.name] for column in results.values() if row.name in column]
        if "undefined" in [as_text(cell) for cell in cells]:
            lines.append(f"- *{row.name}* is undefined where there are not {NEEDED[row.claim]}")
    return [*lines, ""] if lines else []


def make_verdicts(results):
    """A line a claim, of two columns or more: which is better in which of its measures."""
    if len(results) < 3:  # one column and real images
        return []
    lines = ["Which model is better in how many measures of a claim (not independent ones):", ""]
    claims = [row.claim for row in MEASURES if row.claim != ""]
    for claim in dict.fromkeys(claims):  # each once, in this order
        rows = [row for row in MEASURES if row.claim == claim]
        won = {}  # {label: the names of its measures}
        for row in rows:
            label = find_better(row, results) or "open"
            won.setdefault(label, []).append(row.name)
        # Who is better in most measures comes first, "open" last.
        ranking = sorted(won, key=lambda label: (label == "open", -len(won[label])))
        parts = [f"{label} in {len(won[label])} ({', '.join(won[label])})" for label in ranking]
        lines.append(f"- **{claim}**, of {len(rows)}: {'; '.join(parts)}")
    return [*lines, ""]


# ------------------------------------------------------------------------------------- the figures

CAPTIONS = {  # for a report, in English and in Chinese
    "losses": (
        "Losses of each model (binary cross-entropy). Lines: mean of each epoch, discriminator "
        "solid, generator dashed; bands: one standard deviation to each side; dotted: ln 2, the "
        "loss of D(x) = D(G(z)) = 1/2.",
        "各模型的损失（二元交叉熵）。曲线为每轮各次迭代的均值，实线为判别器，虚线为生成器；"
        "阴影带为 ±1 个标准差；点线为 ln 2，即 D(x) = D(G(z)) = 1/2 时的损失。",
    ),
    "samples": (
        "The first 16 images generated by each model (those of figures 1c and 3c) and the first 16 "
        "test images; none is picked.",
        "各模型生成的前 16 幅图像（与图 1c、3c 相同）以及测试集的前 16 幅图像，均未经挑选。",
    ),
    "neighbours": (
        "Eight images generated by each model over the nearest training images. Right: root mean "
        f"square difference in grey levels of 0 to 255, median of {COPIES:,} images; near 0 would "
        "be copying, smooth images are nearer than others.",
        "各模型生成的 8 幅图像及其下方训练集中与之最接近的图像。右侧为两者灰度（0 至 255）的"
        f"均方根差，取 {COPIES:,} 幅图像的中位数；若接近 0，则意味着复制；越平滑的图像距离越小。",
    ),
    "interpolation": (
        "Images on the path from one latent vector (left) to another (right), in equal angles "
        "around the origin; three paths for each model.",
        "从一个隐向量（左）到另一个隐向量（右）的插值图像，绕原点等角度移动；每个模型三条路径。",
    ),
    "smoothness": (
        f"{PAIRS} paths around the origin from one latent vector to another, in {STEPS} equal "
        "angles: the largest change of the classifier's features, divided by the mean one (1: all "
        "steps alike). Paths beyond the axis, at most 1% of those of all models together, are "
        "counted in the last bin.",
        f"绕原点从一个隐向量到另一个隐向量的 {PAIRS} 条路径，每条分为 {STEPS} 个等角步："
        "分类器特征的最大单步变化与平均单步变化之比（1 表示各步相同）。"
        "超出坐标轴范围者（至多占所有模型全部路径的 1%）计入末个区间。",
    ),
    "garments": (
        f"Share of each garment in {IMAGES:,} images, by the classifier; dashed: equal shares, "
        "10%.",
        f"{IMAGES:,} 幅图像中各类别所占比例（由分类器判定）；虚线为各类均等时的 10%。",
    ),
}


def plot_losses(columns):
    """Both losses of the first run of each column: a panel each, with the same limits."""
    firsts = {label: runs[0].history for label, runs in columns.items()}
    figure = Figure((common.WIDTH, common.WIDTH * 0.55))
    longest = max(len(history) for history in firsts.values())
    figure.suptitle("Losses: mean of each epoch, and its standard deviation as a band")
    # squeeze=False: rows and columns of panels, even if there is one of each; [0]: the only row.
    panels = figure.subplots(1, len(firsts), sharex=True, sharey=True, squeeze=False)[0]
    limits = [common.find_limits(history) for history in firsts.values()]
    lowest = min(low for low, _ in limits)
    highest = max(high for _, high in limits)
    for axes, (label, history) in zip(panels, firsts.items(), strict=True):
        common.draw_losses(axes, history, (lowest, highest))
        axes.locator_params("x", nbins=max(2, 10 // len(firsts)))  # few numbers in narrow panels
        axes.set_title(label)
        axes.set_xlabel("Epoch")
        axes.set_xlim(0, longest + 1)
    panels[0].set_ylabel("Loss (binary cross-entropy)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def plot_samples(images):
    """16 images of each column and of the test set; images: {label: uint8 (16, 28, 28)}."""
    return common.plot_images(
        torch.cat(list(images.values())),
        "Generated images and real ones, none of them picked",
        rows=list(images),
        blocks=len(images),
    )


def plot_neighbours(images, nearest, distances):
    """Eight generated images over the nearest training images, {label: uint8 (8, 28, 28)} each;
    distances: {label: (COPIES,)} of generated and of test images."""
    grid = []
    rows = []
    right = []
    for label, generated in images.items():
        grid += [generated, nearest[label]]
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


def plot_interpolation(columns):
    """Three paths between two latent vectors for each column, eight images each."""
    paths = []
    for runs in columns.values():
        z = find_paths(runs[0].settings["latent_dim"], 8)[:3]
        paths.append(generate_in_parts(runs[0].G, z.flatten(0, 1)))
    return common.plot_images(
        torch.cat(paths),
        "From one latent vector (left) to another (right)",
        rows=list(columns),
        blocks=len(columns),
    )


def plot_smoothness(jumps):
    """How even the steps of many paths are; jumps: {label: (paths,)}."""
    figure = Figure((common.WIDTH, common.WIDTH * 0.5))
    figure.suptitle("From one latent vector to another: how even are the steps?")
    axes = figure.subplots()
    every = torch.cat([values[values.isfinite()] for values in jumps.values()])
    # Where the axis ends: at 2 or more, since it begins at 1, and steps may be alike on all paths.
    largest = max(2.0, float(every.quantile(0.99))) if len(every) else 2.0
    styles = ["-", "--", ":", "-."]
    for i, (label, values) in enumerate(jumps.items()):
        axes.hist(
            values.clamp(1, largest).numpy(),  # also what is below 1 by rounding
            np.linspace(1, largest, 30),  # the edges of the bins
            weights=np.full(len(values), 100 / len(values)),  # so that all paths make 100%
            histtype="step",
            linewidth=1.6,
            linestyle=styles[i % 4],
            label=f"{label}: median {values.median():.2f}",
        )
    axes.set_xlabel("Largest step of a path, in mean steps (1: all alike; further right: jumps)")
    axes.set_ylabel("Paths, in %")
    axes.legend()
    return figure


def plot_garments(classes):
    """The share of each garment; classes: {label: (N,)}."""
    height = 0.3 + 0.13 * len(classes)  # room for the bars of each
    figure = Figure((common.WIDTH, common.WIDTH * height))
    figure.suptitle("Share of each garment")
    axes = figure.subplots()
    thickness = 0.84 / len(classes)  # of a bar; 0.16 is left between two garments
    hatches = ["", "/////", ".....", "xxxxx"]
    for i, (label, column) in enumerate(classes.items()):
        # Side by side, all together centred on the garment's number.
        places = np.arange(10) + (i - (len(classes) - 1) / 2) * thickness
        shares = garment_shares(column).numpy()
        hatch = hatches[i % 4]
        # edgecolor: of the hatch, too.
        axes.barh(places, shares, thickness, label=label, hatch=hatch, edgecolor="white")
    axes.axvline(10, color="black", linewidth=1, linestyle="--", label="equal shares")
    axes.set_xlabel("Share of the images, in %")
    axes.set_yticks(range(10), common.FashionMNIST.classes)
    axes.invert_yaxis()  # the first garment at the top
    figure.legend(loc="outside lower center", ncols=4)
    return figure


# ------------------------------------------------------------------------------------ command line


@dataclass
class Run:
    """What a run shows in its folder."""

    folder: Path
    model: str
    seed: int
    settings: dict  # without the seed, with the number of epochs
    program: dict  # {file: text}
    parameters: dict  # {"G": number of weights, "D": ...}
    history: list
    G: nn.Module


def load_runs(folders):
    """The Runs in these folders. Raises UserError if one cannot be read."""
    runs = []
    for folder in folders:
        description, history, G = common.load_run(folder)
        settings = {**description["settings"], "epochs": len(history)}
        try:
            seed = settings.pop("seed")
            program = {name: common.read_text(folder / name) for name in description["program"]}
            model, parameters = description["model"], description["parameters"]
        except (KeyError, OSError) as error:
            raise common.UserError(
                f"{folder} cannot be compared ({type(error).__name__}: {error}): it is not whole, "
                "or it is of an older version of this repository"
            ) from error
        runs.append(Run(folder, model, seed, settings, program, parameters, history, G))
    return runs


def find_differences(first, second, labels):
    """A text for each setting and each place of the program in which two runs differ, the seed left
    out. Two models have scripts of their own, so only files that both have are compared."""
    sides = []
    for run in (first, second):
        program = run.program
        if first.model != second.model:
            both = set(first.program) & set(second.program)
            program = {name: run.program[name] for name in both}
        sides.append({"settings": run.settings, "program": program})
    return common.find_changes(*sides, labels)


def make_columns(runs):
    """{label: runs}; runs that differ in nothing but the seed are one column."""
    groups = []
    for run in runs:
        fitting = [group for group in groups if is_of_group(run, group)]
        if fitting:
            fitting[0].append(run)
        else:
            groups.append([run])
    columns = {}
    for model in dict.fromkeys(run.model for run in runs):  # each once, in this order
        variants = [group for group in groups if group[0].model == model]
        for number, group in enumerate(variants, 1):
            columns[f"{model} {number}" if len(variants) > 1 else model] = group
    return columns


def is_of_group(run, group):
    """Whether a run is another seed of the same training as the runs of a group."""
    first = group[0]
    is_other_seed = run.seed not in [other.seed for other in group]
    labels = ["", ""]  # the texts are not shown
    return run.model == first.model and is_other_seed and not find_differences(first, run, labels)


def measure_run(run, classifier, real_features, train_set):
    """The items of a run, its numbers, {measure: number}, and what figures show of it."""
    latent_dim = run.settings["latent_dim"]
    z = torch.randn(IMAGES, latent_dim, generator=torch.Generator().manual_seed(COMPARED_SEED))
    images = generate_in_parts(run.G, z)
    indices, distances = find_nearest(images[:COPIES], train_set.data)
    items = {
        **image_items(images, classifier, real_features),
        **latent_items(run.G, latent_dim, classifier),
        "nearest training image": (distances,),
    }
    numbers = {**measure(items), **history_numbers(run.history)}
    for network, count in run.parameters.items():
        numbers[f"parameters of {network}"] = count
    figure_parts = {
        "samples": common.generate(run.G, common.latent_vectors(latent_dim))[:16],
        "images": images[:8],
        "nearest": train_set.data[indices[:8]],
        "distances": distances,
        "classes": items["imbalance"][0],
        "jumps": items["jumps"][0],
    }
    return items, numbers, figure_parts


def find_results(items, numbers):
    """{measure: Result} of one run alone."""
    results = {}
    for row in MEASURES:
        if row.name not in numbers:  # real images have no history
            continue
        spread = math.nan
        if row.name in items:
            spread = find_spread(row.statistic, items[row.name])
        results[row.name] = Result([numbers[row.name]], spread)
    return results


def join_results(numbers):
    """{measure: Result} of several runs; numbers: {measure: number} of each."""
    results = {}
    for name in numbers[0]:
        values = [run[name] for run in numbers]
        spread = float(np.std(values, ddof=1))  # as in find_spread
        results[name] = Result(values, spread)
    return results


def compare(folders, outputs, data):
    """Measure the runs; writes comparison.md and figures."""
    runs = load_runs(folders)
    columns = make_columns(runs)
    common.respect_cpu_quota()
    classifier, accuracy = load_classifier()
    train_set, test_set = common.load_fashion_mnist(data)
    real_features, _ = classify(classifier, test_set.data[:IMAGES])
    with common.lock(outputs), tqdm(total=len(runs), desc="measuring", disable=None) as bar:
        results = {}
        shown = {}  # {what: {label: tensor}}
        for label, group in columns.items():
            measured = []
            for run in group:
                measured.append(measure_run(run, classifier, real_features, train_set))
                bar.update()
            items, numbers, figure_parts = measured[0]
            for name, part in figure_parts.items():
                shown.setdefault(name, {})[label] = part  # {} if the name is new
            if len(group) == 1:
                results[label] = find_results(items, numbers)
            else:
                results[label] = join_results([numbers for _, numbers, _ in measured])
        # The column of real images: training images beside the test images.
        items = image_items(train_set.data[:IMAGES], classifier, real_features)
        _, to_training = find_nearest(test_set.data[:COPIES], train_set.data)
        items["nearest training image"] = (to_training,)
        results[REAL] = find_results(items, measure(items))

        bar.close()  # else it would stand in the report
        report = make_report(columns, results, accuracy)
        common.save(outputs / "comparison.md", report.encode(), needed=True)
        print(report)

        shown["samples"]["real"] = test_set.data[:16]  # a short label, beside the rows
        shown["distances"][REAL] = to_training
        shown["classes"][REAL] = items["imbalance"][0]
        figures = {
            "losses": plot_losses(columns),
            "samples": plot_samples(shown["samples"]),
            "neighbours": plot_neighbours(shown["images"], shown["nearest"], shown["distances"]),
            "interpolation": plot_interpolation(columns),
            "smoothness": plot_smoothness(shown["jumps"]),
            "garments": plot_garments(shown["classes"]),
        }
        for name, figure in figures.items():
            png = common.as_bytes(figure.savefig)
            common.save(outputs / f"comparison_{name}.png", png)


ONE_SEED = (
    "±: standard deviation if images (real ones, too), paths and perturbations were drawn anew "
    "from the same training. **Another seed may give another answer**: how much trainings differ "
    "is not in it, and no verdict is given for measures of the history (more stable), whose epochs "
    "are not independent. Bold: better, by more than two standard deviations of the difference; "
    "of equal models one is, by chance, in 1 of 20 measures."
)
# By chance: of the 20 ways to choose three runs of six, two choose the best or the worst three.
SEVERAL_SEEDS = (
    "±: standard deviation over the seeds; of real images, and of a run alone, if images were "
    "drawn anew. Bold: its worst seed is better than the best of the others, and on average the "
    "difference is more than two of its standard deviations (a run alone is taken to deviate as "
    "the others do). Of equal models one is better with every seed, by chance, in 1 of 3 measures "
    "with two seeds of each, in 1 of 10 with three, in 1 of 126 with five (one run beside two: in "
    "2 of 3). Figures show the first run of each."
)


def make_report(columns, results, accuracy):
    """comparison.md."""
    labels = list(columns)
    about_runs = []
    for label, group in columns.items():
        folders = ", ".join(str(run.folder) for run in group)
        about_runs.append(f"- {label}: {folders}, after epoch {len(group[0].history)}")
    for label in labels[1:]:
        first, other = columns[labels[0]][0], columns[label][0]
        changes = find_differences(first, other, [f"in {labels[0]}", f"in {label}"])
        seeds = [sorted(run.seed for run in columns[each]) for each in (labels[0], label)]
        if seeds[0] != seeds[1]:
            changes.insert(0, f"seeds {seeds[0]} in {labels[0]}, {seeds[1]} in {label}")
        if changes:
            about_runs.append(f"- **Not the same conditions**: {common.shorten(changes)}")
    has_several = any(len(group) > 1 for group in columns.values())
    captions = []
    for name, (english, chinese) in CAPTIONS.items():
        captions += [f"- comparison_{name}.png: {english}", f"  {chinese}"]
    lines = [
        f"Of each {IMAGES:,} images, compared with the test images by a classifier of accuracy "
        f"{accuracy:.4f}, {PAIRS} paths, {PERTURBED:,} perturbations and, for the nearest training "
        f"image, {COPIES:,} images. Real images: training images, on which the classifier was "
        "trained, so their distance is not chance alone (nearest training image: test images).",
        "",
        *about_runs,
        "",
        make_table(results),
        "",
        SEVERAL_SEEDS if has_several else ONE_SEED,
        "",
        *explain_undefined(results),
        "Fréchet distance, precision, recall, paths and perturbations are taken in the 128 "
        "features of the classifier, so the distance is not to be compared with a FID, which is "
        "taken in those of the Inception network. Like real: better is closer to the real images' "
        "number, above or below. Sharpness is taken after a 3x3 median filter, which removes "
        "single specks. A copy moved by a pixel is not found, nor are a few copies.",
        "",
        "\\* Last quarter of the run; what broke down before shows in runaway only. Samples change "
        "less in a longer run, because the average of G is over more steps. D's loss deviates "
        "little where D cannot decide and it stays at ln 2, which is no stability. Deviations of "
        "other losses or batch sizes do not compare: that of a mean over few images is larger. Few "
        "epochs make any generator smooth.",
        "",
        *make_verdicts(results),
        "Figures and captions:",
        "",
        *captions,
        "",
    ]
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # the lines as they are above
        allow_abbrev=False,
    )
    default = [Path("outputs/gan"), Path("outputs/dcgan")]
    parser.add_argument("folders", nargs="*", type=Path, default=default, help="of the runs")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where to write")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the images")
    args = parser.parse_args(argv)
    arguments = [args.folders, args.outputs, args.data]
    common.run_for_people(compare, arguments, "fewer runs at a time may help")


if __name__ == "__main__":
    main()
