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
from flow.evaluation.intervals import BLOCKS, block_of

INCEPTION, INCEPTION_LAYER = "inception-v3-compat", "2048"
STATISTICS_ROWS = 4096  # at a time in float64
CLASS_LAYER = "class_logits"  # of the classifier beside an extractor; Inception has a layer "logits" of its own
REMOTE_CODE = "dinov2"  # extractors of torch-fidelity whose network is code that torch.hub downloads from GitHub and runs
INCEPTION_FILE = Path(URL_INCEPTION_V3).name  # as torch.hub stores it


class Extractor:
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
        self.name, self.device = name, device
        self.layer = layer or cls.get_default_feature_layer_for_metric("fid")
        if self.layer not in layers:
            raise ValueError(f"--feature_layer {layer}: {name} has no such layer; choose one of {', '.join(layers)}")
        self.classifier = name if name in classifiers.SIDES else classifier  # that the logits are of
        # The Inception Score is of the network's last layer: weights that serve an earlier one may not hold it.
        self.isc_layer = "logits_unbiased" if name == INCEPTION and self.layer == INCEPTION_LAYER else None
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
        self.class_layer = "logits" if self.classifier else None
        self.second_net = None
        if self.classifier and self.classifier != name:
            self.class_layer = CLASS_LAYER
            self.second_net = classifiers.ClassifierFeatures(self.classifier, ["logits"]).to(device)
        self.layers = [*self.net_layers, CLASS_LAYER] if self.second_net else self.net_layers

    def identity(self, layers: Sequence[str]) -> str:
        """Changes with the network, its weights and what else computes these layers."""
        key = f"{self.name} {self.layer} {self.weights_hash}"
        if self.second_net is not None and CLASS_LAYER in layers:
            key += f" {self.classifier} {_digest(self.second_net)}"
        return key

    @property
    def distance_name(self) -> str:
        """FID for Inception's pooled features alone; the Frechet distance in any other space is not a FID. Its name holds the
        layer where that is not the default one."""
        if self.name == INCEPTION:
            return "FID" if self.layer == INCEPTION_LAYER else f"FD-inception-{self.layer}"
        default = FEATURE_EXTRACTORS_REGISTRY[self.name].get_default_feature_layer_for_metric("fid")
        return f"FD-{self.name}" + ("" if self.layer == default else f"-{self.layer}")

    def dimension(self, image_shape: tuple[int, int, int]) -> int:
        """Number of features; raises ValueError where the extractor does not take images of this shape."""
        return self(torch.zeros(1, *image_shape, dtype=torch.uint8))[self.layer].shape[1]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        rgb = images.to(self.device, non_blocking=True).expand(-1, 3, -1, -1)
        outputs = self.net(rgb) + (() if self.second_net is None else self.second_net(rgb))
        return {name: value.float().cpu() for name, value in zip(self.layers, outputs, strict=True)}


@dataclass
class Moments:
    """What a Frechet distance needs of features: their number, sum and outer sum in float64."""

    n: int = 0
    total: np.ndarray | None = None  # [d]
    outer: np.ndarray | None = None  # [d, d]

    def add(self, features: Tensor) -> None:
        """Add features [b, d]."""
        for x in features.split(STATISTICS_ROWS):
            x = x.double()
            self.merge(Moments(len(x), x.sum(0).numpy(), (x.T @ x).numpy()))

    def merge(self, other: "Moments") -> None:
        """Add those of other images."""
        self.n += other.n
        if self.total is None or self.outer is None:
            self.total, self.outer = other.total, other.outer
        elif other.total is not None and other.outer is not None:
            self.total, self.outer = self.total + other.total, self.outer + other.outer

    @property
    def mu(self) -> np.ndarray:
        assert self.total is not None, "no features yet"
        return self.total / self.n

    @property
    def sigma(self) -> np.ndarray:
        """Unbiased covariance [d, d]."""
        return (self.outer - self.n * np.outer(self.mu, self.mu)) / (self.n - 1)


