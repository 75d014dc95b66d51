"""Autoencoders: images [B, C, H, W] in [-1, 1] to latents [B, c, h, w] and back.

A flow on latents is trained on x1 = (z - shift) / scale, where z is drawn from the posterior N(mean, std^2) of an
autoencoder (Rombach et al. 2022, arXiv:2112.10752, section 3.1) and shift and scale make x1 standard in each channel. The
description of a codec is a dict that caches and snapshots carry: name, source (folder or hub id), digest (of the weights),
shift and scale (one number a channel) and image_shape (of what it decodes to).

`diffusers` is imported where an autoencoder is loaded or built, and nowhere else.
"""

import hashlib
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.layers import check_counts

INSTALL = "autoencoders need the package diffusers: pip install -r requirements-latent.txt"


class VAE(nn.Module):
    """diffusers.AutoencoderKL as a codec. A batch that runs out of memory is halved; an image that is too large alone is
    encoded and decoded in overlapping tiles of about half its sides, with a warning, as their seams are blended."""

    def __init__(self, net: nn.Module, shift: Sequence[float] = (0.0,), scale: Sequence[float] = (1.0,)):
        super().__init__()
        self.net = net
        self.channels, self.latent_channels = net.config.in_channels, net.config.latent_channels
        self.factor = 2 ** (len(net.config.block_out_channels) - 1)  # of downsampling
        self.max_batch = sys.maxsize  # images at once; lowered when the memory is full
        self.register_buffer("shift", torch.tensor(shift, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For training: images [B, C, H, W] and standard normal noise [B, c, h, w] -> the decoded mean + std noise, mean and
        std. With gradients."""
        with _precision(images.device):
            posterior = self.net.encode(images).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            return self.net.decode(mean + std * noise).sample.float(), mean, std

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std [B, c, h, w] of the posterior, float32, of images [B, C, H, W] in [-1, 1]; not normalised."""
        self.to(images.device)

        def moments(part: Tensor) -> Tensor:
            with _precision(images.device):
                posterior = self.net.encode(part.float()).latent_dist
            return torch.cat([posterior.mean.float(), posterior.std.float()], dim=1)

        latent_side = max(images.shape[-2:]) // self.factor
        mean, std = self._split_on_oom(moments, images, latent_side).chunk(2, dim=1)
        return mean, std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, C, H, W], float32, about [-1, 1], of normalised latents (z - shift) / scale [B, c, h, w]."""
        self.to(latents.device)

        def decoded(part: Tensor) -> Tensor:
            with _precision(latents.device):
                return self.net.decode(part.float() * self.scale + self.shift).sample.float()

        return self._split_on_oom(decoded, latents, max(latents.shape[-2:]))

    def to_latents(self, images: Tensor) -> Tensor:
        """Normalised latents (mean - shift) / scale [B, c, h, w], float32, of images [B, C, H, W] in [-1, 1]; `decode` takes
        them back. Raises ValueError as `latent_shape` does."""
        channels, height, width = images.shape[1:]
        self.latent_shape((channels, height, width))
        mean, _ = self.encode(images)  # which moves shift and scale to the device
        return (mean - self.shift) / self.scale

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Raises ValueError for images that the autoencoder does not take."""
        channels, height, width = image_shape
        if channels != self.channels:
            raise ValueError(
                f"the autoencoder takes images of {self.channels} channel(s), these have {channels}; a folder can be read "
                f"with data.args.channels={self.channels}"
            )
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"images of {height}x{width} pixels: the sides must be divisible by {self.factor} for this autoencoder"
            )
        return self.latent_channels, height // self.factor, width // self.factor

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, whatever file they came from."""
        digest = hashlib.sha256()
        for name, value in sorted(self.net.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)}".encode() + value.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """In the format of diffusers: config.json and diffusion_pytorch_model.safetensors."""
        self.net.save_pretrained(folder)

    def _split_on_oom(self, function: Callable[[Tensor], Tensor], batch: Tensor, latent_side: int) -> Tensor:
        if len(batch) > self.max_batch:
            parts = batch.split(self.max_batch)
            return torch.cat([self._split_on_oom(function, part, latent_side) for part in parts])
        try:
            return function(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1 and self.net.use_tiling:
                raise
        if len(batch) > 1:
            self.max_batch = len(batch) // 2
            return self._split_on_oom(function, batch, latent_side)
        warnings.warn("out of memory for one image: the autoencoder works in tiles from now on", stacklevel=3)
        self._enable_tiling(latent_side)
        return function(batch)

    def _enable_tiling(self, latent_side: int) -> None:
        """Tiles of half the longer side. diffusers takes them from the configured sample_size, which need not fit the images;
        with sides divisible by 4 its quarter of overlap is a whole number of latents."""
        tile = 4 * max(1, latent_side // 8)
        self.net.tile_latent_min_size = tile
        self.net.tile_sample_min_size = tile * self.factor
        self.net.enable_tiling()


def build_codec(description: dict[str, Any]) -> VAE:
    """The codec of a description.

    Raises ValueError for an autoencoder that cannot be loaded and for one whose weights are not those of the description.
    """
    if description["name"] != "vae":
        raise ValueError(f"unknown codec {description['name']!r}; choose vae")
    vae = load(description["source"], description["shift"], description["scale"])
    if vae.digest != description["digest"]:
        raise ValueError(
            f"{description['source']}: is not the autoencoder of these latents (its weights have the digest "
            f"{vae.digest[:12]}, expected {description['digest'][:12]})"
        )
    return vae


def load(source: str, shift: Sequence[float] = (0.0,), scale: Sequence[float] = (1.0,)) -> VAE:
    """The AutoencoderKL in a folder that `save_pretrained` wrote, or on the hub: owner/name, or owner/name/subfolder.

    Raises ValueError that names the source for whatever is not a whole AutoencoderKL.
    """
    autoencoder = _autoencoder_kl()
    path, parts = Path(source), source.split("/")
    if not path.is_dir() and (path.is_absolute() or source.startswith(".") or len(parts) < 2):
        raise ValueError(f"{source}: there is no such folder; give one that save_pretrained wrote, or a hub id owner/name")
    place, inner = (source, {}) if path.is_dir() else ("/".join(parts[:2]), {"subfolder": "/".join(parts[2:])})
    try:
        kind = autoencoder.load_config(place, **inner).get("_class_name")
        if kind != "AutoencoderKL":
            raise ValueError(f"its config.json is of {kind}")
        net, info = autoencoder.from_pretrained(place, output_loading_info=True, torch_dtype=torch.float32, **inner)
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(f"its weights lack {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
    except Exception as error:  # files, hub, config and shapes fail in a dozen ways
        place = "" if path.is_dir() else "there is no such folder here, and on the hub: "
        raise ValueError(f"{source}: {place}not a whole AutoencoderKL ({_first_line(error)})") from None
    return VAE(net.eval().requires_grad_(False), shift, scale)


def build_vae(image_channels: int, channels: Sequence[int], latent_channels: int, blocks: int) -> VAE:
    """An untrained VAE: `channels` of each resolution (the images get 2^(len - 1) times smaller), `blocks` residual blocks
    each. Raises ValueError for numbers that make no network."""
    check_counts(latent_channels=latent_channels, blocks=blocks)
    if not channels or any(not isinstance(c, int) or c < 4 or c % 4 for c in channels):
        raise ValueError(f"channels={list(channels)}: must be whole numbers divisible by 4, one for each resolution")
    levels = len(channels)
    net = _autoencoder_kl()(
        in_channels=image_channels,
        out_channels=image_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(channels),
        layers_per_block=blocks,
        latent_channels=latent_channels,
        norm_num_groups=math.gcd(32, *(c // 4 for c in channels)),  # of at least 4 channels
        scaling_factor=1.0,
    )
    return VAE(net)


def _autoencoder_kl():
    try:
        from diffusers import AutoencoderKL
        from diffusers.utils import logging
    except ImportError:
        raise ValueError(INSTALL) from None
    logging.set_verbosity_error()
    return AutoencoderKL


def _precision(device: torch.device):
    """Published autoencoders overflow in float16: under its autocast they work in float32."""
    if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
