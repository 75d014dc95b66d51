"""Three small fixed classifiers, registered with torch-fidelity as the feature extractors `digits`, `mnist` and `cifar10`.

Inception's features mean little on 8x8 or 28x28 gray digits, and Inception cannot tell whether a sample shows its class.
`scripts/dev/train_classifier.py` trains these; their weights are part of the repository, so a Frechet distance measured with
them compares between machines and years.
"""

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

SIDES = {"digits": 8, "mnist": 28, "cifar10": 32}  # pixels
FEATURES, CLASSES = 64, 10
DIGITS = tuple("0123456789")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLASS_NAMES = {"digits": DIGITS, "mnist": DIGITS, "cifar10": CIFAR10}


class DigitClassifier(nn.Module):
    """Grey images [B, 1, side, side] in [0, 1] -> logits [B, 10], by way of 64 features."""

    def __init__(self, side: int):
        super().__init__()
        channels, width = 1, 32
        stages: list[nn.Module] = []
        while side > 4:  # 28 -> 14 -> 7 -> 3, 8 -> 4
            stages += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
            width = 64
            side = side // 2
        self.features = nn.Sequential(
            *stages, nn.Flatten(), nn.Dropout(0.3), nn.Linear(channels * side * side, FEATURES), nn.ReLU()
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class CifarClassifier(nn.Module):
    """Color images [B, 3, 32, 32] in [0, 1] -> logits [B, 10], by way of 64 features.

    Three stages of two convolutions, the second with a skip, down to 16, 8 and 4 pixels; then the mean over the pixels.
    """

    WIDTHS = (64, 112, 112)

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.GELU())
        channels = 32
        self.down = nn.ModuleList()
        self.residual = nn.ModuleList()
        for width in self.WIDTHS:
            pooled = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.MaxPool2d(2))
            self.down.append(nn.Sequential(pooled, nn.BatchNorm2d(width), nn.GELU()))
            self.residual.append(nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU()))
            channels = width
        self.embedding = nn.Sequential(nn.Linear(channels, FEATURES), nn.GELU())
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        h = self.stem(4 * images - 2)
        for down, residual in zip(self.down, self.residual, strict=True):
            h = down(h)
            h = h + residual(h)
        return self.embedding(h.mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def build(name: str) -> DigitClassifier | CifarClassifier:
    """The classifier `name`, untrained."""
    return CifarClassifier() if name == "cifar10" else DigitClassifier(SIDES[name])


def fitting(image_shape: Sequence[int]) -> list[str]:
    """The classifiers that take images of this shape (C, H, W): squares of their side, or larger ones, which they shrink."""
    height, width = image_shape[-2:]
    return [name for name, side in SIDES.items() if side <= height == width]


def weights_file(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.safetensors")


class ClassifierFeatures(FeatureExtractorBase):
    """torch-fidelity's contract: uint8 images [B, 3, side, side] -> a tuple of the asked-for layers, float32."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs):
        super().__init__(name, features_list)
        self.side = SIDES[name]
        self.net = build(name)
        self.gray = isinstance(self.net, DigitClassifier)
        weights = load_file(feature_extractor_weights_path or weights_file(name))
        self.net.load_state_dict(weights)  # those of cifar10 are stored in half precision
        self.requires_grad_(False)
        self.eval()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (str(FEATURES), "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else str(FEATURES)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = images.float() / 255
        height, width = x.shape[-2:]
        if height != width or height < self.side:
            raise ValueError(
                f"the extractor takes {self.side}x{self.side} images, not {height}x{width}; it shrinks larger squares"
            )
        if self.gray:
            x = x.mean(1, keepdim=True)
        if height > self.side:
            x = F.interpolate(x, size=self.side, mode="bilinear", antialias=True)
        features = self.net.features(x)
        outputs = {str(FEATURES): features, "logits": self.net.head(features)}
        return tuple(outputs[name] for name in self.features_list)


for _name in SIDES:
    if _name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(_name, ClassifierFeatures)
