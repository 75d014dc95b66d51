"""Features of uint8 images by torch-fidelity's extractors, and their statistics, merged over processes."""

import hashlib
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from configs.errors import first_line
from flow.evaluation import classifiers
from flow.evaluation.moments import Moments

INCEPTION, INCEPTION_LAYER = "inception-v3-compat", "2048"
CLASS_LAYER = "class_logits"  # of the classifier beside an extractor; Inception has a layer "logits" of its own
REMOTE_CODE = "dinov2"  # extractors of torch-fidelity whose network is code that torch.hub downloads from GitHub and runs
INCEPTION_FILE = Path(URL_INCEPTION_V3).name  # as torch.hub stores it


@dataclass(eq=False)
class FeatureSpace:
    """The features of an extractor by the names that metrics ask for."""

    name: str  # of the extractor
    layer: str  # of the distances
    classifier: str | None = None  # that the logits are of

    @property
    def isc_layer(self) -> str | None:
        """The layer of the Inception Score, the network's last: weights that serve an earlier one may not hold it."""
        return "logits_unbiased" if (self.name, self.layer) == (INCEPTION, INCEPTION_LAYER) else None

    @property
    def class_layer(self) -> str | None:
        """The layer of the logits, of the extractor itself or of a classifier beside it."""
        if self.classifier is None:
            return None
        return "logits" if self.classifier == self.name else CLASS_LAYER

    @property
    def distance_name(self) -> str:
        """FID for Inception's pooled features alone; the Frechet distance in any other space is not a FID. Its name holds the
        layer where that is not the default one."""
        if self.name == INCEPTION:
            return "FID" if self.layer == INCEPTION_LAYER else f"FD-inception-{self.layer}"
        default = FEATURE_EXTRACTORS_REGISTRY[self.name].get_default_feature_layer_for_metric("fid")
        return f"FD-{self.name}" + ("" if self.layer == default else f"-{self.layer}")


class Extractor(FeatureSpace):
    """images uint8 [B, C, H, W] with 1 or 3 channels -> {layer: features [B, d] float32 on the CPU}."""

    def __init__(
        self, name: str, layer: str | None, weights: Path | None, device: torch.device, allow_remote_code: bool = False,
        classifier: str | None = None,
    ):  # fmt: skip
        """layer None: torch-fidelity's own for the Frechet distance. The layer of the Inception Score comes along where the
        extractor has it, and for the class accuracy the logits of the extractor itself or of `classifier`, one of
        `classifiers.SIDES`, beside it.

        Raises ValueError for an unknown name or layer and for weights that cannot be read; a pickle that would run code
        is refused, and without `allow_remote_code` a network whose code comes from the internet.
        """
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            raise ValueError(f"--feature_extractor {name}: unknown; choose one of {', '.join(FEATURE_EXTRACTORS_REGISTRY)}")
        cls = FEATURE_EXTRACTORS_REGISTRY[name]
        layers = cls.get_provided_features_list()
        layer = layer or cls.get_default_feature_layer_for_metric("fid")
        if layer not in layers:
            raise ValueError(f"--feature_layer {layer}: {name} has no such layer; choose one of {', '.join(layers)}")
        super().__init__(name, layer, name if name in classifiers.SIDES else classifier)
        self.device = device
        extra = "logits" if name in classifiers.SIDES else self.isc_layer
        self.net_layers = list(dict.fromkeys(filter(None, (self.layer, extra))))
        if name.startswith(REMOTE_CODE):
            if weights is not None:
                raise ValueError(f"--feature_weights {weights}: {name} takes none, torch.hub downloads its network and weights")
            if not allow_remote_code:
                raise ValueError(
                    f"--feature_extractor {name}: torch.hub downloads its code from github.com/facebookresearch/dinov2 and "
                    "runs it; allow that with --allow_remote_code"
                )
        if weights is not None:
            validate_weights_file(weights)
        try:
            # torch-fidelity would unpickle any file. CLIP's weights are archives, which torch refuses to load as weights.
            with nullcontext() if name.startswith("clip") else mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
                self.net = cls(name, self.net_layers, feature_extractor_weights_path=str(weights) if weights else None)
        except Exception as error:  # downloads and state dicts fail in many ways
            reason = f"its weights could not be loaded ({first_line(error)})"
            here = " or ".join(classifiers.SIDES)
            raise ValueError(
                f"--feature_extractor {name}: {reason}; give a file with --feature_weights, or use --feature_extractor {here}"
            ) from None
        self.net.eval().to(device)
        self.net.to(memory_format=torch.channels_last)  # Inception is 1.4 times as fast on a CPU (docs/performance.md)
        self.weights_hash = _digest(self.net)
        self.second_net = None
        if self.classifier and self.classifier != name:
            self.second_net = classifiers.ClassifierFeatures(self.classifier, ["logits"]).to(device)
        self.layers = [*self.net_layers, CLASS_LAYER] if self.second_net else self.net_layers

    def identity(self, layers: Sequence[str]) -> str:
        """Changes with the network, its weights and what else computes these layers."""
        key = f"{self.name} {self.layer} {self.weights_hash}"
        if self.second_net is not None and CLASS_LAYER in layers:
            key += f" {self.classifier} {_digest(self.second_net)}"
        return key

    def dimension(self, image_shape: tuple[int, int, int]) -> int:
        """Number of features; raises ValueError, with extractors that do, where this one does not take images of this shape."""
        if image_shape[0] not in (1, 3):
            raise ValueError(f"--feature_extractor {self.name}: takes images of 1 or 3 channels, these have {image_shape[0]}")
        try:
            return self(torch.zeros(1, *image_shape, dtype=torch.uint8))[self.layer].shape[1]
        except ValueError as error:
            others = " or ".join([*classifiers.fitting(image_shape), INCEPTION])
            raise ValueError(f"--feature_extractor {self.name}: {error}; use --feature_extractor {others}") from None

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        rgb = images.to(self.device, non_blocking=True).expand(-1, 3, -1, -1)
        outputs = self.net(rgb) + (() if self.second_net is None else self.second_net(rgb))
        return {name: value.float().cpu() for name, value in zip(self.layers, outputs, strict=True)}


