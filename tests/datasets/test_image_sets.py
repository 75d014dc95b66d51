"""Data sets: what each one holds, and every kind of image file that people put into a folder."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets as tv_datasets
from PIL import Image
from small_files import write_idx
from torch import Tensor

import datasets
from datasets import DataSpec
from datasets.folder import Folder
from datasets.images import Images
from datasets.places import default_root

RGB = (10, 200, 30)
NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def decode(folder: Path, image: Image.Image, name: str = "a.png", channels: int = 3, size: int | None = None, **save) -> Tensor:
    """The image as a folder of this one file gives it."""
    image.save(folder / name, **save)
    data = datasets.build("folder", None, {"path": str(folder), "size": size, "channels": channels})
    return data[0][0]


def write_classes(root: Path) -> Path:
    """Two classes with 1 and 2 images of 4x4 pixels; the gray level tells the images apart."""
    for name, gray in (("dog/z.png", 10), ("cat/b.jpg", 20), ("cat/deeper/c.PNG", 30)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (gray,) * 3).save(root / name)
    (root / "cat/notes.txt").write_text("not an image")
    return root


def test_digits():
    data = datasets.build("digits", None, {})
    assert data.images.shape == (1797, 1, 8, 8) and data.images.dtype == torch.uint8
    assert (data.images.min(), data.images.max()) == (0, 255)
    assert data.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert data.image_shape == (1, 8, 8) and len(data) == 1797 and len(data.class_names) == 10
    image, label = data[5]
    assert torch.equal(image, data.images[5]) and label == data.labels[5]


def test_splits_of_digits_are_apart():
    """Every image is in one of the two, and each is the held-out part of the other."""
    whole, train, test = (datasets.build("digits", None, {"split": split}) for split in ("all", "train", "test"))
    assert (len(whole), len(train), len(test)) == (1797, 1498, 299)
    assert torch.equal(whole.images[5::6], test.images) and torch.equal(whole.labels[5::6], test.labels)
    assert DataSpec("digits", None, {"split": "train"}).held_out() == (
        "test split",
        DataSpec("digits", None, {"split": "test"}),
    )
    assert DataSpec("digits", None, {}).held_out() is None
    with pytest.raises(ValueError, match="split=half: must be one of all, train, test"):
        datasets.build("digits", None, {"split": "half"})


def test_folder_with_classes(tmp_path):
    data = datasets.build("folder", None, {"path": str(write_classes(tmp_path))})
    assert data.class_names == ("cat", "dog") and data.labels.tolist() == [0, 0, 1]
    assert len(data) == 3 and data.image_shape == (3, 4, 4)
    items = [(int(image[0, 0, 0]), label) for image, label in (data[i] for i in range(3))]
    assert items == [(20, 0), (30, 0), (10, 1)]
    assert data[0][0].dtype == torch.uint8 and data[0][0].shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (
            ("train", "val", "test"),
            "its classes (test, train, val) have the names of splits; to read one split, name its folder",
        ),
        (("TEST", "val"), "its classes (TEST, val) have the names of splits"),
        (("train",), "its classes (train) have the names of splits"),
        (("train", "bus"), None),
    ],
)
def test_splits_are_hardly_classes(tmp_path, names, note):
    for name in names:
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / name / "a.png")
    notes = Folder(tmp_path, None, 1).notes
    assert note in notes[0] and notes[0].endswith(f"path={tmp_path / names[0]}") if note else not notes


def test_classes_without_images_are_noted(tmp_path):
    write_classes(tmp_path)
    for name in ("bird", "ant/deeper", ".cache"):
        (tmp_path / name).mkdir(parents=True)
    data = Folder(tmp_path, None, 3)
    assert data.class_names == ("cat", "dog")
    assert (
        data.notes[-1]
        == f"path={tmp_path}: skipped 2 folders (ant, bird), without images; add images, or remove what is no class"
    )


def test_folder_without_classes_is_found_below_root(tmp_path):
    write_classes(tmp_path / "pictures")
    data = datasets.build("folder", tmp_path, {"path": "pictures/dog", "channels": 1})
    assert data.labels is None and data.class_names == () and data[0][1] == -1
    assert data[0][0].tolist() == [[[10] * 4] * 4]


def test_images_beside_subfolders_have_no_labels(tmp_path):
    Image.new("L", (4, 4)).save(write_classes(tmp_path) / "a.png")
    assert Folder(tmp_path, None, 3).labels is None


@pytest.mark.parametrize(
    ("mode", "color", "name", "rgb"),
    [
        ("L", 77, "a.png", (77, 77, 77)),
        ("L", 77, "a.jpg", (77, 77, 77)),
        ("1", 1, "a.png", (255, 255, 255)),
        ("RGB", RGB, "a.png", RGB),
        ("RGB", RGB, "a.JPEG", RGB),
        ("RGB", RGB, "a.webp", RGB),
        ("RGBA", (*RGB, 255), "a.png", RGB),
        ("RGBA", (*RGB, 0), "a.png", (255, 255, 255)),
        ("RGBA", (*RGB, 51), "a.png", (206, 244, 210)),  # 255 + (c - 255) / 5
        ("LA", (105, 51), "a.png", (225, 225, 225)),
        ("CMYK", (255, 0, 0, 0), "a.jpg", (0, 255, 255)),
        ("CMYK", (0, 0, 0, 255), "a.jpg", (0, 0, 0)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_modes(tmp_path, mode, color, name, rgb, channels):
    lossy = 0 if name.endswith("png") and mode in "1LRGB" else 3
    expected = rgb if channels == 3 else [np.dot(rgb, (0.299, 0.587, 0.114))]  # ITU-R 601 luma
    image = decode(tmp_path, Image.new(mode, (8, 8), color), name, channels)
    assert image.shape == (channels, 8, 8)
    for plane, value in zip(image.double(), expected, strict=True):
        assert (plane - value).abs().max() <= lossy + 0.51 * (channels == 1)


def test_palette(tmp_path):
    pixels = Image.new("RGB", (2, 1), RGB)
    pixels.putpixel((1, 0), (1, 2, 3))
    palette = pixels.quantize(2)
    assert palette.mode == "P"
    assert decode(tmp_path, palette).permute(1, 2, 0).tolist() == [[list(RGB), [1, 2, 3]]]
    # one colour of the palette made transparent: white there, untouched elsewhere
    transparent = decode(tmp_path, palette, transparency=palette.getpixel((1, 0)))
    assert transparent.permute(1, 2, 0).tolist() == [[list(RGB), [255, 255, 255]]]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, name):
    levels = np.array([[0, 257, 200 * 257, 65535]], dtype=np.uint16)
    assert decode(tmp_path, Image.fromarray(levels), name, channels=1).tolist() == [[[0, 1, 200, 255]]]


def test_rotation_flag_of_a_camera(tmp_path):
    image = Image.new("L", (32, 16), 0)  # left half black, right half white
    image.paste(255, (16, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise to see it
    turned = decode(tmp_path, image, "a.jpg", channels=1, exif=exif)[0]
    assert turned.shape == (32, 16)
    assert turned[:12].max() < 20 and turned[20:].min() > 235


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    image = decode(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert Image.open(tmp_path / "a.gif").n_frames == 2
    assert image[:, 0, 0].tolist() == [255, 0, 0]


def test_crop_is_central_and_resized(tmp_path):
    image = Image.new("RGB", (16, 8), "red")
    image.paste("lime", (4, 0, 12, 8))  # the central square
    for size in (8, 4, 20):
        cropped = decode(tmp_path, image, size=size)
        assert cropped.shape == (3, size, size)
        inner = cropped[:, 1:-1, 1:-1].flatten(1)  # the filter looks a pixel beyond the crop where it resizes
        assert inner[1].min() >= 240 and inner[0].max() <= 15 and inner[2].max() == 0
    assert torch.equal(decode(tmp_path, image, size=8)[1], torch.full((8, 8), 255, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.bmp"])
@pytest.mark.parametrize("share", [0, 0.5, 0.9])
def test_broken_files_are_named(tmp_path, name, share):
    Image.fromarray(NOISE).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    data = Folder(tmp_path, 32, 3)
    with pytest.raises(ValueError, match=rf"{name}: not a readable image"):
        data[0]


@pytest.mark.filterwarnings("ignore")  # Pillow's, about odd metadata
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.bmp", "a.webp", "a.tif"])
def test_mutated_files_are_decoded_or_named(tmp_path, name):
    """A hundred files of each kind with bytes changed at random: an image of the size that was asked for, or an error."""
    Image.fromarray(NOISE).save(tmp_path / name)
    whole = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
    data = Folder(tmp_path, 16, 3)
    rng = np.random.default_rng(0)
    outcomes = {"decoded": 0, "named": 0}
    for _ in range(100):
        mutated = whole.copy()
        places = rng.integers(0, len(mutated) if rng.random() < 0.5 else 64, rng.integers(1, 9))
        mutated[places] = rng.integers(0, 256, len(places))
        (tmp_path / name).write_bytes(mutated.tobytes())
        try:
            image, _ = data[0]
            assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
            outcomes["decoded"] += 1
        except ValueError as error:
            assert f"{name}: not a readable image" in str(error)
            outcomes["named"] += 1
    assert outcomes["named"], outcomes


def test_sizes_must_agree_without_size(tmp_path):
    Image.new("L", (4, 6)).save(tmp_path / "a.png")
    Image.new("L", (4, 5)).save(tmp_path / "b.png")
    data = Folder(tmp_path, None, 1)
    assert data.image_shape == (1, 6, 4)
    with pytest.raises(ValueError, match=r"b.png: has 5x4 pixels, expected 6x4; resize the images, or"):
        data[1]


def test_fingerprint_of_a_folder_follows_its_content(tmp_path):
    image = Image.fromarray(NOISE)
    image.save(tmp_path / "a.png")

    def fingerprint(size: int = 8, channels: int = 3) -> str:
        return Folder(tmp_path, size, channels).fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    assert len({first, fingerprint(size=4), fingerprint(channels=1)}) == 3
    image.putpixel((0, 0), (0, 0, 0))
    image.save(tmp_path / "a.png")
    changed = fingerprint()
    image.save(tmp_path / "b.png")
    assert len({first, changed, fingerprint()}) == 3


def test_fingerprint_of_images_in_memory():
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    images[0] = 1
    one = Images(images, None, ()).fingerprint()
    assert Images(images.clone(), None, ()).fingerprint() == one
    assert Images(images.flip(0), None, ()).fingerprint() != one
    view = images.permute(0, 1, 3, 2)  # not contiguous, the same pixels
    assert Images(view, None, ()).fingerprint() == one


def test_an_unlabelled_image_has_label_minus_one():
    assert Images(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), None, ())[0][1] == -1


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("cifar", {}, r"unknown data set 'cifar'; choose from .*cifar10"),
        ("digits", {"size": 8}, r"digits has no argument 'size'; it takes split"),
        ("mnist", {"trian": True}, r"mnist has no argument 'trian'; it takes train"),
        ("mnist", {"root": "."}, r"mnist has no argument 'root'"),  # the root is data.root, not an argument
        ("folder", {}, r"folder cannot be built from .*path"),
        ("folder", {"path": "pictures", "channels": 2}, r"channels=2: must be 1 \(gray\) or 3 \(RGB\)"),
        ("folder", {"path": "pictures", "size": 0}, r"size=0"),
        ("folder", {"path": "pictures", "size": "big"}, r"size='big'"),
        ("folder", {"path": "pictures", "size": 2.5}, r"size.*2\.5"),  # not an image's fault
    ],
)
def test_wrong_names_and_arguments(tmp_path, name, args, message):
    write_classes(tmp_path / "pictures")
    with pytest.raises(ValueError, match=message):
        datasets.build(name, tmp_path, args)


def test_source_of_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"pairs cannot be built from .*'x'"):
        DataSpec("pairs", tmp_path, {"path": "p", "x": 1}).behind()


def test_folders_that_hold_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(FileNotFoundError, match="holds no image"):
        datasets.build("folder", None, {"path": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        datasets.build("folder", tmp_path, {"path": "absent"})


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("folder", "images.tar", r"images\.tar: is a file; name a folder of images; unpack an archive first"),
        ("folder", "train.parquet", r"is a file; pack Parquet files with .*pack_images --source \S*train\.parquet --save_dir"),
        ("packed", "images.tar", r"images\.tar: is a file; name the folder that scripts\.pack_images wrote"),
        ("pairs", "pairs.npz", r"pairs\.npz: is a file; name the folder that scripts\.make_pairs wrote"),
    ],
)
def test_files_in_place_of_a_folder(tmp_path, name, file, message):
    """Below the root, as folders."""
    (tmp_path / file).touch()
    with pytest.raises(FileNotFoundError, match=message):
        datasets.build(name, tmp_path, {"path": file})


def test_folder_of_parquet_files(tmp_path):
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data/train-00000.parquet").touch()
    with pytest.raises(FileNotFoundError, match=r"holds no image .*scripts\.pack_images --source '.*/my data' --save_dir DIR"):
        datasets.build("folder", tmp_path, {"path": "my data"})


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
@pytest.mark.parametrize("content", [None, b"", b"garbage " * 100], ids=["absent", "empty_files", "damaged_files"])
def test_without_files_and_network(tmp_path, monkeypatch, name, content):
    def no_network(self):
        raise OSError("no network")

    for cls in (tv_datasets.MNIST, tv_datasets.CIFAR10):
        monkeypatch.setattr(cls, "download", no_network)
    if content is not None:  # of a download that was cut off, or of a disk that fails
        for folder in ("MNIST/raw", "FashionMNIST/raw", "cifar-10-batches-py"):
            (tmp_path / folder).mkdir(parents=True)
        for part in ("train", "t10k"):
            for kind in ("images-idx3", "labels-idx1"):
                for folder in ("MNIST", "FashionMNIST"):
                    (tmp_path / folder / "raw" / f"{part}-{kind}-ubyte").write_bytes(content)
        (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"files are damaged.*FLOW_DATA") as error:
        datasets.build(name, tmp_path, {})
    assert str(tmp_path) in str(error.value)


def test_classes_of_mnist(tmp_path):
    """classes=[3]: the images of this class in their order, with the label that they have among all."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"MNIST/raw/{part}-images-idx3-ubyte", pixels)
        write_idx(tmp_path / f"MNIST/raw/{part}-labels-idx1-ubyte", np.array([3, 1, 3, 0], dtype=np.uint8))
    whole, threes, two = (datasets.build("mnist", tmp_path, args) for args in ({}, {"classes": [3]}, {"classes": [1, 0]}))
    assert len(whole) == 4 and whole.labels.tolist() == [3, 1, 3, 0] and len(whole.class_names) == 10
    assert torch.equal(threes.images, torch.from_numpy(pixels[[0, 2]])[:, None]) and threes.labels.tolist() == [3, 3]
    assert torch.equal(two.images, torch.from_numpy(pixels[[1, 3]])[:, None]) and two.labels.tolist() == [1, 0]
    assert threes.class_names == whole.class_names
    for classes in ([], [10], [-1], 3, ["3"]):
        with pytest.raises(ValueError, match=r"classes=.*: must be a list of numbers from 0 to 9"):
            datasets.build("mnist", tmp_path, {"classes": classes})


