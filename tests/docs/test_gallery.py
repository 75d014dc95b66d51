"""The gallery: its page shows the commands that it runs, its pictures are there and follow their weights."""

import os
import re
import shlex
from pathlib import Path

import pytest
from conftest import REPOSITORY

from scripts.dev import gallery

PAGE = (REPOSITORY / "docs" / "gallery.md").read_text(encoding="utf-8")


@pytest.fixture
def gallery_commands(monkeypatch, here):
    """gallery_commands(*arguments): what the script would run."""
    run: list[list[str]] = []
    monkeypatch.setattr(gallery, "run_command", run.append)
    monkeypatch.setattr(gallery, "outdated", lambda figures, weights: True)

    def call(*arguments) -> list[list[str]]:
        run.clear()
        here("gallery", *arguments)
        return list(run)

    return call


def test_commands_of_the_gallery_are_those_of_its_page(gallery_commands, monkeypatch):
    monkeypatch.setattr(
        gallery, "train_arguments", lambda config, run, given: ["train.py", "-c", config, "-e", str(run), *given]
    )
    commands = gallery_commands()
    shown = re.sub(r" *\\\n *", " ", PAGE.partition("## The strip")[0])  # which is made of pictures of other pages
    assert [command for command in commands if f"python {shlex.join(command)}\n" not in shown] == []
    assert len(re.findall(r"^python ", shown, re.M)) == len(commands)


def test_every_picture_is_there_and_light():
    shown = {Path(p) for p in re.findall(r'(?:\]\(|src=")(images/[^)"]+)', PAGE)}
    expected = {Path("images/gallery") / e.name / picture for e in gallery.exhibits(Path()) for picture in e.figures}
    assert expected <= shown
    for picture in shown:
        assert (REPOSITORY / "docs" / picture).stat().st_size < 3_000_000


def test_gallery_makes_requested_pictures(gallery_commands, tmp_path):
    """The gallery makes what is asked for, and what that needs."""
    commands = gallery_commands("--only", "reflow", "--runs", tmp_path, "train.steps=3")
    assert [c[0] if c[0] != "-m" else c[1] for c in commands] == [
        "train.py", "scripts.make_pairs", "train.py", "scripts.compare"
    ]  # fmt: skip
    assert all(c[-1] == "train.steps=3" for c in commands if c[0] == "train.py")


def test_outdated_pictures_are_drawn_again(points_flow, tmp_path):
    """Pictures older than their weights are drawn again."""
    weights, picture = points_flow("moons", 1), tmp_path / "flow.gif"
    assert gallery.outdated([picture], [weights])
    picture.write_bytes(b"")
    os.utime(picture, (weights.stat().st_mtime + 5,) * 2)
    assert not gallery.outdated([picture], [weights])
    os.utime(weights, (weights.stat().st_mtime + 10,) * 2)
    assert gallery.outdated([picture], [weights])


def test_unknown_exhibit(error):
    assert "'moon' (choose from " in error("gallery", "--only", "moon")
