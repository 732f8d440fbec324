"""Each measure of compare.py against a case whose answer is known without it."""

import json
import math
import shutil

import common  # before torch

# isort: split
import numpy as np
import pytest
import torch
from conftest import README, ROOT, read_history, train
from torch import nn
from torchvision.transforms.functional import gaussian_blur

import compare
import dcgan
import gan

REFERENCE = ROOT / "outputs" / "reference"


def constant(*greys):
    """uint8 images, each of one grey."""
    return torch.tensor(greys, dtype=torch.uint8)[:, None, None].repeat(1, 28, 28)


# ----------------------------------------------------------------------------- quality and variety


def test_frechet_distance_of_two_normal_distributions():
    """N(0, diag(1, 4)) and N((3, 0), diag(4, 4)) turned by half a radian: a closed form exists."""
    torch.manual_seed(0)
    turn = torch.tensor([[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]])
    a = torch.randn(200_000, 2) * torch.tensor([1.0, 2.0]) @ turn
    b = (torch.randn(200_000, 2) * torch.tensor([2.0, 2.0]) + torch.tensor([3.0, 0.0])) @ turn
    distance = compare.frechet_distance(torch.stack([a, b], dim=1))
    assert distance == pytest.approx(10, rel=0.01)  # |(3, 0)|^2 + (1 - 2)^2 + (2 - 2)^2
    same = compare.frechet_distance(torch.stack([a, a], dim=1))
    assert same == pytest.approx(0, abs=1e-9)


def test_neighbourhoods():
    """Two clusters around (0, 0) and (100, 0): each holds half of the points."""
    torch.manual_seed(0)
    points = torch.randn(600, 2)
    points[300:, 0] += 100
    radius = compare.neighbourhood(points)
    half = points[:300]
    assert compare.is_within(points, points, radius).all()
    assert compare.is_within(half, points, radius).all()  # precision of a half
    assert compare.is_within(points, half, radius[:300]).float().mean() == 0.5  # recall of it
    assert not compare.is_within(points + 1000, points, radius).any()
    line = torch.arange(100.0)[:, None]
    assert compare.neighbourhood(line)[50] == 3  # the 5th nearest of 50 is 47 or 53


def test_imbalance():
    assert compare.imbalance(torch.arange(10)) == 0
    assert compare.imbalance(torch.zeros(10, dtype=torch.int64)) == 90  # 90 above, 9 x 10 below
    twice = torch.tensor([*range(10), 9])  # one garment twice as often: 2 of 11, the others 1 of 11
    assert compare.imbalance(twice) == pytest.approx(100 * 2 / 11 - 10)


@pytest.fixture(scope="module")
def judge(data):
    """A function from images of the cut to their items, against its training images."""
    classifier, _ = compare.load_classifier()
    train_set, _ = common.load_fashion_mnist(data)
    features, _ = compare.classify(classifier, train_set.data)
    real = {"features": features, "radius": compare.neighbourhood(features)}

    def image_items(images):
        return compare.image_items(images, classifier, real)

    return image_items


def test_half_of_the_classes_and_copies_are_less_varied(data, judge):
    train_set, _ = common.load_fashion_mnist(data)
    half = train_set.data[train_set.targets < 5]
    half = judge(torch.cat([half, half, half])[:320])
    copied = judge(train_set.data[:10].repeat(32, 1, 1))
    assert half["recall"].float().mean() < 0.7
    assert compare.imbalance(half["imbalance"]) > 40
    assert copied["recall"].float().mean() < 0.2


def test_mixtures_of_two_garments_are_far_from_real_images(data, judge):
    """The left half of one garment beside the right half of another is as sharp and as varied."""
    train_set, test_set = common.load_fashion_mnist(data)
    images = train_set.data[train_set.targets.argsort()]
    mixed = images.clone()
    mixed[:, :, 14:] = images[:, :, 14:].roll(160, 0)
    distance = compare.frechet_distance(judge(mixed)["Fréchet distance"])
    others = test_set.data.repeat(4, 1, 1)
    assert distance > 2 * compare.frechet_distance(judge(others)["Fréchet distance"])


def test_the_committed_classifier_knows_garments(data):
    _, test_set = common.load_fashion_mnist(data)
    classifier, accuracy = compare.load_classifier()
    _, found = compare.classify(classifier, test_set.data)
    assert (found == test_set.targets).float().mean() > 0.85  # of 80 images
    assert accuracy > 0.93


# --------------------------------------------------------------------------------------- sharper


