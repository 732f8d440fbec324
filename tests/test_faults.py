"""A run is never lost, and what goes wrong is one line: kills, full disks, damage, mistakes."""

import contextlib
import errno
import os
import random
import re
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
    SCRIPTS,
    SMALL_GRID,
    assert_same_run,
    files_in,
    python,
    read_history,
    refused,
    run,
    train,
)

import common
import gan

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals and limits")
KILLS = int(os.environ.get("KILLS", 0))  # so many more kills, at random moments


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


@posix
def test_a_process_that_is_killed_goes_on_bit_for_bit(data, tmp_path):
    """After an epoch has been shown and before its checkpoint, and KILLS times at random. As a user
    runs it, in the folder of the script."""
    folder = tmp_path / "outputs" / "gan"
    command = [sys.executable, ROOT / "tests" / "run_on_cut.py", tmp_path / "data", "gan.py"]
    command += [*QUICK, "--outputs", tmp_path / "outputs", "--epochs", 1000]
    for kill in range(1 + KILLS):
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=SCRIPTS,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        wait_until_written(folder / "checkpoint.pt", process)  # there is one to go on from
        wait_until_written(folder / "samples_latest.png", process)
        time.sleep(random.Random(kill).uniform(0, 0.5) if kill > 0 else 0)
        process.kill()
        process.communicate()
    epochs = len(read_history(folder)) + 1
    killed = train(gan, tmp_path / "outputs", data, "--epochs", epochs)
    straight = train(gan, tmp_path / "straight", data, "--epochs", epochs)
    assert_same_run(killed, straight)
    assert files_in(killed).keys() == files_in(straight).keys()  # no half written file is left


class Killed(BaseException):
    """No `except` of the program is for this."""


def kill_at_write(number, monkeypatch):
    """A program from here on ends in the middle of writing its file of this number."""
    replace = os.replace
    written = []

    def replace_or_die(part, path):
        written.append(path)
        if len(written) == number:
            os.truncate(part, os.path.getsize(part) // 2)
            raise Killed
        replace(part, path)

    monkeypatch.setattr(os, "replace", replace_or_die)


def test_a_run_killed_at_any_write_goes_on_bit_for_bit(data, tmp_path, trained_once):
    """That a DCGAN goes on so is tested with a checkpoint of a card, in test_runs.py."""
    train(gan, tmp_path, data, "--epochs", 1)
    for number in range(1, 10):  # up to the first file after the checkpoint
        with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Killed):
            kill_at_write(number, monkeypatch)
            train(gan, tmp_path, data, "--epochs", 2)
    folder = train(gan, tmp_path, data, "--epochs", 2)
    (folder / "samples_epoch_001.png").unlink()
    assert_same_run(folder, trained_once)
    assert files_in(folder).keys() == files_in(trained_once).keys()


