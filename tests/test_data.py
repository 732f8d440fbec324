"""The sources of FashionMNIST, and what happens when all of them fail or the files are damaged."""

import gzip
import hashlib
import http.server
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import RAW

import common

NAMES = [path.name for path in sorted(RAW.iterdir())]  # four, ending in .gz


@pytest.fixture(autouse=True)
def no_source(data, monkeypatch, tmp_path):
    """Only what a test puts somewhere can be found; the fixture `data` lets the cut pass."""
    monkeypatch.setattr(common, "DEBIAN_FOLDER", Path("/nonexistent/fashion-mnist"))
    monkeypatch.setattr(common, "MIRRORS", [])
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))


def unpacked(name):
    return gzip.decompress((RAW / name).read_bytes())


def check(folder):
    """The data in `folder` are those of the cut's four files, which are read here by hand."""
    datasets = common.load_fashion_mnist(folder)
    for dataset, prefix in zip(datasets, ("train", "t10k"), strict=True):
        pixels = np.frombuffer(unpacked(f"{prefix}-images-idx3-ubyte.gz"), np.uint8, offset=16)
        labels = np.frombuffer(unpacked(f"{prefix}-labels-idx1-ubyte.gz"), np.uint8, offset=8)
        assert np.array_equal(dataset.data.numpy(), pixels.reshape(-1, 28, 28))
        assert np.array_equal(dataset.targets.numpy(), labels)


# -------------------------------------------------------------------------- files that are there


def put_unpacked(folder):
    """The files as torchvision leaves them."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in NAMES:
        (raw / name).with_suffix("").write_bytes(unpacked(name))


def test_torchvisions_layout(tmp_path):
    put_unpacked(tmp_path)
    check(tmp_path)


@pytest.mark.parametrize("where", [".", "FashionMNIST/raw"])
@pytest.mark.parametrize("compression", [1, 9])
def test_packed_files_are_unpacked_once_and_left_there(where, compression, tmp_path):
    folder = tmp_path / where
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / name).write_bytes(gzip.compress(unpacked(name), compression))
    check(tmp_path)
    for name in NAMES:
        assert gzip.decompress((folder / name).read_bytes()) == unpacked(name)
        (folder / name).unlink()
    check(tmp_path)  # what was unpacked is found


def test_after_a_damaged_gz_comes_debians_folder(monkeypatch, tmp_path):
    shutil.copytree(RAW, tmp_path, dirs_exist_ok=True)
    path = tmp_path / NAMES[-1]
    path.write_bytes(path.read_bytes()[:100])  # a download that broke off
    monkeypatch.setattr(common, "DEBIAN_FOLDER", RAW)
    check(tmp_path)


# ------------------------------------------------------------------------- files that are fetched

APT_GET = """
if arguments[-1] == "update":
    Path("lists").write_text("")
elif arguments[-2] == "download" and Path("lists").exists():
    Path(arguments[-1] + "_1_all.deb").write_text("")
else:
    sys.exit("E: Unable to locate package")
"""
DPKG_DEB = f"""
option, archive, folder = arguments
if option == "-x" and Path(archive).exists():
    shutil.copytree({str(RAW)!r}, folder + "/nonexistent/fashion-mnist")
"""


def test_the_debian_package_is_fetched_without_root(monkeypatch, tmp_path):
    """By stand-ins for apt-get and dpkg-deb that do what those do with these arguments."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {"apt-get": APT_GET, "dpkg-deb": DPKG_DEB}.items():
        start = f"#!{sys.executable}\nimport shutil, sys\nfrom pathlib import Path\n"
        path = programs / name
        path.write_text(f"{start}arguments = sys.argv[1:]\n{script}")
        path.chmod(0o700)
    monkeypatch.setenv("PATH", str(programs))
    check(tmp_path / "data")


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves the cut under /good/, and otherwise as badly as the address says."""

    def do_GET(self):
        content = (RAW / Path(self.path).name).read_bytes()
        status = 200
        if self.path.startswith("/silent/"):
            time.sleep(10)
            return
        if self.path.startswith("/missing/"):
            status = 404
        if self.path.startswith("/html/"):
            content = b"<html>Please log in</html>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.path.startswith(("/short/", "/stalled/")):
            content = content[: len(content) // 2]
        self.wfile.write(content)
        if self.path.startswith("/stalled/"):
            time.sleep(10)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """The address of good and bad mirrors."""
    sums = [(name, hashlib.md5((RAW / name).read_bytes()).hexdigest()) for name in NAMES]
    monkeypatch.setattr(common.FashionMNIST, "resources", sums)  # what torchvision expects
    monkeypatch.setattr(common, "TIMEOUT", 1)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("bad", ["missing", "html", "short", "silent", "stalled"])
def test_after_a_bad_mirror_comes_the_next(bad, server, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "MIRRORS", [f"{server}/{bad}/", f"{server}/good/"])
    started = time.monotonic()
    check(tmp_path)
    assert time.monotonic() - started < 8  # it was not waited for


def test_when_every_source_fails_each_has_a_line_with_the_reason(server, monkeypatch, tmp_path):
    missing = f"{server}/missing/an-address/as-long-as/those-of-github/with/data/fashion/"
    nobody = "http://127.0.0.1:1/"
    monkeypatch.setattr(common, "MIRRORS", [missing, nobody])
    folder = tmp_path / "data"
    with pytest.raises(common.UserError) as raised:
        common.load_fashion_mnist(folder)
    first, *lines, last = str(raised.value).splitlines()
    assert "FashionMNIST was not found" in first
    sources = [
        (folder / "FashionMNIST" / "raw", "No such file"),
        (folder, "No such file"),
        (common.DEBIAN_FOLDER, "No such file"),
        (missing, "404"),
        (nobody, "refused"),
        ("dataset-fashion-mnist", "apt-get"),
    ]
    for line, (source, reason) in zip(lines, sources, strict=True):
        assert str(source) in line
        assert reason in line
        assert len(line) < 400
    assert str(folder) in last
    for name in NAMES:
        assert name in last


# -------------------------------------------------------------------------- files that are damaged


def with_other_pixels(content):
    return content[:5000] + bytes([255 - content[5000]]) + content[5001:]  # as MNIST's are


def half_written(content):
    return content[: len(content) // 2]


def empty(content):
    return b""


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train-images-idx3-ubyte", with_other_pixels),
        ("t10k-images-idx3-ubyte", with_other_pixels),
        ("train-images-idx3-ubyte", half_written),
        ("train-labels-idx1-ubyte", half_written),
        ("t10k-images-idx3-ubyte", empty),
    ],
)
def test_a_damaged_file_costs_one_line_and_nothing_is_deleted(name, damage, tmp_path):
    put_unpacked(tmp_path)
    path = tmp_path / "FashionMNIST" / "raw" / name
    path.write_bytes(damage(path.read_bytes()))
    before = {path: path.read_bytes() for path in path.parent.iterdir()}
    with pytest.raises(common.UserError) as raised:
        common.load_fashion_mnist(tmp_path)
    message = str(raised.value)
    assert f"{tmp_path / 'FashionMNIST'} are damaged" in message
    assert "move that folder away" in message
    assert "\n" not in message
    assert {path: path.read_bytes() for path in path.parent.iterdir()} == before
