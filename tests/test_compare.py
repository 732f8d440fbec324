"""Each measure of compare.py against a case whose answer is known without it."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import README, ROOT, read_history, train
from torch import nn
from torchvision.transforms.functional import gaussian_blur

import common
import compare
import dcgan
import gan
from compare import Evidence

REFERENCE = ROOT / "outputs" / "reference"


def in_features(points):
    return Evidence(features=points, radius=compare.neighbourhood(points))


def two_clusters(n):
    """Points around (0, 0) and around (100, 0)."""
    points = torch.randn(2 * n, 2)
    points[n:, 0] += 100
    return points


def constant(*greys):
    """uint8 images, each of one grey."""
    return torch.tensor(greys, dtype=torch.uint8)[:, None, None].repeat(1, 28, 28)


# --------------------------------------------------------------------------------------- quality


def test_frechet_distance_of_two_normal_distributions():
    """N(0, diag(1, 4)) and N((3, 0), diag(4, 4)) turned by half a radian: a closed form exists."""
    torch.manual_seed(0)
    turn = torch.tensor([[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]])
    a = torch.randn(200_000, 2) * torch.tensor([1.0, 2.0]) @ turn
    b = (torch.randn(200_000, 2) * torch.tensor([2.0, 2.0]) + torch.tensor([3.0, 0.0])) @ turn
    distance = compare.frechet_distance(Evidence(features=a), Evidence(features=b))
    assert distance == pytest.approx(10, rel=0.01)  # |(3, 0)|^2 + (1 - 2)^2 + (2 - 2)^2
    same = compare.frechet_distance(Evidence(features=a), Evidence(features=a))
    assert same == pytest.approx(0, abs=1e-9)


def test_precision_and_recall():
    torch.manual_seed(0)
    points = two_clusters(300)
    real = in_features(points)
    half = in_features(points[:300])
    elsewhere = in_features(points + 1000)
    assert compare.precision(real, real) == 1
    assert compare.recall(real, real) == 1
    assert compare.precision(half, real) == 1
    assert compare.recall(half, real) == 0.5
    assert compare.precision(elsewhere, real) == 0
    assert compare.recall(elsewhere, real) == 0


def test_coverage_of_independent_sets():
    """Of one distribution it is 1 - 2^-K (Naeem et al. 2020)."""
    torch.manual_seed(0)
    coverage = compare.coverage(in_features(two_clusters(2000)), in_features(two_clusters(2000)))
    assert coverage == pytest.approx(1 - 2**-compare.K, abs=0.02)


def test_coverage_counts_the_neighbourhoods_that_an_image_lies_in():
    real = in_features(torch.arange(100.0)[:, None])
    fake = Evidence(features=torch.full((10, 1), 50.0))
    # K = 5: the 5th nearest of 50 is 3 away, so the neighbourhoods of 47 to 53 hold it.
    assert compare.coverage(fake, real) == pytest.approx(7 / 100)


# --------------------------------------------------------------------------------------- sharper


def test_sharpness_of_an_edge():
    images = constant(0)
    images[0, :, 14:] = 100
    # The median filter leaves the edge. Of its 26 columns the Laplacian has 24; it is 100 left of
    # the edge, -100 right of it.
    assert compare.sharpness(Evidence(images), None) == pytest.approx(2 * 100**2 / 24)


def test_specks_are_grain_and_no_sharpness():
    images = constant(50)
    images[0, 5, 5] = 250
    images[0, 20, 9] = 250
    assert compare.sharpness(Evidence(images), None) == 0
    assert compare.grain(Evidence(images), None) == pytest.approx(2 * 200 / 26**2)


def noisy(images, grey_levels):
    noise = grey_levels * torch.randn(images.shape)
    return (images + noise).round().clamp(0, 255).byte()


def blurred(images, sigma):
    return gaussian_blur(images.float()[:, None], 9, sigma)[:, 0].round().byte()


def test_neither_noise_nor_blur_passes_for_sharper(data):
    torch.manual_seed(0)
    train_set, _ = common.load_fashion_mnist(data)
    real = Evidence(train_set.data)
    for worse in (noisy(real.images, 10), noisy(real.images, 30), blurred(real.images, 0.5)):
        assert compare.sharpness(Evidence(worse), None) < compare.sharpness(real, None)
    assert compare.grain(Evidence(noisy(real.images, 10)), None) > compare.grain(real, None)
    assert compare.grain(Evidence(blurred(real.images, 0.5)), None) < compare.grain(real, None)


# ----------------------------------------------------------------------------------- more varied


def test_shares_of_the_garments():
    classes = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9])
    assert compare.rarest_garment(Evidence(classes=classes), None) == pytest.approx(100 / 12)
    assert compare.most_frequent_garment(Evidence(classes=classes), None) == 25
    assert compare.rarest_garment(Evidence(classes=classes[1:]), None) == 0


@pytest.fixture(scope="module")
def judged(data):
    """A function from images of the cut to their Evidence, by the committed classifier."""
    classifier, _, _ = compare.load_classifier(compare.CLASSIFIER)

    def judge(images):
        return compare.gather_images(images, classifier)

    return judge


def test_half_of_the_classes_and_copies_are_less_varied(data, judged):
    train_set, _ = common.load_fashion_mnist(data)
    real = judged(train_set.data)
    half = judged(train_set.data[train_set.targets < 5])
    copied = judged(train_set.data[:10].repeat(32, 1, 1))
    assert compare.recall(half, real) < 0.7
    assert compare.coverage(half, real) < 0.7
    assert compare.rarest_garment(half, real) < 1
    assert compare.recall(copied, real) < 0.2
    assert compare.coverage(copied, real) < 0.3


def test_mixtures_of_two_garments_are_far_from_real_images(data, judged):
    """The left half of one garment beside the right half of another is as sharp and as varied."""
    train_set, test_set = common.load_fashion_mnist(data)
    images = train_set.data[train_set.targets.argsort()]
    mixed = images.clone()
    mixed[:, :, 14:] = images[:, :, 14:].roll(160, 0)
    real = judged(train_set.data)
    distance = compare.frechet_distance(judged(mixed), real)
    assert distance > 2 * compare.frechet_distance(judged(test_set.data), real)


def test_the_committed_classifier_knows_garments(data, judged):
    _, test_set = common.load_fashion_mnist(data)
    _, accuracy, _ = compare.load_classifier(compare.CLASSIFIER)
    found = judged(test_set.data).classes
    assert (found == test_set.targets).float().mean() > 0.85  # of 80 images
    assert accuracy > 0.93


def test_a_classifier_of_ones_own(data, tmp_path, capsys):
    compare.save_classifier(tmp_path / "new" / "judge.pt", data, epochs=1)
    classifier, accuracy, _ = compare.load_classifier(tmp_path / "new" / "judge.pt")
    _, test_set = common.load_fashion_mnist(data)
    with torch.no_grad():
        found = classifier(common.scale(test_set.data[:, None])).argmax(1)
    assert (found == test_set.targets).float().mean() == pytest.approx(accuracy)
    assert f"test accuracy {accuracy:.4f}" in capsys.readouterr().out


def test_the_committed_table_is_of_the_committed_classifier():
    _, _, fingerprint = compare.load_classifier(compare.CLASSIFIER)
    table = read_table(REFERENCE)
    assert f"Classifier {fingerprint}" in table


def test_the_committed_runs_can_be_compared_at_once():
    folders = [REFERENCE / name for name in ("gan", "dcgan")]
    runs, left_out = compare.load_runs(folders)
    assert left_out == []
    table = read_table(REFERENCE)
    (row,) = [row for row in rows_of(table) if row[1] == "change of the samples"]
    for run, folder, cell in zip(runs, folders, row[2:4], strict=True):
        changes = [float(epoch["sample_change"]) for epoch in read_history(folder)[150:]]
        place = f"outputs/reference/{folder.name}"
        assert f"{run.label}: {place}, after epoch 200." in table
        assert len(changes) == 50
        assert float(cell) == pytest.approx(sum(changes) / 50, rel=5e-3)  # three digits


def test_the_readmes_table_is_that_of_the_committed_comparison():
    table = read_table(REFERENCE)
    measured = {row[1]: row[2:5] for row in rows_of(table)}
    ends = zip(measured["rarest garment"], measured["most frequent garment"], strict=True)
    measured["both"] = [f"{rarest}, {most_frequent}" for rarest, most_frequent in ends]
    lines = README.split("## The result")[1].split("---|---|---|---\n")[1].splitlines()
    lines = lines[: lines.index("")]
    assert len(lines) == 13
    for line in lines:
        _, *cells = [cell.strip() for cell in line.split("|")]
        assert cells in measured.values(), line


# -------------------------------------------------------------------------------------- smoother


def on_ways(*ways):
    return Evidence(ways=torch.tensor(ways, dtype=torch.float32))


def test_a_straight_way_has_no_detour_and_no_jumps():
    way = [[t, 2 * t] for t in range(9)]
    assert compare.detour(on_ways(way), None) == pytest.approx(1)
    assert compare.jumps(on_ways(way), None) == pytest.approx(1)


def test_detour_and_jumps_of_known_ways():
    there_and_half_back = [[0], [1], [2], [3], [2]]  # 4 long, its ends 2 apart
    one_jump = [[0], [1], [2], [3], [12]]  # steps 1, 1, 1, 9, whose mean is 3
    assert compare.detour(on_ways(there_and_half_back), None) == 2
    assert compare.jumps(on_ways(one_jump), None) == 3
    larger = on_ways([[10 * x for x in place] for place in one_jump])
    assert compare.jumps(larger, None) == pytest.approx(3)  # the shape counts, not the size
    assert compare.detour(larger, None) == 1


def test_outliers_and_kept_garment():
    moves = torch.cat([torch.full((98,), 2.0), torch.full((3,), 10.0)])
    assert compare.outliers(Evidence(moves=moves), None) == 5
    assert compare.outliers(Evidence(moves=3 * moves), None) == 5
    assert compare.kept_garment(Evidence(kept=torch.tensor([True, True, False, True])), None) == 75


def test_interpolation_is_on_the_circle():
    a = torch.tensor([[1.0, 0.0]])
    b = torch.tensor([[0.0, 1.0]])
    for t in (0, 0.25, 1):
        expected = [[math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)]]
        found = compare.interpolate(a, b, torch.tensor([[t]]))
        np.testing.assert_allclose(found, expected, atol=1e-6)


class Linear(nn.Module):
    """A generator whose first row of pixels is a tenth of z."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.1))

    def forward(self, z):
        x = torch.zeros(len(z), 1, 28, 28)
        x[:, 0, 0, : z.shape[1]] = self.gain * z
        return x


