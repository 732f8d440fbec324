"""A run is never lost: kills, full disks, damaged checkpoints, and mistakes.

The long form, by hand: `PYTHONPATH=. python tests/test_faults.py gan.py 20 200 0.6` kills a run of 200 epochs
20 times, after up to 0.6 s of training each time; likewise `dcgan.py 20 60 1.0`.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_scripts import FIGURES, QUICK, assert_same, failure, train
from torch import nn

import common
import dcgan
import gan

OPTIONS = (*QUICK, "--sample-every", "100")
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals and limits")


def start(script, outputs, epochs, *options, preexec_fn=None):
    """A real process of the script on the cut; its output comes unbuffered."""
    command = [sys.executable, "-u", str(ROOT / "tests" / "run_on_cut.py"), script, *OPTIONS, *options]
    command += ["--epochs", str(epochs), "--outputs", str(outputs)]
    pipe, environment = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment, preexec_fn=preexec_fn)


def wait_for_training(process):
    """Return when the process says that it is about to train, with how many epochs are done."""
    line = process.stdout.readline()
    assert "epochs done" in line, line + process.stderr.read()
    return int(line.split(" of ")[0].split()[-1])


def finish(process, status=0):
    _, errors = process.communicate(timeout=600)
    assert process.returncode == status, errors
    return errors


def kill_and_compare(script, kills, epochs, longest, folder, chance):
    """Kill a run after random times up to `longest` seconds of training, every third time in the middle of
    writing a checkpoint; let it end: it must be what a run never killed is. Returns the epochs found done
    at each start."""
    name = Path(script).stem
    found = []
    straight = start(script, folder / "straight", epochs)  # at the same time, on the other core
    for kill in range(kills):
        process = start(script, folder / "killed", epochs)
        found.append(wait_for_training(process))
        partial = folder / "killed" / name / ".partial-checkpoint.pt"
        deadline = time.monotonic() + 20
        if kill % 3 == 0:
            while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
                pass
        else:
            time.sleep(chance.uniform(0, longest))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "finished before it could be killed"
    process = start(script, folder / "killed", epochs)
    found.append(wait_for_training(process))
    finish(process)
    finish(straight)
    assert_same_run(folder / "killed" / name, folder / "straight" / name)
    return found


def assert_same_run(one, other):
    """The same tensors, history (but for the seconds) and figures, and nothing left over."""
    assert_same(*(torch.load(run / "checkpoint.pt", weights_only=True) for run in (one, other)))
    histories = [[line.rsplit(",", 1)[0] for line in (run / "history.csv").open()] for run in (one, other)]
    assert histories[0] == histories[1]
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for figure in FIGURES:
        assert (one / f"{figure}.png").read_bytes() == (other / f"{figure}.png").read_bytes(), figure


@posix
@pytest.mark.parametrize(("script", "kills", "epochs"), [("gan.py", 2, 15), ("dcgan.py", 1, 2)])
def test_a_killed_run_goes_on_bit_for_bit(script, kills, epochs, tmp_path):
    found = kill_and_compare(script, kills, epochs, 0.5, tmp_path, random.Random(1))
    assert found[0] == 0 and found == sorted(found) and found[-1] < epochs


def hear_ctrl_c():
    """Also where the tests are a shell's background job, which does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_with_one_line(number, tmp_path):
    process = start("gan.py", tmp_path, 1000, preexec_fn=hear_ctrl_c)
    wait_for_training(process)
    while not (tmp_path / "gan" / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.send_signal(number)
    errors = finish(process, 130)
    assert "Traceback" not in errors
    done = len(torch.load(tmp_path / "gan" / "checkpoint.pt", weights_only=True)["history"]["seconds"])
    assert errors.splitlines()[-1] == (f"stopped after epoch {done}: the same command goes on; "
                                       f"with --epochs {done} it draws the figures of what is there")
    if number == signal.SIGINT:  # and so it does
        finish(start("gan.py", tmp_path, done))
        assert (tmp_path / "gan" / f"samples_epoch_{done:03d}.png").exists()


@posix
def test_a_second_run_on_the_folder_stops(cut, tmp_path, capsys):
    with common.locked(tmp_path / "gan"):  # such a lock holds against everybody who opens the file anew
        line = failure(1, capsys, *QUICK, "--data", cut, "--outputs", tmp_path)
    assert "in use by another run" in line and str(tmp_path / "gan") in line
    train(tmp_path, "--epochs", 1, data=cut)  # and once the first is gone, it may


def test_leftovers_of_a_killed_process_are_swept(cut, tmp_path):
    (tmp_path / "gan").mkdir()
    leftover = tmp_path / "gan" / ".partial-checkpoint.pt"
    leftover.write_bytes(b"half")
    train(tmp_path, "--epochs", 1, data=cut)
    assert not leftover.exists()


@posix
def test_a_full_disk_leaves_the_last_checkpoint(cut, tmp_path):
    """In the second run no file may grow beyond 20 MB, as with `ulimit -f`; the checkpoint takes 30."""
    train(tmp_path, "--epochs", 1, data=cut)
    folder = tmp_path / "gan"
    files = {path: path.read_bytes() for path in folder.iterdir()}

    def limit_file_size():
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))

    errors = finish(start("gan.py", tmp_path, 2, preexec_fn=limit_file_size), 1)

    assert "checkpoint.pt could not be written: File too large" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


