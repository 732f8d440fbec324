"""A run is never lost, and what goes wrong is one line: kills, full disks, damage, mistakes."""

import contextlib
import errno
import importlib.util
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import (
    QUICK,
    ROOT,
    assert_same_run,
    files_in,
    python,
    read_history,
    refused,
    run,
    train,
)
from torch import nn

import common
import dcgan
import gan

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals and limits")
KILLS = int(os.environ.get("KILLS", 0))  # so many more kills, at random moments


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


def wait_until_written(path, process):
    """Until the file is there and newer than this call."""
    start = time.time_ns()
    while True:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime_ns > start:
                return
        assert process.poll() is None, process.stderr.read()
        assert time.time_ns() - start < 300e9  # of a busy machine
        time.sleep(0.001)


# Between the figures of an epoch and its checkpoint, in the middle of writing the checkpoint, and
# wherever so many seconds later is.
MOMENTS = [("samples_latest.png", 0), ("checkpoint.pt.part", 0)]
MOMENTS += [("samples_latest.png", random.Random(kill).uniform(0, 0.5)) for kill in range(KILLS)]


@posix
@pytest.mark.parametrize(
    ("module", "moments", "epochs"), [(gan, MOMENTS, 10 + 6 * KILLS), (dcgan, MOMENTS[:1], 3)]
)
def test_a_killed_run_goes_on_bit_for_bit(module, moments, epochs, data, tmp_path):
    name = module.__name__
    folder = tmp_path / "outputs" / name
    for file, seconds in moments:
        with started(f"{name}.py", tmp_path, "--epochs", epochs) as process:
            wait_until_written(folder / "checkpoint.pt", process)  # there is one to go on from
            wait_until_written(folder / file, process)
            time.sleep(seconds)
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    killed = train(module, tmp_path / "outputs", data, "--epochs", epochs)
    straight = train(module, tmp_path / "straight", data, "--epochs", epochs)
    assert_same_run(killed, straight)
    assert files_in(killed).keys() == files_in(straight).keys()  # no half written file is left


@posix
def test_ctrl_c_and_a_second_run_at_the_same_time(data, tmp_path):
    folder = tmp_path / "outputs" / "gan"
    with started("gan.py", tmp_path, "--epochs", 1000) as process:
        wait_until_written(folder / "checkpoint.pt", process)
        line = refused(gan, tmp_path / "outputs", data, "--epochs", 1)
        assert f"{folder} is in use" in line
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "stopped; give the same command to go on" in errors.splitlines()
    done = len(read_history(folder))
    run(gan, tmp_path / "outputs", data, "--redraw")
    assert len(read_history(folder)) == done
    assert {f"samples_epoch_{done:03d}.png", "latent_perturbation.png"} < files_in(folder).keys()


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


def test_a_redraw_that_cannot_write_is_an_error(trained, data):
    (trained / "gan" / "losses.png").unlink()
    (trained / "gan" / "losses.png").mkdir()
    with pytest.raises(SystemExit, match="error: .*losses.png cannot be written"):
        run(gan, trained, data, "--redraw")


