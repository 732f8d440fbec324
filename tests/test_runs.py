"""What a user of gan.py and dcgan.py sees: files, continued runs, options, redrawing."""

import json
import re
import shutil

import matplotlib.style
import numpy as np
import pytest
import torch
from conftest import README, assert_same_run, read_checkpoint, read_history, refused, train
from PIL import Image

import common
import dcgan
import gan

FIGURES = ["losses.png", "real_vs_generated.png", "nearest_neighbours.png"]
FIGURES += ["latent_perturbation.png"]
FILES = [*FIGURES, "samples_latest.png", "training.gif", "history.csv", "settings.json"]
FILES += ["generator.pt", "checkpoint.pt"]


def names_in(folder):
    """The files in a folder, but for hidden ones."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def read_png(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L")).astype(int)


def run_bare(data, *options):
    """gan.py with these options and none of a quick run."""
    argv = [str(word) for word in ["--device", "cpu", "--data", data, *options]]
    common.main("GAN", gan.Generator, gan.Discriminator, argv)


@pytest.fixture(params=[gan, dcgan], ids=["GAN", "DCGAN"])
def finished(request, trained_once, trained_dcgan_once):
    """A model and the folder of its run of two epochs."""
    folder = trained_once if request.param is gan else trained_dcgan_once
    return request.param, folder


def test_every_file_that_the_readme_names_appears(finished):
    _, folder = finished
    assert names_in(folder) == {*FILES, "samples_epoch_002.png"}
    section = README.split("## For your report")[1].split("## The result")[0]
    named = set(re.findall(r"`(\w+\.(?:png|gif|csv|json|pt))`", section))
    assert "samples_epoch_050.png" in named
    assert named - {"samples_epoch_050.png"} < names_in(folder)
    for name in [*FIGURES, "samples_epoch_002.png"]:
        with Image.open(folder / name) as image:
            assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
            assert image.width / 200 * 2.54 == pytest.approx(12, abs=0.02)
            assert image.height / 200 * 2.54 <= 17
    with Image.open(folder / "samples_latest.png") as image:
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)


def test_the_generator_loads_as_the_readme_says(finished, tmp_path, monkeypatch):
    module, folder = finished
    model = module.__name__
    reference = tmp_path / "outputs" / "reference" / model
    reference.mkdir(parents=True)
    shutil.copy(folder / "generator.pt", reference)
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names = {}
    exec(code.replace("dcgan", model), names)

    assert names["images"].shape == (64, 1, 28, 28)
    with torch.no_grad():
        x = names["G"](common.latent_vectors(100)[:64])
    samples = read_checkpoint(folder)["history"][-1]["samples"]
    greys = (x[:, 0] + 1) / 2 * 255
    assert (greys - samples).abs().max() < 1.5  # rounded, in another layout of the memory


def test_history_csv_is_that_of_the_steps(trained_once):
    history = read_checkpoint(trained_once)["history"]
    rows = read_history(trained_once)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row, epoch in zip(rows, history, strict=True):
        for name in ("D_loss", "G_loss", "D_x", "D_G_z"):
            steps = epoch[name].numpy().astype(float)
            assert steps.shape == (3,)  # 96 images in batches of 32
            assert float(row[f"{name}_mean"]) == pytest.approx(np.mean(steps), rel=1e-4)
            assert float(row[f"{name}_std"]) == pytest.approx(np.std(steps), rel=1e-3)
        assert float(row["seconds"]) > 0
    first, second = (epoch["samples"].numpy().astype(float) for epoch in history)
    assert rows[0]["sample_change"] == ""
    assert float(rows[1]["sample_change"]) == pytest.approx(np.abs(second - first).mean(), rel=1e-4)


def test_settings_json(trained_once, capsys):
    settings = json.loads((trained_once / "settings.json").read_text())
    assert settings["model"] == "GAN"
    assert settings["epochs"] == 2
    assert settings["device"] == "cpu"
    assert settings["precision"] in ("float32", "bfloat16")
    assert settings["torch"] == str(torch.__version__)
    assert settings["threads"] == torch.get_num_threads()
    assert settings["parameters"] == {"G": 1_510_032, "D": 533_505}

    with pytest.raises(SystemExit):
        run_bare("data", "--help")
    options = re.findall(r"^  --([a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE)
    assert len(options) > 15
    assert settings["options"].keys() == {option.replace("-", "_") for option in options}
    assert settings["options"]["batch_size"] == 32
    assert settings["options"]["precision"] == "auto"


def test_the_same_seed_gives_the_same_run(trained_once, data, tmp_path):
    assert_same_run(train(gan, tmp_path, data, "--epochs", 2), trained_once)


def test_another_seed_gives_another_run(trained_once, data, tmp_path):
    other = read_checkpoint(train(gan, tmp_path, data, "--epochs", 1, "--seed", 1))
    first = read_checkpoint(trained_once)
    assert not torch.equal(other["G"]["layers.0.weight"], first["G"]["layers.0.weight"])
    assert not torch.equal(other["history"][0]["D_loss"], first["history"][0]["D_loss"])


def test_a_run_made_longer_is_the_run_never_stopped(trained_once, data, tmp_path):
    """That this holds for the DCGAN too is tested with a killed run, in test_faults.py."""
    train(gan, tmp_path, data, "--epochs", 1)
    longer = train(gan, tmp_path, data, "--epochs", 2)
    assert_same_run(longer, trained_once)
    assert json.loads((longer / "settings.json").read_text())["epochs"] == 2


def test_a_finished_run_is_drawn_again_without_training(trained, data):
    folder = trained / "gan"
    checkpoint = folder / "checkpoint.pt"
    written = checkpoint.stat().st_mtime_ns
    kept = {}
    for name in ("history.csv", "settings.json", "losses.png", "training.gif"):
        kept[name] = (folder / name).read_bytes()
        (folder / name).unlink()
    train(gan, trained, data, "--epochs", 2)
    assert checkpoint.stat().st_mtime_ns == written
    for name, content in kept.items():
        assert (folder / name).read_bytes() == content, name


def test_fresh_starts_over_and_removes_the_figures_of_the_run_before(trained, data):
    folder = trained / "gan"
    old = folder / "samples_epoch_002.png"
    mine = [folder / name for name in ("notes.txt", "samples_epoch_050 for my report.png")]
    for path in mine:
        path.write_text("mine")
    assert old.exists()
    train(gan, trained, data, "--epochs", 1, "--fresh", "--seed", 5)
    assert len(read_checkpoint(folder)["history"]) == 1
    assert len(read_history(folder)) == 1
    assert not old.exists()
    assert [path.name for path in mine if not path.exists()] == []


def test_limit_trains_on_the_first_images_only(data, tmp_path):
    """Two batches of 32; latent vectors of one number can be perturbed too."""
    options = ["--epochs", 1, "--limit", 70, "--latent-dim", 1, "--perturb-dims", 0]
    checkpoint = read_checkpoint(train(gan, tmp_path, data, *options))
    assert checkpoint["history"][0]["D_loss"].shape == (2,)
    assert checkpoint["G"]["layers.0.weight"].shape == (128, 1)


def test_a_folder_whose_name_looks_like_a_number(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_bare(data, "--batch-size", 32, "--limit", 96, "--epochs", 1, "--outputs", "-2026")
    assert names_in(tmp_path) == {"-2026"}
    assert names_in(tmp_path / "-2026" / "gan") == {*FILES, "samples_epoch_001.png"}


def test_other_settings_in_the_same_folder_are_named(trained, data):
    before = (trained / "gan" / "checkpoint.pt").read_bytes()
    options = ["--epochs", 3, "--seed", 7, "--learning-rate", 0.002, "--latent-dim", 100]
    line = refused(gan, trained, data, *options)
    assert "seed was 0, is now 7" in line
    assert "learning_rate was 0.001, is now 0.002" in line
    assert "latent_dim" not in line
    assert "--fresh" in line
    assert "--outputs" in line
    assert (trained / "gan" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--batch-size 0", "--batch-size: 0 is not at least 2"),
        ("--batch-size 1", "--batch-size: 1 is not at least 2"),
        ("--batch-size many", "--batch-size: .*'many'"),
        ("--limit 1", "--limit: 1 "),
        ("--epochs 0", "--epochs: 0 "),
        ("--learning-rate nan", "--learning-rate: nan "),
        ("--learning-rate 0", "--learning-rate: 0 "),
        ("--learning-rate 2", "--learning-rate: 2 "),
        ("--seed -1", "--seed: -1 "),
        ("--seed 4294967297", "--seed: 4294967297 "),
        ("--r1-gamma -1", "--r1-gamma: -1 "),
        ("--latent-dim 0", "--latent-dim: 0 "),
        ("--sample-every 0", "--sample-every: 0 "),
        ("--images -1", "--images: -1 "),
        ("--device tpu", "--device: .*'tpu'"),
        ("--precision float16", "--precision: .*'float16'"),
        ("--perturb-dims 3 -1", "--perturb-dims: -1 "),
        ("--perturb-offsets inf", "--perturb-offsets: inf "),
        ("--perturb-dims 1 2 3 4 5 6 7 8 9 10 11 12 13 14", "--perturb-dims .* 40 rows"),
        ("--perturb-offsets 1 2 3 4 5 6 7 8 9", "--perturb-offsets.* 40 rows"),  # of 5 dimensions
        ("--fresh --redraw", "--redraw.*--fresh"),
        ("--colour", "--colour"),
    ],
)
def test_a_wrong_option_is_named(options, named, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(gan, tmp_path, data, "--epochs", 1, *options.split())
    assert stop.value.code == 2
    assert re.search(named, capsys.readouterr().err.splitlines()[-1])
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--batch-size 97", "--batch-size 97: .*96 images"),
        ("--perturb-dims 3 100", "--perturb-dims 100: .*0 to 99"),
        ("--latent-dim 3 --perturb-dims 3", "--perturb-dims 3: .*0 to 2"),
    ],
)
def test_options_that_do_not_go_together(options, named, data, tmp_path):
    assert re.search(named, refused(gan, tmp_path, data, *options.split()))
    assert names_in(tmp_path / "gan") == set()


@pytest.mark.parametrize(
    ("device", "is_there"),
    [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())],
)
def test_a_device_that_is_not_there(device, is_there, data, tmp_path):
    if is_there:
        pytest.skip("it is there")
    line = refused(gan, tmp_path, data, "--device", device)
    assert f"--device {device}" in line
    assert "--device cpu" in line


def test_images_are_numbered_and_replace_earlier_ones(trained, data):
    folder = trained / "gan" / "images"
    train(gan, trained, data, "--epochs", 2, "--images", 120)
    names = [f"{number:05d}.png" for number in range(120)]
    assert names_in(folder) == set(names)
    seen = set()
    for name in names:
        with Image.open(folder / name) as image:
            assert image.size == (28, 28)
            assert image.mode == "L"
            seen.add(image.tobytes())
    assert len(seen) == 120  # each is another one

    mine = [".hidden.png", "photo.png", "notes.txt", "12.png", "00001.jpg"]
    for name in mine:
        (folder / name).write_text("mine")
    train(gan, trained, data, "--epochs", 2, "--images", 7)
    left = {path.name for path in folder.iterdir()}
    assert left == {*names[:7], *mine}
    for name in mine:
        assert (folder / name).read_text() == "mine"


def perturbed_by_hand(folder, latent_dim, dims, offsets):
    """The GAN's latent_perturbation.png after two epochs, as grey levels."""
    G = gan.Generator(latent_dim).eval()
    G.load_state_dict(torch.load(folder / "generator.pt", weights_only=True))
    z = common.latent_vectors(latent_dim)[:8]
    images = torch.zeros(len(dims), len(offsets), 8, 28, 28, dtype=torch.uint8)
    response = torch.zeros(len(dims), len(offsets))
    with torch.no_grad():
        for i, dim in enumerate(dims):
            for j, offset in enumerate(offsets):
                moved = z.clone()
                moved[:, dim] += offset
                images[i, j] = ((G(moved)[:, 0] + 1) / 2 * 255).round()
                response[i, j] = (G(moved) - G(z)).abs().mean() / 2 * 100
    with matplotlib.style.context(common.STYLE):
        figure = common.perturbation_figure(images, response, dims, offsets, "GAN, epoch 2")
        figure.savefig(folder / "by_hand.png")
    return read_png(folder / "by_hand.png")


