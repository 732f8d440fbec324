"""A run is never lost, and what goes wrong is one line: kills, full disks, damage, mistakes."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import common  # before torch

# isort: split
import matplotlib
import pytest
import torch
from conftest import QUICK, ROOT, assert_same_run, files_in, read_history, refused, train
from torch import nn

import dcgan
import gan

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals and limits")
KILLS = int(os.environ.get("KILLS", 2))  # KILLS=20 for the long form


# ------------------------------------------------------------------------------- stopped and killed


def hear_ctrl_c():
    """In a process to be: tests may run in the background, where a shell turns Ctrl-C off."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def started(script, folder, *options):
    """A real process of the script that trains, with its results in folder/outputs."""
    command = [sys.executable, "-u", ROOT / "tests" / "run_on_cut.py", folder / "data", script]
    command += [*QUICK, "--outputs", folder / "outputs", *options]
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        preexec_fn=hear_ctrl_c,
    )
    try:
        line = process.stdout.readline()
        assert "epochs done" in line, line + process.stderr.read()
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(path, process, newer_than=0):
    """Until the file is there and was written after that time, in nanoseconds."""
    deadline = time.monotonic() + 60
    while not path.exists() or path.stat().st_mtime_ns <= newer_than:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill_and_go_on(module, kills, epochs, longest, folder, data):
    """Kill a run so many times: at random moments, in the middle of writing the checkpoint, or
    between the figures of an epoch and its checkpoint. Then let it end. Returns its folder."""
    name = module.__name__
    outputs = folder / "outputs" / name
    for kill in range(kills):
        with started(f"{name}.py", folder, "--epochs", epochs) as process:
            now = time.time_ns()
            if kill % 3 == 0:
                wait_for(outputs / "samples_latest.png", process, now)
            elif kill % 3 == 1:
                wait_for(outputs / "checkpoint.pt.part", process)
            else:
                wait_for(outputs / "checkpoint.pt", process)
                time.sleep(random.uniform(0, longest))
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    return train(module, folder / "outputs", data, "--epochs", epochs)


@posix
def test_a_killed_gan_goes_on_bit_for_bit(data, tmp_path):
    epochs = 4 + 2 * KILLS
    straight = train(gan, tmp_path / "straight", data, "--epochs", epochs)
    killed = kill_and_go_on(gan, KILLS, epochs, 0.5, tmp_path, data)
    assert_same_run(killed, straight)
    assert files_in(killed).keys() == files_in(straight).keys()  # no half written file is left


@posix
def test_a_killed_dcgan_goes_on_bit_for_bit(trained_dcgan_once, data, tmp_path):
    assert_same_run(kill_and_go_on(dcgan, 1, 2, 0, tmp_path, data), trained_dcgan_once)


@posix
def test_ctrl_c_and_a_second_run_at_the_same_time(data, tmp_path):
    folder = tmp_path / "outputs" / "gan"
    with started("gan.py", tmp_path, "--epochs", 1000) as process:
        wait_for(folder / "checkpoint.pt", process)
        line = refused(gan, tmp_path / "outputs", data, "--epochs", 1)
        assert f"{folder} is in use" in line
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "stopped; the same command goes on" in errors.splitlines()

    done = len(read_history(folder))
    train(gan, tmp_path / "outputs", data, "--redraw")
    assert len(read_history(folder)) == done
    assert (folder / f"samples_epoch_{done:03d}.png").exists()
    assert (folder / "latent_perturbation.png").exists()


# ------------------------------------------------------------------------------- disks and systems


