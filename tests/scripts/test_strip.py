"""A strip of pictures: each at the height asked for, animations side by side."""

import numpy as np
from PIL import Image


def test_animations_beside_a_picture(here, error, tmp_path):
    """The shorter animation holds its last frame."""
    gray = [Image.fromarray(np.full((20, 30, 3), value, dtype=np.uint8)) for value in (0, 60, 120, 180)]
    gray[0].save(tmp_path / "long.gif", save_all=True, append_images=gray[1:])
    gray[0].save(tmp_path / "short.gif", save_all=True, append_images=gray[1:2])
    gray[3].resize((40, 40)).save(tmp_path / "still.png")
    pictures = [tmp_path / name for name in ("long.gif", "short.gif", "still.png")]
    printed = here("strip", "--pictures", *pictures, "--height", 40, "--out", tmp_path / "new/strip.webp")
    assert "4 frames of 184x40 pixels" in printed  # 60 + 60 + 40 and two gaps
    with Image.open(tmp_path / "new/strip.webp") as strip:
        strip.seek(strip.n_frames - 1)
        last = np.asarray(strip.convert("RGB"))[20, [5, 65, 100, 170], 0]
    assert np.abs(last.astype(int) - [180, 255, 60, 180]).max() < 8
    (tmp_path / "notes.txt").write_text("no picture")
    line = error("strip", "--pictures", tmp_path / "notes.txt", "--out", tmp_path / "strip.webp")
    assert f"--pictures {tmp_path / 'notes.txt'}: is no picture" in line
