"""Each measure of compare.py against a case whose answer is known without it."""

import io
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import README, REFERENCE, history_of, linear_generator, read_history, train
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import nn
from torchvision.transforms.functional import gaussian_blur

import common
import compare
import dcgan
import gan


def test_frechet_distance_of_two_normal_distributions():
    """With covariances that do not commute: for 2x2, trace (A B)^(1/2) is
    sqrt(trace(A B) + 2 sqrt(det(A B)))."""
    half_a = torch.tensor([[8**0.5, 0], [0, 2**0.5]])  # and its mirror image: A = [[4, 0], [0, 1]]
    half_b = torch.tensor([[3.0, 3.0], [1.0, -1.0]])  # B = [[5, 4], [4, 5]]
    a = torch.cat([half_a, -half_a]).repeat(1000, 1)
    b = torch.cat([half_b, -half_b]).repeat(1000, 1) + torch.tensor([3.0, 0.0])
    expected = 9 + (4 + 1) + (5 + 5) - 2 * math.sqrt(4 * 5 + 1 * 5 + 2 * math.sqrt(4 * 9))
    distance = compare.frechet_distance(a, b)
    assert distance == pytest.approx(expected, rel=1e-3)
    assert compare.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_neighbourhoods():
    """On a line, 300 points 1 apart, and far away 300 points 100 apart."""
    near = torch.arange(300.0, dtype=torch.float64)[:, None]
    points = torch.cat([near, 100 * near + 100_000])
    radius = compare.neighbourhood(points)
    assert radius[[50, 350]].tolist() == pytest.approx([3, 300])  # the 5th nearest of 50: 47 or 53
    others = torch.tensor([-1, 50.5, -50, 100_050, 99_950, 60_000], dtype=torch.float64)
    within = [True, True, False, True, True, False]  # 50 is near for the second 300 only
    found = [compare.share_near(other.view(1, 1), points) for other in others]
    assert found == within
    assert compare.share_near(points, near) == 0.5  # the recall of a half


def test_imbalance():
    assert compare.imbalance(torch.arange(10)) == 0
    assert compare.imbalance(torch.zeros(10, dtype=torch.int64)) == 90  # 90 above, 9 x 10 below
    twice = torch.tensor([*range(10), 9])  # one garment twice as often: 2 of 11, the others 1 of 11
    assert compare.imbalance(twice) == pytest.approx(100 * 2 / 11 - 10)


@pytest.fixture(scope="module")
def judge(data):
    """A function from 320 images to their items, against the cut's training images."""
    classifier, _ = compare.load_classifier()
    train_set, _ = common.load_fashion_mnist(data)
    features, _ = compare.classify(classifier, train_set.data)

    def image_items(images):
        return compare.image_items(images, classifier, features)

    return image_items


def test_half_of_the_classes_copies_and_mixtures_are_found_out(data, judge):
    train_set, test_set = common.load_fashion_mnist(data)
    half = train_set.data[train_set.targets < 5]
    half = compare.measure(judge(torch.cat([half, half, half])[:320]))
    assert half["recall"] < 0.7
    assert half["imbalance"] > 40
    copied = compare.measure(judge(train_set.data[:10].repeat(32, 1, 1)))
    assert copied["recall"] < 0.2
    # The left half of one garment beside the right half of another is as sharp and as varied.
    images = train_set.data[train_set.targets.argsort()]
    mixed = torch.cat([images[:, :, :14], images[:, :, 14:].roll(160, 0)], dim=2)
    distance = compare.measure(judge(mixed))["Fréchet distance"]
    others = compare.measure(judge(test_set.data.repeat(4, 1, 1)))["Fréchet distance"]
    assert distance > 2 * others


def test_the_committed_classifier_knows_garments(data, monkeypatch):
    """Whatever a student lets common.scale do."""
    monkeypatch.setattr(common, "scale", lambda images: images / 255)
    _, test_set = common.load_fashion_mnist(data)
    classifier, accuracy = compare.load_classifier()
    _, found = compare.classify(classifier, test_set.data)
    assert (found == test_set.targets).float().mean() > 0.85  # of 80 images
    assert accuracy > 0.93