@posix
def test_a_full_disk_leaves_the_last_checkpoint(trained, data):
    """No file may grow beyond 20 MB, as with `ulimit -f`; the checkpoint takes 30."""
    import resource

    before = (trained / "gan" / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, hard))
    try:
        line = refused(gan, trained, data, "--epochs", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in line
    assert "checkpoint.pt" in line
    assert (trained / "gan" / "checkpoint.pt").read_bytes() == before
    assert not list((trained / "gan").glob("*.part"))  # the half written file takes no room


def test_a_file_in_the_place_of_a_folder(data, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "gan").write_text("mine")
    assert str(tmp_path / "file") in refused(gan, tmp_path / "file", data)
    assert str(tmp_path / "gan") in refused(gan, tmp_path, data)
    assert files_in(tmp_path) == {"file": b"mine", "gan": b"mine"}


def test_figures_and_tables_that_cannot_be_written_do_not_end_the_run(data, tmp_path, capsys):
    folder = tmp_path / "gan"
    blocked = ["history.csv", "losses.png", "samples_latest.png", "generator.pt", "settings.json"]
    for name in blocked:
        (folder / name).mkdir(parents=True)
    train(gan, tmp_path, data, "--epochs", 2)
    lines = capsys.readouterr().err.splitlines()
    for name in blocked:
        assert [line for line in lines if line.startswith("warning: ") and name in line], name
    assert {"checkpoint.pt", "real_vs_generated.png", "gan.py"} < files_in(folder).keys()


def test_a_system_without_locks_and_a_drive_without_fsync(trained, data, monkeypatch):
    def fail(_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows, its import fails
    monkeypatch.setattr(os, "fsync", fail)
    train(gan, trained, data, "--epochs", 3)
    assert len(read_history(trained / "gan")) == 3


# -------------------------------------------------------------------------- checkpoints of others


class Code:
    """What is unpickled by making a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def change_checkpoint(folder, **parts):
    """Replace parts of the checkpoint; None takes one out."""
    path = folder / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint.update(parts)
    torch.save({name: part for name, part in checkpoint.items() if part is not None}, path)


@pytest.mark.parametrize("how", ["cut short", "text", "code", "G", "description", "history"])
def test_a_damaged_checkpoint_is_said_to_be_damaged_and_left_alone(how, trained, data):
    folder = trained / "gan"
    path = folder / "checkpoint.pt"
    if how == "cut short":
        path.write_bytes(path.read_bytes()[:100_000])
    elif how == "text":
        path.write_text("not a checkpoint\nat all\n")
    elif how == "code":
        change_checkpoint(folder, G=Code(folder / "it ran"))
    else:
        change_checkpoint(folder, **{how: None})
    before = files_in(folder)
    line = refused(gan, trained, data, "--epochs", 3)
    assert f"{path} cannot be read" in line
    assert "move that folder away" in line
    assert "weights_only" not in line  # by which PyTorch says that it runs the code all the same
    assert files_in(folder) == before
    assert not (folder / "it ran").exists()


def test_results_without_a_checkpoint_are_not_replaced(trained, data):
    folder = trained / "gan"
    (folder / "checkpoint.pt").unlink()  # as in a clone of somebody's results
    before = files_in(folder)
    line = refused(gan, trained, data, "--epochs", 3)
    assert f"{folder} holds results" in line
    assert "another --outputs" in line
    assert files_in(folder) == before


def test_a_checkpoint_of_the_other_model(trained, data):
    (trained / "dcgan").mkdir()
    shutil.copy(trained / "gan" / "checkpoint.pt", trained / "dcgan")
    assert "model was GAN, is now DCGAN" in refused(dcgan, trained, data, "--epochs", 3)


@pytest.mark.parametrize(
    ("index", "layer", "named"),
    [
        (3, nn.Linear(512, 200), "(3): Linear(in_features=512, out_features=200, bias=True)"),
        (4, nn.LeakyReLU(0.1), "(4): LeakyReLU(negative_slope=0.1)"),
        (4, nn.Dropout(0.1), "(4): Dropout(p=0.1, inplace=False)"),
    ],
)
def test_a_changed_layer_is_named(index, layer, named, trained, data, monkeypatch):
    class Discriminator(gan.Discriminator):
        def __init__(self):
            super().__init__()
            self.layers[index] = layer
            if index == 3:
                self.layers[5] = nn.Linear(200, 1)

    before = files_in(trained / "gan")
    Discriminator.__name__ = "Discriminator"
    monkeypatch.setattr(gan, "Discriminator", Discriminator)
    line = refused(gan, trained, data, "--epochs", 3)
    assert named in line
    assert "(1): Linear" not in line
    assert "cannot be read" not in line
    assert files_in(trained / "gan") == before


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (lambda G: torch.optim.Adam(G, lr=1e-3, betas=(0.5, 0.999), fused=True), "(0.5, 0.999)"),
        (lambda G: torch.optim.SGD(G, lr=1e-3), "SGD"),
    ],
)
def test_a_changed_optimizer_is_named(changed, named, trained, data, monkeypatch):
    new_training = common.new_training

    def with_another_optimizer(*arguments):
        training = new_training(*arguments)
        training.G_optimizer = changed(training.G.parameters())
        return training

    monkeypatch.setattr(common, "new_training", with_another_optimizer)
    line = refused(gan, trained, data, "--epochs", 3)
    assert "G_optimizer" in line
    assert named in line


def test_another_pytorch_may_print_the_same_network_otherwise(trained, data):
    description = json.loads((trained / "gan" / "settings.json").read_text())
    description["machine"]["torch"] = "1.13.1"
    description["networks"]["D"][2] = "(0): Flatten(as it was printed then)"
    change_checkpoint(trained / "gan", description=description)
    train(gan, trained, data, "--epochs", 3)
    assert len(read_history(trained / "gan")) == 3


# ---------------------------------------------------------------------------- numbers and mistakes


def test_a_loss_that_is_not_finite_ends_the_run(trained, data, monkeypatch):
    class Discriminator(gan.Discriminator):
        def forward(self, x):
            return super().forward(x) * (float("nan") if self.training else 1)

    before = files_in(trained / "gan")
    Discriminator.__name__ = "Discriminator"
    monkeypatch.setattr(gan, "Discriminator", Discriminator)
    line = refused(gan, trained, data, "--epochs", 4)
    assert "not finite" in line
    assert "--learning-rate" in line
    assert files_in(trained / "gan")["checkpoint.pt"] == before["checkpoint.pt"]
    assert files_in(trained / "gan")["history.csv"] == before["history.csv"]


@pytest.mark.parametrize("error", [RuntimeError("shapes"), OSError(2, "No such file", "my.txt")])
def test_a_mistake_in_a_students_layer_keeps_its_traceback(error, data, tmp_path, monkeypatch):
    class Generator(gan.Generator):
        def forward(self, z):
            raise error

    monkeypatch.setattr(gan, "Generator", Generator)
    with pytest.raises(type(error), match="shapes|No such file"):
        train(gan, tmp_path, data, "--epochs", 1)


@pytest.mark.parametrize(
    "error",
    [
        None,  # a real one, of the CPU's memory
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)"),
    ],
)
def test_out_of_memory_is_one_line(error, data, tmp_path, monkeypatch):
    class Discriminator(gan.Discriminator):
        def forward(self, x):
            if error is None:
                return torch.empty(2**50)
            raise error

    monkeypatch.setattr(gan, "Discriminator", Discriminator)
    line = refused(gan, tmp_path, data, "--epochs", 1)
    assert "memory" in line
    assert "--batch-size" in line


# ------------------------------------------------------------------------- the user's own things


def test_the_users_matplotlib_settings_do_not_matter(trained, trained_once, data):
    mine = {"savefig.format": "pdf", "savefig.dpi": 300, "savefig.bbox": "tight", "font.size": 20}
    mine |= {"text.usetex": True, "axes.grid": True, "lines.linewidth": 9, "image.cmap": "viridis"}
    with matplotlib.rc_context(mine):
        settings = dict(matplotlib.rcParams)
        train(gan, trained, data, "--epochs", 2)
        refused(gan, trained, data, "--epochs", 2, "--seed", 1)
        assert dict(matplotlib.rcParams) == settings
    assert_same_run(trained / "gan", trained_once)


INLINE = "module://matplotlib_inline.backend_inline"  # which a notebook hands to what it starts
IN_A_NOTEBOOK = f"""
import os, sys
import gan, matplotlib
assert os.environ["MPLBACKEND"] == {INLINE!r}
assert matplotlib.rcParams["backend"] in ("inline", {INLINE!r})
assert "matplotlib.pyplot" not in sys.modules
"""


def python(code, folder):
    environment = {**os.environ, "MPLBACKEND": INLINE, "PYTHONPATH": f"{folder}:{ROOT}"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_backend_of_a_notebook_is_not_needed_and_left_alone_where_it_is(tmp_path):
    if importable("matplotlib_inline"):
        pytest.skip("this environment has the module")
    done = python("import gan, common; print(common.as_png(common.Figure())[:4])", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "PNG" in done.stdout
    module = tmp_path / "matplotlib_inline"
    module.mkdir()
    (module / "__init__.py").write_text("")
    (module / "backend_inline.py").write_text("from matplotlib.backends.backend_agg import *\n")
    package = tmp_path / "matplotlib_inline-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: matplotlib-inline\nVersion: 1\n"
    )
    (package / "entry_points.txt").write_text(
        "[matplotlib.backend]\ninline = matplotlib_inline.backend_inline\n"
    )
    done = python(IN_A_NOTEBOOK, tmp_path)
    assert done.returncode == 0, done.stderr


def importable(name):
    done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True)
    return done.returncode == 0


def test_waiting_threads_leave_their_cores_unless_the_user_says_otherwise(tmp_path):
    code = "import os, gan; print(os.environ['GOMP_SPINCOUNT'])"
    default = python(code, tmp_path).stdout
    code = "import os; os.environ['GOMP_SPINCOUNT'] = '7'; " + code
    assert python(code, tmp_path).stdout == "7\n" != default
