"""From the network to pictures: levels, PNG files, grids, points."""

import numpy as np
import pytest
import torch

from flow.sampling.images import grid, read_png, scatter_image, to_uint8, write_png


def test_all_levels_go_to_the_network_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(to_uint8(levels.to(dtype) / 127.5 - 1), levels)


def test_to_uint8_rounds_and_clamps():
    """To uint8 rounds to the nearest level and clamps."""
    x = torch.tensor([-9.0, -1.0, -0.999, 0.6 / 127.5 - 1, 1 - 0.6 / 127.5, 1 - 0.4 / 127.5, 1.0, 9.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 254, 255, 255, 255]
    assert to_uint8(torch.zeros(2, 3)).dtype == torch.uint8 and to_uint8(torch.zeros(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path, channels):
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    write_png(tmp_path / "a.png", image)
    assert np.array_equal(read_png(tmp_path / "a.png"), image.permute(1, 2, 0).numpy())
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(FileNotFoundError):
        write_png(tmp_path / "absent" / "a.png", image)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid(channels):
    """Five images in three columns: each in its cell, row by row, with gray lines between, enlarged by whole pixels."""
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, channels, 8, 6) * 10
    picture = grid(images, 3)
    height, width = 2 * 8 + 3, 3 * 6 + 4
    zoom = 19  # 400 / 22, rounded up
    assert picture.shape == (channels, height * zoom, width * zoom) and picture.dtype == torch.uint8
    small = picture[:, ::zoom, ::zoom]
    assert torch.equal(small.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2), picture)
    for k in range(5):
        top, left = 1 + 9 * (k // 3), 1 + 7 * (k % 3)
        assert small[:, top : top + 8, left : left + 6].eq(10 * k).all()
    assert small[:, 0].eq(128).all() and small[:, :, 0].eq(128).all()


def test_the_picture_of_points():
    cloud = scatter_image(torch.tensor([[0.0, 2.0], [9.0, 9.0]]), side=50)
    assert cloud.shape == (1, 50, 50) and cloud[0, 5, 25] == 0 and cloud[0, 40].min() == 255
