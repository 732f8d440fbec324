"""Every source of FashionMNIST, and what happens when one is missing or damaged."""

import functools
import gzip
import hashlib
import http.server
import shutil
import stat
import threading

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


@pytest.fixture
def web_server(tmp_path_factory):
    """A folder, and the address under which it is served."""
    folder = tmp_path_factory.mktemp("mirror")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_the_second_mirror_serves_when_the_first_fails(cut, monkeypatch, tmp_path, web_server):
    monkeypatch.undo()  # the real `download`, which the fixture `cut` had replaced
    for name in common.SHA256:
        content = gzip.decompress((RAW / f"{name}.gz").read_bytes())
        monkeypatch.setitem(common.SHA256, name, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(common, "DEBIAN_FOLDER", tmp_path / "none")
    folder, address = web_server
    (folder / "broken").mkdir()
    (folder / "broken" / "train-images-idx3-ubyte.gz").write_text("<html>Sorry</html>")
    shutil.copytree(RAW, folder / "good")
    resources = [(p.name, hashlib.md5(p.read_bytes()).hexdigest()) for p in sorted(RAW.iterdir())]
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    monkeypatch.setattr(FashionMNIST, "mirrors", [address + "broken/"])
    monkeypatch.setattr(common, "SECOND_MIRROR", address + "good/")

    check_split(*common.load_fashion_mnist(tmp_path, "train"), 320, TRAIN_LABELS)

    shutil.rmtree(folder)  # and what was downloaded stays
    check_split(*common.load_fashion_mnist(tmp_path, "test"), 80, TEST_LABELS)


def test_the_debian_package_is_fetched_without_root(cut, monkeypatch, tmp_path):
    """With stand-ins for apt-get and dpkg-deb that do what those do with these arguments."""
    monkeypatch.undo()
    for name in common.SHA256:
        content = gzip.decompress((RAW / f"{name}.gz").read_bytes())
        monkeypatch.setitem(common.SHA256, name, hashlib.sha256(content).hexdigest())
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


def test_without_any_source_the_error_names_all_of_them_and_the_way_out(cut, tmp_path):
    with pytest.raises(common.UserError) as raised:
        common.load_fashion_mnist(tmp_path, "train")
    message = str(raised.value)
    assert "\n" not in message
    for named in (tmp_path, "/nonexistent", "download", "dataset-fashion-mnist", *common.SHA256):
        assert str(named) in message
