"""The figures: what is drawn, read back from the PNG where that can be, else from the axes."""

import gzip
import io
import math

import matplotlib.style
import numpy as np
import pytest
import torch
from conftest import RAW, read_checkpoint
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image, ImageSequence
from torch import nn

import common


@pytest.fixture(autouse=True)
def style():
    """As in a run."""
    with matplotlib.style.context(common.STYLE):
        yield


def pixels(figure):
    """The figure's PNG as an RGB array."""
    file = io.BytesIO()
    figure.savefig(file)
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def constant(*greys):
    """An image of one grey level for each."""
    return torch.tensor(greys, dtype=torch.uint8)[:, None, None].expand(-1, 28, 28)


def assert_size(figure):
    """12 cm wide and at most 17 cm high, at 200 dpi."""
    height, width, _ = pixels(figure).shape
    assert width == pytest.approx(12 / 2.54 * 200, abs=1)
    assert height <= 17 / 2.54 * 200


def assert_cells(figure, greys):
    """The PNG shows this grey level (rows, 8) at the centre of each cell of the grid."""
    image = pixels(figure)
    box = figure.axes[0].get_window_extent()
    rows, columns = greys.shape
    for row in range(rows):
        for column in range(columns):
            x = box.x0 + box.width * (column + 0.5) / columns
            y = box.y1 - box.height * (row + 0.5) / rows
            found = image[len(image) - 1 - int(y), int(x)]
            assert np.abs(found - int(greys[row, column])).max() <= 1, (row, column)


def shown_texts(figure):
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def assert_text_is_readable(figure, texts):
    """None of the texts is cut off, and none lies over another one."""
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        name = texts[i].get_text()
        assert box.x0 >= 0, name
        assert box.y0 >= 0, name
        assert box.x1 <= figure.bbox.x1, name
        assert box.y1 <= figure.bbox.y1, name
        for other in boxes[i + 1 :]:
            assert not box.overlaps(other), name


def centres_of(figure, label):
    """(x, y) of each text that reads so, in pixels."""
    centres = []
    for text in shown_texts(figure):
        if text.get_text() == label:
            box = text.get_window_extent()
            centres.append(((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))
    return centres


def assert_row_labels(figure, labels):
    """Each of these labels stands beside the middle of its row, from above."""
    figure.draw_without_rendering()
    box = figure.axes[0].get_window_extent()
    for i, label in enumerate(labels):
        middle = box.y1 - box.height * (i + 0.5) / len(labels)
        assert min(abs(y - middle) for _, y in centres_of(figure, label)) < 5, label


def assert_column_labels(figure, labels):
    figure.draw_without_rendering()
    box = figure.axes[0].get_window_extent()
    for i, label in enumerate(labels):
        middle = box.x0 + box.width * (i + 0.5) / len(labels)
        assert min(abs(x - middle) for x, _ in centres_of(figure, label)) < 5, label


def history_of(D_losses, G_losses):
    """An Epoch for each row (epochs, steps)."""
    history = []
    for D_loss, G_loss in zip(D_losses, G_losses, strict=True):
        half = torch.full_like(D_loss, 0.5)
        history.append(common.Epoch(D_loss, G_loss, half, half, constant(*[0] * 64), 1.0))
    return history


def random_history(epochs, steps=41):
    torch.manual_seed(epochs)
    return history_of(0.6 + 0.2 * torch.rand(epochs, steps), 1.0 + torch.rand(epochs, steps) ** 2)


def test_losses_are_means_of_epochs_in_a_band_of_their_steps():
    history = random_history(5)
    figure = common.losses_figure(history, "DCGAN")
    assert_size(figure)
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines][:2] == ["Discriminator", "Generator"]
    assert [line.get_linestyle() for line in axes.lines][:2] == ["-", "--"]  # for black and white
    for i, name in enumerate(["D_loss", "G_loss"]):
        steps = torch.stack([getattr(epoch, name) for epoch in history]).numpy()
        line = axes.lines[i]
        band = axes.collections[i]
        assert list(line.get_xdata()) == [1, 2, 3, 4, 5]
        np.testing.assert_allclose(line.get_ydata(), steps.mean(1), rtol=1e-5)
        corners = band.get_paths()[0].vertices
        for epoch in range(5):
            heights = corners[corners[:, 0] == epoch + 1, 1]
            low, high = np.quantile(steps[epoch], [0.05, 0.95])
            assert heights.min() == pytest.approx(low, rel=1e-5)
            assert heights.max() == pytest.approx(high, rel=1e-5)
        assert np.allclose(band.get_facecolor()[0, :3], to_rgb(line.get_color()))
    assert "DCGAN" in figure.get_suptitle()
    assert "Epoch" in axes.get_xlabel()
    assert "Loss" in axes.get_ylabel()


