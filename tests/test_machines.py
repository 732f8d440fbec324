"""The same run on other people's machines: the faults of public bug reports, as far as Linux can act them."""

import contextlib
import errno
import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import ROOT
from test_scripts import FIGURES, failure, train

import common
import gan


def environment(**variables):
    return {**os.environ, "COLUMNS": "80", **variables}


def test_a_notebooks_backend_and_a_broken_torchvision_do_not_matter(tmp_path):
    command = [sys.executable, str(ROOT / "gan.py"), "--help"]
    variables = {**broken_package(tmp_path, "torchvision"), "MPLBACKEND": "module://that_is_not_here"}
    result = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert result.returncode == 0 and "--epochs" in result.stdout, result.stderr


def test_the_users_matplotlib_settings_do_not_change_the_figures(cut, tmp_path):
    train(tmp_path / "a", "--epochs", 1, data=cut)
    mine = {"savefig.format": "pdf", "savefig.dpi": 300, "savefig.bbox": "tight", "text.usetex": True,
            "font.size": 20, "lines.linewidth": 9, "axes.grid": True, "figure.facecolor": "red"}  # fmt: skip
    with matplotlib.rc_context(mine):
        train(tmp_path / "b", "--epochs", 1, data=cut)
    for figure in FIGURES:
        one, other = (tmp_path / run / "gan" / f"{figure}.png" for run in "ab")
        assert one.read_bytes() == other.read_bytes(), figure