def test_stopped_in_the_first_epoch_of_a_fresh_run(cut, tmp_path, monkeypatch, capsys):
    """Without --fresh the run before it would go on, so that is not what the message may say."""
    train(tmp_path, "--epochs", 2, data=cut)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "train_epoch", interrupted)
    with pytest.raises(SystemExit) as raised:
        train(tmp_path, "--fresh", "--epochs", 2, data=cut)
    line = capsys.readouterr().err.splitlines()[-1]
    assert raised.value.code == 130
    assert line == "stopped before the end of the first epoch: the same command starts again"


def test_fresh_keeps_the_old_run_until_the_new_one_has_a_checkpoint(cut, tmp_path, monkeypatch):
    train(tmp_path, "--epochs", 2, "--sample-every", 1, data=cut)
    files = {path: path.read_bytes() for path in (tmp_path / "gan").iterdir()}

    def stopped(*_):
        raise common.UserError("stopped")

    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(common, "train_epoch", stopped)
        train(tmp_path, "--fresh", "--epochs", 1, data=cut)
    assert {path: path.read_bytes() for path in (tmp_path / "gan").iterdir()} == files

    again = train(tmp_path, "--fresh", "--epochs", 1, data=cut)
    assert len(again["history"]["seconds"]) == 1
    assert not (tmp_path / "gan" / "samples_epoch_002.png").exists()


def test_every_difference_of_settings_is_named(cut, tmp_path, capsys):
    train(tmp_path, "--epochs", 1, data=cut)
    line = failure(1, capsys, *QUICK, "--data", cut, "--outputs", tmp_path,
                   "--seed", 3, "--learning-rate", 0.002, "--latent-dim", 100)  # fmt: skip
    assert "learning_rate was 0.001, is now 0.002" in line and "seed was 0, is now 3" in line
    assert "latent_dim" not in line


def truncate(path):
    path.write_bytes(path.read_bytes()[:100_000])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def write_text(path):
    path.write_text("not a checkpoint\nat all\n")


def change(part, value):
    def tamper(path):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint[part] = value(checkpoint[part])
        torch.save(checkpoint, path)

    return tamper


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("/tmp/this checkpoint ran code",)


def put_code(path):
    torch.save({"settings": Malicious()}, path)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_bit,
        write_text,
        put_code,
        change("history", lambda history: {**history, "D_loss": history["D_loss"][:, :1]}),
        change("history", lambda history: {**history, "G_loss": history["G_loss"][:0]}),
        change("history", lambda history: {**history, "seconds": []}),
        change("D", lambda state: {**state, "layers.1.weight": torch.zeros(3, 3)}),
        change("G_optimizer", lambda state: {}),
        change("settings", lambda settings: None),
    ],
)
def test_a_damaged_checkpoint_is_one_line_and_is_left_alone(damage, cut, tmp_path, capsys):
    train(tmp_path, "--epochs", 1, data=cut)
    path = tmp_path / "gan" / "checkpoint.pt"
    damage(path)
    kept = path.read_bytes()
    line = failure(1, capsys, *QUICK, "--data", cut, "--outputs", tmp_path)
    assert str(path) in line and "damaged or not ours" in line and "--fresh" in line
    assert path.read_bytes() == kept and not Path("/tmp/this checkpoint ran code").exists()


