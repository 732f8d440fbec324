"""The sources of FashionMNIST, and what happens when all of them fail or the files are damaged."""

import gzip
import hashlib
import http.server
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import RAW, files_in

import common

NAMES = [path.name for path in sorted(RAW.iterdir())]  # four, ending in .gz


@pytest.fixture(autouse=True)
def no_source(data, monkeypatch, tmp_path):
    """Only what a test puts somewhere can be found; the fixture `data` lets the cut pass."""
    monkeypatch.setattr(common, "DEBIAN_FOLDER", Path("/nonexistent/fashion-mnist"))
    monkeypatch.setattr(common, "ADDRESSES", [])
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
    """That the data cannot be had is one line, which says what to do."""
    with pytest.raises(common.UserError) as raised:
        common.load_fashion_mnist(folder)
    message = str(raised.value)
    assert "\n" not in message
    for part in [f"move {folder / 'FashionMNIST'} away", f"into {folder}", *NAMES]:
        assert part in message
    return message


def put_unpacked(folder):
    """The files as torchvision leaves them; returns their folder."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in NAMES:
        (raw / name).with_suffix("").write_bytes(unpacked(name))
    return raw


def test_in_torchvisions_layout_nothing_is_written(tmp_path):
    """The folder may belong to somebody else."""
    folders = [put_unpacked(tmp_path), tmp_path / "FashionMNIST", tmp_path]
    before = [folder.stat().st_mtime_ns for folder in folders]
    check(tmp_path)
    assert [folder.stat().st_mtime_ns for folder in folders] == before


@pytest.mark.parametrize("where", [".", "FashionMNIST/raw"])
def test_packed_files_are_unpacked_once_and_left_there(where, tmp_path):
    folder = tmp_path / where
    folder.mkdir(parents=True, exist_ok=True)
    packed = {name: gzip.compress(unpacked(name), 1) for name in NAMES}  # other bytes than RAW's
    for name, content in packed.items():
        (folder / name).write_bytes(content)
    check(tmp_path)
    for name, content in packed.items():
        assert (folder / name).read_bytes() == content
        (folder / name).unlink()
    check(tmp_path)  # what was unpacked is found


def test_debians_package_that_is_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "DEBIAN_FOLDER", RAW)
    check(tmp_path)


def test_two_scripts_that_start_together_read_whole_files(monkeypatch, tmp_path):
    """The second runs from start to end while the first has just unpacked its files."""
    shutil.copytree(RAW, tmp_path, dirs_exist_ok=True)
    extract_archive = common.extract_archive

    def extract_watched(source, folder):
        extract_archive(source, folder)
        assert not list(tmp_path.glob("FashionMNIST/raw/*-ubyte"))  # another would read them
        if Path(source).name == common.FILES[-1][0]:
            monkeypatch.setattr(common, "extract_archive", extract_archive)
            check(tmp_path)

    monkeypatch.setattr(common, "extract_archive", extract_watched)
    check(tmp_path)
    assert common.extract_archive is extract_archive  # the second did run


APT_GET = """#!/bin/sh
case "$*" in
    update) echo "are you root?"; exit 100 ;;
    "download dataset-fashion-mnist") : > fashion_1_all.deb ;;
esac
"""
DPKG_DEB = f"""#!/bin/sh
test "$1" = --extract && test -e "$2" && /bin/mkdir "$3/nonexistent" &&
/bin/cp -r '{RAW}' "$3/nonexistent/fashion-mnist"
"""


def test_the_debian_package_is_fetched_without_root(monkeypatch, tmp_path):
    """By stand-ins for apt-get and dpkg-deb that do what those do with these arguments."""
    for name, script in {"apt-get": APT_GET, "dpkg-deb": DPKG_DEB}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    check(Path("data"))  # as by default, a folder that is not a whole path


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves the cut under /good/, and otherwise as badly as the address says."""

    def do_GET(self):
        content = (RAW / Path(self.path).name).read_bytes()
        if self.path.startswith("/silent/"):
            time.sleep(5)  # and then hang up, which nobody should hear
            return
        self.send_response(404 if self.path.startswith("/missing/") else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.path.startswith("/stalling/"):
            self.wfile.write(content[:50])
            time.sleep(5)
            return
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """The address of good and bad mirrors."""
    sums = [(name, hashlib.md5((RAW / name).read_bytes()).hexdigest()) for name in NAMES]
    monkeypatch.setattr(common, "FILES", sums)  # instead of those of the whole FashionMNIST
    monkeypatch.setattr(common, "TIMEOUT", 1)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("how", ["missing", "silent", "stalling"])
def test_after_an_address_that_fails_comes_the_second(how, server, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "ADDRESSES", [f"{server}/{how}/", f"{server}/good/"])
    check(tmp_path / "data")


def test_the_line_at_the_end_says_what_failed_first(server, monkeypatch, tmp_path):
    """And not that there is no apt-get, which is tried last."""
    monkeypatch.setattr(common, "ADDRESSES", [f"{server}/silent/", f"{server}/missing/"])
    message = fails(tmp_path / "data")
    assert "timed out" in message
    assert "apt-get" not in message


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
        ("train-labels-idx1-ubyte.gz", half_written),
    ],
)
def test_a_damaged_file_costs_one_line_and_nothing_is_deleted(name, damage, tmp_path):
    raw = put_unpacked(tmp_path)
    if name.endswith(".gz"):
        shutil.rmtree(raw)
        shutil.copytree(RAW, raw)
    (raw / name).write_bytes(damage((raw / name).read_bytes()))
    before = files_in(raw)
    fails(tmp_path)
    assert files_in(raw) == before
    assert list(tmp_path.iterdir()) == [tmp_path / "FashionMNIST"]