@pytest.mark.parametrize("D_loss", [math.log(2), 3.0])
def test_ln_2_is_seen_under_no_other_line_and_outside_the_losses(D_loss):
    losses = torch.full((30, 10), D_loss)
    figure = common.losses_figure(history_of(losses, losses + 2), "GAN")
    (axes,) = figure.axes
    image = pixels(figure)
    x, y = axes.transData.transform((15, math.log(2)))
    assert axes.bbox.y0 < y < axes.bbox.y1
    row = len(image) - 1 - int(y)
    around = image[row - 2 : row + 3, int(x) - 100 : int(x) + 100]
    assert (around.max(axis=2) < 60).sum() > 50  # dots of the line, which are black
    assert "ln 2" in " ".join(text.get_text() for text in figure.legends[0].texts)


def test_losses_of_a_single_epoch_are_seen():
    figure = common.losses_figure(random_history(1), "GAN")
    image = pixels(figure)
    (axes,) = figure.axes
    x, y = axes.transData.transform((1, axes.lines[0].get_ydata()[0]))
    colour = np.array(to_rgb("tab:blue")) * 255
    assert np.abs(image[len(image) - 1 - int(y), int(x)] - colour).max() < 20


@pytest.mark.parametrize("epochs", [1, 2, 200, 1000])
def test_text_of_the_losses(epochs):
    figure = common.losses_figure(random_history(epochs, steps=3), "DCGAN")
    (axes,) = figure.axes
    labels = [axes.xaxis.label, axes.yaxis.label]
    assert_text_is_readable(figure, [*labels, *figure.legends[0].texts, *figure.texts])


def test_samples():
    figure = common.images_figure(constant(*range(0, 256, 4)), "DCGAN, epoch 50")
    assert_size(figure)
    assert_cells(figure, np.arange(0, 256, 4).reshape(8, 8))
    assert figure.get_suptitle() == "DCGAN, epoch 50"


def test_samples_latest_shows_the_samples_in_order():
    image = np.asarray(common.samples_image(constant(*range(0, 256, 4)), "GAN, epoch 3"))
    height, width = image.shape
    assert height > width  # a title above a square
    for i in range(64):
        row, column = divmod(i, 8)
        y = height - width + int(width * (row + 0.5) / 8)
        x = int(width * (column + 0.5) / 8)
        assert image[y, x] == 4 * i
    assert image[: height - width].min() < 100


def test_nearest_is_the_root_mean_square_difference():
    """Among more images than are compared at once."""
    torch.manual_seed(0)
    others = torch.randint(0, 256, (12_000, 28, 28), dtype=torch.uint8)
    images = others[[11_000, 30]] // 2
    indices, distances = common.nearest(images, others)
    for i in range(2):
        difference = others.numpy().astype(float) - images[i].numpy()
        by_hand = np.sqrt((difference**2).mean((1, 2)))
        assert indices[i] == by_hand.argmin()
        assert distances[i].item() == pytest.approx(by_hand.min(), abs=0.05)


