"""A run is never lost, and what goes wrong is one line: kills, full disks, damage, mistakes.

The long form, by hand: `python tests/test_faults.py gan.py 20 200 0.6` kills a run of 200 epochs 20
times, after up to 0.6 s of training each time; likewise `dcgan.py 20 60 1.0`.
"""

import contextlib
import errno
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import conftest
import matplotlib
import pytest
import torch
from conftest import QUICK, ROOT, assert_same_run, read_checkpoint, read_history, refused, train
from torch import nn

import common
import dcgan
import gan

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals and limits")


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


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


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill_and_go_on(module, kills, epochs, longest, folder, data):
    """Kill a run so many times, at random moments up to `longest` seconds after it has a
    checkpoint, or in the middle of writing the next one; let it end. Returns its folder."""
    name = module.__name__
    checkpoint = folder / "outputs" / name / "checkpoint.pt"
    for kill in range(kills):
        with started(f"{name}.py", folder, "--epochs", epochs) as process:
            wait_for(checkpoint, process)
            if kill % 3 == 1:
                wait_for(checkpoint.with_name("checkpoint.pt.part"), process)
            else:
                time.sleep(random.uniform(0, longest))
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    return train(module, folder / "outputs", data, "--epochs", epochs)


@posix
def test_a_killed_gan_goes_on_bit_for_bit(data, tmp_path):
    straight = train(gan, tmp_path / "straight", data, "--epochs", 6)
    killed = kill_and_go_on(gan, 2, 6, 0.2, tmp_path, data)
    assert_same_run(killed, straight)
    assert files_in(killed).keys() == files_in(straight).keys()  # no half written file is left


@posix
def test_a_killed_dcgan_goes_on_bit_for_bit(trained_dcgan_once, data, tmp_path):
    assert_same_run(kill_and_go_on(dcgan, 1, 2, 0.5, tmp_path, data), trained_dcgan_once)


@posix
def test_ctrl_c_and_a_second_run_at_the_same_time(data, tmp_path):
    folder = tmp_path / "outputs" / "gan"
    with started("gan.py", tmp_path, "--epochs", 1000) as process:
        wait_for(folder / "samples_latest.png", process)  # which appears after every epoch
        line = refused(gan, tmp_path / "outputs", data, "--epochs", 1)
        assert f"{folder} is in use" in line
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    last_line = errors.splitlines()[-1]
    assert last_line.startswith("stopped: ")
    assert "the same command goes on" in last_line
    assert "--redraw" in last_line

    done = len(read_checkpoint(folder)["history"])
    train(gan, tmp_path / "outputs", data, "--redraw")
    assert len(read_checkpoint(folder)["history"]) == done
    assert len(read_history(folder)) == done
    assert (folder / f"samples_epoch_{done:03d}.png").exists()
    assert (folder / "latent_perturbation.png").exists()


