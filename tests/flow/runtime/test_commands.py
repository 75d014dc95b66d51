"""Command lines that scripts run."""

import os
import shlex
import sys
from pathlib import Path

import pytest

from flow.runtime import commands
from flow.runtime.commands import evaluate_arguments


def test_flags_of_evaluate():
    """One value, several, none, and a flag without a value; a zero is a value."""
    flags = {"methods": ["euler", "heun"], "guidance_interval": (0.2, 1.0), "seed": 0, "nfe": None, "no_control": True}
    assert evaluate_arguments("run", Path("out"), ["data.root=/data"], **flags) == [
        "evaluate.py", "--weights", "run", "--methods", "euler", "heun", "--guidance_interval", "0.2", "1.0", "--seed", "0",
        "--no_control", "--out", "out", "data.root=/data",
    ]  # fmt: skip


@pytest.fixture
def elsewhere(monkeypatch, tmp_path) -> Path:
    """A repository that is not the present folder, which has a train.py and a package `scripts` of its own."""
    root, folder = tmp_path / "root", tmp_path / "elsewhere"
    for place in (root, folder):
        (place / "scripts").mkdir(parents=True)
        (place / "train.py").touch()
    monkeypatch.setattr(commands, "REPOSITORY", root)
    monkeypatch.chdir(folder)
    return root


def test_scripts_from_another_folder(elsewhere, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert commands.resolved("train.py", "-e", Path("run")) == [str(elsewhere / "train.py"), "-e", "run"]
    assert commands.command("train.py").endswith(f" {elsewhere / 'train.py'}")
    assert shlex.split(commands.command("-m", "scripts.animate"))[0] == f"PYTHONPATH={elsewhere}"
    monkeypatch.setenv("PYTHONPATH", f"/mine:{elsewhere}")
    assert commands.variables(["-m", "scripts.animate"]) == {"PYTHONPATH": f"{elsewhere}:/mine"}
    assert commands.variables(["-m", "pytest"]) == commands.variables(["train.py"]) == {}
    assert commands.resolved("-c", "print()") == ["-c", "print()"]


def test_scripts_in_the_root(elsewhere, monkeypatch):
    """Also where it has another name here."""
    link = elsewhere.with_name("link")
    link.symlink_to(elsewhere)
    for root in (elsewhere, link):
        monkeypatch.chdir(root)
        assert commands.resolved("train.py") == ["train.py"] and commands.variables(["-m", "scripts.animate"]) == {}


@pytest.mark.parametrize(("name", "same"), [("python", True), ("python3.99", False)])
def test_python_is_the_interpreter_that_runs(monkeypatch, tmp_path, name, same):
    """Not another one in its folder."""
    for each in ("python", name):
        (tmp_path / each).write_text("#!/bin/sh\n")
        (tmp_path / each).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, "executable", str(tmp_path / name))
    assert commands.interpreter() == ("python" if same else str(tmp_path / name))


def test_python_of_another_environment(monkeypatch, tmp_path):
    """Both are links to the same file."""
    (tmp_path / "base").write_text("#!/bin/sh\n")
    (tmp_path / "base").chmod(0o755)
    for environment in ("here", "active"):
        (tmp_path / environment).mkdir()
        (tmp_path / environment / "python").symlink_to(tmp_path / "base")
    monkeypatch.setenv("PATH", str(tmp_path / "active"), prepend=os.pathsep)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "here/python"))
    assert commands.interpreter() == str(tmp_path / "here/python")
