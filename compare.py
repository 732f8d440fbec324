"""Measure what a report claims of the two models: `python compare.py` after `gan.py` and `dcgan.py`.

Reads outputs/gan and outputs/dcgan (either alone will do), and writes outputs/comparison.png and
outputs/comparison.md. Quality and variety are judged in the features of a small classifier, trained
once and kept in outputs/classifier.pt: 10,000 generated images against the 10,000 test images.
"""

import common  # first: it says in one line which package is missing

# isort: split
import argparse
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import dcgan
import gan

GENERATORS = {"GAN": gan.Generator, "DCGAN": dcgan.Generator}
LABELS = "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"
N = 10_000  # images on each side of a comparison
PAIRS = 1000  # of latent vectors, for the path length; a tenth of them for the interpolations
EPOCHS = 10  # of the judge
K = 5  # nearest neighbours that make an image's neighbourhood, as in Naeem et al. (2020)


# --------------------------------------------------------------------------------- the judge


class Judge(nn.Module):
    """Images (N, 1, 28, 28) in [-1, 1] to logits (N, 10) of garments; features: last hidden layer."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(*self.block(1, 32), *self.block(32, 64), *self.block(64, 128),
                                      nn.Flatten(), nn.Linear(128 * 3 * 3, 128), nn.ReLU())
        self.classify = nn.Sequential(nn.Dropout(0.4), nn.Linear(128, 10))

    @staticmethod
    def block(channels_in, channels_out):
        conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        return conv, nn.MaxPool2d(2), nn.BatchNorm2d(channels_out), nn.ReLU()

    def forward(self, x):
        return self.classify(self.features(x))


def train_judge(images, labels, epochs):
    """A Judge trained on uint8 images (N, 1, 28, 28) and their labels (N,)."""
    torch.manual_seed(0)
    judge = Judge().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(judge.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=5e-3, epochs=epochs, steps_per_epoch=math.ceil(len(images) / 128))
    for _ in tqdm(range(epochs), "training the judge", mininterval=1):
        for batch in torch.randperm(len(images)).split(128):
            x = common.scale(images[batch])
            mirrored = torch.rand(len(batch)) < 0.5  # a garment is the same garment seen in a mirror
            x[mirrored] = x[mirrored].flip(-1)
            optimizer.zero_grad()
            F.cross_entropy(judge(x), labels[batch].long()).backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


def in_parts(function, x):
    """function(x), 500 rows of x at a time, which takes less memory."""
    return torch.cat([function(part) for part in x.split(500)])


@torch.no_grad()
def judge_images(judge, images):
    """Features (N, 128) and classes (N,) of uint8 images (N, 28, 28)."""
    features = in_parts(lambda part: judge.features(common.scale(part[:, None])), images)
    return features, judge.classify(features).argmax(1)


# ------------------------------------------------------------------------------- the measures


def frechet_distance(a, b):
    """Between normal distributions fitted to the features a (N, F) and b (M, F) (Heusel et al. 2017):
    |mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) with the covariances A and B."""
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


def precision_recall_coverage(real, real_radius, fake):
    """Of features real (N, F), with their neighbourhood, and fake (M, F): the share of fake images in
    the neighbourhood of a real one; of real ones in that of a fake one (Kynkäänniemi et al. 2019); and
    of real images with a fake one in their neighbourhood (Naeem et al. 2020)."""
    precise, recalled, covered = [], *torch.zeros(2, len(real), dtype=torch.bool)
    for part, radius in zip(fake.split(500), neighbourhood(fake).split(500), strict=True):
        distance = torch.cdist(part, real)
        precise.append((distance <= real_radius).any(1))
        recalled |= (distance <= radius[:, None]).any(0)
        covered |= (distance <= real_radius).any(0)
    return [share.float().mean().item() for share in (torch.cat(precise), recalled, covered)]


def sharpness(images):
    """Variance of the Laplacian, the mean over uint8 images (N, 28, 28) (Pech-Pacheco et al. 2000)."""
    laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    edges = F.conv2d(images[:, None].float(), laplacian)
    return edges.flatten(1).var(1, correction=0).mean().item()


def interpolate(a, b, t):
    """From latent vectors a (t = 0) to b (t = 1), (..., L), on a great circle (slerp; White 2016)."""
    angle = torch.acos(F.cosine_similarity(a, b, dim=-1).clamp(-1, 1))[..., None]
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


@torch.no_grad()
def path_length(G, judge, z_a, z_b, t, epsilon=1e-3):
    """Perceptual path length (Karras et al. 2019): the mean of |f(G(z(t + e))) - f(G(z(t)))|^2 / e^2, f
    being the judge's features, over pairs of latent vectors (N, L) and places t (N, 1) between them."""
    here, there = (in_parts(lambda z: judge.features(G(z)), interpolate(z_a, z_b, place))
                   for place in (t, t + epsilon))
    return ((here - there).square().sum(1) / epsilon**2).mean().item()


