"""Data sets as folders of PNG files: the same images, and a folder that is whole or absent."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from configs.errors import UserError
from datasets.images import Images
from datasets.shards import MANIFEST, save_shard
from scripts import export_images


def test_broken_image_leaves_no_folder(here, error, tmp_path):
    """Mended, the same command writes the folder."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for k in range(3):
        Image.frombytes("L", (8, 8), bytes(range(40 * k, 40 * k + 64))).save(source / f"{k}.png")
    whole = (source / "1.png").read_bytes()
    (source / "1.png").write_bytes(whole[:40])
    command = ["export_images", "--save_dir", out, "data.name=folder", f"data.args={{path: {source}, channels: 1}}"]
    assert f"data: {source / '1.png'}: not a readable image" in error(*command)
    assert list(tmp_path.iterdir()) == [source]
    (source / "1.png").write_bytes(whole)
    assert f"3 images in {out}" in here(*command)
    assert sorted(tmp_path.iterdir()) == [out, source]
    before, after = (datasets.build("folder", None, {"path": str(path), "channels": 1}) for path in (source, out))
    assert len(after) == 3 and all(torch.equal(after[k][0], before[k][0]) for k in range(3))
    assert f"--save_dir {out}: exists already" in error(*command)
    assert "train.steps: only keys of data have a meaning here" in error(*command, "train.steps=5")


@pytest.mark.parametrize("names", [("a/b", "a-b"), (".hidden", "seen"), ("..", "seen")])
def test_classes_that_name_no_folders(names, tmp_path):
    """Two of them would become one, or would not be read again."""
    data = Images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.arange(2), names)
    with pytest.raises(UserError, match="do not name folders"):
        export_images.export(SimpleNamespace(n_images=None, size=None), None, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_size_of_the_files(here, tmp_path):
    """--size enlarges 8x8 digits, by a filter that keeps their brightness; without it they stay as they are."""
    images = {}
    for size in (8, 16):
        given = ["--size", size] if size != 8 else []
        here("export_images", "--save_dir", tmp_path / str(size), "--n_images", "5", *given, "data.name=digits")
        data = datasets.build("folder", None, {"path": str(tmp_path / str(size)), "channels": 1})
        assert len(data) == 5 and data.image_shape == (1, size, size)
        images[size] = torch.stack([data[k][0] for k in range(5)]).float()
    digits = datasets.build("digits", None, {})
    assert torch.equal(images[8].byte(), digits.images[digits.labels[:5].argsort(stable=True)])
    shrunk = torch.nn.functional.avg_pool2d(images[16], 2)
    assert (shrunk - images[8]).abs().mean() < 20 and not torch.equal(shrunk, images[8])


def test_images_that_are_not_square_are_cropped(here, tmp_path):
    """To the central square, as data.args.size does."""
    (tmp_path / "in").mkdir()
    pixels = np.zeros((8, 16), dtype=np.uint8)
    pixels[:, 4:12] = 200
    Image.fromarray(pixels).save(tmp_path / "in/wide.png")
    data = ["data.name=folder", f"data.args={{path: {tmp_path / 'in'}, channels: 1}}"]
    here("export_images", "--save_dir", tmp_path / "out", "--size", 8, *data)
    (file,) = (tmp_path / "out").iterdir()
    assert (np.asarray(Image.open(file)) == 200).all()


def test_unlabelled_pairs_have_no_class_folders(here, tmp_path):
    """Their manifest names the classes of the real images all the same."""
    pairs, out = tmp_path / "pairs", tmp_path / "out"
    pairs.mkdir()
    save_shard(pairs / "generated_00000.safetensors", {"images": torch.zeros(2, 1, 8, 8, dtype=torch.float16)})
    manifest = {"seed": 0, "generated": 2, "inverted": 0, "shard_pairs": 2, "class_names": ["cat", "dog"]}
    manifest |= {"data": {"name": "digits", "root": None, "args": {}}}
    (pairs / MANIFEST).write_text(json.dumps(manifest))
    assert f"2 images in {out}" in here("export_images", "--save_dir", out, "data.name=pairs", f"data.args.path={pairs}")
    assert sorted(path.name for path in out.iterdir()) == ["000000.png", "000001.png"]
    assert datasets.build("folder", None, {"path": str(out), "channels": 1}).labels is None
