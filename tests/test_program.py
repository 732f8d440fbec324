"""The program belongs to the run: an experiment is told apart from a mistake."""

import importlib
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL_GRID, files_in, read_history, refused, run, train

import common
import dcgan
import gan


class Project:
    """A student's copy of gan.py and common.py, which may be edited. What runs is the code of the
    repository; that is enough to see what a run says of the program as it lies there."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.monkeypatch = monkeypatch
        for name in ("gan.py", "common.py"):
            shutil.copy(ROOT / name, folder)
        self.module = SimpleNamespace(
            __name__="gan",
            __file__=str(folder / "gan.py"),
            Generator=gan.Generator,
            Discriminator=gan.Discriminator,
        )

    def edit(self, file, old, new):
        text = (self.folder / file).read_text()
        assert text.count(old) == 1, old
        text = text.replace(old, new)
        (self.folder / file).write_text(text)
        if file == "common.py":  # as after a new start of Python
            self.monkeypatch.setattr(common, "TEXT", text)

    def line_of(self, file, text):
        lines = (self.folder / file).read_text().splitlines()
        (number,) = [i for i, line in enumerate(lines, 1) if text in line]
        return number


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.setattr(common, "__file__", str(folder / "common.py"))
    return Project(folder, monkeypatch)


def test_what_does_not_decide_the_numbers_may_change(project, trained, data):
    """Comments, blank lines, docstrings, layout, and functions that only draw or write."""
    project.edit("gan.py", "nn.Tanh(),", "\n            # white is 1\n            nn.Tanh( ),")
    project.edit("gan.py", '"""G: latent vectors z', '"""The generator.\n\n    G: latent vectors z')
    project.edit(
        "common.py",
        "    G, D = training.G, training.D\n",
        "    # both\n    G, D = training.G, training.D\n",
    )
    project.edit(
        "common.py",
        "torch.cat([real, fake.detach()])",
        "torch.cat(\n            [real, fake.detach()]\n        )",
    )
    project.edit("common.py", '"Generator", "tab:orange"', '"Generator", "tab:green"')
    project.edit("common.py", "of all random numbers", "of the random numbers")
    train(project.module, trained, data, "--epochs", 3)
    assert len(read_history(trained / "gan")) == 3


EDITS = {
    "loss": ("common.py", "F.softplus(-logits_for_G).mean()", "(logits_for_G - 1).square().mean()"),
    "constant": ("common.py", "fake_logits).mean()) / 2", "fake_logits).mean()) / 3"),
    "helper": ("common.py", "images / 127.5 - 1", "images / 127.5 - 0.9"),
    "optimizer": (
        "common.py",
        "G_optimizer = torch.optim.Adam(",
        "G_optimizer = torch.optim.AdamW(",
    ),
    "forward": ("gan.py", "return self.layers(z)", "return -self.layers(z)"),
    "layer": ("gan.py", "nn.Linear(512, 256)", "nn.Linear(512, 256, bias=False)"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("epochs", [2, 3], ids=["nothing to train", "to go on"])
def test_a_changed_program_is_refused_and_the_line_named(edit, epochs, project, trained, data):
    file, old, new = EDITS[edit]
    number = project.line_of(file, old)
    project.edit(file, old, new)
    before = files_in(trained / "gan")
    line = refused(project.module, trained, data, "--epochs", epochs)
    assert f"{file} line {number} before: " in line
    assert f"{file} line {number} now: " in line
    assert old in line.split(" now: ")[0]
    assert new in line.split(" now: ")[1]
    assert line.count(" line ") == 2  # only what is changed
    assert "undo that, or give another --outputs" in line
    assert files_in(trained / "gan") == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # Once an epoch, not in each step; every word is the same.
        (
            "                update_average(G_ema, G, step)\n                bar.update()\n",
            "            update_average(G_ema, G, step)\n            bar.update()\n",
        ),
        (
            "            G.train()\n            D.train()\n",
            "            D.train()\n            G.train()\n",
        ),
    ],
    ids=["out of the loop", "other order"],
)
def test_a_line_that_was_moved_is_refused(old, new, project, trained, data):
    project.edit("common.py", old, new)
    line = refused(project.module, trained, data, "--epochs", 3)
    assert "common.py line " in line


@pytest.mark.parametrize("layout", ["module", "package", "folder of modules", "link"])
def test_a_module_of_ones_own_belongs_to_the_program(layout, project, data, tmp_path, monkeypatch):
    module = {"module": "own_blocks", "link": "own_blocks"}.get(layout, "own.blocks")
    path = project.folder / f"{module.replace('.', '/')}.py"
    path.parent.mkdir(exist_ok=True)
    if layout == "package":
        (path.parent / "__init__.py").write_text("")
    path.write_text("slope = 0.2\n")
    (project.folder / "not_imported.py").write_text("")
    (project.folder / "csv").mkdir()  # a folder of data with the name of a module
    if layout == "link":
        (tmp_path / "links").mkdir()
        (tmp_path / "links" / "gan.py").symlink_to(project.folder / "gan.py")
        project.module.__file__ = str(tmp_path / "links" / "gan.py")
    monkeypatch.syspath_prepend(str(project.folder))
    monkeypatch.chdir(project.folder)  # as a user, whose folder it is
    importlib.import_module(module)  # as gan.py would
    folder = train(project.module, tmp_path, data, "--epochs", 1)
    name = path.relative_to(project.folder).as_posix()
    own = {found.relative_to(folder).as_posix() for found in folder.rglob("*.py")}
    assert own - {"own/__init__.py"} == {"gan.py", name, "common.py"}
    path.write_text("# by how much\nslope = 0.2\n")
    train(project.module, tmp_path, data, "--epochs", 1)  # nothing to train
    path.write_text("slope = 0.3\n")
    line = refused(project.module, tmp_path, data, "--epochs", 1)
    for imported in list(sys.modules):
        if imported.startswith("own"):
            del sys.modules[imported]
    assert f"{name} line 1 before: slope = 0.2" in line
    assert f"{name} line 1 now: slope = 0.3" in line


def test_common_py_edited_in_a_notebook_that_goes_on_with_the_old_one(project, trained, data):
    path = project.folder / "common.py"
    path.write_text(path.read_text() + "\n")
    assert "start Python anew" in refused(project.module, trained, data, "--epochs", 3)


FIRST = "self.layers = nn.Sequential(\n            nn.Linear(latent_dim"
FORWARD = "return self.layers(z)"
OTHER_GENERATORS = {  # edits of gan.py, and what is said
    "random numbers": ([(FORWARD, "return self.layers(nn.functional.dropout(z, 0.1))")], "random"),
    "layers in a list": (
        [
            ("def forward(self, z)", "more = [nn.Linear(100, 100)]\n\n    def forward(self, z)"),
            (FORWARD, "return self.layers(self.more[0](z))"),
        ],
        "ModuleList",
    ),
    "random numbers that are multiplied by 0 at first": (
        [
            ("from torch import nn", "import torch\nfrom torch import nn"),
            (FIRST, "self.strength = nn.Parameter(torch.zeros(()))\n        " + FIRST),
            (FORWARD, "return self.layers(z + self.strength * torch.randn_like(z))"),
        ],
        "random",
    ),
    "a z that depends on the others": (
        [(FORWARD, "return self.layers(10 * z / z.norm())")],
        "keep latent vectors apart",
    ),
    "another name": ([("class Generator(", "class Decoder(")], "no class of the name Generator"),
    "Dropout": ([("            nn.Linear(128, 256),", "nn.Dropout(), nn.Linear(128, 256),")], ""),
    "another z": ([(FORWARD, "return self.layers((z / 2**0.5).erf())")], ""),
}


@pytest.mark.parametrize("name", OTHER_GENERATORS)
def test_a_generator_that_cannot_be_made_again_is_refused_before_training(
    name, project, data, tmp_path
):
    edits, said = OTHER_GENERATORS[name]
    for old, new in edits:
        project.edit("gan.py", old, new)
    text = (project.folder / "gan.py").read_text()
    names = {"__name__": "gan"}
    exec(text, names)
    project.module.Generator = names.get("Generator", gan.Generator)
    if said:
        assert said in refused(project.module, tmp_path, data, "--epochs", 1)
        assert not list(tmp_path.rglob("*.png"))
    else:
        assert read_history(train(project.module, tmp_path, data, "--epochs", 1))


def test_a_generator_that_is_not_that_of_the_script_is_refused(project, data, tmp_path):
    class Negative(gan.Generator):
        def forward(self, z):
            return -super().forward(z)

    project.module.Generator = Negative
    assert "give this class to common.main" in refused(project.module, tmp_path, data)


def test_a_script_that_trains_whenever_it_is_imported_is_refused(project, data, tmp_path):
    project.edit("gan.py", 'if __name__ == "__main__":\n    common.main', "common.main")
    argv = ["--outputs", str(tmp_path), "--data", str(data), "--epochs", "1"]
    project.monkeypatch.setattr(sys, "argv", ["gan.py", *argv])
    line = refused(project.module, tmp_path, data, "--epochs", 1)
    assert '`if __name__ == "__main__":`' in line
    assert not list(tmp_path.rglob("*.png"))


def changes(before, now):
    """What is named of a program of one file."""
    runs = [{"settings": {}, "program": {"gan.py": text}} for text in (before, now)]
    return common.find_changes(*runs, ["before", "now"])


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("x = a - b\n", "x = a\n- b\n"),  # every word is the same, but not the statement
        ('x = """lr 1"""\n', 'x = """lr 2"""\n'),  # no docstring
        ('x = """\n# lr 1\n"""\n', 'x = """\n# lr 2\n"""\n'),  # nor a comment
        ("if a:\n    x\n    y\n", "if a:\n    x\ny\n"),
        ("x()\ny()\n", "y()\nx()\n"),
    ],
)
def test_changes_that_are_easily_overlooked(before, now):
    assert changes(before, now)
    assert changes(now, before)