@pytest.fixture
def ctrl_c(monkeypatch):
    """The user presses Ctrl-C during the GAN's first step."""

    class Discriminator(gan.Discriminator):
        def forward(self, x):
            signal.raise_signal(signal.SIGINT)
            return super().forward(x)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(gan, "Discriminator", Discriminator)
        yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_the_first_epoch(ctrl_c, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(gan, tmp_path, data, "--epochs", 1)
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped: ")
    assert "nothing to redraw" in refused(gan, tmp_path, data, "--redraw")


def test_fresh_keeps_the_old_run_until_the_new_one_has_a_checkpoint(ctrl_c, trained, data, capsys):
    before = files_in(trained / "gan")
    with pytest.raises(SystemExit) as stop:
        train(gan, trained, data, "--epochs", 2, "--fresh")
    assert stop.value.code == 130
    assert files_in(trained / "gan") == before
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped: ")


@posix
def test_a_full_disk_leaves_the_last_checkpoint(trained, data):
    """No file may grow beyond 20 MB, as with `ulimit -f`; the checkpoint takes 30."""
    import resource

    before = files_in(trained / "gan")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, hard))
    try:
        line = refused(gan, trained, data, "--epochs", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in line
    assert "checkpoint.pt" in line
    assert files_in(trained / "gan") == before  # and the half written file takes no room


def test_a_file_in_the_place_of_a_folder(data, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "gan").write_text("mine")
    assert str(tmp_path / "file") in refused(gan, tmp_path / "file", data)
    assert str(tmp_path / "gan") in refused(gan, tmp_path, data)
    assert files_in(tmp_path) == {"file": b"mine", "gan": b"mine"}


def test_figures_and_tables_that_cannot_be_written_do_not_end_the_run(data, tmp_path, capsys):
    folder = tmp_path / "gan"
    blocked = ["history.csv", "losses.png", "samples_latest.png", "training.gif", "generator.pt"]
    for name in blocked:
        (folder / name).mkdir(parents=True)
    train(gan, tmp_path, data, "--epochs", 2)
    lines = capsys.readouterr().err.splitlines()
    for name in blocked:
        assert [line for line in lines if line.startswith("warning: ") and name in line], name
    assert len(read_checkpoint(folder)["history"]) == 2
    others = {"settings.json", "real_vs_generated.png", "nearest_neighbours.png"}
    assert others < files_in(folder).keys()


def test_a_system_without_locks_and_a_drive_without_fsync(trained, data, monkeypatch):
    def fail(_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows, its import fails
    monkeypatch.setattr(os, "fsync", fail)
    train(gan, trained, data, "--epochs", 3)
    assert len(read_checkpoint(trained / "gan")["history"]) == 3


class Code:
    """What is unpickled by making a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def damage(path, how):
    checkpoint = read_checkpoint(path.parent)
    if how == "cut short":
        path.write_bytes(path.read_bytes()[:100_000])
    elif how == "text":
        path.write_text("not a checkpoint\nat all\n")
    elif how == "code":
        torch.save({**checkpoint, "layers": Code(path.parent / "it ran")}, path)
    else:  # a part is missing
        del checkpoint[how]
        torch.save(checkpoint, path)


@pytest.mark.parametrize(
    "how",
    ["cut short", "text", "code", "G", "D_optimizer", "settings", "layers", "facts", "history"],
)
def test_a_damaged_checkpoint_is_said_to_be_damaged_and_left_alone(how, trained, data):
    folder = trained / "gan"
    damage(folder / "checkpoint.pt", how)
    before = files_in(folder)
    line = refused(gan, trained, data, "--epochs", 2)
    assert f"{folder / 'checkpoint.pt'} is damaged" in line
    assert "--fresh" not in line  # which would destroy what may be mended
    assert "weights_only" not in line  # by which PyTorch says that it runs the code all the same
    assert files_in(folder) == before
    assert not (folder / "it ran").exists()


def test_results_without_a_checkpoint_are_not_replaced(trained, data):
    folder = trained / "gan"
    (folder / "checkpoint.pt").unlink()  # as in a clone of somebody's results
    before = files_in(folder)
    line = refused(gan, trained, data, "--epochs", 3)
    assert f"{folder} holds the results of a run" in line
    assert "another --outputs" in line
    assert files_in(folder) == before
    train(gan, trained, data, "--epochs", 1, "--fresh")
    assert len(read_history(folder)) == 1


def test_a_checkpoint_of_the_other_model(trained, data):
    (trained / "dcgan").mkdir()
    shutil.copy(trained / "gan" / "checkpoint.pt", trained / "dcgan")
    assert "model was GAN, is now DCGAN" in refused(dcgan, trained, data, "--epochs", 3)


def test_a_loss_that_is_not_finite_ends_the_run(trained, data, monkeypatch):
    class Discriminator(gan.Discriminator):
        def forward(self, x):
            return super().forward(x) * float("nan")

    before = files_in(trained / "gan")
    monkeypatch.setattr(gan, "Discriminator", Discriminator)
    line = refused(gan, trained, data, "--epochs", 4)
    assert "not finite" in line
    assert "--learning-rate" in line
    assert files_in(trained / "gan") == before


def test_a_weight_that_is_not_finite_after_the_last_step_ends_the_run(trained, data, monkeypatch):
    class Adam(torch.optim.Adam):
        def step(self):
            super().step()
            bias = self.param_groups[0]["params"][-1]
            if len(bias) == 28 * 28:  # G's, which takes the last step
                bias.data.fill_(float("inf"))

    before = files_in(trained / "gan")
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    # One step: its losses were computed before.
    line = refused(gan, trained, data, "--epochs", 1, "--fresh", "--limit", 32)
    assert "not finite" in line
    assert files_in(trained / "gan") == before


@pytest.mark.parametrize(
    ("index", "layer", "named"),
    [
        (3, nn.Linear(512, 200), "D.layers.3 out_features was 256, is now 200"),
        (4, nn.LeakyReLU(0.1), "D.layers.4 negative_slope was 0.2, is now 0.1"),
        (4, nn.Dropout(0.1), "D.layers.4 type was LeakyReLU, is now Dropout"),
        (5, nn.Sequential(nn.Linear(256, 1)), "D.layers.5.0 type was not there, is now Linear"),
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
    assert "D.layers.1" not in line
    assert "damaged" not in line
    assert "--fresh" in line
    assert files_in(trained / "gan") == before


def test_a_changed_rate_of_dropout_is_named(trained_dcgan_once, data, tmp_path, monkeypatch):
    class Discriminator(dcgan.Discriminator):
        def __init__(self):
            super().__init__()
            self.layers[2].p = 0.3

    shutil.copytree(trained_dcgan_once, tmp_path / "dcgan")
    monkeypatch.setattr(dcgan, "Discriminator", Discriminator)
    line = refused(dcgan, tmp_path, data, "--epochs", 3)
    assert "D.layers.2 p was 0.1, is now 0.3" in line


def test_what_only_one_pytorch_knows_of_a_layer_is_no_change(trained, data, monkeypatch):
    class Discriminator(gan.Discriminator):
        def __init__(self):
            super().__init__()
            self.layers[2].known_to_the_present_one = 1

    path = trained / "gan" / "checkpoint.pt"
    checkpoint = read_checkpoint(path.parent)
    checkpoint["layers"]["D.layers.4"]["known_to_the_earlier_one"] = "1"
    torch.save(checkpoint, path)
    monkeypatch.setattr(gan, "Discriminator", Discriminator)
    train(gan, trained, data, "--epochs", 3)
    assert len(read_checkpoint(path.parent)["history"]) == 3


def test_a_mistake_in_a_layer_keeps_its_traceback(data, tmp_path, monkeypatch):
    class Generator(gan.Generator):
        def forward(self, z):
            return self.layers(z[:, :7])

    monkeypatch.setattr(gan, "Generator", Generator)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(gan, tmp_path, data, "--epochs", 1)


@pytest.mark.parametrize(
    "error",
    [
        None,  # a real one, of the CPU's memory
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
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


def test_the_users_matplotlib_settings_do_not_matter(trained, trained_once, data):
    mine = {"savefig.format": "pdf", "savefig.dpi": 300, "savefig.bbox": "tight", "font.size": 20}
    mine |= {"text.usetex": True, "axes.grid": True, "lines.linewidth": 9, "image.cmap": "viridis"}
    with matplotlib.rc_context(mine):
        settings = dict(matplotlib.rcParams)
        train(gan, trained, data, "--epochs", 2)
        refused(gan, trained, data, "--epochs", 2, "--seed", 1)
        assert dict(matplotlib.rcParams) == settings
    assert_same_run(trained / "gan", trained_once)


IN_A_NOTEBOOK = """
import os, sys
import torch, torchvision, matplotlib
before = dict(os.environ)
import gan, common
figure = common.images_figure(torch.zeros(8, 28, 28, dtype=torch.uint8), "GAN")
common.save_figure(figure, common.Path("figure.png"))
assert dict(os.environ) == before
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams["backend"] == "module://nonsense"
"""


def test_an_import_leaves_the_notebooks_backend_alone_and_needs_none(tmp_path):
    environment = {**os.environ, "MPLBACKEND": "module://nonsense", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IN_A_NOTEBOOK]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figure.png").exists()


def test_the_precision_that_is_asked_for_and_that_auto_chooses(monkeypatch):
    cpu = torch.device("cpu")
    cuda = torch.device("cuda")
    assert common.choose_dtype("float32", cpu) is torch.float32
    assert common.choose_dtype("bfloat16", cuda) is torch.bfloat16
    assert common.choose_dtype("auto", cuda) is torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert common.choose_dtype("auto", cpu) is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    assert common.choose_dtype("auto", cpu) is torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card that can compute")
@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch knows of no cards")
def test_a_card_that_is_there_and_cannot_compute(data, tmp_path, monkeypatch, capsys):
    """What is asked of it fails: here because there is no driver."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert common.choose_device("auto").type in ("cpu", "mps")
    assert capsys.readouterr().err.startswith("cuda cannot compute: ")
    line = refused(gan, tmp_path, data, "--device", "cuda")
    assert "--device cuda" in line
    assert "--device cpu" in line


if __name__ == "__main__":
    script, kills, epochs, longest = sys.argv[1:]
    module = importlib.import_module(Path(script).stem)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data"
        conftest.accept_cut(data)
        straight = train(module, folder / "straight", data, "--epochs", epochs)
        killed = kill_and_go_on(module, int(kills), int(epochs), float(longest), folder, data)
        assert_same_run(killed, straight)
    print(f"killed {kills} times, the same as a run never killed")