def test_nearest_neighbours():
    fake = constant(200, 107, 10, 20, 30, 40, 50, 60, 100)
    figure = common.nearest_neighbours_figure(
        fake, constant(13, 103), constant(10, 100, 202), "GAN, epoch 9"
    )
    assert_size(figure)
    neighbours = [202, 100, 10, 10, 10, 10, 10, 100]
    assert_cells(figure, np.array([fake[:8, 0, 0].tolist(), neighbours]))
    assert_row_labels(figure, ["generated", "nearest"])
    distances = ["2.0", "7.0", "0.0", "10.0", "20.0", "30.0", "40.0", "40.0"]
    assert_column_labels(figure, distances)
    said = " ".join(text.get_text() for text in shown_texts(figure))
    assert "9 generated images 10.0" in said  # the middle one of 0 0 2 7 10 20 30 40 40
    assert "2 real test images 3.0" in said
    assert_text_is_readable(figure, shown_texts(figure))


class Dimmer(nn.Module):
    """Brightness follows z[3] alone: images of 0.1 z[3]."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.1))

    def forward(self, z):
        return (self.gain * z[:, 3, None, None, None]).expand(-1, 1, 28, 28)


def test_perturbation_moves_one_dimension_and_measures_the_response():
    z = torch.zeros(8, 5)
    z[:, 3] = torch.arange(8) * 0.2
    images, response = common.perturb(Dimmer(), z, [0, 3], [-5.0, 0.0, 2.5])
    assert images.shape == (2, 3, 8, 28, 28)
    # 0.1 * 5 of a range of 2 is 25%, 0.1 * 2.5 is 12.5%; dimension 0 does nothing
    np.testing.assert_allclose(response, [[0, 0, 0], [25, 0, 12.5]], atol=0.3)
    unmoved = ((0.1 * z[:, 3] + 1) * 127.5).round()
    assert images[0, 0, :, 5, 5].tolist() == unmoved.tolist()
    moved = ((0.1 * (z[:, 3] + 2.5) + 1) * 127.5).round()
    assert images[1, 2, :, 5, 5].tolist() == moved.tolist()
    assert z[0, 3] == 0  # the caller's z is left alone


def test_perturbation_grid():
    greys = np.arange(120).reshape(15, 8) * 2
    images = constant(*greys.flatten()).view(5, 3, 8, 28, 28)
    response = torch.arange(15.0).view(5, 3)
    dims = [0, 7, 20, 50, 99]
    figure = common.perturbation_figure(images, response, dims, [-2.0, 0.0, 2.5], "GAN, epoch 9")
    assert_size(figure)
    assert_cells(figure, greys)
    minus = "\N{MINUS SIGN}"
    labels = [f"z[{dim}] {offset}" for dim in dims for offset in (f"{minus}2", "+0", "+2.5")]
    assert_row_labels(figure, labels)
    assert_row_labels(figure, [f"{i}.0%" for i in range(15)])
    assert_column_labels(figure, [f"Sample {i}" for i in range(1, 9)])
    assert "GAN, epoch 9" in figure.get_suptitle()


def test_a_rule_separates_the_dimensions():
    white = torch.full((2, 3, 8, 28, 28), 255, dtype=torch.uint8)
    figure = common.perturbation_figure(
        white, torch.zeros(2, 3), [0, 1], [-1.0, 0.0, 1.0], "GAN, epoch 9"
    )
    box = figure.axes[0].get_window_extent()
    image = pixels(figure)[:, int(box.x0 + box.width / 3)].mean(1)
    cell = box.height / 6
    ruled = []
    for edge in range(1, 6):
        row = len(image) - 1 - int(box.y1 - edge * cell)
        if image[row - 5 : row + 6].min() < 128:
            ruled.append(edge)
    assert ruled == [3]  # below the first dimension's three rows


@pytest.mark.parametrize(
    ("dims", "offsets"),
    [
        ([7], [1.0]),
        ([0, 50, 99], [2.0]),
        ([0, 25, 50, 75, 99], [-3.5, 0.0, 3.5]),
        ([1, 99], [-123.4567, -0.0001234, 7.5]),
        ([12345, 999999], [-1.2345e-5]),
        ([1, 2, 3, 4, 5, 6], [-2.0, 0.0, 2.0]),
        ([1, 2, 3, 4], [-4.0, -2.0, 0.0, 2.0, 4.0]),
        ([10, 11, 12], [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]),
        (range(60, 80), [-4.0, 4.0]),
        (range(60, 100), [-123.4567]),
    ],
)
def test_a_perturbation_grid_of_any_shape_fills_its_page(dims, offsets):
    images = torch.full((len(dims), len(offsets), 8, 28, 28), 128, dtype=torch.uint8)
    response = torch.full((len(dims), len(offsets)), 100.0)
    figure = common.perturbation_figure(images, response, dims, offsets, "DCGAN, epoch 200")
    assert_size(figure)
    assert len(shown_texts(figure)) == 2 * len(dims) * len(offsets) + 8 + 2  # title and caption
    assert_text_is_readable(figure, shown_texts(figure))
    assert_no_blank_band(figure)


def assert_no_blank_band(figure):
    """Nowhere on the page are 5 mm without anything, from top to bottom."""
    is_blank = (pixels(figure) == 255).all(axis=(1, 2))
    longest = 0
    length = 0
    for blank in is_blank:
        length = length + 1 if blank else 0
        longest = max(longest, length)
    assert longest < 0.5 / 2.54 * 200


@pytest.mark.parametrize("epochs", [1, 3, 25, 26, 120])
def test_animation_has_at_most_25_frames_and_ends_with_the_last_epoch(epochs, tmp_path):
    greys = np.linspace(30, 230, epochs).astype(int).tolist()
    history = random_history(epochs, steps=2)
    for epoch, grey in zip(history, greys, strict=True):
        epoch.samples = constant(*[grey] * 64)
    settings = common.Settings("GAN", 2, 1e-3, 1.0, 5, 0, "float32", 100)
    common.draw_animation(common.Run(tmp_path, settings, {}, {}, history))
    shown = []
    with Image.open(tmp_path / "training.gif") as gif:
        for frame in ImageSequence.Iterator(gif):
            image = np.asarray(frame.convert("L")).astype(int)
            shown.append(image[-image.shape[1] // 16, image.shape[1] // 16])
    assert len(shown) <= 25
    assert len(shown) >= min(epochs, 10)
    assert shown[-1] == pytest.approx(greys[-1], abs=16)  # of 16 grey levels
    assert shown == sorted(shown)
    if epochs == 3:
        assert shown == pytest.approx(greys, abs=16)


def read_images(name, count):
    """The first images of one of the files, by hand."""
    content = gzip.decompress((RAW / name).read_bytes())
    return torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8).view(-1, 28, 28)[:count]


def test_a_run_compares_its_samples_with_real_images(trained_once):
    """Test images stand over samples, these over the nearest of the 96 images trained on."""
    samples = read_checkpoint(trained_once)["history"][-1]["samples"][:8]
    test_images = read_images("t10k-images-idx3-ubyte.gz", 8)
    train_images = read_images("train-images-idx3-ubyte.gz", 96)
    nearest = []
    for sample in samples.numpy().astype(float):
        squares = (train_images.numpy() - sample) ** 2
        nearest.append(train_images[squares.mean((1, 2)).argmin()])
    expected = {
        "real_vs_generated.png": common.images_figure(
            torch.cat([test_images, samples]), "", ["real", "generated"]
        ),
        "nearest_neighbours.png": common.images_figure(
            torch.cat([samples, torch.stack(nearest)]),
            "",
            ["generated", "nearest"],
            column_labels=["0.0"] * 8,
            caption="two\nlines",
        ),
    }
    for name, figure in expected.items():
        image = pixels(figure)
        box = figure.axes[0].get_window_extent()
        rows = slice(int(len(image) - box.y1) + 1, int(len(image) - box.y0))
        columns = slice(int(box.x0) + 1, int(box.x1))
        with Image.open(trained_once / name) as file:
            drawn = np.asarray(file.convert("RGB")).astype(int)
        difference = np.abs(drawn - image)[rows, columns]
        assert difference.max() <= 1, name  # a batch of another size may be rounded otherwise
