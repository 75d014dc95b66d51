"""What --reference, --source and restore's --images may name."""

import pytest
from PIL import Image

from datasets import DataSpec
from flow.sampling import named_data

SHAPE = (3, 8, 8)


def test_grid_of_sample_is_no_image(tmp_path):
    for name in ("grid.png", "images/000000.png", "images/000001.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert len(named_data.spec_of(str(tmp_path), None, SHAPE).build()) == 3
    (tmp_path / "sampling.json").write_text("{}")
    assert len(named_data.spec_of(str(tmp_path), None, SHAPE).build()) == 2


def test_folders_below_the_root(tmp_path):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "images_0.safetensors").touch()
    (tmp_path / "pairs").mkdir()  # also the name of a kind of data, which needs a path
    assert named_data.spec_of("packed", tmp_path, SHAPE) == DataSpec("packed", tmp_path, {"path": "packed"})
    assert named_data.spec_of("pairs", tmp_path, SHAPE) == DataSpec.of_folder(tmp_path / "pairs", SHAPE)


def test_names(tmp_path):
    assert named_data.spec_of("mnist:test", tmp_path, SHAPE) == DataSpec("mnist", tmp_path, {"train": False})
    with pytest.raises(ValueError, match="nowhere: there is no such folder of images, and no such data set; data sets: digits"):
        named_data.spec_of("nowhere", tmp_path, SHAPE)
    (tmp_path / "images.tar").touch()
    with pytest.raises(ValueError, match=r"images\.tar: is a file; name a folder of images, or one of the data sets digits"):
        named_data.spec_of("images.tar", tmp_path, SHAPE)
    with pytest.raises(ValueError, match=f"{tmp_path}: must be toys:SHAPE"):
        named_data.spec_of(str(tmp_path), None, (2,))