class Pixels(nn.Module):
    """In the place of a classifier: the features are the first row of pixels, the class is 0, or 1
    where the first pixel is bright."""

    def features(self, x):
        return x[:, 0, 0, :3]

    def logits(self, features):
        return torch.stack([torch.full((len(features),), 0.1), features[:, 0]], dim=1)


def test_a_linear_generator_is_smooth_in_every_way():
    run = compare.Published(None, "linear", "GAN", Linear(), None, {"latent_dim": 3}, {})
    found = compare.gather(run, Pixels(), constant(0))
    # Each dimension moved by 2 changes one pixel by 0.2 of its range of 2, but for rounding.
    torch.testing.assert_close(found.moves, torch.full_like(found.moves, 0.2), atol=0.01, rtol=0)
    assert compare.outliers(found, None) == pytest.approx(1, abs=0.05)
    # An arc of 90 degrees is 1.11 times its chord; others are not much longer.
    assert 1 <= compare.detour(found, None) < 1.4
    # The class changes where z_0 passes 1 on its way from z_0 to z_0 + 2: in a third of
    # P(-1 < z_0 < 1) = 0.683 of all moves.
    assert compare.kept_garment(found, None) == pytest.approx(100 * (1 - 0.683 / 3), abs=2)


# ----------------------------------------------------------------------------------- more stable