def test_default_root(monkeypatch):
    monkeypatch.setenv("FLOW_DATA", "/somewhere")
    assert default_root() == Path("/somewhere")
    monkeypatch.delenv("FLOW_DATA")
    assert default_root() == Path("data")


def test_mnist(real_data):
    train, test = (datasets.build("mnist", real_data, {"train": part}) for part in (True, False))
    assert train.images.shape == (60_000, 1, 28, 28) and train.images.dtype == torch.uint8
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.images.shape == (10_000, 1, 28, 28) and len(test.labels) == 10_000
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9] and train.labels.dtype == torch.int64
    assert train.images.max() == 255 and train.images[0].float().mean() == pytest.approx(35.1, abs=0.1)
    assert len(train.class_names) == 10 and train.fingerprint() != test.fingerprint()


def test_cifar10(real_data):
    train, test = (datasets.build("cifar10", str(real_data), {"train": part}) for part in (True, False))
    assert train.images.shape == (50_000, 3, 32, 32) and train.images.dtype == torch.uint8
    assert test.images.shape == (10_000, 3, 32, 32)
    assert train.labels.bincount().tolist() == [5000] * 10 and test.labels.bincount().tolist() == [1000] * 10
    assert train.class_names[:3] == ("airplane", "automobile", "bird")
    # the first row of the first image, and the channel means that everybody normalises with: the axes are in order
    assert train.images[0, 0, 0, :4].tolist() == [59, 43, 50, 68]
    means = train.images[:5000].float().mean((0, 2, 3)) / 255
    assert torch.allclose(means, torch.tensor([0.491, 0.482, 0.447]), atol=0.01)
