"""Packed images against the folder that they were made from: pixels, order, training to the bit, damage, held-out images."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, run_here
from PIL import Image
from safetensors.torch import load_file

import datasets
from datasets.packed import Packed
from flow.sampling import locate
from flow.training.logging import read_metrics

SMALL = ["model.name=mlp", "model.args={width: 16}"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two classes of 17 images that are neither square nor of one size, one of them with alpha."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    for k in range(17):
        for name in ("discs", "cats"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (12 + k, 30 - k, 4 if k == 3 else 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k:02d}.png")
    return folder


@pytest.fixture(scope="module")
def folder(photos) -> datasets.DataSet:
    return datasets.build("folder", None, {"path": str(photos), "size": 8})


@pytest.fixture(scope="module")
def path(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "photos8"
    run_here("pack_images", "--source", photos, "--size", 8, "--shard_images", 10, "--save_dir", out)
    return out


@pytest.fixture(scope="module")
def data(path) -> Packed:
    return datasets.build("packed", None, {"path": str(path)})


def test_images_are_those_of_the_folder(data, folder):
    assert len(data) == len(folder) == 34 and data.image_shape == (3, 8, 8) and data.class_names == ("cats", "discs")
    assert torch.equal(data.labels, folder.labels)
    for k in range(34):
        image, label = data[k]
        assert torch.equal(image, folder[k][0]) and label == folder[k][1], k
    order = [33, 0, 9, 10, 33, 29, 30]  # across the borders of shards, and twice the same
    assert torch.equal(data.read(order), torch.stack([folder[k][0] for k in order]))


def test_missing_folder_is_named_as_it_was_given(error, tmp_path):
    words = ["data.name=packed", "data.args.path=photos/none", f"data.root={tmp_path}", "-e", tmp_path / "run"]
    assert "path=photos/none: holds no packed images" in error("train", *SMALL, *words)


def test_manifest(path):
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["size"] == 8 and manifest["crop"] == "center" and manifest["image_shape"] == [3, 8, 8]
    assert manifest["class_names"] == ["cats", "discs"] and manifest["skipped"] == [] and manifest["images"] == 34
    assert [shard["images"] for shard in manifest["shards"]] == [10, 10, 10, 4]
    assert manifest["bytes"] == sum(shard["bytes"] for shard in manifest["shards"])
    assert all((path / shard["name"]).stat().st_size == shard["bytes"] for shard in manifest["shards"])


def test_training_equals_that_from_the_folder(here, tmp_path, photos, path):
    """To the bit, with flips, also where one of the two is resumed; the classes are found for both."""
    common = [*SMALL, *TINY_RUN, "data.horizontal_flip=true"]
    from_folder = ["data.name=folder", f"data.args={{path: {photos}, size: 8}}", "data.num_workers=0"]
    said = here("train", *common, *from_folder, "-e", tmp_path / "folder")
    assert f"pack_images --source {photos} --size 8 --save_dir {photos}_packed" in said
    from_packed = [*common, "data.name=packed", f"data.args.path={path}"]
    said = here("train", *from_packed, "-e", tmp_path / "packed", "train.steps=2")
    assert "2 classes (cats, discs)" in said and "pack_images" not in said
    here("train", "-e", tmp_path / "packed", "-r", "latest", "train.steps=4")
    one, other = (load_file(locate.find(tmp_path / name)) for name in ("folder", "packed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_reference_and_held_out(here, error, tmp_path, path, tiny_run, packed_digits):
    """--reference takes packed images; data.args.held_out is the row of real images and the validation loss."""
    small = ["--sampling_steps", 1, "--methods", "euler", "--n_samples", 8, "--metrics", "fid", "--feature_extractor", "digits"]
    gray, root = packed_digits / "train", f"data.root={tmp_path}"
    said = here("evaluate", "--weights", tiny_run, *small, "--reference", gray, "--out", tmp_path / "out", root)
    assert "real (half against half)" in said
    test, other = (f"data.args={{path: {gray}, held_out: {packed_digits / name}}}" for name in ("test", "other"))
    said = here("evaluate", "--weights", tiny_run, *small, "--out", tmp_path / "held", root, "data.name=packed", test)
    assert "real (held-out images)" in said
    train = ["train", *SMALL, *TINY_RUN, "evaluate.loss_every_steps=4", "evaluate.loss_samples=20", "data.name=packed"]
    rows = {}
    for run, args in (("one", test), ("two", other), ("three", test)):
        here(*train, args, "-e", tmp_path / run)
        rows[run] = {key: value for row in read_metrics(tmp_path / run / "metrics.jsonl") for key, value in row.items()}
    assert rows["one"]["loss"] == rows["two"]["loss"]
    validation = {run: row["validation_loss"] for run, row in rows.items()}
    assert validation["one"] == validation["three"] != validation["two"]
    line = error(*train, f"data.args.path={gray}", "-e", tmp_path / "none")
    assert "has no held-out part" in line and "data.args.held_out" in line
    line = error(*train, f"data.args={{path: {gray}, held_out: {path}}}", "-e", tmp_path / "none")
    assert "image_shape [3, 8, 8]" in line and "[1, 8, 8]" in line
    line = error(*train, f"data.args={{path: {gray}, held_out: {gray}}}", "-e", tmp_path / "none")
    assert f"held_out={gray}: holds the images of {gray}, which training sees" in line


@pytest.mark.parametrize("damage", ["missing", "cut", "other", "header"])
def test_damaged_shards_are_named(tmp_path, path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    shard = copy / "images_00001.safetensors"
    if damage == "other":
        shutil.copy(copy / "images_00002.safetensors", shard)
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "header":
        content = shard.read_bytes()
        shard.write_bytes(content.replace(b'"header":"{', b'"header":"x', 1))
        assert shard.read_bytes() != content
    else:
        shard.unlink()
    with pytest.raises(ValueError, match=r"images_00001\.safetensors is .*run pack_images with the same arguments"):
        datasets.build("packed", None, {"path": str(copy)})


def test_damaged_list_of_shards(tmp_path, path):
    shutil.copytree(path, tmp_path / "copy")
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["shards"][1]["digest"]
    (tmp_path / "copy/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged, a shard lacks its name, digest .*; run pack_images with"):
        datasets.build("packed", None, {"path": str(tmp_path / "copy")})
    (tmp_path / "copy/manifest.json").write_text(json.dumps({**manifest, "shards": []}))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged, it lists no shard; run pack_images with"):
        datasets.build("packed", None, {"path": str(tmp_path / "copy")})


def test_shard_that_is_cut_off_in_use(tmp_path, path):
    shutil.copytree(path, tmp_path / "copy")
    data = datasets.build("packed", None, {"path": str(tmp_path / "copy")})
    os.truncate(tmp_path / "copy/images_00003.safetensors", 500)
    assert data.read([0, 29]).shape == (2, 3, 8, 8)
    with pytest.raises(OSError, match=r"images_00003\.safetensors: was cut off"):
        data.read([33])


def test_folders_of_another_kind(error, tmp_path, photos, path):
    with pytest.raises(FileNotFoundError, match=r"holds no packed images .* scripts\.pack_images"):
        datasets.build("packed", None, {"path": str(photos)})
    (tmp_path / "manifest.json").write_text('{"data": {"name": "mnist", "root": null, "args": {}}, "class_names": []}')
    with pytest.raises(
        ValueError,
        match=r"not that of packed images .*it lacks crop, digest, image_shape, shards, size",
    ):
        datasets.build("packed", None, {"path": str(tmp_path)})
    shutil.copytree(path, tmp_path / "unfinished")
    (tmp_path / "unfinished/manifest.json").unlink()
    line = error("evaluate", "--samples", photos / "cats", "--reference", tmp_path / "unfinished", "--out", tmp_path / "out")
    assert "holds no packed images" in line