def test_a_system_without_locks_and_a_drive_without_fsync(trained, data, monkeypatch):
    def fail(_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows, its import fails
    monkeypatch.setattr(os, "fsync", fail)
    train(gan, trained, data, "--epochs", 3)
    assert len(read_history(trained / "gan")) == 3


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
        os.truncate(path, 100_000)
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
    (trained / "gan").rename(trained / "dcgan")
    assert "model was GAN, is now DCGAN" in refused(dcgan, trained, data, "--epochs", 3)


@pytest.mark.parametrize(
    ("index", "layer", "named"),
    [
        (1, nn.Linear(784, 512, bias=False), "out_features=512, bias=False)"),
        (4, nn.LeakyReLU(0.1), "(4): LeakyReLU(negative_slope=0.1)"),
    ],
)
def test_a_changed_layer_is_named(index, layer, named, trained, data, monkeypatch):
    class Discriminator(gan.Discriminator):
        def __init__(self):
            super().__init__()
            self.layers[index] = layer

    before = files_in(trained / "gan")
    monkeypatch.setattr(gan, "Discriminator", Discriminator)
    line = refused(gan, trained, data, "--epochs", 3)
    assert named in line
    assert "(3): Linear" not in line  # only what is changed
    assert "cannot be read" not in line
    assert files_in(trained / "gan") == before


@pytest.mark.parametrize("optimizer", ["Adam (0.5, 0.999)", "SGD"])
def test_a_changed_optimizer_is_named(optimizer, trained, data, monkeypatch):
    new_training = common.new_training

    def with_another_optimizer(*arguments):
        training = new_training(*arguments)
        weights = training.G.parameters()
        if optimizer == "SGD":
            training.G_optimizer = torch.optim.SGD(weights, lr=1e-3)
        else:
            training.G_optimizer = torch.optim.Adam(weights, betas=(0.5, 0.999), fused=True)
        return training

    monkeypatch.setattr(common, "new_training", with_another_optimizer)
    line = refused(gan, trained, data, "--epochs", 3)
    assert re.search(f"G_optimizer .*{re.escape(optimizer.removeprefix('Adam '))}", line)


def test_another_pytorch_may_print_the_same_network_otherwise(trained, data):
    description = json.loads((trained / "gan" / "settings.json").read_text())
    description["machine"]["torch"] = "1.13.1"
    description["networks"]["D"][2] = "(0): Flatten(as it was printed then)"
    change_checkpoint(trained / "gan", description=description)
    train(gan, trained, data, "--epochs", 3)
    assert len(read_history(trained / "gan")) == 3


def test_a_loss_that_is_not_finite_ends_the_run(trained, data, monkeypatch):
    class Discriminator(gan.Discriminator):
        def forward(self, x):
            return super().forward(x) * (float("nan") if self.training else 1)

    before = files_in(trained / "gan")
    monkeypatch.setattr(gan, "Discriminator", Discriminator)
    line = refused(gan, trained, data, "--epochs", 4)
    assert "not finite" in line
    assert "--learning-rate" in line
    for name in ["checkpoint.pt", "history.csv"]:
        assert files_in(trained / "gan")[name] == before[name]


@pytest.mark.parametrize("error", [RuntimeError("shapes"), OSError(2, "No such file", "my.txt")])
def test_a_mistake_in_a_students_layer_keeps_its_traceback(error, data, tmp_path, monkeypatch):
    class Generator(gan.Generator):
        def forward(self, z):
            raise error

    monkeypatch.setattr(gan, "Generator", Generator)
    with pytest.raises(type(error), match="shapes|No such file"):
        train(gan, tmp_path, data, "--epochs", 1)


OUT_OF_MEMORY = [
    None,  # a real one, of the CPU's memory
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_is_one_line(error, data, tmp_path, monkeypatch):
    class Discriminator(gan.Discriminator):
        def forward(self, x):
            if error is None:
                return torch.empty(2**50)
            raise error

    monkeypatch.setattr(gan, "Discriminator", Discriminator)
    assert re.search("memory.* --batch-size", refused(gan, tmp_path, data, "--epochs", 1))


def test_the_users_matplotlib_settings_do_not_matter(trained, trained_once, data):
    mine = {"savefig.format": "pdf", "savefig.dpi": 300, "savefig.bbox": "tight", "font.size": 20}
    mine |= {"text.usetex": True, "axes.grid": True, "lines.linewidth": 9, "image.cmap": "viridis"}
    with matplotlib.rc_context(mine):
        settings = dict(matplotlib.rcParams)
        train(gan, trained, data, "--epochs", 2)
        refused(gan, trained, data, "--epochs", 2, "--seed", 1)
        assert dict(matplotlib.rcParams) == settings
    assert_same_run(trained / "gan", trained_once)


def test_the_backend_of_a_notebook_is_left_alone_but_where_its_module_is_missing(tmp_path):
    code = "import os, gan, common; common.as_png(common.Figure())\n"
    code += "print(os.environ.get('MPLBACKEND'))"
    inline = "module://matplotlib_inline.backend_inline"  # which Jupyter hands to what it starts
    is_missing = importlib.util.find_spec("matplotlib_inline") is None
    assert python(code, tmp_path, MPLBACKEND=inline) == f"{None if is_missing else inline}\n"
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "backend.py").write_text("")
    assert python(code, tmp_path, MPLBACKEND="module://there.backend") == "module://there.backend\n"


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="it concerns Linux")
@pytest.mark.parametrize(
    ("flags", "own", "expected"),
    [("avx2", {}, "5000"), ("avx2 avx512_bf16", {}, None), ("avx2", {"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_waiting_threads_leave_their_cores_where_that_is_faster(flags, own, expected, monkeypatch):
    """Which is without bfloat16, and if the user has not said otherwise."""
    environment = {**os.environ, **own}
    if not own:
        environment.pop("GOMP_SPINCOUNT", None)  # conftest.py has imported common
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(Path, "read_text", lambda _: f"flags : {flags}\n")
    runpy.run_path(str(ROOT / "common.py"))
    assert environment.get("GOMP_SPINCOUNT") == expected