def fail_with(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_without_locks_and_without_fsync(cut, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", fail_with(errno.ENOLCK))
    monkeypatch.setattr(os, "fsync", fail_with(errno.EINVAL))
    train(tmp_path, "--epochs", 1, data=cut)
    assert (tmp_path / "gan" / "losses.png").exists()


def held(monkeypatch, times, *names):
    """Files of these names are held by another program, so many times."""
    replace, left = os.replace, iter(range(times))

    def guarded(source, target):
        if Path(target).name in names and next(left, None) is not None:
            raise PermissionError(errno.EACCES, "used by another process", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", guarded)
    monkeypatch.setattr(time, "sleep", lambda _: None)


def test_a_checkpoint_held_for_a_moment_is_written(cut, tmp_path, monkeypatch, capsys):
    held(monkeypatch, 3, "checkpoint.pt")
    train(tmp_path, "--epochs", 1, data=cut)
    assert "could not be written" not in capsys.readouterr().err


def test_a_checkpoint_held_for_ever_ends_the_run(cut, tmp_path, monkeypatch, capsys):
    held(monkeypatch, 1000, "checkpoint.pt")
    with pytest.raises(SystemExit) as raised:
        train(tmp_path, "--epochs", 2, data=cut)
    line = capsys.readouterr().err.splitlines()[-1]
    assert raised.value.code == 1 and "checkpoint.pt could not be written: used by another" in line


def test_files_that_somebody_holds_open_are_left_out_with_a_word(cut, tmp_path, monkeypatch, capsys):
    names = ("history.csv", "losses.png", "samples_latest.png", "training.gif")
    with monkeypatch.context() as patch:
        held(patch, 1000, *names)
        train(tmp_path, "--epochs", 2, data=cut)
    said = capsys.readouterr().err
    for name in names:
        assert said.count(f"{name} could not be written") == 1 and not (tmp_path / "gan" / name).exists()
    train(tmp_path, "--epochs", 3, data=cut)
    assert all((tmp_path / "gan" / name).exists() for name in names)
    assert not list((tmp_path / "gan").glob(".partial*"))


def broken_package(folder, name):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    return environment(PYTHONPATH=str(folder))


def test_a_torchvision_that_cannot_be_imported_is_not_missed_later(cut, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # from here on its import fails
    train(tmp_path, "--epochs", 1, data=cut)
    assert (tmp_path / "gan" / "latent_perturbation.png").exists()


@pytest.mark.parametrize("package", ["torch", "matplotlib", "tqdm", "PIL"])
def test_a_package_that_cannot_be_imported_is_one_line_at_once(package, tmp_path):
    variables = broken_package(tmp_path, package)
    command = [sys.executable, str(ROOT / "dcgan.py"), "--outputs", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "does not exist" in result.stderr and "pip install -r requirements.txt" in result.stderr


@pytest.mark.parametrize("module", ["matplotlib.backends.backend_agg", "PIL.ImageFont"])
def test_what_only_figures_need_is_tried_at_once(module, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{module!r}] = None")
    command = [sys.executable, str(ROOT / "gan.py"), "--outputs", str(tmp_path)]
    variables = environment(PYTHONPATH=str(tmp_path))
    result = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert module.split(".")[-1] in result.stderr and "pip install -r" in result.stderr


def test_a_second_run_in_the_same_notebook_says_its_own_words(cut, tmp_path, monkeypatch, capsys):
    held(monkeypatch, 1000, "losses.png")
    for outputs in (tmp_path, tmp_path):
        train(outputs, "--epochs", 1, data=cut)
        assert capsys.readouterr().err.count("losses.png could not be written") == 1


@pytest.fixture
def useless_card(monkeypatch):
    """A CUDA card that is there and has no kernels."""
    conv2d = torch.nn.functional.conv2d

    def fail(x, *args, **kwargs):
        if not fail.tried:
            fail.tried = True
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")
        return conv2d(x, *args, **kwargs)

    fail.tried = False
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *size, device=None: ones(*size))
    monkeypatch.setattr(torch.nn.functional, "conv2d", fail)


def test_a_card_that_cannot_compute_is_said_and_the_cpu_used(useless_card, capsys):
    assert common.choose_device("auto") == torch.device("cpu")
    line = capsys.readouterr().err
    assert "cuda cannot compute (CUDA error: no kernel image" in line and line.count("\n") == 1


def test_a_card_that_was_asked_for_and_cannot_compute_ends_the_run(useless_card, cut, tmp_path, capsys):
    line = failure(1, capsys, "--data", cut, "--outputs", tmp_path, "--device", "cuda")
    assert "no kernel image" in line and "--device cpu" in line


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"),
    torch.AcceleratorError("CUDA error: all CUDA-capable devices are busy or unavailable"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    NotImplementedError("The operator 'aten::x' is not currently implemented for the MPS device."),
    MemoryError(),
])  # fmt: skip
def test_a_device_without_memory_is_one_line(error, cut, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(common, "train_step", fail)
    with pytest.raises(SystemExit) as raised:
        train(tmp_path, "--epochs", 1, data=cut)
    line = capsys.readouterr().err.splitlines()[-1]
    assert raised.value.code == 1 and line.startswith("error: ") and "--device cpu" in line


def test_a_mistake_in_a_layer_keeps_its_traceback(cut, tmp_path, monkeypatch):
    monkeypatch.setattr(gan.Generator, "forward", lambda G, z: G.layers(z[:, :7]))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(tmp_path, "--epochs", 1, data=cut)


def test_in_a_thread(cut, tmp_path):
    thread = threading.Thread(target=train, args=(tmp_path, "--epochs", 1), kwargs={"data": cut})
    thread.start()
    thread.join()
    assert (tmp_path / "gan" / "losses.png").exists()


def test_without_a_terminal(cut, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)  # as Python has them when they are closed
    train(tmp_path, "--epochs", 1, "--images", 2, data=cut)
    assert (tmp_path / "gan" / "images" / "00001.png").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_with_a_terminal_that_is_gone(cut, tmp_path, monkeypatch):
    """As after its window was closed, a write to it fails."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", buffering=1))
    train(tmp_path, "--epochs", 2, "--images", 2, data=cut)
    assert (tmp_path / "gan" / "images" / "00001.png").exists()


def test_a_folder_that_the_terminal_cannot_write_down(cut, tmp_path, monkeypatch):
    written = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written, "ascii", write_through=True))
    train(tmp_path / "Übung 生成", "--epochs", 1, data=cut)
    assert b"figures in" in written.getvalue() and b"bung \\u751f" in written.getvalue()


@pytest.mark.parametrize(("quota", "threads"), [
    ("150000 100000", 1), ("50000 100000", 1), ("400000 100000", 4), ("900000 100000", 8),
    ("max 100000", 8)])  # fmt: skip
def test_a_containers_quota_limits_the_threads(quota, threads, monkeypatch):
    chosen = [8]
    monkeypatch.setattr(Path, "read_text", lambda path: quota if str(path).endswith("cpu.max") else "")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    common.use_the_cpu_well()
    assert chosen[-1] == threads


def test_settings_that_a_notebook_needs_are_left_as_they_are(cut, tmp_path):
    with matplotlib.rc_context({"lines.linewidth": 9}), contextlib.suppress(SystemExit):
        train(tmp_path, "--epochs", 1, data=cut)
        assert matplotlib.rcParams["lines.linewidth"] == 9
