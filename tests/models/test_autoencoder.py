"""Codecs: AutoencoderKL as diffusers writes it, memory that is too short."""

import pytest
import torch
from torch import Tensor

from models import autoencoder

pytest.importorskip("diffusers")


def test_a_folder_of_diffusers_is_loaded_as_it_is(vae_folder):
    from diffusers import AutoencoderKL

    theirs, ours = AutoencoderKL.from_pretrained(vae_folder), autoencoder.load(str(vae_folder))
    x = torch.rand(3, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
        assert ours.latent_shape((1, 8, 8)) == tuple(posterior.mean.shape[1:]) == (2, 4, 4)
        for mine, other in zip(ours.encode(x), (posterior.mean, posterior.std), strict=True):
            torch.testing.assert_close(mine, other)
        torch.testing.assert_close(ours.decode(posterior.mean), theirs.decode(posterior.mean).sample)


def test_short_memory_halves_the_batch_then_tiles(vae_folder, monkeypatch):
    """With room for three images a batch of eight is the same in parts; with room for none it goes in tiles, and says so."""
    vae = autoencoder.load(str(vae_folder))
    z = torch.randn(8, 2, 4, 4)
    expected, decode, sizes = vae.decode(z), vae.net.decode, []

    def short(z: Tensor, room: int = 3):
        if len(z) > room or (room == 0 and not vae.net.use_tiling):
            raise torch.OutOfMemoryError
        sizes.append(len(z))
        return decode(z)

    monkeypatch.setattr(vae.net, "decode", short)
    torch.testing.assert_close(vae.decode(z), expected)
    assert sizes == [2, 2, 2, 2]
    monkeypatch.setattr(vae.net, "decode", lambda z: short(z, 1 if vae.net.use_tiling else 0))
    with pytest.warns(UserWarning, match="tiles"):
        assert vae.decode(z[:1]).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("sides", [(16, 16), (12, 20)])
def test_tiles_cover_the_image(monkeypatch, sides):
    """Five levels, so an image of 256 pixels has 16 latents a side: tiles of 8 that overlap by 2."""
    vae = autoencoder.build_vae(1, [4] * 5, 2, 1).eval()
    z = torch.randn(1, 2, *sides)
    whole = vae.decode(z)
    mean, _ = vae.encode(whole)
    for name in ("encode", "decode"):
        monkeypatch.setattr(vae.net, name, full_for_whole_images(vae.net, getattr(vae.net, name)))
    seen = {name: sides_seen_by(getattr(vae.net, f"{name}r")) for name in ("encode", "decode")}
    with pytest.warns(UserWarning, match="tiles"):
        tiled = vae.decode(z)
    assert tiled.isfinite().all()  # its numbers are others, as a tile has norms and attention of its own
    assert tiled.shape == whole.shape and vae.encode(whole)[0].shape == mean.shape
    for tiles, longest in ((seen["decode"], max(sides)), (seen["encode"], max(whole.shape[-2:]))):
        assert len(tiles) > 1 and max(map(max, tiles)) <= longest // 2


def sides_seen_by(module) -> list[tuple[int, ...]]:
    """Height and width of what the module is called with, filled by later calls."""
    seen: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    return seen


def full_for_whole_images(net, function):
    """`function` with a memory that holds no whole image, only tiles."""

    def short(x: Tensor):
        if not net.use_tiling:
            raise torch.OutOfMemoryError
        return function(x)

    return short
