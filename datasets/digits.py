"""The 1,797 handwritten digits of 8x8 pixels that come inside scikit-learn: real images without a download."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from datasets.images import Images

SPLITS = ("all", "train", "test")
TEST_EVERY = 6  # one of so many images is in the test split: 299 of 1,797


def digits(root: Path, split: str = "all") -> Images:
    """scikit-learn's `load_digits` (the test part of UCI's Optical Recognition of Handwritten Digits, 1998).

    Its 17 gray levels are spread over 0..255. `root` is not used: the images are part of the package. split: all of them, or
    every sixth (test) or the others (train). Raises ValueError for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split}: must be one of {', '.join(SPLITS)}")
    images, labels = _load()
    is_test = torch.arange(len(images)) % TEST_EVERY == TEST_EVERY - 1
    rows = {"all": slice(None), "train": ~is_test, "test": is_test}[split]
    return Images(images[rows].clone(), labels[rows].clone(), tuple("0123456789"))


@cache  # parsing the text takes 20 ms
def _load() -> tuple[Tensor, Tensor]:
    """Images uint8 [1797, 1, 8, 8] and labels int64 [1797], which all callers share."""
    from sklearn.datasets import load_digits  # a second of import that other data sets need not pay

    bunch = load_digits()
    images = torch.from_numpy((bunch.images * (255 / 16)).round()).to(torch.uint8)
    return images.unsqueeze(1), torch.from_numpy(bunch.target).long()
