"""Image data sets in memory, among them those that torchvision downloads."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass
class Images:
    """A data set in memory."""

    access: ClassVar[str] = "memory"
    images: Tensor  # [N, C, H, W] uint8, or floats in [-1, 1]; float16 images or latents of pairs; float32 points [N, 2]
    labels: Tensor | None  # int64 [N], from 0
    class_names: tuple[str, ...]  # one for each class
    codec: dict[str, Any] | None = None  # of latents: what decodes them
    notes: Sequence[str] = ()  # lines for the log

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], -1 if self.labels is None else int(self.labels[index])

    def fingerprint(self) -> str:
        """Hash of the content: images in order."""
        return hashlib.blake2b(self.images.contiguous().numpy(), digest_size=16).hexdigest()


def to_float(x: Tensor) -> Tensor:
    """Samples as networks see them, float32: uint8 images mapped to [-1, 1]; pairs, latents and points keep their values."""
    return x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x.float()


def mnist(root: Path, train: bool = True, classes: Sequence[int] | None = None) -> Images:
    """MNIST (LeCun, Cortes & Burges): 60,000 training or 10,000 test digits of 28x28 pixels; of these classes, or all."""
    return _of_classes(_idx(_download("MNIST", root, train)), classes)


def fashion_mnist(root: Path, train: bool = True, classes: Sequence[int] | None = None) -> Images:
    """Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747): as MNIST, with clothes."""
    return _of_classes(_idx(_download("FashionMNIST", root, train)), classes)


def cifar10(root: Path, train: bool = True, classes: Sequence[int] | None = None) -> Images:
    """CIFAR-10 (Krizhevsky 2009): 50,000 training or 10,000 test images of 32x32 RGB pixels in ten classes, or those of these
    classes."""
    data = _download("CIFAR10", root, train)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return _of_classes(Images(images, torch.tensor(data.targets), tuple(data.classes)), classes)


def _idx(data: Any) -> Images:
    return Images(data.data.unsqueeze(1), data.targets.long(), tuple(data.classes))


def _of_classes(data: Images, classes: Sequence[int] | None) -> Images:
    """The images of these classes, whose labels stay; all of them where there are none. Raises ValueError for other numbers."""
    if classes is None:
        return data
    known = range(len(data.class_names))
    if not isinstance(classes, list | tuple) or not classes or not all(type(k) is int and k in known for k in classes):
        raise ValueError(f"classes={classes}: must be a list of numbers from 0 to {known[-1]}")
    assert data.labels is not None
    rows = torch.isin(data.labels, torch.tensor(classes))
    return replace(data, images=data.images[rows], labels=data.labels[rows])


def _download(name: str, root: Path, train: bool):
    """The torchvision data set, from the files below root if they are whole, downloaded otherwise."""
    import torchvision.datasets  # here, as it doubles the seconds before a script that needs none of it does anything

    cls = getattr(torchvision.datasets, name)
    try:
        return cls(root, train=train, download=False)
    except Exception:  # torchvision raises a dozen kinds for absent and damaged files
        pass
    try:
        return cls(root, train=train, download=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{cls.__name__} is not in {root}, or its files are damaged, and could not be downloaded ({reason}); remove "
            "damaged files, or set data.root or the environment variable FLOW_DATA to a folder that holds whole ones"
        ) from None
