"""The figures: what is drawn, read back from the PNG where that can be, else from the axes."""

import io
import math
from types import SimpleNamespace

import matplotlib.style
import numpy as np
import pytest
import torch
from conftest import history_of, linear_generator
from matplotlib.text import Text
from PIL import Image

import common
import compare


@pytest.fixture(autouse=True)
def style():
    """As in a run."""
    with matplotlib.style.context(common.STYLE):
        yield


def pixels(figure):
    """The figure's PNG as an RGB array, after a look at its size."""
    with Image.open(io.BytesIO(common.as_bytes(figure.savefig))) as image:
        array = np.asarray(image.convert("RGB")).astype(int)
    height, width, _ = array.shape
    assert width == pytest.approx(12 / 2.54 * 200, abs=1)
    assert height <= 17 / 2.54 * 200
    return array


def constant(*greys):
    """An image of one grey level for each."""
    return torch.tensor(greys, dtype=torch.uint8)[:, None, None].expand(-1, 28, 28)


def assert_cells(figure, greys):
    """The PNG shows this grey level (rows, 8) at the centre of each cell of the grid."""
    image = pixels(figure)
    rows, columns = greys.shape
    for row in range(rows):
        for column in range(columns):
            place = ((column + 0.5) / columns, 1 - (row + 0.5) / rows)
            y, x = place_in_png(figure, figure.axes[0].transAxes.transform(place))
            assert np.abs(image[y, x] - int(greys[row, column])).max() <= 1, (row, column)


def place_in_png(figure, place):
    """The row and the column of a place of a figure that has been drawn."""
    scale = 200 / figure.dpi
    return int(scale * (figure.bbox.height - place[1])), int(scale * place[0])


def ticks_outside(axis):
    """The labels of ticks beyond the ends of an axis: they are not drawn."""
    low, high = sorted(axis.get_view_interval())
    ticks = axis.get_major_ticks()
    return [tick.label1 for tick in ticks if not low <= tick.get_loc() <= high]


def assert_text_is_readable(figure):
    """No text is cut off, and none lies over another one. Returns the texts."""
    figure.draw_without_rendering()
    drawn = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    outside = []
    for axes in figure.axes:
        outside += ticks_outside(axes.xaxis) + ticks_outside(axes.yaxis)
    texts = [text for text in drawn if text not in outside]
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        name = texts[i].get_text()
        assert min(box.x0, box.y0) >= 0, name
        assert box.x1 <= figure.bbox.x1, name
        assert box.y1 <= figure.bbox.y1, name
        for other in boxes[i + 1 :]:
            assert not box.overlaps(other), name
    return [text.get_text() for text in texts]


def assert_no_blank_band(figure):
    """Nowhere on the page are 5 mm without anything, from top to bottom."""
    is_blank = (pixels(figure) == 255).all(axis=(1, 2))
    marks = np.flatnonzero(np.concatenate([[False], is_blank, [False]]) == 0)
    assert np.diff(marks).max() < 0.5 / 2.54 * 200


def test_a_grid_of_images():
    title = "DCGAN, epoch 50: generated samples"
    figure = common.plot_images(constant(*range(0, 256, 4)), title)
    assert_cells(figure, np.arange(0, 256, 4).reshape(8, 8))
    assert assert_text_is_readable(figure) == [title]
    assert_no_blank_band(figure)


def test_a_grid_of_blocks_with_a_label_each():
    greys = np.arange(0, 160, 5)
    figure = common.plot_images(constant(*greys), "GAN", rows=["real", "generated"], blocks=2)
    assert_cells(figure, greys.reshape(4, 8))
    assert {"real", "generated"} < set(assert_text_is_readable(figure))
    assert_no_blank_band(figure)
    labels = {label.get_text(): label for label in figure.axes[0].get_yticklabels()}
    for text, middle in [("real", 0.75), ("generated", 0.25)]:  # of their two rows of four
        box = labels[text].get_window_extent()
        height = figure.axes[0].transAxes.inverted().transform((0, (box.y0 + box.y1) / 2))[1]
        assert height == pytest.approx(middle, abs=0.03)


