"""Every source and every layout of FashionMNIST, and what happens when it is missing or damaged."""

import functools
import gzip
import http.server
import os
import shutil
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import RAW
from test_scripts import QUICK

import common
import gan

# The first ten labels of the two splits, as published with the data set.
TRAIN_LABELS = [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
TEST_LABELS = [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
NAMES = sorted(common.SHA256)


def check(data):
    train_images, test_images = common.load_fashion_mnist(data)
    assert train_images.shape == (320, 1, 28, 28) and test_images.shape == (80, 1, 28, 28)
    assert train_images.dtype == test_images.dtype == torch.uint8
    content = gzip.decompress((RAW / "train-images-idx3-ubyte.gz").read_bytes())
    image, row, column = 7, 13, 21
    assert train_images[image, 0, row, column] == content[16 + image * 784 + row * 28 + column]


def unpacked(name):
    return gzip.decompress((RAW / f"{name}.gz").read_bytes())


def test_torchvisions_layout(cut):
    check(cut)
    train_labels, test_labels = common.load_fashion_mnist(cut, "labels")
    assert train_labels.shape == (320,) and train_labels[:10].tolist() == TRAIN_LABELS
    assert test_labels.shape == (80,) and test_labels[:10].tolist() == TEST_LABELS


def one_level_too_deep(folder):
    shutil.copytree(RAW, folder / "FashionMNIST" / "FashionMNIST" / "raw")


def keras_cache(folder):
    shutil.copytree(RAW, folder / "fashion-mnist")


def unpacked_with_the_ending_of_packed(folder):
    for name in NAMES:
        (folder / f"{name}.gz").write_bytes(unpacked(name))


def packed_without_the_ending(folder):
    for path in RAW.iterdir():
        shutil.copy(path, folder / path.stem)


def names_with_a_dot(folder):
    for name in NAMES:
        (folder / name.replace("-idx", ".idx")).write_bytes(unpacked(name))


def folders_called_like_the_files(folder):
    for name in NAMES:
        (folder / name).mkdir()
        (folder / name / name).write_bytes(unpacked(name))


def half_unpacked_beside_the_whole(folder):
    shutil.copytree(RAW, folder / "raw")
    for name in NAMES:
        (folder / "raw" / name).write_bytes(unpacked(name)[:5000])


def images_without_labels(folder):
    for path in RAW.glob("*images*"):
        shutil.copy(path, folder)


def behind_a_link(folder):
    (folder / "FashionMNIST").symlink_to(RAW.parent)


def with_links_that_lead_back(folder):
    shutil.copytree(RAW, folder / "raw")
    for name in ("one", "two", "three"):  # each way through each of them, 40 deep, would never end
        (folder / "raw" / name).symlink_to(folder)


def among_a_pipe_and_other_files(folder):
    shutil.copytree(RAW, folder / "raw")
    os.mkfifo(folder / "train-images-idx3-ubyte")
    (folder / "notes.gz").write_bytes(gzip.compress(b"my notes"))
    (folder / "empty").write_bytes(b"")


LAYOUTS = [one_level_too_deep, keras_cache, unpacked_with_the_ending_of_packed, packed_without_the_ending,
           names_with_a_dot, folders_called_like_the_files, half_unpacked_beside_the_whole,
           images_without_labels, behind_a_link, with_links_that_lead_back,
           among_a_pipe_and_other_files]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, cut, tmp_path):
    if os.name == "nt" and layout in (behind_a_link, with_links_that_lead_back, among_a_pipe_and_other_files):
        pytest.skip("needs links and pipes")
    layout(tmp_path)
    check(tmp_path)


def cut_short(content):
    return content[: len(content) // 2]


def other_pixels(content):
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]  # as MNIST's files are


@pytest.mark.parametrize("damage", [cut_short, other_pixels, lambda content: b"<html>Sorry</html>"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_file_that_is_not_fashion_mnists_is_named_left_alone_and_another_source_used(
        damage, packed, cut, monkeypatch, tmp_path, capsys):  # fmt: skip
    path = tmp_path / ("train-images-idx3-ubyte" + ".gz" * packed)
    content = damage(unpacked("train-images-idx3-ubyte"))
    path.write_bytes(gzip.compress(content) if packed else content)
    before = path.read_bytes()
    monkeypatch.setattr(common, "DEBIAN_FOLDER", RAW)
    check(tmp_path)
    said = capsys.readouterr().err
    assert f"{path} is not FashionMNIST's" in said and "left alone" in said and said.count("\n") == 1
    assert path.read_bytes() == before


def test_the_debian_package_is_fetched_without_root(checksums, monkeypatch, tmp_path):
    """With stand-ins for apt-get and dpkg-deb that do what those do with these arguments."""
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {
        "apt-get": 'for last; do :; done; [ "$last" = update ] || touch "${last}_1_all.deb"',
        "dpkg-deb": f'[ -f "$2" ] && d="$3/usr/share" && mkdir -p "$d" && cp "{RAW}"/*.gz "$d"',
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setattr(common, "DEBIAN_FOLDER", tmp_path / "none")
    monkeypatch.setattr(common, "MIRRORS", ())
    check(tmp_path / "data")
    kept = tmp_path / "data" / "FashionMNIST" / "raw"
    assert sorted(path.name for path in kept.iterdir()) == NAMES


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
    monkeypatch.setattr(common, "TIMEOUT", 1)
    monkeypatch.setattr(common, "DEBIAN_FOLDER", tmp_path / "none")
    handler = functools.partial(Mirror, directory=tmp_path / "web")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("bad", ["html", "short", "hang"])
def test_after_a_bad_mirror_comes_the_next_and_what_was_fetched_stays(bad, mirrors, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "MIRRORS", (f"{mirrors}{bad}/", f"{mirrors}good/"))
    started = time.monotonic()
    check(tmp_path / "data")
    assert time.monotonic() - started < 4
    monkeypatch.setattr(common, "fetch", None)
    check(tmp_path / "data")


def test_a_data_folder_that_cannot_be_written_keeps_no_copy(mirrors, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "MIRRORS", (f"{mirrors}good/",))
    (tmp_path / "file").write_text("")
    check(tmp_path / "file" / "data")  # nobody can make a folder there
    assert "could not be written" in capsys.readouterr().err


def test_when_every_source_fails_each_has_a_short_line(mirrors, monkeypatch, tmp_path):
    incomplete = tmp_path / "debian"
    incomplete.mkdir()
    shutil.copy(RAW / "t10k-images-idx3-ubyte.gz", incomplete)
    monkeypatch.setattr(common, "DEBIAN_FOLDER", incomplete)
    monkeypatch.setattr(common, "MIRRORS", (f"{mirrors}html/", "http://127.0.0.1:1/"))
    monkeypatch.setenv("PATH", "/nonexistent")  # no apt-get
    with pytest.raises(common.UserError) as raised:
        common.load_fashion_mnist(tmp_path / "data")
    first, *lines, way_out = str(raised.value).splitlines()
    assert "FashionMNIST was not found" in first and len(str(raised.value)) < 1000
    sources = (tmp_path / "data", incomplete, f"{mirrors}html/", "http://127.0.0.1:1/", "dataset-fashion")
    for source, line in zip(sources, lines, strict=True):
        assert str(source) in line
    assert "refused" in lines[3]
    assert "train-images-idx3-ubyte" in way_out and str(tmp_path / "data") in way_out


def test_a_home_folder(cut, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    shutil.copytree(RAW, tmp_path / "x")
    argv = ["--data=~/x", "--outputs=~/results", "--epochs", "1", *QUICK]
    common.main("GAN", gan.Generator, gan.Discriminator, argv)
    assert (tmp_path / "results" / "gan" / "losses.png").exists()
