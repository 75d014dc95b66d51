"""Packing: sources of every kind give the same bytes, what a kill costs, several processes, damage, mistakes."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPOSITORY, contents, run_here, succeed, wait_until
from huggingface_hub import constants
from PIL import Image

import datasets
from datasets.packed import Packed
from scripts import pack_images

PACK = ["--size", "8", "--shard_images", "10"]
FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["cats", "discs"], "_type": "ClassLabel"}}


def read(folder: Path) -> Packed:
    return datasets.build("packed", None, {"path": str(folder)})


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two classes of 12 images."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    for name in ("cats", "discs"):
        (folder / name).mkdir(parents=True)
        for k in range(12):
            Image.fromarray(rng.integers(0, 256, (9 + k, 20, 3), dtype=np.uint8)).save(folder / name / f"{k:02d}.png")
    return folder


def write_parquet(photos: Path, folder: Path, features: dict | None = FEATURES, files: int = 3, label: str = "label") -> None:
    """The images as the hub stores them: in several files with row groups of three."""
    images = sorted(photos.rglob("*.png"))
    rows = [{"bytes": p.read_bytes(), "path": p.name} for p in images]
    labels: list = [("cats", "discs").index(p.parent.name) for p in images]
    if features is None:
        labels = [p.parent.name for p in images]
    folder.mkdir(parents=True, exist_ok=True)
    cuts = np.array_split(np.arange(len(rows)), files)
    for i, cut in enumerate(cuts):
        table = pa.table({"image": [rows[k] for k in cut], label: [labels[k] for k in cut]})
        if features is not None:
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, folder / f"train-{i:05d}-of-{files:05d}.parquet", row_group_size=3)
    pq.write_table(table.slice(0, 2), folder / "test-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory) -> Path:
    """The photos, packed by an uninterrupted process."""
    out = tmp_path_factory.mktemp("packed") / "one"
    run_here("pack_images", "--source", photos, *PACK, "--save_dir", out)
    return out


@pytest.mark.parametrize("features", [FEATURES, None], ids=["metadata", "found"])
def test_parquet_equals_the_folder(here, tmp_path, photos, folder, features):
    write_parquet(photos, tmp_path / "hub/data", features)
    said = here("pack_images", "--source", tmp_path / "hub", *PACK, "--save_dir", tmp_path / "out")
    assert "24 images of 3x8x8, 2 classes" in said
    data, expected = read(tmp_path / "out"), read(folder)
    assert torch.equal(data.read(range(24)), expected.read(range(24))) and torch.equal(data.labels, expected.labels)
    assert data.class_names == expected.class_names
    said = here("pack_images", "--source", tmp_path / "hub", *PACK, "--save_dir", tmp_path / "test", "--split", "test")
    assert "2 images" in said
    said = here("pack_images", "--source", tmp_path / "hub/data/train-00001-of-00003.parquet", *PACK, "--label_column", "none",
                "--save_dir", tmp_path / "one")  # fmt: skip
    assert torch.equal(read(tmp_path / "one").read(range(8)), expected.read(range(8, 16)))
    assert read(tmp_path / "one").labels is None


def test_tables_beside_images_are_no_source(here, error, photos, tmp_path):
    """Folders of images on the hub hold metadata.parquet; a flag for Parquet files asks for it."""
    folder = shutil.copytree(photos, tmp_path / "photos")
    pq.write_table(pa.table({"file_name": ["00.png"]}), folder / "metadata.parquet")
    assert "metadata.parquet is not read" in here("pack_images", "--source", folder, *PACK, "--save_dir", tmp_path / "out")
    assert len(read(tmp_path / "out")) == 24
    line = error("pack_images", "--source", folder, *PACK, "--save_dir", tmp_path / "none", "--image_column", "file_name")
    assert "--image_column file_name: no column of images" in line


def test_categories_are_labels(here, photos, tmp_path):
    """Of pandas, and beside a binary column that the metadata does not call images."""
    images = sorted(photos.rglob("*.png"))
    table = pa.table({
        "image": [{"bytes": p.read_bytes(), "path": p.name} for p in images],
        "audio": [b"sound"] * len(images),
        "label": pa.array([p.parent.name for p in images]).dictionary_encode(),
    })  # fmt: skip
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    (tmp_path / "table").mkdir()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "table" / "train.parquet")
    here("pack_images", "--source", tmp_path / "table", *PACK, "--save_dir", tmp_path / "out")
    assert read(tmp_path / "out").class_names == ("cats", "discs") and read(tmp_path / "out").labels.sum() == 12


def test_parquet_files_are_looked_for_once(here, monkeypatch, tmp_path, photos):
    """A folder of millions of files takes minutes each time."""
    looked_at = []

    def parquet_files(path, before=pack_images.parquet_files):
        looked_at.append(path)
        return before(path)

    monkeypatch.setattr(pack_images, "parquet_files", parquet_files)
    here("pack_images", "--source", photos, *PACK, "--save_dir", tmp_path / "out")
    assert looked_at == [photos]


def test_built_in_set(here, tmp_path):
    here("pack_images", "--source", "digits", "--split", "test", "--shard_images", 100, "--save_dir", tmp_path / "out")
    data, digits = read(tmp_path / "out"), datasets.build("digits", None, {"split": "test"})
    assert torch.equal(data.read(range(299)), digits.images) and torch.equal(data.labels, digits.labels)


def test_two_processes_write_the_same_bytes(group, tmp_path, photos, folder):
    out = tmp_path / "two"
    group("pack_images", "--source", photos, *PACK, "--save_dir", out)
    assert contents(out) == contents(folder)


def test_damaged_shards_are_made_again(here, tmp_path, photos, folder):
    """What a kill leaves behind, a missing shard and a flipped bit: they are named, and they alone are made again."""
    out = tmp_path / "out"
    out.mkdir()
    for name, content in contents(folder).items():
        if name not in ("images_00001.safetensors", "manifest.json"):
            (out / name).write_bytes(content)
    for name in (".tmp-1-images_00001.safetensors", ".tmpA3x9Zq"):  # ours, and one of safetensors itself
        (out / name).write_bytes(b"half of")
    damaged = bytearray((out / "images_00002.safetensors").read_bytes())
    damaged[-3] ^= 1
    (out / "images_00002.safetensors").write_bytes(damaged)
    stamp = (out / "images_00000.safetensors").stat().st_mtime_ns
    said = here("pack_images", "--source", photos, *PACK, "--save_dir", out)
    assert "14 of the source read now" in said
    assert contents(out) == contents(folder) and (out / "images_00000.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """Ended by SIGKILL three times, each time after further shards: the folder ends as if nothing had happened."""
    command = ["-m", "scripts.pack_images", "--source", "digits", "--shard_images", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for _ in range(3):
        before = len(list(cut.glob("images_*")))
        process = subprocess.Popen([sys.executable, *command, "--save_dir", str(cut)], cwd=REPOSITORY, env={**os.environ})
        wait_until(lambda enough=before + 20: len(list(cut.glob("images_*"))) >= enough, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (cut / "manifest.json").exists()
    succeed(*command, "--save_dir", cut)
    succeed(*command, "--save_dir", whole)
    assert contents(cut) == contents(whole)


def test_damaged_images(here, error, tmp_path, photos):
    """One line that names the file, or with --skip_damaged a count; a whole shard of them has no images."""
    for name, sources in {"a": 4, "b": 2}.items():
        (tmp_path / "mixed" / name).mkdir(parents=True)
        for k, file in enumerate(sorted((photos / "cats").iterdir())[:sources]):
            whole = file.read_bytes()
            (tmp_path / "mixed" / name / f"{k}.png").write_bytes(whole[:60] if name == "b" or k == 1 else whole)
    command = [
        "pack_images",
        "--source",
        tmp_path / "mixed",
        "--size",
        "8",
        "--shard_images",
        "2",
        "--save_dir",
        tmp_path / "out",
    ]
    line = error(*command)
    assert f"{tmp_path}/mixed/a/1.png: not a readable image" in line and "--skip_damaged" in line
    said = here(*command, "--skip_damaged")
    assert "note: left out 3 images that cannot be decoded (a/1.png, b/0.png, b/1.png)" in said
    assert json.loads((tmp_path / "out/manifest.json").read_text())["skipped"] == ["a/1.png", "b/0.png", "b/1.png"]
    data, source = read(tmp_path / "out"), datasets.build("folder", None, {"path": str(tmp_path / "mixed"), "size": 8})
    assert torch.equal(data.read([0, 1, 2]), torch.stack([source[k][0] for k in (0, 2, 3)]))
    assert data.labels.tolist() == [0, 0, 0] and data.class_names == ("a", "b")
    assert "0 of the source read now" in here(*command, "--skip_damaged")  # the shards without an image are whole, too

    line = error("pack_images", "--source", photos, "--skip_damaged", "--save_dir", tmp_path / "sizes")
    assert (
        "has 10x20 pixels, expected 9x20; resize the images, or read them with data.args.size=N in a training, " in line
    )  # not damage
    line = error(
        "pack_images", "--source", tmp_path / "mixed/b", "--size", 8, "--skip_damaged", "--save_dir", tmp_path / "none"
    )
    assert "none of 2 images can be decoded, such as 0.png" in line


def test_first_image_may_be_damaged(here, error, tmp_path):
    """The size is that of the first image that can be read; where none can, the first one is named."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (6, 4), (k, 0, 0)).save(folder / f"{k}.png")
    (folder / "0.png").write_bytes(b"no image")
    command = ["pack_images", "--source", folder, "--save_dir", tmp_path / "out"]
    line = error(*command)
    assert f"{folder / '0.png'}: not a readable image" in line and "--skip_damaged" in line
    assert "left out 1 images that cannot be decoded (0.png)" in here(*command, "--skip_damaged")
    data = read(tmp_path / "out")
    assert data.image_shape == (3, 4, 6) and data.read([0, 1])[:, 0, 0, 0].tolist() == [1, 2]
    for k in (1, 2):
        (folder / f"{k}.png").write_bytes(b"no image")
    line = error(*command[:-1], tmp_path / "none", "--skip_damaged")
    assert f"{folder / '0.png'}: not a readable image" in line


