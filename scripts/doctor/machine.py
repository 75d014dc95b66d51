"""Checks of the machine for scripts/doctor/: packages and the weights of feature extractors."""

import re
import sys
from importlib import metadata
from pathlib import Path

import torch
from packaging.version import Version

from flow.evaluation.classifiers import SIDES
from flow.evaluation.features import INCEPTION_FILE


def versions(requirements: Path) -> tuple[str, str]:
    """Lower bounds of `requirements`, up to the part for the tests, against what is installed."""
    text = requirements.read_text(encoding="utf-8").partition("# for the tests")[0]
    bounds = re.findall(r"^([\w.-]+)>=([\w.]+)$", text, re.M)
    wrong = []
    for name, bound in bounds:
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        if Version(installed) < Version(bound):
            wrong.append(f"{name} is {installed}, older than {bound}")
    if wrong:
        return "fail", f"{', '.join(wrong)}; pip install -r requirements.txt"
    return (
        "pass",
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, {len(bounds)} packages as in requirements.txt",
    )


def feature_weights(image_shape: tuple[int, ...]) -> tuple[str, str]:
    """Whether evaluate.py has what it needs for images of this shape without a network."""
    if len(image_shape) == 1:
        return "pass", "points are measured as they are"
    for name, side in SIDES.items():
        if image_shape == (1, side, side) and name != "cifar10":
            return "pass", f"evaluate with --feature_extractor {name}, whose weights are part of the repository"
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if file.is_file():
        return "pass", f"Inception's weights are in {file}"
    return (
        "warn",
        f"Inception's weights are not in {file.parent}; evaluate.py fetches them, or give a file with --feature_weights",
    )
