"""The cut of FashionMNIST in tests/fashion_mnist_cut stands in for the whole; no test needs a network."""

import gzip
import hashlib
import sys
from pathlib import Path

import matplotlib.style
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # so that `pytest` alone finds the scripts
CUT = ROOT / "tests" / "fashion_mnist_cut"
RAW = CUT / "FashionMNIST" / "raw"

import common  # noqa: E402


def accept_cut():
    """Let the cut's files pass for FashionMNIST's."""
    for name in common.SHA256:
        content = gzip.decompress((RAW / f"{name}.gz").read_bytes())
        common.SHA256[name] = hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def as_in_a_run():
    """The figures' style; and what was said in one test may be said in the next."""
    common.say.cache_clear()
    with matplotlib.style.context(common.STYLE):
        yield


@pytest.fixture
def checksums(monkeypatch):
    """Within a test, the cut's files pass for FashionMNIST's."""
    monkeypatch.setattr(common, "SHA256", dict(common.SHA256))
    accept_cut()


@pytest.fixture
def cut(checksums, monkeypatch):
    """The folder to give as --data; every other source of the images is empty."""
    monkeypatch.setattr(common, "DEBIAN_FOLDER", Path("/nonexistent"))
    monkeypatch.setattr(common, "fetch", unreachable)
    return CUT


def unreachable(source, folder):
    raise RuntimeError("no network in tests")
