"""Every source of FashionMNIST, and what happens when one is missing or damaged."""

import functools
import gzip
import hashlib
import http.server
import shutil
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import CUT, RAW
from torchvision.datasets import FashionMNIST

import common

# The first ten labels of the two splits, as published with the data set.
TRAIN_LABELS = [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
TEST_LABELS = [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]


def check_split(images, labels, n, first_labels):
    assert images.shape == (n, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.shape == (n,) and labels[:10].tolist() == first_labels


def test_both_splits_are_read_from_torchvisions_layout(cut):
    check_split(*common.load_fashion_mnist(cut, "train"), 320, TRAIN_LABELS)
    check_split(*common.load_fashion_mnist(cut, "test"), 80, TEST_LABELS)


def test_pixels_are_those_of_the_file(cut):
    images, _ = common.load_fashion_mnist(cut, "train")
    content = gzip.decompress((RAW / "train-images-idx3-ubyte.gz").read_bytes())
    image, row, column = 7, 13, 21
    assert images[image, 0, row, column] == content[16 + image * 784 + row * 28 + column]


def test_unpacked_files_are_read(cut, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in RAW.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    check_split(*common.load_fashion_mnist(tmp_path, "test"), 80, TEST_LABELS)


def test_the_debian_package_is_read_where_it_is_installed(cut, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "DEBIAN_FOLDER", RAW)
    check_split(*common.load_fashion_mnist(tmp_path, "train"), 320, TRAIN_LABELS)


def test_the_debian_package_is_fetched_without_root(checksums, monkeypatch, tmp_path):
    """With stand-ins for apt-get and dpkg-deb that do what those do with these arguments."""
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {
        "apt-get": 'for last; do :; done; [ "$last" = update ] || touch "${last}_1_all.deb"',
        "dpkg-deb": f'[ -f "$2" ] && d="$3{common.DEBIAN_FOLDER}" && mkdir -p "$d" && cp "{RAW}"/*.gz "$d"',
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    raw = tmp_path / "data" / "FashionMNIST" / "raw"

    common.fetch_debian_package(raw)

    assert sorted(path.name for path in raw.iterdir()) == sorted(common.SHA256)


def test_a_damaged_file_is_named_and_the_next_source_used(cut, monkeypatch, tmp_path, capsys):
    shutil.copytree(CUT / "FashionMNIST", tmp_path / "FashionMNIST")
    damaged = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz"
    content = bytearray(gzip.decompress(damaged.read_bytes()))
    content[5000] ^= 1
    damaged.write_bytes(gzip.compress(content))
    monkeypatch.setattr(common, "DEBIAN_FOLDER", RAW)

    check_split(*common.load_fashion_mnist(tmp_path, "train"), 320, TRAIN_LABELS)

    said = capsys.readouterr().err
    assert str(damaged) in said and "damaged" in said and f"took the images from {RAW}" in said


def cut_short(content):
    return content[: len(content) // 2]


def wrong_header(content):
    return b"\0\0\x08\x01" + content[4:]


@pytest.mark.parametrize("damage", [cut_short, wrong_header, lambda content: b"<html>Sorry</html>"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_data_file_is_named(damage, packed, cut, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    shutil.copytree(RAW, raw)
    path = raw / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    if not packed:
        content = gzip.decompress(content)
        path.unlink()
        path = path.with_suffix("")
    path.write_bytes(damage(content))
    with pytest.raises(common.UserError) as raised:
        common.load_fashion_mnist(tmp_path, "train")
    assert f"{path} is damaged" in str(raised.value) and "delete it" in str(raised.value)


class Mirror(http.server.SimpleHTTPRequestHandler):
    """Serves the cut well under /good/, and otherwise as badly as the path says."""

    def do_GET(self):
        if self.path.startswith("/good/"):
            super().do_GET()
        elif self.path.startswith("/html/"):
            self.answer(b"<html>Sorry</html>", 18)
        elif self.path.startswith("/short/"):
            content = (RAW / Path(self.path).name).read_bytes()
            self.answer(cut_short(content), len(content))
        else:
            time.sleep(5)

    def answer(self, content, length):
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def mirrors(checksums, tmp_path, monkeypatch):
    """The address of a server of good and bad mirrors."""
    shutil.copytree(RAW, tmp_path / "web" / "good")
    resources = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in sorted(RAW.iterdir())]
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    monkeypatch.setattr(common, "NETWORK_TIMEOUT", 1)
    handler = functools.partial(Mirror, directory=tmp_path / "web")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("bad", ["html", "short", "hang"])
def test_after_a_bad_mirror_comes_the_next(bad, mirrors, monkeypatch, tmp_path):
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"{mirrors}{bad}/"])
    monkeypatch.setattr(common, "SECOND_MIRROR", f"{mirrors}good/")
    monkeypatch.setattr(common, "DEBIAN_FOLDER", tmp_path / "none")
    started = time.monotonic()
    check_split(*common.load_fashion_mnist(tmp_path, "train"), 320, TRAIN_LABELS)
    assert time.monotonic() - started < 4
    monkeypatch.setattr(common, "download", None)  # what was downloaded stays
    check_split(*common.load_fashion_mnist(tmp_path, "test"), 80, TEST_LABELS)


def test_when_every_source_fails_all_are_listed(mirrors, monkeypatch, tmp_path):
    incomplete = tmp_path / "debian"
    incomplete.mkdir()
    shutil.copy(RAW / "t10k-images-idx3-ubyte.gz", incomplete)
    monkeypatch.setattr(common, "DEBIAN_FOLDER", incomplete)
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"{mirrors}html/"])
    monkeypatch.setattr(common, "SECOND_MIRROR", f"{mirrors}short/")
    monkeypatch.setenv("PATH", "/nonexistent")  # no apt-get, and no sh
    with pytest.raises(common.UserError) as raised:
        common.load_fashion_mnist(tmp_path / "data", "test")
    message = str(raised.value)
    for named in (tmp_path / "data", incomplete, "html/", "short/", "dataset-fashion-mnist"):
        assert str(named) in message, message
    assert "\n" not in message


def test_without_any_source_the_error_names_all_of_them_and_the_way_out(cut, tmp_path):
    with pytest.raises(common.UserError) as raised:
        common.load_fashion_mnist(tmp_path, "train")
    message = str(raised.value)
    assert "\n" not in message
    for named in (tmp_path, "/nonexistent", "download", "dataset-fashion-mnist", *common.SHA256):
        assert str(named) in message
