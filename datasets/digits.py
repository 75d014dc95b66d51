"""The 1,797 handwritten digits of 8x8 pixels that come inside scikit-learn: real images without a download."""

from pathlib import Path

import torch

from datasets.images import Images


def digits(root: Path) -> Images:
    """scikit-learn's `load_digits` (the test part of UCI's Optical Recognition of Handwritten Digits, 1998).

    Its 17 grey levels are spread over 0..255. `root` is not used: the images are part of the package.
    """
    from sklearn.datasets import load_digits  # a second of import that other data sets need not pay

    bunch = load_digits()
    images = torch.from_numpy((bunch.images * (255 / 16)).round()).to(torch.uint8)
    return Images(images.unsqueeze(1), torch.from_numpy(bunch.target).long(), tuple("0123456789"))
