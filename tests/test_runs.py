"""What a user of gan.py and dcgan.py sees: files, continued runs, options, redrawing."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    README,
    REFERENCE,
    ROOT,
    SMALL_GRID,
    assert_same_run,
    files_in,
    read_history,
    refused,
    run,
    train,
)
from PIL import Image

import common
import dcgan
import gan

FIGURES = ["losses.png", "real_vs_generated.png", "latent_perturbation.png"]
FILES = [*FIGURES, "samples_latest.png", "history.csv", "settings.json", "generator.pt"]


@pytest.fixture(params=[gan, dcgan], ids=["GAN", "DCGAN"])
def finished(request, trained_once, trained_dcgan_once):
    """A model and the folder of its run of two epochs."""
    folder = trained_once if request.param is gan else trained_dcgan_once
    return request.param, folder


def test_every_file_that_the_readme_names_appears(finished):
    module, folder = finished
    script = f"{module.__name__}.py"
    own = {"samples_epoch_002.png", script, "common.py", "checkpoint.pt"}
    assert files_in(folder).keys() == {*FILES, *own}
    for name in (script, "common.py"):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    section = README.split("## For your report")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+\.(?:png|csv|json|pt))`", section))
    assert named >= {"samples_epoch_050.png", *FIGURES}
    assert named - {"samples_epoch_050.png"} <= files_in(folder).keys()
    for name in [*FIGURES, "samples_epoch_002.png", "samples_latest.png"]:
        with Image.open(folder / name) as image:
            assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
            assert image.width / 200 * 2.54 == pytest.approx(12, abs=0.02)
            assert image.height / 200 * 2.54 <= 17


def test_the_generator_loads_as_the_readme_says(data, tmp_path, monkeypatch):
    folder = train(gan, tmp_path / "outputs", data, "--epochs", 1, "--latent-dim", 7)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    code = code.replace("outputs/reference/dcgan", str(folder)).replace("(64, 100)", "(64, 7)")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["images"].shape == (64, 1, 28, 28)
    written = sorted(tmp_path.rglob("*.png"))
    singles = [path for path in written if path.parent != folder]
    assert len(singles) == 64
    with Image.open(singles[5]) as image:
        assert image.size == (28, 28)
        greys = np.asarray(image.convert("L")).astype(float)
    expected = (names["images"][5, 0].numpy() + 1) / 2 * 255
    assert np.abs(greys - expected).max() <= 1


def test_settings_json_says_what_decides_the_numbers(trained_once):
    content = json.loads((trained_once / "settings.json").read_text())
    settings = {"batch_size": 32, "learning_rate": 0.001, "r1_gamma": 1.0, "latent_dim": 100}
    settings |= {"seed": 0, "limit": 96}
    assert content["settings"].pop("precision") in ("float32", "bfloat16")  # what auto became
    assert content["settings"] == settings
    assert (content["model"], content["script"]) == ("GAN", "gan.py")
    # Of the report's layers: a weight for each pair of units, a bias for each unit, and two numbers
    # for each unit with BatchNorm.
    G = 101 * 128 + 129 * 256 + 257 * 512 + 513 * 1024 + 1025 * 784 + 2 * (256 + 512 + 1024)
    D = 785 * 512 + 513 * 256 + 257
    assert content["parameters"] == {"G": G, "D": D}
    assert content["machine"]["device"] == "cpu"


def test_a_seed_gives_the_same_run_and_another_seed_another(trained_once, data, tmp_path):
    assert_same_run(train(gan, tmp_path, data, "--epochs", 2), trained_once)
    other = train(gan, tmp_path / "other", data, "--epochs", 1, "--seed", 1)
    assert read_history(other)[0] != read_history(trained_once)[0]


def test_a_checkpoint_of_a_card_goes_on_the_same_on_a_cpu(trained_dcgan_once, data, tmp_path):
    """A card has the numbers of a weight, and Adam's of it, in another order in memory."""
    folder = train(dcgan, tmp_path, data, "--epochs", 1)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)

    def reorder(part):
        if isinstance(part, torch.Tensor):
            return part.contiguous()
        if isinstance(part, dict):
            return {name: reorder(value) for name, value in part.items()}
        return part

    torch.save(reorder(checkpoint), folder / "checkpoint.pt")
    train(dcgan, tmp_path, data, "--epochs", 2)
    (folder / "samples_epoch_001.png").unlink()
    assert_same_run(folder, trained_dcgan_once)


def test_a_finished_run_is_drawn_again_without_training(trained, data, capsys):
    before = files_in(trained / "gan")
    for name in (*FIGURES, "history.csv", "generator.pt"):
        (trained / "gan" / name).unlink()
    train(gan, trained, data, "--epochs", 2)
    assert files_in(trained / "gan") == before
    train(gan, trained, data, "--epochs", 1)
    assert "--epochs 1: nothing to train" in capsys.readouterr().out
    assert files_in(trained / "gan") == before


def test_sample_grids_of_the_epochs_in_between(data, tmp_path):
    folder = train(gan, tmp_path, data, "--epochs", 3, "--sample-every", 2)
    grids = {path.name for path in folder.glob("samples_epoch_*.png")}
    assert grids == {"samples_epoch_002.png", "samples_epoch_003.png"}


