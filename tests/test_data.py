"""The sources of FashionMNIST, and what happens when all of them fail or the files are damaged."""

import gzip
import hashlib
import http.server
import shutil
import sys
import threading
import time
from pathlib import Path

import common  # before torch

# isort: split
import numpy as np
import pytest
from conftest import RAW

NAMES = [path.name for path in sorted(RAW.iterdir())]  # four, ending in .gz


@pytest.fixture(autouse=True)
def no_source(data, monkeypatch, tmp_path):
    """Only what a test puts somewhere can be found; the fixture `data` lets the cut pass."""
    monkeypatch.setattr(common, "DEBIAN_FOLDER", Path("/nonexistent/fashion-mnist"))
    monkeypatch.setattr(common.FashionMNIST, "mirrors", [])
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


def fails(folder):
    """What is said when the data cannot be had: one line."""
    with pytest.raises(common.UserError) as raised:
        common.load_fashion_mnist(folder)
    message = str(raised.value)
    assert "\n" not in message
    for name in [str(folder), *NAMES]:
        assert name in message
    return message


def put_unpacked(folder):
    """The files as torchvision leaves them."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in NAMES:
        (raw / name).with_suffix("").write_bytes(unpacked(name))


def test_torchvisions_layout_in_a_folder_that_cannot_be_written(tmp_path):
    put_unpacked(tmp_path)
    for path in [tmp_path / "FashionMNIST" / "raw", tmp_path / "FashionMNIST", tmp_path]:
        path.chmod(0o500)
    check(tmp_path)
    for path in [tmp_path, tmp_path / "FashionMNIST"]:
        path.chmod(0o700)


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


def test_debians_package_that_is_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "DEBIAN_FOLDER", RAW)
    check(tmp_path)


def test_two_scripts_that_start_together_read_whole_files(monkeypatch, tmp_path):
    """The second starts while the first unpacks slowly, name by name."""
    shutil.copytree(RAW, tmp_path, dirs_exist_ok=True)
    extract_archive = common.extract_archive

    def slowly(source, folder):
        extract_archive(source, folder)
        time.sleep(0.1)

    monkeypatch.setattr(common, "extract_archive", slowly)
    failures = []

    def load():
        try:
            check(tmp_path)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
        time.sleep(0.15)
    for thread in threads:
        thread.join()
    assert failures == []


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
        if self.path.startswith("/silent/"):
            time.sleep(5)
            return
        self.send_response(404 if self.path.startswith("/missing/") else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

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


def test_after_an_address_without_the_files_comes_the_second(server, monkeypatch, tmp_path):
    mirrors = [f"{server}/missing/", f"{server}/good/"]
    monkeypatch.setattr(common.FashionMNIST, "mirrors", mirrors)
    check(tmp_path / "data")


def test_an_address_that_says_nothing_is_not_waited_for(server, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common.FashionMNIST, "mirrors", [f"{server}/silent/"])
    started = time.monotonic()
    fails(tmp_path / "data")
    assert time.monotonic() - started < 4
    assert "timed out" in capsys.readouterr().out


def with_other_pixels(content):
    return content[:5000] + bytes([255 - content[5000]]) + content[5001:]  # as MNIST's are


def half_written(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train-images-idx3-ubyte", with_other_pixels),
        ("train-images-idx3-ubyte", half_written),
        ("train-labels-idx1-ubyte", half_written),
    ],
)
def test_a_damaged_file_costs_one_line_and_nothing_is_deleted(name, damage, tmp_path):
    put_unpacked(tmp_path)
    path = tmp_path / "FashionMNIST" / "raw" / name
    path.write_bytes(damage(path.read_bytes()))
    before = {path: path.read_bytes() for path in path.parent.iterdir()}
    assert f"move {tmp_path / 'FashionMNIST'} away" in fails(tmp_path)
    assert {path: path.read_bytes() for path in path.parent.iterdir()} == before


def test_a_damaged_gz_is_one_line(tmp_path):
    shutil.copytree(RAW, tmp_path, dirs_exist_ok=True)
    path = tmp_path / NAMES[-1]
    path.write_bytes(path.read_bytes()[:100])  # a download that broke off
    fails(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FashionMNIST", *NAMES]
