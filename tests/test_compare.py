"""Each measure of compare.py against a case whose answer is known without it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_figures import assert_12_cm_wide_at_200_dpi, assert_no_text_is_cut
from test_scripts import train
from torch import nn

import common
import compare
import dcgan
import gan


def test_frechet_distance_of_two_normal_distributions():
    """N(0, diag(1, 4)) and N((3, 0), diag(4, 4)) turned by half a radian: a closed form exists."""
    torch.manual_seed(0)
    turn = torch.tensor([[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]])
    a = torch.randn(200_000, 2) * torch.tensor([1.0, 2.0]) @ turn
    b = (torch.randn(200_000, 2) * torch.tensor([2.0, 2.0]) + torch.tensor([3.0, 0.0])) @ turn
    # |(3, 0)|^2 + (1 - 2)^2 + (2 - 2)^2
    assert compare.frechet_distance(a, b) == pytest.approx(10, rel=0.01)
    assert compare.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def two_clusters(n):
    """Points around (0, 0) and around (100, 0)."""
    points = torch.randn(2 * n, 2)
    points[n:, 0] += 100
    return points


def precision_recall_coverage(real, fake):
    return compare.precision_recall_coverage(real, compare.neighbourhood(real), fake)


def test_precision_recall_coverage():
    torch.manual_seed(0)
    real = two_clusters(300)
    assert precision_recall_coverage(real, real) == [1, 1, 1]
    # a set that lacks half of the classes; one that has nothing to do with it
    assert precision_recall_coverage(real, real[:300]) == [1, 0.5, 0.5]
    assert precision_recall_coverage(real, real + 1000) == [0, 0, 0]
    # of independent sets of one distribution the coverage is 1 - 2^-K (Naeem et al. 2020)
    _, _, coverage = precision_recall_coverage(two_clusters(2000), two_clusters(2000))
    assert coverage == pytest.approx(1 - 2**-compare.K, abs=0.02)


def test_coverage_counts_the_neighbourhoods_that_an_image_lies_in():
    real = torch.arange(100.0)[:, None]  # K = 5: the 5th nearest of 50 is 3 away, so 47 to 53 reach it
    _, _, coverage = precision_recall_coverage(real, torch.full((10, 1), 50.0))
    assert coverage == pytest.approx(7 / 100)


def test_sharpness():
    ramp = torch.arange(28, dtype=torch.uint8).repeat(1, 28, 1)  # as dark as bright, and no edge
    assert compare.sharpness(ramp) == 0
    dot = torch.zeros(1, 28, 28, dtype=torch.uint8)
    dot[0, 9, 9] = 10  # Laplacian -40 there, 10 at its four neighbours; 26 x 26 pixels have all of theirs
    assert compare.sharpness(dot) == pytest.approx((40**2 + 4 * 10**2) / 26**2)
    assert compare.sharpness(torch.cat([dot, ramp])) == pytest.approx(2000 / 26**2 / 2)


def test_interpolation_is_on_the_circle():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for t in (0, 0.25, 1):
        expected = [[math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)]]
        np.testing.assert_allclose(compare.interpolate(a, b, torch.tensor([[t]])), expected, atol=1e-6)


class Straight(nn.Module):
    """A generator and a judge in one: the first row of the image, and the features, are three times z."""

    def forward(self, z):
        x = torch.zeros(len(z), 1, 28, 28, dtype=z.dtype)
        x[:, 0, 0, :2] = 3 * z
        return x

    def features(self, x):
        return x.flatten(1)


class Jumping(Straight):
    """The same, but that the second half of the way is far from the first."""

    def forward(self, z):
        return super().forward(z + 100 * (z[:, 1:] > z[:, :1]))


def quarter_circle():
    """Two latent vectors, (1, 2) each: z moves on a circle of radius 1 from one to the other."""
    return torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()


def test_path_length_of_a_linear_generator():
    """For t from 0 to 1 z moves at the speed pi/2, the features three times as fast; squared."""
    place = torch.tensor([[0.3]]).double()
    length = compare.path_length(Straight(), Straight(), *quarter_circle(), place)
    assert length == pytest.approx((3 * math.pi / 2) ** 2, rel=1e-4)


def test_interpolation_steps_show_a_jump():
    images, changes = compare.interpolation_steps(Straight(), Straight(), *quarter_circle(), 9)
    assert images.shape == (1, 10, 1, 28, 28)
    np.testing.assert_allclose(changes, [[6 * math.sin(math.pi / 36)] * 9], rtol=1e-6)  # chords of 10 degrees
    _, changes = compare.interpolation_steps(Jumping(), Jumping(), *quarter_circle(), 9)
    assert changes.argmax() == 4 and changes.max() > 400 and changes.sum() - changes.max() < 5


def test_stability():
    D_loss = torch.tensor([0.4, 0.6, 0.4, 0.6]).repeat(60, 1)  # swings within every epoch
    G_loss = torch.arange(60.0)[:, None].repeat(1, 4) % 2  # from epoch to epoch
    samples = torch.zeros(60, 64, 28, 28, dtype=torch.uint8)
    samples[29], samples[59] = 20, 50  # after the quarters: 0, 20, 0, 50
    history = common.History(D_loss, G_loss, D_loss, D_loss, samples, [1.0] * 60, "")
    found = {measure: value for (_, measure, _), value in compare.measure_stability(history).items()}
    deviation = np.std([0.4, 0.6, 0.4, 0.6], ddof=1)
    expected = {"D loss: deviation in an epoch": deviation, "G loss: deviation in an epoch": 0,
                "change of the samples": (20 + 20 + 50) / 3}  # fmt: skip
    assert found == pytest.approx(expected)


def test_memorisation_finds_copies():
    train = torch.arange(0, 250, 10, dtype=torch.uint8)[:, None, None].expand(-1, 28, 28)
    (copies,) = compare.measure_memorisation(train[:5], train).values()
    (moved,) = compare.measure_memorisation(train[:5] + 3, train).values()
    assert copies < 0.1 and moved == pytest.approx(3, abs=0.05)


def test_shares_of_the_garments():
    class Judge(nn.Module):
        """Sees the class in the brightness."""

        def features(self, x):
            return torch.cat([x.flatten(1)[:, :1], torch.randn(len(x), 1)], 1)

        def classify(self, features):
            return F.one_hot(((features[:, 0] + 1) * 127.5).round().long(), 10).float()

    images = torch.tensor([3, 3, 3, 8] * 5, dtype=torch.uint8)[:, None, None].expand(-1, 28, 28)
    real = torch.randn(10, 2)
    rows, shares = compare.measure_images(Judge(), images, (real, compare.neighbourhood(real)))
    values = {measure: value for (_, measure, _), value in rows.items()}
    assert shares.tolist() == [0, 0, 0, 0.75, 0, 0, 0, 0, 0.25, 0]
    assert values["largest share of a garment"] == 0.75 and values["smallest share of a garment"] == 0


def test_the_figure_shows_the_losses_the_jumps_and_the_shares():
    swing = torch.tensor([[0.8, 1.2]] * 3)  # deviation: a fifth
    history = common.History(0.5 * swing, 1.5 * swing, swing, swing, None, [1.0] * 3, "")
    run = {"history": history, "samples": torch.zeros(32, 28, 28, dtype=torch.uint8),
           "path": torch.zeros(2, 17, 28, 28), "jumps": torch.tensor([[0.5, 1.5], [1.0, 2.5]])}  # fmt: skip
    shares = {name: torch.arange(10) / 45 for name in ("GAN", "DCGAN", "real data")}
    figure = compare.comparison_figure({"GAN": run, "DCGAN": run}, run["samples"], shares)
    assert_12_cm_wide_at_200_dpi(figure)
    losses, jumps, garments = figure.axes[0], figure.axes[-2], figure.axes[-1]
    assert losses.get_title() == "GAN, epoch 3: losses"
    np.testing.assert_allclose(losses.lines[0].get_ydata(), [0.5] * 3, rtol=1e-6)
    np.testing.assert_allclose(losses.lines[1].get_ydata(), [1.5] * 3, rtol=1e-6)
    band = losses.collections[1].get_paths()[0].vertices[:, 1]  # mean and deviation of the generator's
    np.testing.assert_allclose([band.min(), band.max()], [1.2, 1.8], rtol=1e-6)
    np.testing.assert_allclose(jumps.lines[0].get_ydata(), [0.75, 2], rtol=1e-6)
    np.testing.assert_allclose(jumps.lines[1].get_ydata(), [1, 2.5], rtol=1e-6)
    widths = [bar.get_width() for bar in garments.patches]
    np.testing.assert_allclose(widths, [*(np.arange(10) / 45 * 100)] * 3, rtol=1e-6)
    assert [label.get_text() for label in garments.get_yticklabels()][::9] == ["T-shirt", "Boot"]
    assert_no_text_is_cut(figure, [axes.title for axes in figure.axes])


def test_compare_writes_table_and_figure(cut, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "N", 60)
    monkeypatch.setattr(compare, "PAIRS", 20)
    monkeypatch.setattr(compare, "EPOCHS", 1)
    for model in (gan, dcgan):
        train(tmp_path, "--epochs", 1, model=model, data=cut)
    argv = ["--outputs", str(tmp_path), "--data", str(cut)]
    compare.main(argv)
    table = (tmp_path / "comparison.md").read_text()
    assert table in capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert rows[0] == ["measure", "GAN", "DCGAN", "real data", "what it means"]
    assert len(rows) == 1 + 13
    for measure, GAN, DCGAN, real, meaning in rows[1:]:
        assert meaning
        if "change of the samples" not in measure:  # which takes two grids
            assert float(GAN.replace(",", "")) >= 0 and float(DCGAN.replace(",", "")) >= 0
        assert (real == "") == measure.startswith(("Stability", "Smoothness"))
    assert (tmp_path / "comparison.png").stat().st_size > 10_000

    (tmp_path / "dcgan" / "checkpoint.pt").unlink()  # either alone will do, and the judge is there already
    monkeypatch.setattr(compare, "train_judge", None)
    compare.main(argv)
    assert "DCGAN" not in (tmp_path / "comparison.md").read_text()


def test_compare_without_a_run(cut, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        compare.main(["--outputs", str(tmp_path), "--data", str(cut)])
    line = capsys.readouterr().err
    assert raised.value.code == 1 and line.count("\n") == 1
    assert str(tmp_path) in line and "run one of them first" in line
