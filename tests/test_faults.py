"""A run is never lost, and what goes wrong is one line: kills, full disks, damage, mistakes."""

import contextlib
import errno
import importlib.util
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
    assert_same_run,
    files_in,
    python,
    read_history,
    refused,
    run,
    train,
)

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
    command = [sys.executable, "-u", ROOT / "tests" / "run_on_cut.py", folder / "data"]
    command.append(SCRIPTS / script)
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
        if "epochs done" not in line:
            process.kill()
            pytest.fail(line + process.stderr.read())
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
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ""  # neither a traceback nor, into a file, a bar
    done = int(
        re.search(r"^stopped, (\d+) epochs done: the same command goes on$", printed, re.M)[1]
    )
    # It may have been stopped between an epoch and its checkpoint.
    epochs = re.findall(r"^epoch \d+ of 1000: loss D ", printed, re.M)
    assert 1 <= done <= len(read_history(folder)) <= len(epochs) <= done + 1
    drawn = files_in(folder)
    run(gan, tmp_path / "outputs", data, "--redraw")
    assert files_in(folder) == drawn  # the figures of the finished epochs were there


@posix
def test_ctrl_c_in_the_first_epoch(data, tmp_path):
    with started("gan.py", tmp_path, "--limit", 60_000, "--batch-size", 2) as process:
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ""
    assert "stopped, 0 epochs done" in printed
    assert not list((tmp_path / "outputs" / "gan").glob("*.png"))


@posix
def test_ctrl_c_while_the_libraries_are_imported(tmp_path):
    """Which takes seconds. It is sent when torch has been begun."""
    (tmp_path / "matplotlib.py").write_text(
        "print('here', flush=True)\nimport time\ntime.sleep(60)"
    )
    command = [sys.executable, "-c", "import common"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_ctrl_c,
    ) as process:
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors == b""


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


def test_the_backend_of_a_notebook_is_left_alone_but_where_its_module_is_missing(tmp_path):
    code = "import os, gan, common; common.as_bytes(common.Figure().savefig)\n"
    code += "print(os.environ.get('MPLBACKEND'))"
    inline = "module://matplotlib_inline.backend_inline"  # which Jupyter hands to what it starts
    is_missing = importlib.util.find_spec("matplotlib_inline") is None
    assert python(code, tmp_path, MPLBACKEND=inline) == f"{None if is_missing else inline}\n"
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "backend.py").write_text("")
    (tmp_path / "matplotlib.py").write_text(SHOW.format("os.environ['MPLBACKEND']"))
    found = python("import common", tmp_path, MPLBACKEND="module://there.backend")
    assert found == "module://there.backend\n"


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