def test_an_edge_is_sharpness_and_specks_are_grain(judge):
    edge, specks = images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    edge[:, 14:] = 100
    specks[5, 5] = specks[20, 9] = 200
    items = judge(images.repeat(160, 1, 1))
    # The median filter leaves the edge. Of its 26 columns the Laplacian has 24; it is 100 left of
    # the edge, -100 right of it.
    assert items["sharpness"][0][:2].tolist() == pytest.approx([2 * 100**2 / 24, 0])
    assert items["grain"][0][:2].tolist() == pytest.approx([0, 2 * 200 / 26**2])


def test_neither_noise_nor_blur_passes_for_sharper(data, judge):
    torch.manual_seed(0)
    images = common.load_fashion_mnist(data)[0].data
    noisy = (images + 10 * torch.randn(images.shape)).round().clamp(0, 255).byte()
    blurred = gaussian_blur(images.float()[:, None], 9, 0.5)[:, 0].round().byte()
    real, noisy, blurred = (compare.measure(judge(shown)) for shown in (images, noisy, blurred))
    assert max(noisy["sharpness"], blurred["sharpness"]) < real["sharpness"]
    assert blurred["grain"] < real["grain"] < noisy["grain"]


class Pixels(nn.Module):
    """In the place of a classifier: the features are the first three pixels."""

    def features(self, x):
        return x[:, 0, 0, :3]

    def logits(self, features):
        return features


def test_a_linear_generator_is_smooth_in_every_way():
    items = compare.latent_items(linear_generator(0.1 * torch.eye(784, 3)), 3, Pixels())
    # Each dimension moved by 2 changes one pixel by 0.2 of its range of 2, but for rounding.
    expected = torch.full((compare.PERTURBED,), 0.2)
    torch.testing.assert_close(items["outliers"], (expected,), atol=0.01, rtol=0)
    assert compare.tail(*items["outliers"]) == pytest.approx(1, abs=0.05)
    # An arc of 90 degrees is 1.11 times its chord; others are not much longer.
    assert 1 <= compare.median(*items["detour"]) < 1.4


def test_a_generator_that_jumps():
    """White where z_0 is positive, else black: one step in 32 is all the change, so it is 32 times
    the mean one. On about half of the paths nothing changes, and they say nothing."""
    weight = torch.zeros(784, 3)
    weight[:, 0] = 1e9
    (jumps,) = compare.latent_items(linear_generator(weight, nn.Tanh()), 3, Pixels())["jumps"]
    assert 0.4 * compare.PAIRS < len(jumps) < 0.6 * compare.PAIRS
    assert compare.median(jumps) == pytest.approx(32, rel=1e-4)


def test_tail():
    moves = torch.cat([torch.full((98,), 2.0), torch.full((3,), 10.0)])
    assert compare.tail(moves) == compare.tail(3 * moves) == 5  # the shape counts, not the size


def test_interpolation_turns_evenly_from_one_length_to_the_other():
    """From an angle of 0 degrees to 90 or, in z of two numbers also likely, nearly to 180."""
    for degrees, length in ((90, 1), (90, 3), (179, 0.5)):
        end = math.radians(degrees)
        a = torch.tensor([[1.0, 0.0]])
        b = length * torch.tensor([[math.cos(end), math.sin(end)]])
        for t in (0, 0.25, 1):
            radius = 1 + t * (length - 1)
            expected = [[radius * math.cos(t * end), radius * math.sin(t * end)]]
            found = compare.interpolate(a, b, torch.tensor([[t]]))
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_stability_is_that_of_the_last_quarter_and_a_runaway_that_of_all():
    history = history_of([0.7] * 80, [0.8] * 20 + [2.4] + [0.8] * 59)
    for row in history:
        factor = 1 if row["epoch"] > 60 else 5
        row["sample_change"] = 10.0 * factor
        row["G_loss_std"] = 4.0 * factor
        row["D_loss_std"] = 2.0 * factor
    numbers = compare.history_numbers(history)
    assert numbers["change of the samples"] == 10
    assert numbers["deviation of G's loss"] == 4
    assert numbers["deviation of D's loss"] == 2
    assert numbers["runaway"] == pytest.approx(3)
    assert numbers["seconds"] == pytest.approx(800)
    # The last quarter has two epochs or more; of fewer than 20 the usual loss is not known.
    for epochs, is_defined in ((4, False), (5, True)):
        found = compare.history_numbers(history[-epochs:])
        assert math.isfinite(found["change of the samples"]) == is_defined
    for epochs, is_defined in ((19, False), (20, True)):
        assert math.isfinite(compare.history_numbers(history[-epochs:])["runaway"]) == is_defined
    history[-1]["D_loss_mean"] = -0.1  # as Wasserstein's
    assert math.isnan(compare.history_numbers(history)["runaway"])


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