@pytest.mark.parametrize(
    "docstring", ["'It.'", '"It."', "'''It.'''", '"""It.\n\n    A."""', 'r"It."']
)
def test_a_docstring_in_any_quotes_does_not_count(docstring):
    with_docstring = f"def f():\n    {docstring}\n    return 1\n"
    assert changes("def f():\n    return 1\n", with_docstring) == []


@pytest.mark.parametrize(
    "text", ['"""\n    old()\n    """', '"It."\n    "And more."', '""\n    """x"""']
)
def test_neither_does_any_other_text_that_stands_alone(text):
    """Such as lines that somebody has put between quotes."""
    code = "def f():\n    x = 1\n    return x\n"
    assert changes(code, code.replace("    return", f"    {text}\n    return")) == []
    assert changes(code, code.replace("    x =", f"    {text}\n    x =")) == []


def test_beside_a_longer_docstring_only_the_changed_line_is_named():
    before = 'def f():\n    """It."""\n    return 1\n'
    now = 'def f():\n    """It.\n\n    a\n    b\n    c\n    d\n    e\n    """\n    return 2\n'
    assert changes(before, now) == [
        "gan.py line 3 before: return 1",
        "gan.py line 10 now: return 2",
    ]


def test_in_a_long_file_only_the_changed_lines_are_named():
    before = "".join(f"layer({i})\nactivation()\n" for i in range(200))
    now = before.replace("layer(7)", "layer(7.5)").replace("layer(150)", "layer(150.5)")
    assert changes(before, now) == [
        "gan.py line 15 before: layer(7)",
        "gan.py line 15 now: layer(7.5)",
        "gan.py line 301 before: layer(150)",
        "gan.py line 301 now: layer(150.5)",
    ]