@torch.no_grad()
def interpolation_steps(G, judge, z_a, z_b, steps):
    """Images (N, steps + 1, 1, 28, 28) on the way between latent vectors (N, L), and the distances
    (N, steps) of the judge's features from one to the next."""
    t = torch.linspace(0, 1, steps + 1)[None, :, None]
    z = interpolate(z_a[:, None], z_b[:, None], t)
    x = in_parts(G, z.flatten(0, 1))
    features = in_parts(judge.features, x).view(*z.shape[:2], -1)
    return x.view(*z.shape[:2], 1, 28, 28), features.diff(dim=1).norm(dim=2)


def measure_images(judge, images, real):
    """Rows of the table, {(claim, measure, meaning): value}, on quality and variety of uint8 images
    (N, 28, 28), and the shares (10,) of the garments among them. real: features (M, F) of test images
    and their neighbourhood (M,)."""
    features, classes = judge_images(judge, images)
    precision, recall, coverage = precision_recall_coverage(*real, features)
    shares = torch.bincount(classes, minlength=10) / len(classes)
    return {
        ("Quality", "Frechet distance", "of features of generated and test images; lower is better"):
            frechet_distance(features, real[0]),
        ("Quality", "precision", "share of fake images among real ones; higher is better"): precision,
        ("Quality", "sharpness", "variance of the Laplacian; closer to real data's is better"):
            sharpness(images),
        ("Variety", "recall", "share of real images among fake ones; higher is better"): recall,
        ("Variety", "coverage", "share of real images with a fake one near; higher is better"): coverage,
        ("Variety", "smallest share of a garment", "closer to 0.1 is better"): shares.min().item(),
        ("Variety", "largest share of a garment", "closer to 0.1 is better"): shares.max().item(),
    }, shares


def measure_memorisation(images, train):
    distances = in_parts(lambda part: common.nearest(part, train)[1], images[:2000])
    return {("Memorisation", "nearest training image", "median distance in grey levels; "
             "far below that of real (test) images is copying"): distances.median().item()}