def test_limit_trains_on_the_first_images_only(data, tmp_path, monkeypatch):
    seen = []

    class Discriminator(gan.Discriminator):
        def forward(self, x):
            seen.append(x.detach())
            return super().forward(x)

    monkeypatch.setattr(gan, "Discriminator", Discriminator)
    train(gan, tmp_path, data, "--epochs", 1, "--limit", 70, "--precision", "float32")
    train_set, _ = common.load_fashion_mnist(data)
    images = torch.cat(seen)[:, None] == train_set.data[:, None] / 127.5 - 1
    was_seen = images.flatten(2).all(2).any(0)
    assert was_seen[:70].sum() == 64  # two batches of 32
    assert not was_seen[70:].any()


def test_other_settings_in_the_same_folder_are_named(trained, data):
    before = files_in(trained / "gan")
    options = ["--epochs", 3, "--seed", 7, "--learning-rate", 0.002, "--latent-dim", 100]
    line = refused(gan, trained, data, *options)
    assert "seed 0 before, 7 now" in line
    assert "learning_rate 0.001 before, 0.002 now" in line
    assert "latent_dim" not in line
    assert "--outputs" in line
    assert files_in(trained / "gan") == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--batch-size 1", "--batch-size 1: .*from 2"),
        ("--learning-rate nan", "--learning-rate nan"),
        ("--r1-gamma -1", "--r1-gamma -1"),
        ("--seed 4294967297", "--seed 4294967297"),
        ("--perturb-dims 3 -1", r"--perturb-dims \[3, -1\]"),
        ("--perturb-dims 3,14,15", "--perturb-dims: .*3,14,15"),
        ("--epoch 2", "--epoch"),  # no abbreviations
    ],
)
def test_a_wrong_option_is_named(options, named, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(gan, tmp_path, data, *options.split())
    assert stop.value.code == 2
    assert re.search(named, capsys.readouterr().err.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--batch-size 97", "--batch-size 97: .*96 images"),
        ("--latent-dim 3 --perturb-dims 3", "--perturb-dims 3: .*0 to 2"),
        ("--device cuda:7", "--device cuda:7 .*--device cpu"),
        ("--device tpu", "--device tpu .*--device cpu"),
    ],
)
def test_options_that_do_not_go_together(options, named, data, tmp_path):
    assert re.search(named, refused(gan, tmp_path, data, *options.split()))
    assert list(tmp_path.iterdir()) == []


def test_the_precision_that_is_asked_for_and_that_auto_chooses(monkeypatch):
    cpu = torch.device("cpu")
    cuda = torch.device("cuda")
    for is_fast, chosen in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(common, "FAST_BFLOAT16", is_fast)
        assert common.choose_precision("auto", cpu) == chosen
        assert common.choose_precision("auto", cuda) == "float32"
        assert common.choose_precision("float32", cpu) == "float32"
        assert common.choose_precision("bfloat16", cuda) == "bfloat16"


def test_the_dimensions_that_are_moved_are_spread_over_z():
    assert common.choose_dims(None, 100) == [0, 25, 50, 74, 99]  # as in the report's figure
    assert common.choose_dims(None, 3) == [0, 1, 2]
    assert common.choose_dims([7, 3], 8) == [7, 3]


def test_redraw_gives_the_same_figures_without_checkpoint(finished, data, tmp_path):
    module, trained = finished
    folder = tmp_path / module.__name__
    shutil.copytree(trained, folder)
    before = files_in(folder)
    for path in [*folder.glob("*.png"), folder / "checkpoint.pt"]:
        path.unlink()
    run(module, tmp_path, data, "--redraw", *SMALL_GRID)
    after = files_in(folder)
    samples = {"samples_latest.png", "samples_epoch_002.png"}
    assert before.keys() - after.keys() == {*samples, "checkpoint.pt"}
    for name, content in after.items():
        if name.endswith(".png"):  # the average was in another memory layout: rounding
            found = np.asarray(Image.open(folder / name).convert("L")).astype(int)
            expected = np.asarray(Image.open(trained / name).convert("L")).astype(int)
            different = np.abs(found - expected) > 2
            assert found.shape == expected.shape
            assert different.mean() < 0.01, name  # a digit of a response, say
        else:
            assert content == before[name]


def test_redraw_of_other_dimensions_says_what_it_does_not_use(data, tmp_path, capsys):
    unusual = "--latent-dim 7 --seed 3 --batch-size 16 --limit 64 --precision float32 --epochs 2"
    folder = train(gan, tmp_path, data, *unusual.split())
    before = files_in(folder)
    capsys.readouterr()
    other = "--perturb-dims 1 --perturb-offsets -1 1 --seed 9 --epochs 5"
    run(gan, tmp_path, data, "--redraw", *other.split())
    said = capsys.readouterr().out
    assert "--seed is not used" in said
    assert "--epochs is not used" in said
    assert "--batch-size" not in said
    assert f"figures in {folder.resolve()}" in said
    changed = {name for name, content in files_in(folder).items() if content != before[name]}
    assert "latent_perturbation.png" in changed
    assert changed <= {name for name in before if name.endswith(".png")}


def test_the_committed_runs_can_be_redrawn(data, tmp_path):
    shutil.copytree(REFERENCE / "dcgan", tmp_path / "dcgan")
    drawn = tmp_path / "dcgan" / "latent_perturbation.png"
    drawn.unlink()
    run(dcgan, tmp_path, data, "--redraw", "--perturb-dims", 3, 14, 15)
    assert drawn.exists()