def normal(count, *, moved=0.0):
    return torch.randn(count, 4) + moved


SPREADS = {  # statistic, and how its sides are drawn
    "mean": (compare.mean, lambda: (torch.randn(2000),)),
    "median": (compare.median, lambda: (torch.randn(2000),)),
    "recall": (compare.share_near, lambda: (normal(2000), normal(2000, moved=1.0))),
    "Fréchet distance": (compare.frechet_distance, lambda: (normal(2000), normal(2000, moved=1.0))),
}


@pytest.mark.parametrize("name", SPREADS)
def test_the_spread_is_that_of_drawing_all_sides_anew(name):
    """Which is done here, 30 times. Of a mean it is known: 1 / sqrt(2000)."""
    torch.manual_seed(0)
    statistic, draw = SPREADS[name]
    drawn = [draw() for _ in range(30)]
    expected = np.std([float(statistic(*sides)) for sides in drawn], ddof=1)
    if name == "mean":
        assert expected == pytest.approx(1 / math.sqrt(2000), rel=0.3)
    found = [compare.find_spread(statistic, sides) for sides in drawn]
    assert np.median(found) == pytest.approx(expected, rel=0.4)
    assert max(found) < 3 * expected


def results_of(name, values):
    """{label: {measure: Result}} of (values of seeds, spread), and of real images."""
    results = {label: {name: compare.Result(*value)} for label, value in values.items()}
    results[compare.REAL] = {"grain": compare.Result([9.4], 0.1)}
    return results


NAN = math.nan


@pytest.mark.parametrize(
    ("name", "values", "better"),
    [
        # One seed each: by more than two standard deviations of the difference.
        ("Fréchet distance", [([26], 0.5), ([5], 0.5)], "B"),  # lower
        ("recall", [([0.9], 0.01), ([0.5], 0.01)], "A"),  # higher
        ("grain", [([12], 0.1), ([9], 0.1)], "B"),  # like real ones, which have 9.4
        ("grain", [([9], 0.1), ([7], 0.1)], "A"),
        # Real ones deviate by 0.1, which counts twice where they lie in between: 0.4 < 2 x 0.24.
        ("grain", [([9.0], 0.1), ([8.6], 0.1)], "A"),
        ("grain", [([9.0], 0.1), ([10.2], 0.1)], None),
        ("grain", [([10.2], 0.1), ([9.0], 0.1)], None),
        ("grain", [([9.0], 0.1), ([10.4], 0.1)], "A"),
        ("jumps", [([3.0], 0.1), ([2.8], 0.1)], None),  # within chance: 0.2 < 2 x 0.14
        ("jumps", [([3.0], 0.1), ([2.6], 0.1)], "B"),
        ("jumps", [([3.0], 0.1), ([2.6], 0.1), ([2.8], 0.1)], None),  # B is better than A only
        ("jumps", [([3.0], 0.1), ([2.6], 0.1), ([3.1], 0.1)], "B"),
        ("jumps", [([NAN], NAN), ([2.6], 0.1), ([3.1], 0.1)], "B"),
        ("jumps", [([3.0], 0.1), ([NAN], NAN)], None),
        ("jumps", [([3.0], 0.1)], None),
        ("change of the samples", [([1.4], NAN), ([0.6], NAN)], None),  # of one seed not known
        # Several seeds: in all pairs.
        ("change of the samples", [([1.4, 1.5], 0.1), ([0.6, 0.8], 0.1)], "B"),
        ("change of the samples", [([1.4, 1.5], 0.1), ([0.6, 1.3], 0.7)], None),  # too uneven
        ("change of the samples", [([1.4, 1.5], 0.1), ([0.6, 1.45], 0.4)], None),
        ("change of the samples", [([1.4, 1.5], 0.1), ([0.6], NAN)], "B"),
        ("change of the samples", [([1.4, 1.5], 0.1), ([1.3], NAN)], None),
        ("grain", [([9.0, 9.7], 0.1), ([8.6, 10.4], 0.1)], "A"),  # on both sides of real ones
        # Not judged, or not to be told apart.
        ("runaway", [([9.0, 9.1], 0.1), ([1.0, 1.1], 0.1)], None),
        ("jumps", [([2.6001], 1e-6), ([2.6], 2e-6)], None),  # both are written 2.6
    ],
)
def test_who_is_better(name, values, better):
    results = results_of(name, dict(zip("ABC", values, strict=False)))
    (row,) = [row for row in compare.MEASURES if row.name == name]
    assert compare.find_better(row, results) == better


