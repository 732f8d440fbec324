"""Both scripts from the command line, as a user runs them, on the cut of the data."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import common
import dcgan
import gan

FIGURES = ("losses", "real_vs_generated", "nearest_neighbours", "latent_perturbation")
QUICK = ("--batch-size", "32", "--limit", "96", "--device", "cpu")  # three steps an epoch


def script(name, *arguments):
    command = [sys.executable, str(ROOT / "tests" / "run_on_cut.py"), name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})


def train(outputs, *arguments, model=gan, data):
    name = {gan: "GAN", dcgan: "DCGAN"}[model]
    argv = [*QUICK, "--outputs", str(outputs), "--data", str(data), *map(str, arguments)]
    common.main(name, model.Generator, model.Discriminator, argv)
    return torch.load(outputs / name.lower() / "checkpoint.pt", weights_only=True)


def tensors(part, path=""):
    """Every tensor of a checkpoint by its path; seconds, which no two runs share, are left out."""
    if isinstance(part, torch.Tensor):
        return {path: part}
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    return {k: v for key, value in items for k, v in tensors(value, f"{path}/{key}").items()}


def assert_same(one, other):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys() and len(one) > 50
    different = [path for path in one if not torch.equal(one[path], other[path])]
    assert not different


@pytest.mark.parametrize("name", ["gan", "dcgan"])
def test_a_run_leaves_every_file_of_the_table(name, tmp_path):
    result = script(f"{name}.py", *QUICK, "--epochs", 2, "--sample-every", 1, "--outputs", tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / name
    pngs = {f"{figure}.png" for figure in FIGURES} | {"samples_epoch_001.png", "samples_epoch_002.png"}
    pngs |= {"samples_latest.png"}
    others = {"training.gif", "history.csv", "settings.json", "checkpoint.pt", "generator.pt"}
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == pngs | others
    for png in pngs:
        with Image.open(folder / png) as image:
            image.load()
            assert image.width >= 944 and image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    assert len(list(csv.DictReader((folder / "history.csv").open()))) == 2
    for shown in ("2.0/2, loss", "D 0.", "G 0.", "D(x) 0.", "D(G(z)) 0.", "img/s", "left 00:00"):
        assert shown in result.stderr  # also on 80 columns

    G = {"gan": gan, "dcgan": dcgan}[name].Generator()  # as the README shows for use elsewhere
    G.load_state_dict(torch.load(folder / "generator.pt", weights_only=True))
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    z = common.latent_vectors(100)[:64]
    shown = checkpoint["history"]["samples"][-1]
    assert torch.load(folder / "generator.pt")["layers.0.weight"].device.type == "cpu"
    assert (common.generate(G, z).int() - shown.int()).abs().max() <= 1  # the memory layout rounds otherwise
    averaged = checkpoint["G_ema"]["layers.0.weight"]
    assert torch.equal(G.layers[0].weight, averaged)
    assert not torch.equal(averaged, checkpoint["G"]["layers.0.weight"])


def test_the_same_seed_gives_the_same_checkpoint(cut, tmp_path):
    runs = [train(tmp_path / str(i), "--epochs", 1, data=cut) for i in range(2)]
    assert_same(*runs)


def test_another_seed_makes_another_run(cut, tmp_path):
    runs = [train(tmp_path / str(seed), "--epochs", 1, "--seed", seed, data=cut) for seed in range(2)]
    assert not torch.equal(*(run["G"]["layers.0.weight"] for run in runs))
    assert not torch.equal(*(run["history"]["D_loss"] for run in runs))


@pytest.mark.parametrize("model", [gan, dcgan])
def test_a_run_extended_later_is_the_run_never_stopped(model, cut, tmp_path):
    name = model.__name__
    for epochs in (1, 3):
        continued = train(tmp_path / "a", "--epochs", epochs, "--sample-every", 2, model=model, data=cut)
    straight = train(tmp_path / "b", "--epochs", 3, "--sample-every", 2, model=model, data=cut)
    assert_same(continued, straight)
    for figure in (*FIGURES, "samples_epoch_002", "samples_epoch_003"):
        file = f"{name}/{figure}.png"
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), figure
    rows = [
        [row[:-1] for row in csv.reader((tmp_path / run / name / "history.csv").open())] for run in "ab"
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4


def test_a_finished_run_is_redrawn_without_training(cut, tmp_path, capsys):
    before = train(tmp_path, "--epochs", 1, data=cut)
    stamp = (tmp_path / "gan" / "checkpoint.pt").stat().st_mtime_ns
    gone = {name: (tmp_path / "gan" / name).read_bytes() for name in ("history.csv", "settings.json")}
    for name in ("losses.png", *gone):
        (tmp_path / "gan" / name).unlink()
    capsys.readouterr()
    after = train(tmp_path, "--epochs", 1, "--perturb-dims", 5, 6, "--perturb-offsets", 0, 2, data=cut)
    assert_same(before, after)
    assert (tmp_path / "gan" / "checkpoint.pt").stat().st_mtime_ns == stamp
    assert (tmp_path / "gan" / "losses.png").exists()
    for name, content in gone.items():
        assert (tmp_path / "gan" / name).read_bytes() == content
    assert capsys.readouterr().err == ""  # no progress bar where there is no progress


def test_fresh_starts_over(cut, tmp_path):
    train(tmp_path, "--epochs", 2, data=cut)
    again = train(tmp_path, "--epochs", 1, "--fresh", data=cut)
    assert len(again["history"]["D_loss"]) == 1


def test_limit_trains_on_the_first_images_only(cut, tmp_path):
    checkpoint = train(tmp_path, "--epochs", 1, "--limit", 70, data=cut)
    assert checkpoint["history"]["D_loss"].shape == (1, 2)  # two batches of 32


def test_other_settings_in_the_same_folder_are_an_error_that_names_them(cut, tmp_path, capsys):
    train(tmp_path, "--epochs", 1, data=cut)
    kept = (tmp_path / "gan" / "checkpoint.pt").read_bytes()
    line = failure(1, capsys, "--outputs", tmp_path, "--data", cut, "--seed", 7, *QUICK)
    assert "seed was 0, is now 7" in line and "--fresh" in line and "--outputs" in line
    assert (tmp_path / "gan" / "checkpoint.pt").read_bytes() == kept


def failure(status, capsys, *arguments, lines=1):
    """Run gan.py with these; it must end with this status and one line, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        common.main("GAN", gan.Generator, gan.Discriminator, [str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert raised.value.code == status and said.count("\n") == lines, said
    return said


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--batch-size", "0"], "--batch-size: 0 is not at least 2"),
        (["--batch-size", "1"], "--batch-size: 1 is not at least 2"),
        (["--batch-size", "many"], "--batch-size: invalid int value: 'many'"),
        (["--batch-size", "321"], "--batch-size 321"),
        (["--limit", "100"], "--batch-size 128: more than the 100 images"),
        (["--epochs", "-1"], "--epochs: -1"),
        (["--learning-rate", "nan"], "--learning-rate: nan"),
        (["--learning-rate", "0"], "--learning-rate: 0"),
        (["--learning-rate", "1"], "--learning-rate: 1"),
        (["--seed", str(2**32)], "--seed: 4294967296"),
        (["--r1-gamma", "-1"], "--r1-gamma: -1"),
        (["--images", "-1"], "--images: -1"),
        (["--device", "tpu"], "'tpu'"),
        (["--perturb-dims", "3", "100"], "--perturb-dims: 100 is not at least 0 and below 100"),
        (["--perturb-dims", "-1"], "--perturb-dims: -1"),
        (["--perturb-dims", *map(str, range(20))], "more than the 40 rows"),
        (["--perturb-offsets", "inf"], "inf"),
        (["--colour"], "--colour"),
    ],
)
def test_a_wrong_option_is_one_line_and_status_2(arguments, named, cut, tmp_path, capsys):
    line = failure(2, capsys, "--data", cut, "--outputs", tmp_path, *arguments)
    assert named in line


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="needs a bare CPU")
def test_a_device_that_is_not_there(cut, tmp_path, capsys):
    for device in ("cuda", "mps"):
        line = failure(2, capsys, "--device", device, "--data", cut, "--outputs", tmp_path)
        assert device in line and "only cpu" in line