def test_redraw_needs_no_setting_typed_again_and_trains_nothing(data, tmp_path):
    unusual = "--latent-dim 7 --seed 3 --batch-size 16 --limit 64 --learning-rate 0.002"
    unusual += " --r1-gamma 2 --precision float32 --epochs 2"
    folder = train(gan, tmp_path, data, *unusual.split())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in before:
        if name != "checkpoint.pt":
            (folder / name).unlink()

    options = "--images 3 --perturb-dims 1 --perturb-offsets -1 1 --sample-every 1"
    run_bare(data, "--redraw", "--outputs", tmp_path, *options.split())
    samples = {"samples_epoch_001.png", "samples_epoch_002.png"}
    assert names_in(folder) == {*FILES, *samples, "images"}
    assert len(names_in(folder / "images")) == 3
    changed = {name for name in before if (folder / name).read_bytes() != before[name]}
    assert changed == {"latent_perturbation.png"}
    expected = perturbed_by_hand(folder, 7, [1], [-1.0, 1.0])
    difference = np.abs(read_png(folder / "latent_perturbation.png") - expected)
    assert difference.max() <= 1


def test_redraw_without_a_run(data, tmp_path):
    line = refused(gan, tmp_path, data, "--redraw")
    assert str(tmp_path / "gan" / "checkpoint.pt") in line
    assert "redraw" in line