def test_a_script_that_was_edited_while_python_was_starting():
    """What lies there then may be no Python at all."""
    assert changes("x = = 1\n", "x = 1\n") == [
        "gan.py line 1 before: x = = 1",
        "gan.py line 1 now: x = 1",
    ]


def test_what_is_installed_below_the_script_is_not_ones_own(tmp_path, monkeypatch):
    """As in .venv, where the README has it."""
    script = tmp_path / "gan.py"
    script.write_text("")
    for folder in [".venv/lib/site-packages", "my-site-packages"]:
        path = tmp_path / folder / "thing.py"
        path.parent.mkdir(parents=True)
        path.write_text("")
        monkeypatch.setitem(sys.modules, folder, SimpleNamespace(__file__=str(path)))
    program = common.read_program(script)
    assert program.keys() == {"gan.py", "common.py", "my-site-packages/thing.py"}


def test_a_line_that_is_there_once_more_is_named():
    before = "layer(0.2)\nother()\n"
    more = before + "layer(0.2)\n"
    assert changes(before, more) == ["gan.py line 3 now: layer(0.2)"]
    assert changes(more, before) == ["gan.py line 3 before: layer(0.2)"]


def test_a_script_in_another_encoding_and_with_a_mark_of_its_encoding(project, trained, data):
    text = (project.folder / "gan.py").read_text()
    (project.folder / "gan.py").write_bytes(f"\ufeff{text}".encode())  # as Windows' editor does
    train(project.module, trained, data, "--epochs", 2)
    chinese = f"# coding: gbk\n# \u751f\u6210\u5668\n{text}"
    (project.folder / "gan.py").write_bytes(chinese.encode("gbk"))
    train(project.module, trained, data, "--epochs", 3)
    assert len(read_history(trained / "gan")) == 3