def test_an_output_folder_that_cannot_be_written(cut, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    line = failure(1, capsys, "--data", cut, "--outputs", tmp_path / "file")
    assert str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "mine"


def test_no_data_anywhere(cut, tmp_path, capsys):
    lines = failure(1, capsys, "--data", tmp_path / "nothing", "--outputs", tmp_path, lines=7)
    assert "FashionMNIST was not found" in lines and str(tmp_path / "nothing") in lines


def test_errors_reach_the_shell_without_a_traceback(tmp_path):
    (tmp_path / "file").write_text("")
    result = script("dcgan.py", *QUICK, "--outputs", tmp_path / "file")
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr


def test_help_names_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit):
        common.parse_arguments("GAN", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for default in ("200", "128", "0.001", "1.0", "100", "auto", "data", "outputs", "50"):
        assert f"(default: {default})" in text
    for option in ("--perturb-dims", "--perturb-offsets", "--limit", "--fresh"):
        assert option in text


def test_a_number_as_scientists_write_it(cut):
    for offset in ("-1e-1", "-.1", "-0.1"):
        assert common.parse_arguments("GAN", ["--perturb-offsets", offset, "2"]).perturb_offsets == [-0.1, 2]


def test_settings_json_says_what_auto_became(cut, tmp_path):
    train(tmp_path, "--epochs", 1, data=cut)
    settings = json.loads((tmp_path / "gan" / "settings.json").read_text())
    assert settings["options"]["seed"] == 0 and settings["options"]["precision"] == "auto"
    assert settings["device"] == "cpu" and settings["precision"] in ("torch.float32", "torch.bfloat16")
    assert settings["torch"] == str(torch.__version__) and settings["threads"] == torch.get_num_threads()
    assert settings["parameters"] == {"G": 1510032, "D": 533505}


def test_samples_latest_is_written_after_every_epoch(cut, tmp_path, monkeypatch):
    drawn, resize = [], Image.Image.resize

    def noted(image, *size):
        drawn.append(image)
        return resize(image, *size)

    monkeypatch.setattr(Image.Image, "resize", noted)
    checkpoint = train(tmp_path, "--epochs", 3, data=cut)
    assert len(drawn) == 3 + 1  # and once more with the other figures
    with Image.open(tmp_path / "gan" / "samples_latest.png") as image:
        pixels = np.asarray(image)
    row, column = 3, 5
    sample = checkpoint["history"]["samples"][-1][8 * row + column]
    top, left = (18 + 30 * row + 1) * 4, (30 * column + 1) * 4  # beneath the title, in a margin, enlarged
    assert np.array_equal(pixels[top : top + 112 : 4, left : left + 112 : 4], sample)


def test_images_are_single_pngs_that_a_smaller_number_removes(cut, tmp_path):
    train(tmp_path, "--epochs", 1, data=cut)
    folder = tmp_path / "gan" / "images"
    assert not folder.exists()
    before = (tmp_path / "gan" / "checkpoint.pt").read_bytes()
    train(tmp_path, "--epochs", 1, "--images", 120, data=cut)
    names = [f"{i:05d}.png" for i in range(120)]
    assert sorted(path.name for path in folder.iterdir()) == names
    pixels = {}
    for name in names:
        with Image.open(folder / name) as image:
            assert image.size == (28, 28) and image.mode == "L"
            pixels[name] = np.asarray(image)
    G = gan.Generator()
    G.load_state_dict(torch.load(tmp_path / "gan" / "generator.pt"))
    z = torch.randn(100, 100, generator=torch.Generator().manual_seed(2016))
    assert np.abs(pixels["00099.png"].astype(int) - common.generate(G, z)[99].numpy()).max() <= 1
    train(tmp_path, "--epochs", 1, "--images", 7, data=cut)
    assert sorted(path.name for path in folder.iterdir()) == names[:7]
    train(tmp_path, "--epochs", 1, data=cut)
    assert sorted(path.name for path in folder.iterdir()) == names[:7]
    assert (tmp_path / "gan" / "checkpoint.pt").read_bytes() == before


def test_a_folder_of_other_images_is_left_alone(cut, tmp_path, capsys):
    folder = tmp_path / "gan" / "images"
    folder.mkdir(parents=True)
    Image.new("L", (28, 28)).save(folder / "00000.png")
    before = (folder / "00000.png").read_bytes()
    line = failure(1, capsys, *QUICK, "--epochs", 1, "--images", 3, "--data", cut, "--outputs", tmp_path)
    assert str(folder / "00000.png") in line
    train(tmp_path, "--epochs", 1, data=cut)  # the first checkpoint removes what another run left, not this
    assert [path.name for path in folder.iterdir()] == ["00000.png"]
    assert (folder / "00000.png").read_bytes() == before


def test_figures_of_another_run_go_with_the_first_checkpoint(cut, tmp_path):
    folder = tmp_path / "gan"
    folder.mkdir()
    for name in ("samples_epoch_200.png", "training.gif", "notes.txt"):
        (folder / name).write_text("old")
    train(tmp_path, "--epochs", 1, data=cut)
    assert not (folder / "samples_epoch_200.png").exists()
    assert (folder / "training.gif").read_bytes()[:3] == b"GIF"
    assert (folder / "notes.txt").read_text() == "old"