def items_of(images, judge):
    padding = images[:1].repeat(320 - len(images), 1, 1)
    items = judge(torch.cat([images, padding]))
    return {name: items[name][: len(images)] for name in ("sharpness", "grain")}


def test_sharpness_of_an_edge(judge):
    images = constant(0)
    images[0, :, 14:] = 100
    # The median filter leaves the edge. Of its 26 columns the Laplacian has 24; it is 100 left of
    # the edge, -100 right of it.
    assert items_of(images, judge)["sharpness"].item() == pytest.approx(2 * 100**2 / 24)


def test_specks_are_grain_and_no_sharpness(judge):
    images = constant(50)
    images[0, 5, 5] = 250
    images[0, 20, 9] = 250
    items = items_of(images, judge)
    assert items["sharpness"].item() == 0
    assert items["grain"].item() == pytest.approx(2 * 200 / 26**2)


def test_neither_noise_nor_blur_passes_for_sharper(data, judge):
    torch.manual_seed(0)
    train_set, _ = common.load_fashion_mnist(data)
    images = train_set.data
    noise = 10 * torch.randn(images.shape)
    noisy = (images + noise).round().clamp(0, 255).byte()
    blurred = gaussian_blur(images.float()[:, None], 9, 0.5)[:, 0].round().byte()
    real, noisy, blurred = (
        {name: values.double().mean() for name, values in judge(shown).items() if values.dim() == 1}
        for shown in (images, noisy, blurred)
    )
    assert noisy["sharpness"] < real["sharpness"]
    assert blurred["sharpness"] < real["sharpness"]
    assert blurred["grain"] < real["grain"] < noisy["grain"]


# -------------------------------------------------------------------------------------- smoother