@dataclass
class FeatureSet:
    """Features of a set of images, with mean and covariance of one layer."""

    layer: str = ""  # that the mean and the covariance are of
    indices: list[range] = field(default_factory=list)
    rows: dict[str, list[np.ndarray]] = field(default_factory=dict)  # layer -> blocks [b, d], in the order of indices

    def add(self, layer: str, indices: range, features: dict[str, Tensor]) -> None:
        """Add a batch of {layer: [b, d]}; mean and covariance are those of `layer`."""
        self.layer = layer
        self.indices.append(indices)
        for name, value in features.items():
            self.rows.setdefault(name, []).append(value.numpy())
        self.__dict__.pop("moments", None)  # of the images before

    @cached_property
    def moments(self) -> Moments:
        """Summed in the order of the image indices: to the bit the same for any number of processes."""
        return Moments.of(self.matrix(self.layer).numpy())

    def matrix(self, layer: str) -> Tensor:
        """All features [n, d], float32, in the order of the image indices."""
        order = sorted(range(len(self.indices)), key=lambda i: self.indices[i].start)
        blocks = [self.rows[layer][i] for i in order]
        return torch.from_numpy(np.concatenate(blocks) if len(blocks) > 1 else blocks[0])

    def select(self, layer: str, positions: np.ndarray) -> "FeatureSet":
        """The images at these positions [k] of the order, with mean and covariance of `layer`."""
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
                f"the features of {len(set(bad))} of {self.n} images of {owner} are not finite (NaN or infinite), the first is "
                f"image {min(bad)}"
            )

    @property
    def n(self) -> int:
        return sum(map(len, self.indices))


def merge(parts: list[FeatureSet]) -> FeatureSet:
    """The union of what the processes hold, in the order of the image indices, which must be without gaps."""
    merged = FeatureSet()
    for part in parts:
        if not part.n:
            continue
        merged.layer = part.layer
        merged.indices += part.indices
        for name, blocks in part.rows.items():
            merged.rows.setdefault(name, []).extend(blocks)
    merged.rows = {name: [merged.matrix(name).numpy()] for name in merged.rows}
    merged.indices = [range(min(i.start for i in merged.indices), max(i.stop for i in merged.indices))]
    return merged


def _digest(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in net.state_dict().items():
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def validate_weights_file(weights: Path) -> None:
    """Raises ValueError that names the file where it does not exist or holds more than plain weights."""
    if not weights.is_file():
        raise ValueError(f"--feature_weights {weights}: there is no such file")
    with open(weights, "rb") as file:
        if weights.suffix == ".safetensors" and file.read(9)[8:] == b"{":
            return
    try:
        torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"--feature_weights {weights}: not a file of plain weights ({first_line(error)[:120]})") from None
