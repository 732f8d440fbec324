"""The figures: what is drawn, read back from the PNG where that can be, and from the axes."""

import csv
import io
import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image, ImageSequence
from torch import nn

import common


def pixels(figure):
    """The figure's PNG as an RGB array."""
    file = io.BytesIO()
    figure.savefig(file)
    return np.asarray(Image.open(file).convert("RGB"))


def assert_12_cm_wide_at_200_dpi(figure):
    assert abs(pixels(figure).shape[1] - 12 / 2.54 * 200) <= 1


@pytest.fixture
def history():
    """Three epochs of two steps, with losses that can be averaged by eye."""
    steps = torch.tensor([
        [[0.5, 1.0, 0.6, 0.4], [0.7, 1.4, 0.8, 0.2]],
        [[0.6, 1.5, 0.5, 0.5], [0.6, 1.5, 0.5, 0.5]],
        [[0.4, 2.0, 0.7, 0.3], [0.8, 1.0, 0.9, 0.1]],
    ])  # fmt: skip
    samples = (torch.arange(64) * 4).byte()[None, :, None, None].expand(3, 64, 28, 28)
    return common.History(*steps.unbind(2), samples, [1.0, 2.0, 3.5], '{"seed": 0}')


def test_losses(history):
    figure = common.losses_figure(history, "GAN")
    assert_12_cm_wide_at_200_dpi(figure)
    (axes,) = figure.axes
    thin_D, mean_D, thin_G, mean_G, undecided = axes.lines
    np.testing.assert_allclose(thin_D.get_ydata(), [0.5, 0.7, 0.6, 0.6, 0.4, 0.8], rtol=1e-6)
    np.testing.assert_allclose(thin_G.get_ydata(), [1.0, 1.4, 1.5, 1.5, 2.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(mean_D.get_ydata(), [0.6, 0.6, 0.6], rtol=1e-6)
    np.testing.assert_allclose(mean_G.get_ydata(), [1.2, 1.5, 1.5], rtol=1e-6)
    np.testing.assert_allclose(undecided.get_ydata(), math.log(2))
    assert mean_D.get_linewidth() > 3 * thin_D.get_linewidth()
    assert [text.get_text() for text in figure.legends[0].texts][:2] == ["Discriminator", "Generator"]
    assert (
        "GAN" in figure.get_suptitle() and "Epoch" in axes.get_xlabel() and "Loss" in axes.get_ylabel()
    )
    drawn = pixels(figure).reshape(-1, 3)
    for line, colour in ((mean_D, "tab:blue"), (mean_G, "tab:orange")):
        assert line.get_color() == colour
        assert (np.abs(drawn - np.array(to_rgb(colour)) * 255).max(1) < 2).sum() > 500


def assert_cells(figure, axes, greys):
    """The PNG shows, at the centre of each cell of the axes' grid, this grey level (rows, columns)."""
    image = pixels(figure)
    cell = 30  # an image of 28 pixels and a gap of 2
    for row, column in np.ndindex(greys.shape):
        centre = column * cell + 14.5, row * cell + 14.5
        x, y = axes.transData.transform(centre)
        found = image[image.shape[0] - 1 - int(y), int(x)]
        assert np.abs(found.astype(int) - int(greys[row, column])).max() <= 1, (row, column)


def test_samples(history):
    figure = common.images_figure(history.samples[0], "DCGAN, epoch 50")
    assert_12_cm_wide_at_200_dpi(figure)
    assert "DCGAN" in figure.get_suptitle() and "epoch 50" in figure.get_suptitle()
    assert_cells(figure, figure.axes[0], np.arange(64).reshape(8, 8) * 4)


def constant(*greys):
    return torch.tensor(greys, dtype=torch.uint8)[:, None, None].expand(-1, 28, 28)


def test_rows_are_labelled():
    figure = common.images_figure(constant(*range(8), *range(200, 208)), "GAN", ["real", "generated"])
    assert_12_cm_wide_at_200_dpi(figure)
    assert_cells(figure, figure.axes[0], np.array([range(8), range(200, 208)]))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["real", "generated"]


def test_nearest_finds_copies_and_measures_distance_in_grey_levels():
    train = constant(10, 100, 200)
    indices, distances = common.nearest(constant(200, 107), train)
    assert indices.tolist() == [2, 1]
    torch.testing.assert_close(distances, torch.tensor([0.0, 7.0]), atol=0.05, rtol=0)


def test_nearest_neighbours():
    fake, train = constant(200, 107, 10, 20, 30, 40, 50, 60), constant(10, 100, 200)
    figure = common.nearest_neighbours_figure(fake, constant(13, 103), train, "GAN")
    assert_12_cm_wide_at_200_dpi(figure)
    (axes,) = figure.axes
    neighbours = [200, 100, 10, 10, 10, 10, 10, 100]
    assert_cells(figure, axes, np.array([fake[:, 0, 0].tolist(), neighbours]))
    assert [label.get_text() for label in axes.get_xticklabels()][1:4] == ["7.0", "0.0", "10.0"]
    assert "2 real test images 3.0" in axes.get_xlabel()


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
    expected = ((0.1 * (z[:, 3] + 2.5) + 1) * 127.5).round()
    assert images[1, 2, :, 5, 5].tolist() == expected.tolist()
    assert z[0, 3] == 0  # the caller's z is left alone


def test_perturbation_grid():
    images = torch.randint(0, 256, (5, 3, 8, 28, 28), dtype=torch.uint8)
    images[:, 1] = images[0, 1]
    response = torch.arange(15.0).view(5, 3)
    figure = common.perturbation_figure(images, response, [0, 7, 20, 50, 99], [-3.0, 0.0, 3.0], "GAN")
    assert_12_cm_wide_at_200_dpi(figure)
    (axes,) = figure.axes
    left = [label.get_text() for label in axes.get_yticklabels()]
    assert len(left) == 15 and left[3:6] == ["z[7] \N{MINUS SIGN}3", "z[7] +0", "z[7] +3"]
    assert [label.get_text() for label in axes.texts] == [f"{i}.0%" for i in range(15)]
    assert [label.get_position()[1] for label in axes.texts] == list(axes.get_yticks())  # each beside its row
    top = [label.get_text() for label in axes.get_xticklabels()]
    assert top == [f"Sample {i}" for i in range(1, 9)]
    rows = np.asarray(axes.images[0].get_array()).reshape(5, 3, 30, 240)
    for block in rows:
        assert np.array_equal(block[1], rows[0, 1])  # the unperturbed row
        assert not np.array_equal(block[0], block[1])
    assert np.array_equal(rows[4, 2, 1:29, 7 * 30 + 1 : 8 * 30 - 1], images[4, 2, 7])


def test_a_rule_separates_the_dimensions():
    white = torch.full((2, 3, 8, 28, 28), 255, dtype=torch.uint8)
    figure = common.perturbation_figure(white, torch.zeros(2, 3), [0, 1], [-1.0, 0.0, 1.0], "GAN")
    drawn, axes = pixels(figure).mean(2), figure.axes[0]
    dark = []
    for edge in range(1, 6):
        x, y = axes.transData.transform((100, edge * 30 - 0.5)).astype(int)
        if drawn[drawn.shape[0] - 1 - y - 3 : drawn.shape[0] - 1 - y + 4, x].min() < 128:
            dark.append(edge)
    assert dark == [3]  # after the first dimension's three rows


@pytest.mark.parametrize(("dims", "offsets"), [
    ([0, 25, 50, 75, 99], [-3.5, 0.0, 3.5]),
    ([7], [1.0]),
    ([1, 99], [-123.4567, -0.0001234, 7.5]),
    ([12345, 999999], [-1.2345e-5]),
    (list(range(20)), [-4.0, 4.0]),
])  # fmt: skip
def test_text_is_inside_the_page_and_does_not_overlap(dims, offsets):
    images = torch.zeros(len(dims), len(offsets), 8, 28, 28, dtype=torch.uint8)
    response = torch.full((len(dims), len(offsets)), 12.3)
    figure = common.perturbation_figure(images, response, dims, offsets, "DCGAN, epoch 200")
    assert figure.get_figheight() <= 17 / 2.54
    (axes,) = figure.axes
    assert_no_text_is_cut(figure, [*axes.get_yticklabels(), *axes.get_xticklabels(), *axes.texts])


def assert_no_text_is_cut(figure, labels):
    pixels(figure)
    boxes = [text.get_window_extent() for text in [*labels, figure._suptitle]]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def frames_of(folder, history):
    """The frames of training.gif, each as its grey level inside an image."""
    zeros = torch.zeros(8, 28, 28, dtype=torch.uint8)
    response = torch.zeros(1, 1)
    perturbation = zeros[None, None], response, [0], [0.0]
    common.draw_results(folder, history, "GAN", zeros, zeros, zeros, perturbation)
    with Image.open(folder / "training.gif") as gif:
        return [int(np.asarray(frame.convert("L"))[100, 100]) for frame in ImageSequence.Iterator(gif)]


def test_animation_has_one_frame_an_epoch(history, tmp_path):
    history.samples = torch.stack([constant(*[30 + 90 * i] * 64) for i in range(3)])
    np.testing.assert_allclose(frames_of(tmp_path, history), [30, 120, 210], atol=16)  # 16 grey levels


def test_animation_of_a_long_run_keeps_50_frames_and_ends_with_the_last_epoch(history, tmp_path):
    history.samples = torch.stack([constant(*[epoch] * 64) for epoch in range(1, 201)])
    history.seconds = [1.0] * 200
    np.testing.assert_allclose(frames_of(tmp_path, history), range(4, 201, 4), atol=16)


def test_an_animation_of_50_frames_is_about_a_megabyte(history, tmp_path):
    """Even of noise, which cannot be packed: 62,000 pixels a frame of half a byte each."""
    history.samples = torch.randint(0, 256, (50, 64, 28, 28), dtype=torch.uint8)
    history.seconds = [1.0] * 50
    frames_of(tmp_path, history)
    assert (tmp_path / "training.gif").stat().st_size < 2_000_000


def test_history_is_mean_and_deviation_of_each_epoch(history, tmp_path):
    common.save_tables(tmp_path, history)
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    last = {key: float(value) for key, value in rows[2].items()}
    expected = {"D_loss_mean": 0.6, "D_loss_std": 0.2, "G_loss_mean": 1.5, "G_loss_std": 0.5}
    expected |= {"D_x_mean": 0.8, "D_G_z_mean": 0.2, "seconds": 3.5, "epoch": 3}
    assert last == pytest.approx({**last, **expected}, abs=1e-5)
    assert (tmp_path / "settings.json").read_text() == '{"seed": 0}'