def measure_stability(history):
    quarter = max(1, len(history) // 4)
    grids = history.samples[quarter - 1 :: quarter].float()
    change = grids.diff(dim=0).abs().mean().item() if len(grids) > 1 else math.nan
    D_std, G_std = (x[-50:].std(1).mean().item() for x in (history.D_loss, history.G_loss))
    return {
        ("Stability", "D loss: deviation in an epoch", "mean of the last 50; lower is steadier"): D_std,
        ("Stability", "G loss: deviation in an epoch", "mean of the last 50; lower is steadier"): G_std,
        ("Stability", "change of the samples", "of a pixel in a quarter of the run, in grey levels; "
         "lower is steadier"): change,
    }


def measure_latent_space(G, judge, latent_dim):
    """Smoothness; and to draw, images of two ways, (2, 17, 28, 28) in [-1, 1], and the changes from step
    to step along many, (N, 32)."""
    random = torch.Generator().manual_seed(2018)
    z_a, z_b = torch.randn(2, PAIRS, latent_dim, generator=random)
    length = path_length(G, judge, z_a, z_b, torch.rand(PAIRS, 1, generator=random))
    images, jumps = interpolation_steps(G, judge, z_a[: PAIRS // 10], z_b[: PAIRS // 10], 32)
    jumps = jumps / jumps.mean(1, keepdim=True)
    return {
        ("Smoothness", "path length", "change of features with z, squared; lower is smoother"): length,
        ("Smoothness", "largest jump", "of 32 steps from z to z, over the mean; near 1 is smoother"):
            jumps.amax(1).mean().item(),
    }, images[:2, ::2, 0], jumps


def comparison_table(columns):
    """Markdown: a row a measure, a column each of `columns`, {name: rows}; real data has fewer rows."""
    lines = [f"| measure | {' | '.join(columns)} | what it means |", "|---" * (len(columns) + 2) + "|"]
    for claim, measure, meaning in next(iter(columns.values())):
        values = [rows.get((claim, measure, meaning), math.nan) for rows in columns.values()]
        cells = ["" if math.isnan(x) else f"{x:.3g}" if x < 1000 else f"{x:,.0f}" for x in values]
        lines.append(f"| {claim}: {measure} | {' | '.join(cells)} | {meaning} |")
    return "\n".join([*lines, ""])


def draw_losses(axes, history):
    """The mean of both losses in every epoch, and their standard deviation within it as a band."""
    epochs = np.arange(1, len(history) + 1)
    curves = ((history.D_loss, "Discriminator", "tab:blue", "-"),
              (history.G_loss, "Generator", "tab:orange", "--"))
    for losses, label, colour, style in curves:
        mean, std = losses.mean(1).numpy(), losses.std(1, correction=0).numpy()
        axes.plot(epochs, mean, style, color=colour, linewidth=1.2, label=label)
        axes.fill_between(epochs, mean - std, mean + std, color=colour, alpha=0.25, linewidth=0)
    axes.axhline(math.log(2), color="black", linewidth=0.8, linestyle=":", label="ln 2")
    axes.set_xlabel("Epoch")


def draw_jumps(axes, jumps):
    """The step-to-step change along interpolations, {name: (N, steps)}: mean and largest of N."""
    for (name, changes), style in zip(jumps.items(), ("-", "--"), strict=False):
        place = np.arange(1, changes.shape[1] + 1)
        (line,) = axes.plot(place, changes.mean(0), style, label=f"{name}, mean of {len(changes)}")
        thin = {"color": line.get_color(), "linewidth": 0.6, "label": f"{name}, largest"}
        axes.plot(place, changes.amax(0), style, **thin)
    axes.set_title("Change from step to step / mean step")
    axes.set_xlabel("Step of the interpolation")
    axes.set_ylim(0, None)


def draw_shares(axes, shares):
    """The share of each of the ten garments, {name: (10,)}."""
    for i, (name, share) in enumerate(shares.items()):
        place = np.arange(10) + (i - (len(shares) - 1) / 2) * 0.27
        look = {"hatch": ("", "/////", ".....")[i], "edgecolor": "black", "linewidth": 0}
        axes.barh(place, share.numpy() * 100, 0.25, label=name, **look)
    axes.set_yticks(np.arange(10), LABELS)
    axes.invert_yaxis()
    axes.set_title("Share of each garment in %")


def comparison_figure(runs, real, shares):
    """One page. runs: {name: {"history", "samples" (32, 28, 28), "path" (N, steps, 28, 28),
    "jumps" (N, steps)}}; real: uint8 (32, 28, 28); shares: {name: (10,)}, real data's among them."""
    titles = [f"{name}, epoch {len(run['history'])}" for name, run in runs.items()]
    figure = common.new_figure(17, f"{' and '.join(runs)} on FashionMNIST")
    top, middle, paths, end = figure.subfigures(4, height_ratios=(4, 2.6, 0.3 + 1.7 * len(runs), 5.6))
    losses = top.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    samples = middle.subplots(1, len(runs) + 1)
    ways = paths.subplots(len(runs), squeeze=False)[:, 0]
    for title, run, *axes in zip(titles, runs.values(), losses, samples[:-1], ways, strict=True):
        draw_losses(axes[0], run["history"])
        axes[1].imshow(common.mosaic(run["samples"]), vmin=0, vmax=255)
        rows = F.pad(run["path"], (1, 1, 1, 1), value=1).transpose(1, 2).flatten(2)  # (N, 30, 17 * 30)
        axes[2].imshow(rows.flatten(0, 1).numpy(), vmin=-1, vmax=1)
        for panel, what in zip(axes, (": losses", "", ": from one z to another"), strict=True):
            panel.set_title(title + what)
    samples[-1].imshow(common.mosaic(real), vmin=0, vmax=255)
    samples[-1].set_title("real test images")
    for axes in [*samples, *ways]:
        axes.set_axis_off()
    jumps_axes, shares_axes = end.subplots(1, 2)
    draw_jumps(jumps_axes, {name: run["jumps"] for name, run in runs.items()})
    draw_shares(shares_axes, shares)
    losses[0].legend()
    for axes in (jumps_axes, shares_axes):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.23), ncols=2)
    return figure


def load_run(path, Generator):
    """The averaged generator and the History of the run with this checkpoint. Raises UserError."""
    try:
        checkpoint = common.read_checkpoint(path)
        G = Generator(checkpoint["settings"]["latent_dim"])
        G.load_state_dict(checkpoint["G_ema"])
        return G.eval(), common.History(**checkpoint["history"]), checkpoint["settings"]["latent_dim"]
    except Exception as error:  # whatever Python and torch make of a bad file
        reason = f"damaged or of another network ({type(error).__name__})"
        raise common.UserError(f"{path} is {reason}: run {path.parent.name}.py --fresh") from error


def load_judge(path, images, labels):
    """The judge kept at `path`; where there is none, or a damaged one, it is trained first."""
    judge = Judge()
    try:
        judge.load_state_dict(common.read_checkpoint(path))
    except Exception:
        judge = train_judge(images, labels, EPOCHS)
        common.save(path, lambda file: torch.save(judge.state_dict(), file))
    return judge.eval()


def compare(outputs, data):
    """Measure the runs in `outputs`; write comparison.png and comparison.md there; returns the table."""
    paths = {name: outputs / name.lower() / "checkpoint.pt" for name in GENERATORS}
    loaded = {name: load_run(path, GENERATORS[name]) for name, path in paths.items() if path.exists()}
    if not loaded:
        raise common.UserError(f"{outputs} has no run of gan.py or dcgan.py: run one of them first")
    (train, test), labels = common.load_fashion_mnist(data), common.load_fashion_mnist(data, "labels")
    common.use_the_cpu_well()
    judge = load_judge(outputs / "classifier.pt", train, labels[0])
    train, test = train[:, 0], test[:, 0]
    features, classes = judge_images(judge, test)
    real, accuracy = (features, neighbourhood(features)), (classes == labels[1]).float().mean().item()
    runs, columns, shares = {}, {}, {}
    for name, (G, history, latent_dim) in tqdm(loaded.items(), "measuring"):
        z = torch.randn(N, latent_dim, generator=torch.Generator().manual_seed(2017))
        images = in_parts(lambda part, G=G: common.generate(G, part), z)
        columns[name], shares[name] = measure_images(judge, images, real)
        smoothness, path, jumps = measure_latent_space(G, judge, latent_dim)
        columns[name] |= measure_stability(history) | smoothness | measure_memorisation(images, train)
        runs[name] = {"history": history, "samples": images[:32], "path": path, "jumps": jumps}
    columns["real data"], shares["real data"] = measure_images(judge, train[:N], real)
    columns["real data"] |= measure_memorisation(test, train)
    heading = f"{N:,} images each; real data: training images. The judge's accuracy: {accuracy:.4f}.\n\n"
    table = heading + comparison_table(columns)
    common.save(outputs / "comparison.md", lambda file: file.write(table.encode()))
    common.save(outputs / "comparison.png", comparison_figure(runs, test[:32], shares).savefig)
    return table


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=common.Path, default="outputs", help="folder of the runs")
    parser.add_argument("--data", type=common.Path, default="data", help="folder of the images")
    args = parser.parse_args(argv)
    with common.errors_for_people():
        print(compare(args.outputs.expanduser(), args.data.expanduser()))


if __name__ == "__main__":
    main()