def test_a_line_for_each_claim():
    GAN = {row.name: compare.Result([2.0], 0.1) for row in compare.MEASURES}
    DCGAN = dict(GAN)
    real = {row.name: compare.Result([0.0], 0.1) for row in compare.MEASURES}
    for name in ["sharpness", "grain", "jumps", "outliers", "runaway"]:
        DCGAN[name] = compare.Result([1.0], 0.1)
    GAN["detour"] = compare.Result([1.0], 0.1)
    lines = compare.make_verdicts({"GAN": GAN, "DCGAN": DCGAN, compare.REAL: real})
    assert "- **sharper**, of 2: DCGAN in 2 (sharpness, grain)" in lines
    assert "- **smoother**, of 3: DCGAN in 2 (jumps, outliers); GAN in 1 (detour)" in lines
    assert "- **more varied**, of 2: open in 2 (recall, imbalance)" in lines
    assert not [line for line in lines if "runaway" in line or "nearest" in line]


@pytest.fixture
def small(monkeypatch):
    """Few images: the numbers do not matter."""
    for name, value in {"IMAGES": 60, "PAIRS": 10, "PERTURBED": 20, "COPIES": 10}.items():
        monkeypatch.setattr(compare, name, value)


@pytest.fixture
def without_figures(monkeypatch):
    """Blank ones, since these take most of the time."""
    for name in compare.CAPTIONS:
        monkeypatch.setattr(compare, f"plot_{name}", lambda *_: Figure((1, 1)))


def run_compare(data, outputs, *folders):
    """compare.py on these folders; returns comparison.md."""
    words = [*folders, "--outputs", outputs, "--data", data]
    compare.main([str(word) for word in words])
    return (outputs / "comparison.md").read_text(encoding="utf-8")


def rows_of(table):
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip(" *") for cell in line[1:].removesuffix("|").split("|")] for line in lines]


def test_two_models_side_by_side(trained, data, small, monkeypatch, capsys):
    train(dcgan, trained, data, "--epochs", 1)
    capsys.readouterr()
    figures = []
    as_bytes = common.as_bytes

    def watched(savefig):
        figures.append(savefig.__self__)
        return as_bytes(savefig)

    monkeypatch.setattr(common, "as_bytes", watched)
    table = run_compare(data, trained, trained / "gan", trained / "dcgan")
    assert table in capsys.readouterr().out
    assert f"GAN: {trained / 'gan'}, after epoch 2" in table
    assert f"DCGAN: {trained / 'dcgan'}, after epoch 1" in table
    assert "**Not the same conditions**: epochs 2 in GAN, 1 in DCGAN" in table
    assert "gan.py" not in table.split("conditions**")[1].splitlines()[0]  # each has its own
    assert "- *runaway* is undefined where there are not 20 epochs and losses above 0" in table
    assert "Another seed may give another answer" in table
    assert "- **quality**, of 2: " in table
    heading, *rows = rows_of(table)
    assert heading[:6] == ["claim", "measure", "better", "GAN", "DCGAN", "real images"]
    assert len(rows) == 17
    for claim, name, _, GAN, DCGAN, real, _ in rows:
        if claim == "more stable" or name == "runaway":
            assert GAN == DCGAN == "undefined"  # a quarter of so few epochs
        else:
            assert float(GAN.split()[0].replace(",", "")) >= 0, name
        has_real = claim in ("quality", "sharper", "more varied") or name.startswith("nearest")
        assert (real != "") == has_real, name
    cells = {row[1]: row[3:5] for row in rows}
    assert cells["parameters of G"] == ["1,510,032", "855,617"]
    for name in compare.CAPTIONS:
        assert (trained / f"comparison_{name}.png").exists()
        caption = table.split(f"- comparison_{name}.png: ")[1].splitlines()[:2]
        assert caption[0].isascii()
        assert re.search("[\u4e00-\u9fff]", caption[1])  # the same in Chinese
    assert len(figures) == len(compare.CAPTIONS) == 6
    for figure in figures:
        texts = " ".join(text.get_text() for text in figure.findobj(Text))
        assert re.search(r"\bGAN\b.*\bDCGAN\b", texts), texts
        assert figure.get_figheight() <= 17 / 2.54
        for axes in figure.axes:
            assert axes.images or len([*axes.lines, *axes.patches]) > 1, texts
            assert all(image.get_array().std() > 10 for image in axes.images), texts