def test_perturbation_moves_one_dimension_and_measures_the_response():
    weight = torch.zeros(784, 5)
    weight[:, 3] = 0.1  # the brightness follows z[3] alone
    z = torch.zeros(8, 5)
    z[:, 3] = torch.arange(8) * 0.2
    images, response = common.perturb(linear_generator(weight), z, [0, 3], [-5.0, 0.0, 2.5])
    assert images.shape == (2, 3, 8, 28, 28)
    # 0.1 * 5 of a range of 2 is 25%, 0.1 * 2.5 is 12.5%; dimension 0 does nothing
    np.testing.assert_allclose(response, [[0, 0, 0], [25, 0, 12.5]], atol=0.3)
    unmoved = ((0.1 * z[:, 3] + 1) * 127.5).round()
    assert images[0, 0, :, 5, 5].tolist() == unmoved.tolist()
    moved = ((0.1 * (z[:, 3] + 2.5) + 1) * 127.5).round()
    assert images[1, 2, :, 5, 5].tolist() == moved.tolist()
    assert z[0, 3] == 0  # the caller's z is left alone


def test_images_that_would_stand_beside_labels_of_others_are_refused():
    for count in (20, 24):
        with pytest.raises(ValueError, match=f"{count} images"):
            common.plot_images(constant(*range(count)), "", rows=["real", "generated"], blocks=2)


def test_perturbation_grid_with_a_rule_between_the_dimensions():
    greys = 255 - np.arange(48).reshape(6, 8)
    images = constant(*greys.flatten()).view(2, 3, 8, 28, 28)
    response = torch.arange(6.0).view(2, 3)
    figure = common.plot_perturbation(images, response, [7, 99], [-2.0, 0.0, 2.5], "GAN, epoch 9")
    assert_cells(figure, greys)
    texts = assert_text_is_readable(figure)
    for dim in (7, 99):
        assert {f"z[{dim}] -2", f"z[{dim}]", f"z[{dim}] +2.5"} < set(texts)
    assert {text for text in texts if "%" in text and "Right" not in text} == {
        "0.0%",
        "2.0%",
        "3.0%",
        "5.0%",  # and nothing beside the rows that are not moved
    }
    assert {str(i) for i in range(1, 9)} < set(texts)
    assert any("GAN, epoch 9" in text for text in texts)
    image = pixels(figure)
    ruled = []
    for edge in range(1, 6):  # below each row of images but the last
        place = figure.axes[0].transAxes.transform((0.3, 1 - edge / 6))
        y, x = place_in_png(figure, place)
        if image[y - 5 : y + 6, x].min() < 128:
            ruled.append(edge)
    assert ruled == [3]


@pytest.mark.parametrize(
    ("dims", "offsets"),
    [
        ([1, 99], [-123.4567, -0.0001234, 7.5]),
        (range(60, 80), [-4.0, 4.0]),
    ],
)
def test_a_perturbation_grid_of_any_shape_fills_its_page(dims, offsets):
    images = torch.full((len(dims), len(offsets), 8, 28, 28), 128, dtype=torch.uint8)
    response = torch.full((len(dims), len(offsets)), 100.0)
    figure = common.plot_perturbation(images, response, dims, offsets, "DCGAN, epoch 200")
    texts = assert_text_is_readable(figure)
    assert len(texts) == 2 * len(dims) * len(offsets) + 8 + 2  # title and caption
    assert_no_blank_band(figure)


