"""Features of uint8 images by torch-fidelity's extractors, and their statistics, merged over processes."""

import hashlib
import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from configs.stored import first_line
from flow.evaluation import classifiers

INCEPTION, INCEPTION_LAYER = "inception-v3-compat", "2048"
STATISTICS_ROWS = 4096  # at a time in float64
INCEPTION_FILE = Path(URL_INCEPTION_V3).name  # as torch.hub stores it


class Extractor:
    """images uint8 [B, C, H, W] with 1 or 3 channels -> {layer: features [B, d] float32 on the CPU}."""

    def __init__(self, name: str, layer: str | None, weights: Path | None, device: torch.device):
        """layer None: torch-fidelity's own for the Frechet distance. Layers for the Inception Score and for the class
        accuracy come along where the extractor has them.

        Raises ValueError for an unknown name or layer and for weights that cannot be read; a pickle that would run code
        is refused.
        """
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            raise ValueError(f"--feature_extractor {name}: unknown; choose one of {', '.join(FEATURE_EXTRACTORS_REGISTRY)}")
        cls = FEATURE_EXTRACTORS_REGISTRY[name]
        layers = cls.get_provided_features_list()
        self.name, self.device = name, device
        self.layer = layer or cls.get_default_feature_layer_for_metric("fid")
        if self.layer not in layers:
            raise ValueError(f"--feature_layer {layer}: {name} has no such layer; choose one of {', '.join(layers)}")
        self.classifies = name in classifiers.SIDES
        # The Inception Score is of the network's last layer: weights that serve an earlier one may not hold it.
        self.isc_layer = "logits_unbiased" if name == INCEPTION and self.layer == INCEPTION_LAYER else None
        extra = ["logits"] if self.classifies else [self.isc_layer] if self.isc_layer else []
        self.layers = list(dict.fromkeys([self.layer, *extra]))
        if weights is not None:
            validate_weights_file(weights)
        try:
            # It would unpickle whatever is there; CLIP's are no pickles, but archives that torch refuses to read as weights.
            with nullcontext() if name.startswith("clip") else mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
                self.net = cls(name, self.layers, feature_extractor_weights_path=str(weights) if weights else None)
        except Exception as error:  # downloads and state dicts fail in many ways
            reason = f"its weights could not be loaded ({first_line(error)})"
            raise ValueError(f"--feature_extractor {name}: {reason}; give a file with --feature_weights") from None
        self.net.eval().to(device)
        self.net.to(memory_format=torch.channels_last)  # Inception is 1.4 times as fast on a CPU (docs/performance.md)
        digest = hashlib.sha256()
        for key, value in self.net.state_dict().items():
            digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
        self.weights_hash = digest.hexdigest()[:16]

    @property
    def distance_name(self) -> str:
        """FID for Inception's pooled features alone; the Frechet distance in any other space is not a FID."""
        if self.name == INCEPTION:
            return "FID" if self.layer == INCEPTION_LAYER else f"FD-inception-{self.layer}"
        return f"FD-{self.name}"

    def dimension(self, image_shape: tuple[int, int, int]) -> int:
        """Number of features; raises ValueError where the extractor does not take images of this shape."""
        return self(torch.zeros(1, *image_shape, dtype=torch.uint8))[self.layer].shape[1]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        rgb = images.to(self.device, non_blocking=True).expand(-1, 3, -1, -1)
        return {name: value.float().cpu() for name, value in zip(self.layers, self.net(rgb), strict=True)}


@dataclass
class FeatureSet:
    """Features of a set of images, with what a Frechet distance needs of them: n, sum and outer sum in float64."""

    n: int = 0
    total: np.ndarray | None = None  # [d]
    outer: np.ndarray | None = None  # [d, d]
    indices: list[range] = field(default_factory=list)
    rows: dict[str, list[np.ndarray]] = field(default_factory=dict)  # layer -> blocks [b, d], in the order of indices

    def add(self, layer: str, indices: range, features: dict[str, Tensor]) -> None:
        """Add a batch of {layer: [b, d]}; the statistics are those of `layer`."""
        for x in features[layer].split(STATISTICS_ROWS):
            x = x.double()
            total, outer = x.sum(0).numpy(), (x.T @ x).numpy()
            self.n += len(x)
            self.total = total if self.total is None else self.total + total
            self.outer = outer if self.outer is None else self.outer + outer
        self.indices.append(indices)
        for name, value in features.items():
            self.rows.setdefault(name, []).append(value.numpy())

    def matrix(self, layer: str) -> Tensor:
        """All features [n, d], float32, in the order of the image indices."""
        order = sorted(range(len(self.indices)), key=lambda i: self.indices[i].start)
        blocks = [self.rows[layer][i] for i in order]
        return torch.from_numpy(np.concatenate(blocks) if len(blocks) > 1 else blocks[0])

    def select(self, layer: str, positions: np.ndarray) -> "FeatureSet":
        """The images at these positions [k] of the order, with statistics of `layer`."""
        selection = FeatureSet()
        selection.add(layer, range(len(positions)), {name: self.matrix(name)[positions] for name in self.rows})
        return selection

    def check_finite(self, owner: str) -> None:
        """Raises ValueError that counts the images of `owner` whose features are not finite, and names the first."""
        bad = [
            indices[int(k)]
            for blocks in self.rows.values()
            for indices, block in zip(self.indices, blocks, strict=True)
            for k in np.flatnonzero(~np.isfinite(block).all(1))
        ]
        if bad:
            raise ValueError(
                f"the features of {len(set(bad))} of {self.n} images of {owner} are not finite (NaN or infinite), "
                f"the first is image {min(bad)}"
            )

    @property
    def mu(self) -> np.ndarray:
        assert self.total is not None, "no features yet"
        return self.total / self.n

    @property
    def sigma(self) -> np.ndarray:
        """Unbiased covariance [d, d]."""
        return (self.outer - self.n * np.outer(self.mu, self.mu)) / (self.n - 1)


def merge(parts: list[FeatureSet]) -> FeatureSet:
    """The union of what the processes hold, in the order of the image indices, which must be without gaps."""
    merged = FeatureSet()
    for part in parts:
        if not part.n:
            continue
        merged.n += part.n
        merged.total = part.total if merged.total is None else merged.total + part.total
        merged.outer = part.outer if merged.outer is None else merged.outer + part.outer
        merged.indices += part.indices
        for name, blocks in part.rows.items():
            merged.rows.setdefault(name, []).extend(blocks)
    merged.rows = {name: [merged.matrix(name).numpy()] for name in merged.rows}
    merged.indices = [range(min(i.start for i in merged.indices), max(i.stop for i in merged.indices))]
    return merged


def validate_weights_file(weights: Path) -> None:
    """A file that is not there or holds more than weights, by name."""
    if not weights.is_file():
        raise ValueError(f"--feature_weights {weights}: there is no such file")
    with open(weights, "rb") as file:
        if weights.suffix == ".safetensors" and file.read(9)[8:] == b"{":
            return
    try:
        torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"--feature_weights {weights}: not a file of plain weights ({first_line(error)[:120]})") from None