class Linear(nn.Module):
    """A generator whose first row of pixels is a tenth of z."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.1))

    def forward(self, z):
        x = torch.zeros(len(z), 1, 28, 28)
        x[:, 0, 0, : z.shape[1]] = self.gain * z
        return x


class Step(Linear):
    """One whose image changes only where z_0 changes its sign."""

    def forward(self, z):
        return 0.5 * z[:, :1].sign()[:, :, None, None].expand(-1, 1, 28, 28) + 0 * self.gain


class Pixels(nn.Module):
    """In the place of a classifier: the features are the first three pixels."""

    def features(self, x):
        return x[:, 0, 0, :3]

    def logits(self, features):
        return features


def test_a_linear_generator_is_smooth_in_every_way():
    items = compare.latent_items(Linear(), 3, Pixels())
    # Each dimension moved by 2 changes one pixel by 0.2 of its range of 2, but for rounding.
    expected = torch.full((compare.MOVES,), 0.2)
    torch.testing.assert_close(items["outliers"], expected, atol=0.01, rtol=0)
    assert compare.tail(items["outliers"]) == pytest.approx(1, abs=0.05)
    # An arc of 90 degrees is 1.11 times its chord; others are not much longer.
    assert 1 <= compare.median(items["detour"]) < 1.4


def test_a_generator_that_jumps():
    """One step in 32 is all the change: it is 32 times the mean one."""
    items = compare.latent_items(Step(), 3, Pixels())
    jumps = items["jumps"][items["jumps"].isfinite()]  # of z with the same sign at both ends: none
    assert compare.median(jumps) == pytest.approx(32, rel=1e-4)


def test_tail():
    moves = torch.cat([torch.full((98,), 2.0), torch.full((3,), 10.0)])
    assert compare.tail(moves) == 5
    assert compare.tail(3 * moves) == 5  # the shape counts, not the size


def test_interpolation_is_on_the_circle():
    a = torch.tensor([[1.0, 0.0]])
    b = torch.tensor([[0.0, 1.0]])
    for t in (0, 0.25, 1):
        expected = [[math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)]]
        found = compare.interpolate(a, b, torch.tensor([[t]]))
        np.testing.assert_allclose(found, expected, atol=1e-6)


# ------------------------------------------------------------------------- more stable, no copies


def test_stability_is_that_of_the_last_quarter_and_a_runaway_that_of_all():
    history = []
    for epoch in range(1, 81):
        last = epoch > 60
        row = {"sample_change": 10.0 if last else 50.0, "G_loss_std": 4.0 if last else 9.0}
        row |= {"D_loss_std": 2.0 if last else 9.0, "D_loss_mean": 0.7, "G_loss_mean": 0.8}
        history.append(row)
    history[20]["G_loss_mean"] = 2.4
    items = {name: values.mean().item() for name, values in compare.history_items(history).items()}
    assert items == pytest.approx(
        {
            "change of the samples": 10,
            "deviation of G's loss": 4,
            "deviation of D's loss": 2,
            "runaway": 3,
        }
    )


def test_nearest_is_the_root_mean_square_difference():
    """Among more images than are compared at once."""
    torch.manual_seed(0)
    others = torch.randint(0, 256, (12_000, 28, 28), dtype=torch.uint8)
    images = others[[11_000, 30]] // 2
    indices, distances = compare.find_nearest(images, others)
    for i in range(2):
        difference = others.numpy().astype(float) - images[i].numpy()
        by_hand = np.sqrt((difference**2).mean((1, 2)))
        assert indices[i] == by_hand.argmin()
        assert distances[i].item() == pytest.approx(by_hand.min(), abs=0.05)


# --------------------------------------------------------------------------------- who is better


def test_the_spread_is_that_of_a_mean():
    """Of N numbers of deviation 1 the mean deviates by 1 / sqrt(N)."""
    torch.manual_seed(0)
    value, spread = compare.measure({"grain": torch.randn(10_000)})["grain"]
    assert value == pytest.approx(0, abs=0.04)
    assert spread == pytest.approx(0.01, rel=0.35)  # 50 resamples: within 10%, mostly


def row_of(name):
    (row,) = [row for row in compare.MEASURES if row.name == name]
    return row


@pytest.mark.parametrize(
    ("name", "GAN", "DCGAN", "real", "better"),
    [
        ("Fréchet distance", (26, 0.5), (5, 0.5), (0.5, 0.1), "DCGAN"),  # lower
        ("recall", (0.9, 0.01), (0.5, 0.01), (0.8, 0.01), "GAN"),  # higher
        ("grain", (12, 0.1), (9, 0.1), (9.4, 0.1), "DCGAN"),  # like real
        ("grain", (7, 0.1), (9, 0.1), (7.4, 0.1), "GAN"),
        ("jumps", (3.0, 0.1), (2.8, 0.1), None, None),  # within chance: 0.2 < 2 x 0.14
        ("jumps", (3.0, 0.1), (2.6, 0.1), None, "DCGAN"),
        ("change of the samples", (2, 0), (math.nan, 0), None, None),
    ],
)
def test_who_is_better(name, GAN, DCGAN, real, better):
    results = {"GAN": {name: GAN}, "DCGAN": {name: DCGAN}, compare.REAL: {name: real}}
    assert compare.find_better(row_of(name), results) == better
    del results["DCGAN"]
    assert compare.find_better(row_of(name), results) is None


def test_a_line_for_each_claim():
    GAN = {row.name: (2, 0.1) for row in compare.MEASURES}
    DCGAN = {row.name: (2, 0.1) for row in compare.MEASURES}
    real = {row.name: (0, 0.1) for row in compare.MEASURES}
    DCGAN["sharpness"] = DCGAN["grain"] = DCGAN["jumps"] = DCGAN["outliers"] = (1, 0.1)
    GAN["detour"] = (1, 0.1)
    lines = compare.make_verdicts({"GAN": GAN, "DCGAN": DCGAN, compare.REAL: real})
    assert "- **sharper**, of 2: DCGAN in 2 (sharpness, grain)" in lines
    assert "- **smoother**, of 3: DCGAN in 2 (jumps, outliers); GAN in 1 (detour)" in lines
    assert "- **more varied**, of 2: none in 2 (recall, imbalance)" in lines


# ------------------------------------------------------------------------------- the command line


@pytest.fixture
def small(monkeypatch):
    """Few images: the numbers do not matter."""
    for name, value in {"N": 60, "PAIRS": 8, "MOVES": 20, "COPIES": 8, "RESAMPLES": 3}.items():
        monkeypatch.setattr(compare, name, value)


def run_compare(data, outputs, *folders):
    """compare.py on these folders; returns comparison.md."""
    words = [*folders, "--outputs", outputs, "--data", data]
    compare.main([str(word) for word in words])
    return (outputs / "comparison.md").read_text(encoding="utf-8")


def rows_of(table):
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def test_two_models_side_by_side(trained, data, small, capsys):
    train(dcgan, trained, data, "--epochs", 1)
    capsys.readouterr()
    table = run_compare(data, trained, trained / "gan", trained / "dcgan")
    assert table in capsys.readouterr().out
    assert f"GAN: {trained / 'gan'}, after epoch 2" in table
    assert f"DCGAN: {trained / 'dcgan'}, after epoch 1" in table
    assert "from GAN to DCGAN: epochs was 2, is now 1" in table
    heading, *rows = rows_of(table)
    assert heading[:6] == ["claim", "measure", "better", "GAN", "DCGAN", "real images"]
    assert len(rows) == 14
    for claim, name, _, GAN, DCGAN, real, _ in rows:
        assert float(GAN.split()[0].replace(",", "")) >= 0, name
        assert (real == "") == (claim in ("smoother", "more stable"))
        if name == "change of the samples":
            assert DCGAN == "undefined"  # which takes two epochs
    for name in compare.CAPTIONS:
        assert (trained / f"comparison_{name}.png").stat().st_size > 5_000
        assert f"- comparison_{name}.png: " in table  # its caption


def test_a_variant_of_a_layer_is_compared(trained, data, small):
    """Trained by a gan.py with another slope, which lies in its folder."""
    other = trained / "other" / "gan"
    shutil.copytree(trained / "gan", other)
    script = (other / "gan.py").read_text()
    (other / "gan.py").write_text(script.replace("LeakyReLU(0.2)", "LeakyReLU(0.9)"))
    description = json.loads((other / "settings.json").read_text())
    for network in ("G", "D"):
        lines = description["networks"][network]
        description["networks"][network] = [line.replace("=0.2", "=0.9") for line in lines]
    description["settings"]["seed"] = 4
    (other / "settings.json").write_text(json.dumps(description))
    table = run_compare(data, trained, trained / "gan", other)
    heading, distance, *_ = rows_of(table)
    assert heading[3:5] == ["GAN 1", "GAN 2"]
    assert distance[3] != distance[4]  # the same weights, another slope
    (line,) = [line for line in table.splitlines() if "Not the same conditions" in line]
    assert "from GAN 1 to GAN 2: seed was 0, is now 4" in line
    assert "G + (1): LeakyReLU(negative_slope=0.9)" in line


@pytest.mark.parametrize(
    "name", ["generator.pt", "history.csv", "settings.json", "gan.py", "all", "another"]
)
def test_a_folder_that_cannot_be_read_is_an_error_and_nothing_is_written(
    name, trained, trained_dcgan_once, data, small
):
    other = trained / "other" / "gan"
    shutil.copytree(trained / "gan", other)
    if name == "all":
        shutil.rmtree(other)
    elif name == "another":
        shutil.copy(trained_dcgan_once / "generator.pt", other)
    elif name == "gan.py":
        (other / name).unlink()
    else:
        (other / name).write_text("half")
    with pytest.raises(SystemExit) as stop:
        run_compare(data, trained / "new", trained / "gan", other)
    line = stop.value.code
    assert line.startswith("error: ")
    assert str(other) in line
    assert line.isprintable()
    assert not (trained / "new").exists()


def test_one_latent_dimension(data, tmp_path, small):
    folder = train(gan, tmp_path, data, "--epochs", 2, "--latent-dim", 1)
    table = run_compare(data, tmp_path, folder)
    assert "nan" not in table
    assert "undefined" not in table


# ------------------------------------------------------------------------ what is in the repository


def test_the_committed_table_is_that_of_the_committed_runs():
    table = (REFERENCE / "comparison.md").read_text(encoding="utf-8")
    (row,) = [row for row in rows_of(table) if row[1] == "change of the samples"]
    for model, cell in zip(("gan", "dcgan"), row[3:5], strict=True):
        changes = [float(epoch["sample_change"]) for epoch in read_history(REFERENCE / model)[150:]]
        assert f"{model.upper()}: outputs/reference/{model}, after epoch 200" in table
        assert len(changes) == 50
        assert float(cell.split()[0]) == pytest.approx(sum(changes) / 50, rel=5e-3)


def test_the_readme_says_what_the_committed_comparison_says():
    table = (REFERENCE / "comparison.md").read_text(encoding="utf-8")
    measured = {row[1]: [cell.split(" ")[0] for cell in row[3:6]] for row in rows_of(table)}
    section = README.split("## The result")[1].split("\n## ")[0]
    rows = rows_of(section)[1:]
    assert len(rows) == 8
    for name, *cells in rows:
        assert cells[-3:] == measured[name], name
    verdicts = [line for line in table.splitlines() if line.startswith("- **")]
    assert len(verdicts) == 6
    for line in verdicts:
        assert line in section
