"""Data sets as folders of PNG files: the same images, and a folder that is whole or absent."""

import torch
from PIL import Image

import datasets


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