def test_a_run_is_drawn_by_the_modules_beside_its_script(trained, data):
    """Whatever those of the same names are today."""
    folder = trained / "gan"
    text = (folder / "gan.py").read_text()
    text = text.replace("# isort: split", "import blocks\n").replace(
        "nn.LeakyReLU(0.2)", "blocks.activation()"
    )
    (folder / "gan.py").write_text(text)
    (folder / "blocks.py").write_text("from common import activation\n")
    (folder / "common.py").write_text(
        "from torch import nn\ndef activation(): return nn.LeakyReLU(0.2)\n"
    )
    drawn = files_in(folder)
    for path in folder.glob("[rl]*.png"):
        path.unlink()
    assert not hasattr(common, "activation")
    run(gan, trained, data, "--redraw", *SMALL_GRID)
    assert files_in(folder).keys() == drawn.keys()
    assert files_in(folder)["latent_perturbation.png"] == drawn["latent_perturbation.png"]
    assert sys.modules["common"] is common
    (folder / "blocks.py").unlink()
    with pytest.raises(SystemExit, match="error: .*gan.py cannot be run .*blocks"):
        run(gan, trained, data, "--redraw")


def test_another_precision_of_auto_is_named(trained, data, monkeypatch):
    monkeypatch.setattr(common, "FAST_BFLOAT16", not common.FAST_BFLOAT16)
    names = ["float32", "bfloat16"]
    now = names[common.FAST_BFLOAT16]
    before = names[not common.FAST_BFLOAT16]
    assert f"precision {before} before, {now} now" in refused(gan, trained, data, "--epochs", 3)


def test_another_pytorch_goes_on_with_the_same_program(trained, data, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99")
    train(gan, trained, data, "--epochs", 3)
    assert len(read_history(trained / "gan")) == 3


def test_a_checkpoint_of_the_other_model(trained, data):
    (trained / "gan").rename(trained / "dcgan")
    line = refused(dcgan, trained, data, "--epochs", 3)
    assert "gan.py line" in line
    assert " more" in line  # of so many lines some are named
