"""A folder of images that is made of links: to folders of classes elsewhere, in a circle, and to nowhere."""

from pathlib import Path

import pytest
from PIL import Image

import datasets


@pytest.fixture
def linked(tmp_path) -> Path:
    """Classes a, a folder, b, a link to one, and c, a link to that too; b also holds links back to all of them."""
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for place in (folder / "a", elsewhere / "inner"):
        place.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(place / "0.png")
    (folder / "b").symlink_to(elsewhere)
    (folder / "c").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    return folder


def test_linked_folders_are_classes(linked):
    data = datasets.build("folder", None, {"path": str(linked)})
    assert data.class_names == ("a", "b", "c")
    names = [data.name_of(k) for k in range(len(data))]
    assert {"a/0.png", "b/inner/0.png", "c/inner/0.png"} <= set(names) and len(names) == len(set(names)) < 20


def test_links_that_lead_nowhere_are_named(tmp_path):
    """Also one to itself; an image is not asked for under a name that only a link has."""
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    for name in ("cats", "circle", "1.png"):
        (tmp_path / name).symlink_to(tmp_path / ("circle" if name == "circle" else "gone"))
    data = datasets.build("folder", None, {"path": str(tmp_path)})
    assert len(data) == 1 and "skipped 3 files (1.png, cats, circle)" in data.notes[0]