@dataclass
class FeatureSet:
    """Features of a set of images, with their moments."""

    layer: str = ""  # that the moments are of
    indices: list[range] = field(default_factory=list)
    rows: dict[str, list[np.ndarray]] = field(default_factory=dict)  # layer -> blocks [b, d], in the order of indices

    def add(self, layer: str, indices: range, features: dict[str, Tensor]) -> None:
        """Add a batch of {layer: [b, d]}; the moments are those of `layer`."""
        self.layer = layer
        self.indices.append(indices)
        for name, value in features.items():
            self.rows.setdefault(name, []).append(value.numpy())
        self.__dict__.pop("moments", None)

    @cached_property
    def moments(self) -> Moments:
        """Summed in the order of the image indices: to the bit the same for any number of processes."""
        moments = Moments()
        moments.add(self.matrix(self.layer))
        return moments

    def matrix(self, layer: str) -> Tensor:
        """All features [n, d], float32, in the order of the image indices."""
        order = sorted(range(len(self.indices)), key=lambda i: self.indices[i].start)
        blocks = [self.rows[layer][i] for i in order]
        return torch.from_numpy(np.concatenate(blocks) if len(blocks) > 1 else blocks[0])

    def select(self, layer: str, positions: np.ndarray) -> "FeatureSet":
        """The images at these positions [k] of the order, with moments of `layer`."""
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
            raise ValueError(_not_finite(owner, len(set(bad)), self.n, min(bad)))

    @property
    def n(self) -> int:
        return sum(map(len, self.indices))

    @property
    def mu(self) -> np.ndarray:
        return self.moments.mu

    @property
    def sigma(self) -> np.ndarray:
        return self.moments.sigma


class BlockMoments:
    """Moments of features in `intervals.BLOCKS` blocks of images by index, in memory that does not grow with their number.

    For a Frechet distance with its standard error and nothing else. Rows wait until there are enough of them to be worth an
    update of all blocks.
    """

    def __init__(self) -> None:
        self.blocks = [Moments() for _ in range(BLOCKS)]
        self.waiting: list[tuple[range, Tensor]] = []
        self.bad: list[int] = []  # images with features that are not finite

    def add(self, layer: str, indices: range, features: dict[str, Tensor]) -> None:
        """Add a batch of {layer: [b, d]}, of which `layer` counts."""
        self.waiting.append((indices, features[layer]))
        if sum(len(batch) for batch, _ in self.waiting) >= STATISTICS_ROWS:
            self.flush()

    def flush(self) -> None:
        """Add the waiting rows to their blocks."""
        if not self.waiting:
            return
        indices = np.concatenate([np.array(batch) for batch, _ in self.waiting])
        rows = torch.cat([features for _, features in self.waiting])
        self.bad += indices[(~rows.isfinite().all(1)).numpy()].tolist()
        members = block_of(indices, BLOCKS)
        for k, block in enumerate(self.blocks):
            if (members == k).any():
                block.add(rows[torch.from_numpy(members == k)])
        self.waiting = []

    def check_finite(self, owner: str) -> None:
        """As `FeatureSet.check_finite`."""
        if self.bad:
            raise ValueError(_not_finite(owner, len(self.bad), self.n, min(self.bad)))

    @property
    def total(self) -> Moments:
        """The moments of all blocks."""
        total = Moments()
        for block in self.blocks:
            total.merge(block)
        return total

    @property
    def n(self) -> int:
        return sum(block.n for block in self.blocks)

    @property
    def mu(self) -> np.ndarray:
        return self.total.mu

    @property
    def sigma(self) -> np.ndarray:
        return self.total.sigma


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


def merge_blocks(parts: list[BlockMoments]) -> BlockMoments:
    """The moments of what the processes hold; nothing may wait any more."""
    merged = BlockMoments()
    for part in parts:
        merged.bad += part.bad
        for block, other in zip(merged.blocks, part.blocks, strict=True):
            block.merge(other)
    return merged


def _digest(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in net.state_dict().items():
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _not_finite(owner: str, bad: int, n: int, first: int) -> str:
    return f"the features of {bad} of {n} images of {owner} are not finite (NaN or infinite), the first is image {first}"


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
