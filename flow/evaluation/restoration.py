"""How well images were restored: simple methods to compare with, PSNR and SSIM."""

from dataclasses import dataclass

import numpy as np
import torch
from skimage.metrics import structural_similarity
from skimage.restoration import inpaint_biharmonic, wiener
from torch import Tensor
from torch.nn import functional as F

from flow.evaluation import table
from flow.evaluation.intervals import mean_interval
from flow.restoration import Degradation, Downsampling, GaussianBlur, Grayscale, Inpainting, median_fill
from flow.sampling.images import psnr, to_uint8

BALANCES = tuple(10.0**power for power in np.arange(-4, 1.1, 0.5))  # of the Wiener filter, which are tried
SSIM_WINDOW = 7  # pixels, less for smaller images
DEGRADED = "degraded"
FLOW = "PnP-Flow"


@dataclass
class Scores:
    """PSNR in decibels and SSIM of each image, in order."""

    method: str
    psnr: list[float]
    ssim: list[float]


def baselines(degradation: Degradation, y: Tensor, originals: Tensor) -> dict[str, Tensor]:
    """Restorations of the measurement y by simple methods, {name: uint8 [B, C, H, W]}.

    Inpainting: median of the known neighbors, and the biharmonic equation. Downsampling: bicubic. Blur: the Wiener filter with
    the Laplacian as its regularization, and that weight of it (`BALANCES`) which gives the best PSNR against the `originals`,
    uint8 [B, C, H, W]. Gray: the same in all channels.
    """
    if isinstance(degradation, Inpainting):
        return {
            "median fill": to_uint8(median_fill(y, degradation.known)),
            "biharmonic": to_uint8(_biharmonic(y, degradation.known)),
        }
    if isinstance(degradation, Downsampling):
        bicubic = F.interpolate(y, scale_factor=degradation.factor, mode="bicubic", align_corners=False)
        return {"bicubic": to_uint8(bicubic)}
    if isinstance(degradation, GaussianBlur):
        tried = [to_uint8(_wiener(y, degradation, balance)) for balance in BALANCES]
        return {"Wiener": max(tried, key=lambda images: psnr(originals, images).mean().item())}
    if isinstance(degradation, Grayscale):
        return {"gray": to_uint8(degradation.to_image(y))}
    raise ValueError(f"{type(degradation).__name__}: has no simple method to compare with")


def score(method: str, originals: Tensor, restored: Tensor) -> Scores:
    """PSNR and SSIM of uint8 images [B, C, H, W], with a square window of 7 pixels and the mean over channels.

    Raises:
        ValueError: for images of less than three pixels.
    """
    side = min(originals.shape[-2:])
    if side < 3:
        raise ValueError(f"images of {side} pixels: SSIM needs at least three")
    window = min(SSIM_WINDOW, side - 1 + side % 2)
    pairs = zip(originals.numpy(), restored.numpy(), strict=True)
    ssim = [structural_similarity(a, b, win_size=window, data_range=255, channel_axis=0) for a, b in pairs]
    return Scores(method, psnr(originals, restored).tolist(), [float(value) for value in ssim])


def best_baseline(scores: list[Scores]) -> Scores:
    """The scores with the highest mean PSNR of all but the flow, the degraded image among them."""
    return max((entry for entry in scores if entry.method != FLOW), key=lambda entry: np.mean(entry.psnr))


def mean_and_interval(values: list[float]) -> tuple[float, float | None]:
    """The mean over images and half the width of its 95% interval, None for a single image."""
    return float(np.mean(values)), mean_interval(np.array(values))


def markdown(scores: list[Scores]) -> str:
    """The scores as a table: mean ± 95% interval over images, and the gain of the flow in PSNR over each method, paired by
    image."""
    [flow] = [entry for entry in scores if entry.method == FLOW]
    lines = [["method", "n", "PSNR (dB)", "SSIM", "gain of PnP-Flow (dB)"]]
    for entry in scores:
        gain = "" if entry is flow else _cell([a - b for a, b in zip(flow.psnr, entry.psnr, strict=True)], 2)
        lines.append([entry.method, str(len(entry.psnr)), _cell(entry.psnr, 2), _cell(entry.ssim, 3), gain])
    return table.markdown(lines)


def _cell(values: list[float], digits: int) -> str:
    mean, interval = mean_and_interval(values)
    return f"{mean:.{digits}f}" + ("" if interval is None else f" ± {interval:.{digits}f}")


def _biharmonic(y: Tensor, known: Tensor) -> Tensor:
    missing = (known < 0.5).expand(len(y), -1, -1, -1)[:, 0].numpy()
    filled = [inpaint_biharmonic(image, mask, channel_axis=0) for image, mask in zip(y.double().numpy(), missing, strict=True)]
    return torch.from_numpy(np.stack(filled))


def _wiener(y: Tensor, blur: GaussianBlur, balance: float) -> Tensor:
    height, width = y.shape[-2:]
    kernel = torch.fft.fftshift(blur.kernel(height, width)).numpy()
    channels = [wiener(channel, kernel, balance, clip=False) for channel in y.double().flatten(0, 1).numpy()]
    return torch.from_numpy(np.stack(channels)).view(y.shape)