@pytest.fixture
def ctrl_c():
    """Where tests run in the background, a shell may have switched it off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def discriminator_that(acts, in_pass):
    """A D that calls acts() in one pass of images. Three are before the first step, which has three
    itself, because of the penalty; the other two of an epoch have two."""
    passes = []

    class Discriminator(gan.Discriminator):
        def forward(self, x):
            passes.append(len(x))
            if len(passes) == in_pass:
                acts()
            return super().forward(x)

    return Discriminator


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def stopped(module, outputs, data, *options):
    with pytest.raises(SystemExit) as stop:
        train(module, outputs, data, *options)
    assert stop.value.code == 130  # as after Ctrl-C in other programs


def test_ctrl_c_draws_the_finished_epochs_and_the_run_goes_on(
    ctrl_c, data, tmp_path, trained_once, monkeypatch, capsys
):
    with monkeypatch.context() as patched:
        patched.setattr(gan, "Discriminator", discriminator_that(press_ctrl_c, in_pass=3 + 7 + 4))
        stopped(gan, tmp_path, data, "--epochs", 2)
    printed, errors = capsys.readouterr()
    assert "\nstopped, 1 epochs done: the same command goes on\n" in printed
    assert errors == ""  # neither a traceback nor, into a file, a bar
    folder = tmp_path / "gan"
    drawn = files_in(folder)
    run(gan, tmp_path, data, "--redraw", *SMALL_GRID)
    assert files_in(folder) == drawn  # the figures of the finished epoch were there
    train(gan, tmp_path, data, "--epochs", 2)
    assert_same_run(folder, trained_once)


def test_ctrl_c_in_the_first_epoch(ctrl_c, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gan, "Discriminator", discriminator_that(press_ctrl_c, in_pass=5))
    stopped(gan, tmp_path, data)
    assert "\nstopped, 0 epochs done" in capsys.readouterr().out
    assert not list((tmp_path / "gan").glob("*.png"))


@posix
def test_a_second_run_in_the_same_folder_at_the_same_time(data, tmp_path, monkeypatch):
    lines = []
    Discriminator = gan.Discriminator

    def start_another():
        monkeypatch.setattr(gan, "Discriminator", Discriminator)
        lines.append(refused(gan, tmp_path, data, "--epochs", 1))

    monkeypatch.setattr(gan, "Discriminator", discriminator_that(start_another, in_pass=5))
    train(gan, tmp_path, data, "--epochs", 1)
    assert f"{tmp_path / 'gan'} is in use" in lines[0]
    train(gan, tmp_path, data, "--epochs", 1)  # and later it is not


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


@pytest.mark.parametrize(("refusals", "expected"), [(2, b"new"), (99, b"old")])
def test_a_file_that_a_virus_scanner_holds_is_waited_for(refusals, expected, tmp_path, monkeypatch):
    (tmp_path / "table").write_bytes(b"old")
    replace = os.replace
    refused_yet = []

    def refuse_at_first(*paths):
        if len(refused_yet) < refusals:
            refused_yet.append(paths)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        replace(*paths)

    monkeypatch.setattr(os, "replace", refuse_at_first)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    common.save(tmp_path / "table", b"new")
    assert files_in(tmp_path) == {"table": expected}


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


@pytest.mark.parametrize(
    "how", ["cut short", "text", "code", "G", "settings", "program", "history"]
)
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


# In the place of matplotlib, the first library that common.py imports: what is set until then.
SHOW = """
import os, sys
print({})
sys.exit()
"""


def test_the_backend_of_a_notebook_is_left_alone_in_the_notebook_only(tmp_path):
    (tmp_path / "matplotlib.py").write_text(SHOW.format("os.environ['MPLBACKEND']"))
    inline = "module://matplotlib_inline.backend_inline"  # may not be installed
    assert python("import common", tmp_path, MPLBACKEND=inline) == "agg\n"
    assert python("import common", tmp_path, MPLBACKEND="svg") == "svg\n"
    (tmp_path / "ipykernel.py").write_text("")
    found = python("import ipykernel, common", tmp_path, MPLBACKEND=inline)
    assert found == f"{inline}\n"


CPUINFO = """
from pathlib import Path
read_text = Path.read_text
Path.read_text = lambda path, **how: {flags!r} if path.name == "cpuinfo" else read_text(path, **how)
import common
"""


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="it concerns Linux")
@pytest.mark.parametrize(
    ("flags", "own", "expected"),
    [
        ("avx2", None, "5000 False"),
        ("avx2 avx512_bf16 amx_bf16", None, "None True"),
        ("avx2", "7", "7 False"),
    ],
)
def test_what_a_processor_can_do_decides_on_waiting_threads_and_bfloat16(
    flags, own, expected, tmp_path, monkeypatch
):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)  # conftest.py has imported common
    found = "os.environ.get('GOMP_SPINCOUNT'), sys.modules['common'].FAST_BFLOAT16"
    (tmp_path / "matplotlib.py").write_text(SHOW.format(found))
    variables = {} if own is None else {"GOMP_SPINCOUNT": own}
    assert python(CPUINFO.format(flags=flags), tmp_path, **variables) == f"{expected}\n"


@pytest.mark.parametrize(
    ("load", "threads", "is_said"), [(0, 2, False), (10, 1, False), (10, 2, True)]
)
def test_a_busy_machine_is_said_with_the_command(load, threads, is_said, monkeypatch, capsys):
    load = load * os.cpu_count()
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    common.warn_if_busy(torch.device("cpu"))
    assert ("OMP_NUM_THREADS=1" in capsys.readouterr().out) == is_said