def test_losses_are_means_of_epochs_in_a_band_of_one_standard_deviation():
    losses = [[0.6, 0.62, 0.64, 0.66, 0.68], [0.8, 0.79, 0.78, 0.77, 0.76]]
    figure = common.plot_losses(history_of(*losses), "DCGAN")
    pixels(figure)
    assert "DCGAN" in figure.get_suptitle()
    axes, below = figure.axes
    *lines, ln_2 = axes.lines
    assert ln_2.get_ydata()[0] == pytest.approx(math.log(2))
    assert [line.get_label() for line in lines] == ["Discriminator", "Generator"]
    assert lines[0].get_linestyle() != lines[1].get_linestyle()  # for black and white
    for i, deviation in enumerate([0.01, 0.02]):
        np.testing.assert_allclose(lines[i].get_xydata(), list(enumerate(losses[i], 1)))
        corners = axes.collections[i].get_paths()[0].vertices
        for epoch, loss in enumerate(losses[i], 1):
            heights = corners[corners[:, 0] == epoch, 1]
            ends = [heights.min(), heights.max()]
            assert ends == pytest.approx([loss - deviation, loss + deviation])
    D_right, chance = below.lines
    np.testing.assert_allclose(D_right.get_ydata(), [75] * 5)  # in %
    assert chance.get_ydata()[0] == 50
    heights = below.collections[0].get_paths()[0].vertices[:, 1]
    assert [heights.min(), heights.max()] == pytest.approx([62.5, 87.5])


def test_a_loss_that_ran_away_once_is_cut_and_named():
    """The other epochs fill the figure: they lie within 0.1, the peak is at 9."""
    D_losses = [0.69] * 200
    G_losses = list(np.linspace(0.75, 0.7, 200))
    D_losses[126] = 9.0
    figure = common.plot_losses(history_of(D_losses, G_losses), "GAN")
    axes, _ = figure.axes
    low, high = axes.get_ylim()
    assert 0.6 < low < 0.68
    assert 0.77 < high < 0.85
    assert any("peak 9.00 in epoch 127" in text for text in assert_text_is_readable(figure))


def test_losses_of_a_calm_start_are_seen_whole():
    """Few epochs in 200, but no loss runs away."""
    G_losses = [0.72] * 200
    D_losses = [0.68] * 200
    G_losses[:3] = [0.74, 0.77, 0.75]
    D_losses[:3] = [0.66, 0.64, 0.65]
    figure = common.plot_losses(history_of(D_losses, G_losses), "DCGAN")
    low, high = figure.axes[0].get_ylim()
    assert 0.6 < low < 0.64
    assert 0.77 < high < 0.81
    assert not any("peak" in text for text in assert_text_is_readable(figure))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_losses_of_many_runs_beside_each_other_are_readable(count):
    """And the last alone, which begins higher, is not cut because of the others."""
    G_losses = [0.72] * 200
    histories = [history_of([0.69] * 200, G_losses) for _ in range(count)]
    histories[-1] = history_of([0.68] * 200, [0.76, 0.77, 0.75, *G_losses[3:]])
    columns = {f"GAN {i}": [SimpleNamespace(history=histories[i])] for i in range(count)}
    figure = compare.plot_losses(columns)
    assert not any("peak" in text for text in assert_text_is_readable(figure))


@pytest.mark.parametrize("D_loss", [math.log(2), 3.0])
def test_ln_2_is_seen_under_no_other_line_and_outside_the_losses(D_loss):
    figure = common.plot_losses(history_of([D_loss] * 30, [D_loss + 2] * 30), "GAN")
    image = pixels(figure)
    y, x = place_in_png(figure, figure.axes[0].transData.transform((15, math.log(2))))
    around = image[y - 2 : y + 3, x - 100 : x + 100]
    assert (around.max(axis=2) < 60).sum() > 50  # dots of the line, which are black


@pytest.mark.parametrize("epochs", [1, 2, 1000])
def test_text_of_the_losses_and_ticks_at_whole_epochs(epochs):
    losses = np.linspace(0.6, 0.7, epochs)
    figure = common.plot_losses(history_of(losses, losses + 0.2), "DCGAN")
    assert any("ln 2" in text for text in assert_text_is_readable(figure))
    axes, _ = figure.axes
    assert all(tick == round(tick) for tick in axes.get_xticks())
    if epochs == 1:  # seen though one point makes no line
        image = pixels(figure)
        y, x = place_in_png(figure, axes.transData.transform((1, losses[0])))
        assert image[y, x].max() < 200
