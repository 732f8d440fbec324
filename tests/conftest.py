"""The cut of FashionMNIST in tests/fashion_mnist_cut stands in for the whole; no test needs a network."""

import gzip
import hashlib
from pathlib import Path

import pytest

import common

CUT = Path(__file__).parent / "fashion_mnist_cut"
RAW = CUT / "FashionMNIST" / "raw"


def accept_cut():
    """Let the cut's files pass for FashionMNIST's."""
    for name in common.SHA256:
        content = gzip.decompress((RAW / f"{name}.gz").read_bytes())
        common.SHA256[name] = hashlib.sha256(content).hexdigest()


@pytest.fixture
def checksums(monkeypatch):
    """Within a test, the cut's files pass for FashionMNIST's."""
    monkeypatch.setattr(common, "SHA256", dict(common.SHA256))
    accept_cut()


@pytest.fixture
def cut(checksums, monkeypatch):
    """The folder to give as --data; every other source of the images is empty."""
    monkeypatch.setattr(common, "DEBIAN_FOLDER", Path("/nonexistent"))
    monkeypatch.setattr(common, "download", unreachable)
    monkeypatch.setattr(common, "fetch_debian_package", unreachable)
    return CUT


def unreachable(raw):
    raise RuntimeError("no network in tests")
