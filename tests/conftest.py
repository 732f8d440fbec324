"""The cut of FashionMNIST in tests/fashion_mnist_cut stands in for the whole; no network needed."""

import csv
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # so that `pytest` alone finds the scripts
CUT = ROOT / "tests" / "fashion_mnist_cut"
RAW = CUT / "FashionMNIST" / "raw"  # the four .gz files
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = ROOT / "outputs" / "reference"

import common  # noqa: E402

# isort: split
import torch  # noqa: E402
from torch import nn  # noqa: E402

BATCH_NORM_BATCHES = common.BATCH_NORM_BATCHES
common.BATCH_NORM_BATCHES = 2  # the DCGAN takes seconds for them

# The scripts of this folder are run as those of a user who has them alone: the modules of the tests
# are not their modules.
scripts = tempfile.TemporaryDirectory()
SCRIPTS = Path(scripts.name)
for name in ("gan.py", "dcgan.py"):
    shutil.copy(ROOT / name, SCRIPTS)

# Three steps an epoch, and of the perturbations two rows, which are drawn in no time.
SMALL_GRID = ["--perturb-dims", "0", "--perturb-offsets", "-2", "2"]
QUICK = ["--batch-size", "32", "--limit", "96", "--device", "cpu", *SMALL_GRID]


def accept_cut(folder):
    """Unpack the cut into `folder` and let its pixels pass for FashionMNIST's."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    common.unpack(RAW, raw)
    for split in ("train", "test"):
        dataset = common.FashionMNIST(folder, train=split == "train")
        common.PIXELS_SHA256[split] = hashlib.sha256(dataset.data.numpy()).hexdigest()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The folder to give as --data."""
    folder = tmp_path_factory.mktemp("data")
    accept_cut(folder)
    return folder


def run(module, outputs, data, *options):
    """Run gan.py or dcgan.py (the module) in this process as a user would; returns its folder."""
    name = module.__name__
    argv = [str(word) for word in ["--data", data, "--outputs", outputs, *options]]
    script = Path(module.__file__)
    if script.parent == ROOT:
        script = SCRIPTS / script.name
    common.main(name.upper(), script, module.Generator, module.Discriminator, argv)
    return outputs / name


def train(module, outputs, data, *options):
    return run(module, outputs, data, *QUICK, *options)


def refused(module, outputs, data, *options):
    """A run that must end with status 1 and one line, which is returned."""
    with pytest.raises(SystemExit) as stop:
        train(module, outputs, data, *options)
    line = stop.value.code  # Python prints it and returns 1
    assert isinstance(line, str), line
    assert line.startswith("error: ")
    assert line.isprintable()  # no line break and no colours
    return line


def python(code, folder, **variables):
    """What it prints in a new process that has these variables of the environment."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", **variables}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_in(folder):
    """{name: content} but for hidden files."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."]
    return {path.name: path.read_bytes() for path in paths}


def read_history(folder):
    """The rows of history.csv, but for the seconds."""
    with open(folder / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row.pop("seconds")) > 0
    return rows


def history_of(D_losses, G_losses, deviation=0.01):
    """Rows as of history.csv."""
    rows = []
    for epoch, (D_loss, G_loss) in enumerate(zip(D_losses, G_losses, strict=True), 1):
        row = {"epoch": epoch, "D_loss_mean": D_loss, "G_loss_mean": G_loss}
        row |= {"D_loss_std": deviation, "G_loss_std": 2 * deviation, "seconds": 10.0}
        row |= {"D_right_mean": 0.75, "D_right_std": 0.125}
        rows.append(row)
    return rows


def linear_generator(weight, *layers):
    """A generator of weight z, with weight (784, latent_dim), and what the layers make of it."""
    linear = nn.Linear(weight.shape[1], 784, bias=False)
    linear.weight.data = weight
    return nn.Sequential(linear, *layers, nn.Unflatten(1, (1, 28, 28)))


def read_tensors(folder):
    """{path: tensor} of all tensors in a checkpoint."""
    parts = [("", torch.load(folder / "checkpoint.pt", weights_only=True))]
    found = {}
    for path, part in parts:  # which grows meanwhile
        if isinstance(part, torch.Tensor):
            found[path] = part
        if isinstance(part, dict):
            parts += [(f"{path}/{key}", value) for key, value in part.items()]
    return found


def assert_same_run(folder, expected):
    """The same bit for bit: every tensor, the numbers but for seconds, every figure."""
    tensors = read_tensors(folder)
    others = read_tensors(expected)
    assert tensors.keys() == others.keys()
    assert len(tensors) > 50
    different = [path for path in tensors if not torch.equal(tensors[path], others[path])]
    assert not different
    assert read_history(folder) == read_history(expected)
    figures = list(expected.glob("*.png"))
    assert len(figures) >= 5
    for path in figures:
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.fixture(scope="session")
def trained_once(data, tmp_path_factory):
    """A GAN's folder after two epochs; a test that changes it takes `trained`, its copy."""
    import gan

    return train(gan, tmp_path_factory.mktemp("trained"), data, "--epochs", 2)


@pytest.fixture(scope="session")
def trained_dcgan_once(data, tmp_path_factory):
    """A DCGAN's folder after two epochs, not to be changed."""
    import dcgan

    return train(dcgan, tmp_path_factory.mktemp("trained_dcgan"), data, "--epochs", 2)


@pytest.fixture
def trained(trained_once, tmp_path):
    """outputs, with a GAN of two epochs in outputs/gan."""
    shutil.copytree(trained_once, tmp_path / "outputs" / "gan")
    return tmp_path / "outputs"