def test_stability_is_that_of_the_last_quarter():
    columns = ("sample_change", "D_loss_std", "G_loss_std")
    for epochs in (8, 80):
        history = np.zeros(epochs, dtype=[(column, float) for column in columns])
        history["sample_change"] = 50
        history["sample_change"][-epochs // 4 :] = 10
        history["G_loss_std"][-1] = epochs
        history["D_loss_std"][-1] = epochs / 2
        assert compare.change_of_the_samples(Evidence(history=history), None) == 10
        assert compare.deviation_of_the_generator_loss(Evidence(history=history), None) == 4
        assert compare.deviation_of_the_discriminator_loss(Evidence(history=history), None) == 2


def test_copies_of_training_images_are_found():
    training = constant(*range(0, 250, 10))
    copies = compare.distance_to_training(training[:5], training)
    moved = compare.distance_to_training(training[:5] + 3, training)
    assert compare.nearest_training_image(Evidence(to_training=copies), None) < 0.1
    assert compare.nearest_training_image(Evidence(to_training=moved), None) == pytest.approx(
        3, abs=0.05
    )


# ------------------------------------------------------------------------------- the command line


@pytest.fixture
def small(monkeypatch):
    """Few images: the numbers do not matter."""
    for name, value in {"N": 60, "PAIRS": 8, "MOVES": 20, "COPIES": 8}.items():
        monkeypatch.setattr(compare, name, value)


def run_compare(*words):
    compare.main([str(word) for word in words])


def read_table(folder):
    return (folder / "comparison.md").read_text(encoding="utf-8")


def rows_of(table):
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_two_models_side_by_side(trained, data, small, capsys):
    train(dcgan, trained, data, "--epochs", 1)
    capsys.readouterr()
    run_compare(trained / "gan", trained / "dcgan", "--outputs", trained, "--data", data)
    table = read_table(trained)
    assert table in capsys.readouterr().out
    assert f"GAN: {trained / 'gan'}, after epoch 2" in table
    assert f"DCGAN: {trained / 'dcgan'}, after epoch 1" in table
    assert "Not the same conditions:** epochs: 2 (GAN), 1 (DCGAN)" in table
    heading, *rows = rows_of(table)
    assert heading[:5] == ["claim", "measure", "GAN", "DCGAN", "real images"]
    assert len(rows) == 16
    for claim, measure, GAN, DCGAN, real, meaning in rows:
        assert float(GAN.replace(",", "")) >= 0, measure
        assert meaning.endswith(".")
        assert (real == "") == (claim in ("smoother", "more stable"))
        if measure == "change of the samples":
            assert DCGAN == "undefined"  # which takes two epochs
    for name in ("losses", "samples", "interpolation", "perturbation", "garments"):
        assert (trained / f"comparison_{name}.png").stat().st_size > 5_000
        assert f"- comparison_{name}.png: " in table  # its caption


def test_two_variants_of_one_model_are_told_apart(trained, data, small):
    train(gan, trained / "variant", data, "--epochs", 1, "--learning-rate", 0.002)
    run_compare(trained / "gan", trained / "variant" / "gan", "--outputs", trained, "--data", data)
    table = read_table(trained)
    assert rows_of(table)[0][2:4] == ["GAN 1", "GAN 2"]
    assert f"GAN 1: {trained / 'gan'}, after epoch 2" in table
    assert f"GAN 2: {trained / 'variant' / 'gan'}, after epoch 1" in table
    assert "learning_rate: 0.001 (GAN 1), 0.002 (GAN 2)" in table


def test_a_changed_discriminator_is_named_in_one_line(trained, data, small):
    other = trained / "other" / "gan"
    shutil.copytree(trained / "gan", other)
    facts = json.loads((other / "settings.json").read_text())
    facts["layers"]["D.layers.1"]["out_features"] = "1024"
    facts["layers"]["D.layers.3"]["in_features"] = "1024"
    (other / "settings.json").write_text(json.dumps(facts))
    run_compare(trained / "gan", other, "--outputs", trained, "--data", data)
    table = read_table(trained)
    (line,) = [line for line in table.splitlines() if "Not the same conditions" in line]
    assert "D.layers.1 out_features was 512, is now 1024" in line
    assert "D.layers.3 in_features was 512, is now 1024" in line


def test_one_latent_dimension(data, tmp_path, small):
    folder = train(gan, tmp_path, data, "--epochs", 2, "--latent-dim", 1)
    run_compare(folder, "--outputs", tmp_path, "--data", data)
    table = read_table(tmp_path)
    assert "nan" not in table
    assert "undefined" not in table


def test_a_changed_generator_is_left_out_by_a_true_line(trained, data, small, capsys):
    other = trained / "other" / "gan"
    shutil.copytree(trained / "gan", other)
    facts = json.loads((other / "settings.json").read_text())
    facts["layers"]["G.layers.1"]["negative_slope"] = "0.3"
    (other / "settings.json").write_text(json.dumps(facts))
    run_compare(trained / "gan", other, "--outputs", trained, "--data", data)
    said = capsys.readouterr().out
    line, again = [line for line in said.splitlines() if "left out" in line]
    assert again == f"**{line}.**"  # in comparison.md too
    assert str(other) in line
    assert "gan.py" in line
    assert "G.layers.1 negative_slope was 0.3, is now 0.2" in line
    assert "--fresh" not in said
    assert rows_of(read_table(trained))[0][2] == "GAN"


@pytest.mark.parametrize("name", ["generator.pt", "history.csv", "settings.json"])
def test_a_damaged_or_unfinished_run_is_left_out(name, trained, data, small, capsys):
    (trained / "gan" / name).write_text("half")
    with pytest.raises(SystemExit) as raised:
        run_compare(trained / "gan", trained / "none", "--outputs", trained, "--data", data)
    said = capsys.readouterr().out
    assert f"{trained / 'gan'} is left out: it cannot be read" in said
    assert f"{trained / 'none'} is left out: there is no generator.pt in it" in said
    assert "no run to compare" in str(raised.value)
    assert (trained / "gan" / name).read_text() == "half"


def test_a_generator_of_another_model_is_left_out(trained, trained_dcgan_once, data, small, capsys):
    other = trained / "other" / "gan"
    shutil.copytree(trained / "gan", other)
    shutil.copy(trained_dcgan_once / "generator.pt", other)
    run_compare(trained / "gan", other, "--outputs", trained, "--data", data)
    said = capsys.readouterr().out
    assert f"{other} is left out: generator.pt is not of the network" in said
    assert "GAN: " in read_table(trained)


@pytest.mark.parametrize("content", ["text", "generator"])
def test_a_judge_that_is_none_is_one_line(content, trained, data, small):
    judge = trained / "gan" / "generator.pt"
    if content == "text":
        judge = trained / "gan" / "history.csv"
    with pytest.raises(SystemExit) as raised:
        run_compare(trained / "gan", "--judge", judge, "--outputs", trained, "--data", data)
    line = raised.value.code
    assert line.startswith(f"error: --judge {judge} is not a classifier")
    assert line.isprintable()


# -------------------------------------------------------------------------------------- the figures


def test_perturbation_figure_shows_the_outliers():
    moves = torch.ones(1000)
    moves[:20] = 8
    figure = compare.perturbation_figure({"GAN": moves})
    curve = figure.axes[0].lines[0]
    changes = np.array(curve.get_xdata())
    shares = np.array(curve.get_ydata())
    np.testing.assert_allclose(shares[changes == 8].max(), 2)  # % of the moves


def test_garments_figure_shows_the_shares():
    figure = compare.garments_figure({"GAN": torch.arange(10), "DCGAN": torch.tensor([3, 3, 3, 5])})
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(widths[:10], 10)
    np.testing.assert_allclose(widths[10:], [0, 0, 0, 75, 0, 25, 0, 0, 0, 0])


def test_losses_figure_has_the_same_axes_for_both():
    columns = ["epoch", "D_loss_mean", "D_loss_std", "G_loss_mean", "G_loss_std"]
    runs = []
    for label, level in (("GAN", 0.7), ("DCGAN", 1.7)):
        history = np.ones(3, dtype=[(column, float) for column in columns])
        history["G_loss_mean"] = level
        history["D_loss_mean"] = level / 2
        history["D_loss_std"] = level / 4
        runs.append(compare.Published(None, label, label, None, history, {}, {}))
    left, right = compare.losses_figure(runs).axes
    assert left.get_ylim() == right.get_ylim()
    assert left.get_title() == "GAN"
    D_loss, G_loss = right.lines[:2]
    np.testing.assert_allclose(D_loss.get_ydata(), 0.85)
    np.testing.assert_allclose(G_loss.get_ydata(), 1.7)
    D_band, G_band = [band.get_paths()[0].vertices[:, 1] for band in right.collections]
    np.testing.assert_allclose([D_band.min(), D_band.max()], [0.425, 1.275])
    np.testing.assert_allclose([G_band.min(), G_band.max()], [0.7, 2.7])