def test_a_checkpoint_of_the_other_model(cut, tmp_path, capsys):
    train(tmp_path, "--epochs", 1, data=cut)
    (tmp_path / "dcgan").mkdir()
    shutil.copy(tmp_path / "gan" / "checkpoint.pt", tmp_path / "dcgan")
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        train(tmp_path, "--epochs", 1, model=dcgan, data=cut)
    line = capsys.readouterr().err
    assert raised.value.code == 1 and line.count("\n") == 1 and "model was GAN, is now DCGAN" in line


def test_a_loss_that_is_not_finite_stops_the_run(cut, tmp_path, capsys, monkeypatch):
    before = train(tmp_path, "--epochs", 1, data=cut)
    step, calls = common.train_step, iter(range(100))

    def broken_step(*arguments):
        losses = step(*arguments)
        return {**losses, "G_loss": losses["G_loss"] * (float("nan") if next(calls) == 1 else 1)}

    monkeypatch.setattr(common, "train_step", broken_step)
    with pytest.raises(SystemExit) as raised:
        train(tmp_path, "--epochs", 5, data=cut)
    line = capsys.readouterr().err.splitlines()[-1]
    assert raised.value.code == 1 and "epoch 2" in line and "not finite" in line and "--learning-rate" in line
    assert_same(before, torch.load(tmp_path / "gan" / "checkpoint.pt", weights_only=True))


def test_a_loss_that_runs_away_is_said_once(cut, tmp_path, capsys, monkeypatch):
    step = common.train_step

    def run_away(*arguments):
        return {**step(*arguments), "D_loss": torch.tensor(3e6)}

    train(tmp_path, "--epochs", 1, data=cut)
    monkeypatch.setattr(common, "train_step", run_away)
    capsys.readouterr()
    train(tmp_path, "--epochs", 4, data=cut)
    assert capsys.readouterr().err.count("warning: a loss has run away") == 1


def test_a_changed_layer_is_said_to_be_one(cut, tmp_path, capsys, monkeypatch):
    train(tmp_path, "--epochs", 1, data=cut)

    class Narrower(gan.Discriminator):
        def __init__(self):
            super().__init__()
            self.layers[3], self.layers[5] = nn.Linear(512, 200), nn.Linear(200, 1)

    monkeypatch.setattr(gan, "Discriminator", Narrower)
    line = failure(1, capsys, *QUICK, "--data", cut, "--outputs", tmp_path)
    assert "another network" in line and "damaged" not in line and "--fresh" in line and "--outputs" in line
    assert "D.layers.3 was Linear(in_features=512, out_features=256" in line and "out_features=200" in line
    assert "layers.1 " not in line


def test_a_setting_that_an_older_checkpoint_does_not_know(cut, tmp_path, capsys):
    train(tmp_path, "--epochs", 1, data=cut)
    path = tmp_path / "gan" / "checkpoint.pt"
    change("settings", lambda settings: {k: v for k, v in settings.items() if k != "r1_gamma"})(path)
    line = failure(1, capsys, *QUICK, "--data", cut, "--outputs", tmp_path)
    assert "r1_gamma was unknown, is now 1.0" in line and "damaged" not in line


def test_a_data_path_that_is_a_file(cut, tmp_path, capsys):
    (tmp_path / "images.gz").write_text("")
    line = failure(1, capsys, "--data", tmp_path / "images.gz", "--outputs", tmp_path)
    assert f"--data {tmp_path / 'images.gz'} is a file" in line and "folder" in line


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        seed = random.randrange(1000)
        print("seed", seed)
        script, kills, epochs, longest = sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4])
        found = kill_and_compare(script, kills, epochs, longest, Path(folder), random.Random(seed))
        print("the same as a run never killed; epochs found done at each start:", found)
