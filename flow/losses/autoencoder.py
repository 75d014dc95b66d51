"""The loss of an autoencoder for latent flows: reconstruction, KL divergence and perceptual distance."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flow.losses import distances
from flow.losses.base import Batch, Eager, Losses


class AutoencoderLoss:
    """distance(x, decode(mean + std e)) + kl_weight KL(N(mean, std^2) | N(0, I)) + lpips_weight LPIPS.

    Rombach et al. 2022 (arXiv:2112.10752, appendix G) without the discriminator. The distance is a mean over pixels, the KL
    divergence a sum over the latent; the same weight in a loss with sums over both is kl_weight C H W. The network maps
    (images, noise) to (reconstructions, mean, std).
    """

    capturable = True

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        distance: str = "l1",
        kl_weight: float = 1e-6,
        lpips_weight: float = 0.0,
        lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        """lpips: perceptual distance [b] of images in [-1, 1]; needed where its weight is not 0."""
        self.draws = {"posterior": latent_shape}
        self.distance_name = distance
        self.distance = distances.build(distance, {})
        self.kl_weight, self.lpips_weight, self.lpips = kl_weight, lpips_weight, lpips

    def __call__(self, net: Callable[..., Any], eager: Eager, batch: Batch) -> Losses:
        recon, mean, std = net(batch.x1, batch.noise["posterior"])
        distance, kl = self.distance(batch.x1, recon), kl_divergence(mean, std)
        lpips = self.lpips(batch.x1, recon) if self.lpips else torch.zeros_like(kl)
        per_sample = distance + self.kl_weight * kl + self.lpips_weight * lpips
        return Losses(per_sample, None, {self.distance_name: distance, "kl": kl, "lpips": lpips})


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) | N(0, I)) [b] in nats, summed over the latent (Kingma & Welling 2014, arXiv:1312.6114, app. B)."""
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).flatten(1).sum(1)