def test_losses_of_runs_of_unequal_length_show_all_epochs_of_both():
    runs = {
        "short": SimpleNamespace(history=history_of([0.6] * 3, [0.8] * 3)),
        "long": SimpleNamespace(history=history_of([0.1] * 9, [2.5] * 9)),
    }
    for labels in (["short", "long"], ["long", "short"]):
        figure = compare.plot_losses({label: [runs[label]] for label in labels})
        for axes, label in zip(figure.axes, labels, strict=True):
            run = runs[label]
            assert axes.get_title() == label
            for line, name in zip(axes.lines, ["D_loss_mean", "G_loss_mean"], strict=False):
                expected = [(row["epoch"], row[name]) for row in run.history]
                assert [tuple(point) for point in line.get_xydata()] == expected
            left, right = axes.get_xlim()
            low, high = axes.get_ylim()
            assert left < 1 < 9 < right
            assert low < 0.1 < 2.5 < high


def test_a_variant_of_a_layer_is_compared(trained, data, small, without_figures):
    """Trained by a gan.py with another slope, which lies in its folder."""
    other = trained / "other" / "gan"
    shutil.copytree(trained / "gan", other)
    script = (other / "gan.py").read_text()
    number = script.splitlines().index("            nn.LeakyReLU(0.2),") + 1  # the first of them
    script = script.replace("LeakyReLU(0.2)", "LeakyReLU(9.0)", 1)
    (other / "gan.py").write_text(script)
    description = json.loads((other / "settings.json").read_text())
    description["settings"]["seed"] = 4
    (other / "settings.json").write_text(json.dumps(description))
    table = run_compare(data, trained, trained / "gan", other)
    heading, distance, *_ = rows_of(table)
    assert heading[3:5] == ["GAN 1", "GAN 2"]
    assert distance[3] != distance[4]  # the same weights, another slope
    (line,) = [line for line in table.splitlines() if "Not the same conditions" in line]
    assert "seeds [0] in GAN 1, [4] in GAN 2" in line
    assert f"gan.py line {number} in GAN 2: nn.LeakyReLU(9.0)" in line


def copy_run(folder, other, seed, dark):
    """As if trained with another seed: a darker generator, and another sample change."""
    shutil.copytree(folder, other)
    description = json.loads((other / "settings.json").read_text())
    description["settings"]["seed"] = seed
    (other / "settings.json").write_text(json.dumps(description))
    weights = torch.load(other / "generator.pt", weights_only=True)
    weights["layers.11.bias"] -= dark
    torch.save(weights, other / "generator.pt")
    return other


def test_seeds_are_one_column_with_mean_and_standard_deviation(trained, data, small):
    seeds = [trained / "gan"]
    seeds.append(copy_run(trained / "gan", trained / "s1" / "gan", seed=1, dark=0.2))
    apart = [{row[1]: row[3] for row in rows_of(run_compare(data, trained, run))} for run in seeds]
    table = run_compare(data, trained, *seeds)
    heading, *rows = rows_of(table)
    assert heading[3:5] == ["GAN", "real images"]
    assert "standard deviation over the seeds" in table
    for folder in seeds:
        assert str(folder) in table
    cells = {row[1]: row[3] for row in rows}
    for name in ["Fréchet distance", "grain"]:
        values = [float(cell[name].split(" ")[0].replace(",", "")) for cell in apart]
        mean, _, deviation = cells[name].split(" ")
        assert float(mean.replace(",", "")) == pytest.approx(np.mean(values), rel=0.01)
        assert float(deviation) == pytest.approx(np.std(values, ddof=1), rel=0.35)  # one digit
    # The same seed twice is not two seeds, and neither are two other settings.
    description = json.loads((seeds[1] / "settings.json").read_text())
    description["settings"]["learning_rate"] = 0.5
    (seeds[1] / "settings.json").write_text(json.dumps(description))
    assert compare.make_columns(compare.load_runs(seeds)).keys() == {"GAN 1", "GAN 2"}
    again = run_compare(data, trained, seeds[0], seeds[0])
    assert rows_of(again)[0][3:5] == ["GAN 1", "GAN 2"]
    distance = [line for line in again.splitlines() if "Fréchet distance | lower" in line]
    assert "**" not in distance[0]


