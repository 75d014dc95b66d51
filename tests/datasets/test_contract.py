"""Data sets of one's own: what a builder returns is checked, and a mistake is one line that says what to return."""

import numpy as np
import pytest
import torch
from conftest import TINY_RUN

import datasets
from datasets.images import Images

PIXELS = torch.arange(6 * 64, dtype=torch.float32).remainder(256).view(6, 1, 8, 8)
BYTES = PIXELS.to(torch.uint8)
LABELS = torch.tensor([0, 1, 0, 1, 0, 1])
NAMES = ("a", "b")
WITH_NAN = (PIXELS / 127.5 - 1).index_fill(0, torch.tensor([2, 4]), torch.nan)
NETWORK = ["model.name=unet", "model.args={width: 16, attention_resolutions: [4], head_channels: 16, num_classes: auto}"]


@pytest.fixture
def build(monkeypatch):
    """build(returned): the data set of a builder that returns this."""

    def call(returned):
        monkeypatch.setitem(datasets.DATASETS, "own", lambda root: returned)
        return datasets.build("own", None, {})

    return call


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ((BYTES, LABELS), r"is built as a tuple; return datasets\.images\.Images\(images, labels, class_names\)"),
        (None, "is built as None; return"),
        (Images(list(BYTES), None, ()), r"images are a list, must be a tensor; return torch\.stack"),
        (Images(BYTES.numpy(), None, ()), r"images are a numpy\.ndarray, must be a tensor; return torch\.from_numpy"),
        (
            Images(BYTES.long(), None, ()),
            r"images are int64, must be uint8 \(0 to 255\), .*; return images\.to\(torch\.uint8\)",
        ),
        (
            Images(PIXELS, None, ()),
            r"images are float32 from 0 to 255, must be in \[-1, 1\], .*; return images\.round\(\)\.to\(torch\.uint8\)",
        ),
        (Images(PIXELS / 50 - 2, None, ()), r"images are float32 from -2 to 3\.1, must be in \[-1, 1\]"),
        (Images(WITH_NAN, None, ()), "2 of 6 samples hold NaN or infinity, the first is number 2; leave them out"),
        (
            Images(BYTES.permute(0, 2, 3, 1), None, ()),
            r"images have the shape \[6, 8, 8, 1\], .*; move the channels by images\.permute",
        ),
        (
            Images(BYTES[:, 0], None, ()),
            r"images have the shape \[6, 8, 8\], must be \[N, C, H, W\], .*; add the channel by images\[:, None\]",
        ),
        (Images(BYTES.flatten(1), None, ()), r"images have the shape \[6, 64\], .*; reshape flattened images"),
        (Images(BYTES[:0], None, ()), "holds no images; return at least one"),
        (Images(BYTES, LABELS.tolist(), NAMES), r"labels are a list, must be a tensor; return torch\.tensor\(labels\)"),
        (Images(BYTES, LABELS.numpy(), NAMES), r"labels are a numpy\.ndarray, must be a tensor; return torch\.from_numpy"),
        (Images(BYTES, LABELS.float(), NAMES), r"labels are float32, must be int64; return labels\.long\(\)"),
        (Images(BYTES, LABELS[:5], NAMES), r"labels have the shape \[5\], must be \[6\], .*; return one for each image"),
        (Images(BYTES, LABELS - 1, NAMES), "labels begin at -1, must begin at 0; number the classes from 0"),
        (Images(BYTES, LABELS, ()), "labels go up to 1, class_names has 0 names; name each class from 0 to 1"),
        (Images(BYTES, LABELS, (0, 1)), r"class_names=\(0, 1\): must be a tuple of strings"),
    ],
)
def test_mistakes_are_named(build, returned, message):
    with pytest.raises(ValueError, match=f"^name=own: {message}"):
        build(returned)


@pytest.mark.parametrize(
    "returned",
    [
        Images(BYTES, LABELS, NAMES),
        Images(np.pi * torch.ones(5, 2), None, ()),  # points
        Images(PIXELS.half() / 127.5 - 1, None, ()),
        Images(BYTES.expand(6, 3, 8, 8), LABELS, [*NAMES, "c"]),  # a class without images
    ],
)
def test_whole_sets_have_no_notes(build, returned):
    assert build(returned) is returned and not returned.notes


def test_images_in_half_the_range_are_noted(build):
    (note,) = build(Images(PIXELS / 255, None, ())).notes
    assert "float32 from 0 to 1, half of the range [-1, 1]" in note and "return images * 2 - 1" in note


def test_training_says_what_is_wrong(here, error, monkeypatch, tmp_path):
    train = ["data.name=own", *NETWORK, *TINY_RUN, "-e", tmp_path / "run"]
    monkeypatch.setitem(datasets.DATASETS, "own", lambda root: Images(BYTES.long(), LABELS, NAMES))
    assert error("train", *train).startswith("error: data: name=own: images are int64, must be uint8")
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(datasets.DATASETS, "own", lambda root: Images(PIXELS / 255, LABELS, NAMES))
    assert "note: name=own: images are float32 from 0 to 1" in here("train", *train, "train.steps=1")


def test_names_of_classes_are_a_tuple():
    """None, as for labels, is not one."""
    data = Images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), None, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name=own: class_names=None: must be a tuple of strings, a name for each class"):
        datasets.contract.check("own", data)