def test_gray_images_are_noted(here, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.linear_gradient("L").resize((8, 8)).save(tmp_path / "photos" / "a.png")
    command = ["pack_images", "--source", tmp_path / "photos", "--save_dir"]
    assert "note: the first image is gray; --channels 1 packs" in here(*command, tmp_path / "color")
    assert "is gray" not in here(*command, tmp_path / "gray", "--channels", 1)


def test_damaged_rows_of_parquet(here, error, tmp_path):
    good = io.BytesIO()
    Image.new("L", (8, 8), 7).save(good, "png")
    cells = [good.getvalue(), b"no image", None, good.getvalue()]
    pq.write_table(pa.table({"pixels": cells}), tmp_path / "a.parquet")
    command = ["pack_images", "--source", tmp_path / "a.parquet", "--channels", 1, "--save_dir", tmp_path / "out"]
    assert "a.parquet, row 1: not a readable image (its content is none of PNG, JPEG, WEBP, BMP, TIFF, GIF)" in error(*command)
    assert "left out 2 images that cannot be decoded (a.parquet, row 1, a.parquet, row 2)" in here(*command, "--skip_damaged")
    assert read(tmp_path / "out").read([0, 1]).unique().tolist() == [7]
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    assert "b.parquet: not a whole Parquet file" in error("pack_images", "--source", tmp_path / "b.parquet", *command[3:])


@pytest.mark.parametrize(("column", "flags"), [("pixels", []), ("pixels", ["--size", 8]), ("label", [])])
def test_parquet_with_damaged_pages(error, tmp_path, column, flags):
    """The footer is whole, so that the damage shows where the column is read; it is not that of an image."""
    file, cells = tmp_path / "a.parquet", []
    for k in range(4):
        png = io.BytesIO()
        Image.new("L", (8, 8), k).save(png, "png")
        cells.append(png.getvalue())
    pq.write_table(pa.table({"pixels": cells, "label": [0, 1, 0, 1]}), file)
    start = pq.read_metadata(file).row_group(0).column(("pixels", "label").index(column)).dictionary_page_offset
    content = bytearray(file.read_bytes())
    content[start : start + 20] = b"\xff" * 20
    file.write_bytes(content)
    command = ["pack_images", "--source", file, "--channels", 1, "--skip_damaged", "--save_dir", tmp_path / "out"]
    assert f"{file}: not a whole Parquet file" in error(*command, *flags)
    assert list(tmp_path.iterdir()) == [file]


def test_other_settings_do_not_mix(error, photos, folder):
    before = contents(folder)
    line = error("pack_images", "--source", photos, "--size", 9, "--shard_images", 10, "--save_dir", folder)
    assert "holds images of another run (size 8, now 9)" in line
    assert contents(folder) == before


def test_columns_and_splits(error, tmp_path, photos):
    """What cannot be chosen is listed."""
    write_parquet(photos, tmp_path / "a/train", files=1, label="kind")
    write_parquet(photos, tmp_path / "b/train", files=1)
    pq.write_table(pa.table({"x": [1.5], "front": [b"1"], "back": [b"2"]}), tmp_path / "two.parquet")
    pq.write_table(pa.table({"x": [1.5]}), tmp_path / "none.parquet")
    pack = ["--save_dir", tmp_path / "out", "--source"]
    ask = partial(error, "pack_images", *pack)
    assert "several data sets (a/train, b/train); choose with --files 'a/train/*'" in ask(tmp_path, "--split", "train")
    assert "--split dev: choose from none, test, train, two" in ask(tmp_path, "--split", "dev")
    assert "--files c/*: matches no Parquet file" in ask(tmp_path, "--files", "c/*")
    assert "2 columns (front, back); choose with --image_column" in ask(tmp_path / "two.parquet")
    assert "no column of images (x)" in ask(tmp_path / "none.parquet")
    one = tmp_path / "b"
    assert "--image_column x: no column of images; those are image" in ask(one, "--image_column", "x")
    assert "--label_column image: no column of whole numbers or strings; those are label" in ask(one, "--label_column", "image")
    assert not (tmp_path / "out").exists()


def test_mistakes(error, tmp_path, photos):
    pack = partial(error, "pack_images", "--save_dir", tmp_path / "out", "--source")
    assert "path=nowhere: there is no such folder" in pack("nowhere")
    (tmp_path / "photos.tar").touch()
    line = pack(tmp_path / "photos.tar")
    assert f"--source {tmp_path / 'photos.tar'}: is a file, not a Parquet file; name a folder of images (unpack an" in line
    assert "--split train: a folder of images has none" in pack(photos, "--split", "train")
    assert "--label_column x: is for Parquet files" in pack(photos, "--label_column", "x")
    assert "--revision x: is for the hub" in pack(photos, "--revision", "x")
    assert "--size 16: digits is packed as it is" in pack("digits", "--size", "16")
    assert "--split dev: must be one of train, test" in pack("digits", "--split", "dev")
    assert "data.name: of the configuration only data.root" in pack("digits", "data.name=mnist")
    assert not (tmp_path / "out").exists()


class Hub(BaseHTTPRequestHandler):
    """The two requests of the hub that a download needs: what a revision holds, and a file of it."""

    def __init__(self, root: Path, *args):
        self.root = root
        super().__init__(*args)

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].split("/")
        if self.path.startswith("/api/datasets/owner/photos"):
            siblings = [{"rfilename": p.relative_to(self.root).as_posix()} for p in self.root.rglob("*") if p.is_file()]
            info = {"id": "owner/photos", "sha": "a" * 40, "siblings": siblings, "private": False, "downloads": 0, "tags": []}
            self.answer(200, json.dumps(info).encode())
        elif self.path.startswith("/datasets/owner/photos/resolve/"):
            content = (self.root / "/".join(parts[6:])).read_bytes()
            self.answer(200, content, {"X-Repo-Commit": "a" * 40, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
        else:
            code = "GatedRepo" if "gated" in self.path else "RepoNotFound"
            self.answer(403 if "gated" in self.path else 404, b"{}", {"X-Error-Code": code})

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The folder of a data set on a hub of this machine, with an empty cache."""
    root = tmp_path / "remote"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield root
    server.shutdown()
    server.server_close()


def test_hub(here, error, tmp_path, photos, folder, hub):
    """A data set of the hub, at the commit of its revision; a second run reads the cache."""
    hub.mkdir()
    (hub / "README.md").write_text("# photos")
    ask = partial(error, "pack_images", *PACK, "--save_dir", tmp_path / "out", "--source")
    assert "holds no Parquet files; the hub converts many data sets: --revision refs/convert/parquet" in ask("hf:owner/photos")
    write_parquet(photos, hub / "data")
    here("pack_images", "--source", "hf:owner/photos", *PACK, "--save_dir", tmp_path / "out")
    assert torch.equal(read(tmp_path / "out").read(range(24)), read(folder).read(range(24)))
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["revision"] == "a" * 40 and manifest["data"]["args"]["repository"] == "owner/photos"
    assert len(list((tmp_path / "cache").rglob("*.parquet"))) == 3  # not that of the test split
    for name, reason in {"owner/gated": "access has to be asked for", "owner/nothing": "there is no such repository"}.items():
        assert f"hf:{name}: {reason}" in ask(f"hf:{name}")
    assert "hf:a/b/c: Repo id must be" in ask("hf:a/b/c")


def test_unreachable_hub(error, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    line = error("pack_images", "--source", "hf:owner/name", "--save_dir", tmp_path / "out")
    assert "hf:owner/name: " in line and "cannot be reached" in line


def test_parquet_files_in_linked_folders(tmp_path):
    (tmp_path / "disk").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "disk/train.parquet")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/data").symlink_to(tmp_path / "disk")
    assert pack_images.parquet_files(tmp_path / "hub") == ["data/train.parquet"]