def test_a_console_that_lacks_a_letter_and_what_is_saved_before_it_is_printed(
    trained, data, small, without_figures, monkeypatch
):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", console)
    run_compare(data, trained, trained / "gan")
    console.flush()
    assert b"Fr?chet distance" in console.buffer.getvalue()

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    with pytest.raises(BrokenPipeError):
        run_compare(data, trained / "new", trained / "gan")
    assert "Fréchet" in (trained / "new" / "comparison.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    ["generator.pt", "history.csv", "settings.json", "gan.py", "common.py", "all", "another"],
)
def test_a_folder_that_cannot_be_read_is_an_error_and_nothing_is_written(
    name, trained, trained_dcgan_once, data, small
):
    other = trained / "other" / "gan"
    if name != "all":
        shutil.copytree(trained / "gan", other)
    if name == "another":
        shutil.copy(trained_dcgan_once / "generator.pt", other)
    elif name.endswith(".py"):
        (other / name).unlink()
    elif name != "all":
        (other / name).write_text("half")
    with pytest.raises(SystemExit) as stop:
        run_compare(data, trained / "new", trained / "gan", other)
    line = stop.value.code
    assert line.startswith("error: ")
    assert str(other) in line
    assert line.isprintable()
    assert not (trained / "new").exists()


def test_a_generator_that_draws_one_image_only_is_measured(trained, data, small):
    path = trained / "gan" / "generator.pt"
    weights = torch.load(path, weights_only=True)
    weights["layers.11.weight"].zero_()  # what is left is the bias of the last layer
    torch.save(weights, path)
    cells = {row[1]: row[3] for row in rows_of(run_compare(data, trained, trained / "gan"))}
    assert cells["recall"] == "0.00"
    assert cells["imbalance"] == "90.0"
    assert cells["jumps"] == "undefined"
    table = (trained / "comparison.md").read_text(encoding="utf-8")
    assert "*jumps* is undefined where there are not images that change with z" in table


def test_one_run_alone_of_one_latent_dimension(data, tmp_path, small):
    folder = train(gan, tmp_path, data, "--epochs", 2, "--latent-dim", 1)
    table = run_compare(data, tmp_path, folder)
    assert "nan" not in table
    undefined = {row[1] for row in rows_of(table) if row[3] == "undefined"}
    assert undefined == {
        "change of the samples",
        "deviation of G's loss",
        "deviation of D's loss",
        "runaway",
    }
    assert "- **" not in table  # no verdict: there is nothing to be better than
    assert not re.search(r"\| \*\*", table)


def test_the_readme_the_committed_comparison_and_the_committed_runs_agree():
    table = (REFERENCE / "comparison.md").read_text(encoding="utf-8")
    measured = {row[1]: [cell.split(" ")[0] for cell in row[3:6]] for row in rows_of(table)}
    cells = measured["change of the samples"]
    for model, cell in zip(("gan", "dcgan"), cells, strict=False):
        changes = [float(epoch["sample_change"]) for epoch in read_history(REFERENCE / model)[150:]]
        assert f"{model.upper()}: outputs/reference/{model}, after epoch 200" in table
        assert len(changes) == 50
        assert float(cell) == pytest.approx(sum(changes) / 50, rel=5e-3)

    section = README.split("## The result")[1].split("\n## ")[0]
    rows = rows_of(section)[1:]
    assert len(rows) == 10
    for name, *cells in rows:
        assert cells[-3:] == measured[name], name
    verdicts = [line for line in table.splitlines() if line.startswith("- **")]
    assert len(verdicts) == 5
    for line in verdicts:
        assert line in section
