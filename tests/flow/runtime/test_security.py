"""Nothing that lies in a file is run: pickles, YAML objects, paths that leave their folder, image bombs; no open port."""

import json
import os
import pickle
import shutil
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torchvision.datasets as tv_datasets
from conftest import TINY_TRAIN
from PIL import Image
from safetensors.torch import load_file, save_file
from small_files import Payload

import datasets
from configs import loading
from configs.errors import UserError
from datasets.folder import Folder
from flow.evaluation import feature_cache, features, reference
from flow.runtime import distributed, files
from flow.runtime.errors import cli_main
from flow.sampling import images, locate
from flow.training import checkpoint
from flow.training.data_loader import TrainingLoader


@pytest.fixture
def pwned(tmp_path):
    """The file that a payload would make; it must not be there in the end."""
    path = tmp_path / "pwned"
    run, arguments = Payload(path).__reduce__()  # it works
    run(*arguments)
    assert path.exists()
    path.unlink()
    yield path
    assert not path.exists(), "the payload has run"


def evil(pwned: Path, kind: str) -> bytes:
    """A pickle, or what torch.save makes of the same object."""
    if kind == "pickle":
        return pickle.dumps(Payload(pwned))
    path = pwned.with_name("evil")
    torch.save({"state": Payload(pwned)}, path)
    return path.read_bytes()


def seal_manifest(folder: Path) -> None:
    """As the author of the evil file would: a manifest that fits."""
    names = sorted(p for p in folder.iterdir() if p.name != "manifest.json")
    entries = {p.name: {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in names}
    (folder / "manifest.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
@pytest.mark.parametrize("name", ["optimizer.bin", "model.safetensors", "pytorch_model.bin", "ema.safetensors", "state.json"])
def test_pickle_as_checkpoint_file(error, pwned, tiny_run, tmp_path, name, kind):
    """A pickle in place of a file of a checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    folder = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    if name == "pytorch_model.bin":  # which accelerate takes where the safetensors file is not there
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(evil(pwned, kind))
    seal_manifest(folder)
    assert str(folder) in error("train", "-e", run, "-r", "latest", "train.steps=5")


@pytest.mark.parametrize("name", ["random_states_0.pkl", "custom_checkpoint_0.pkl", "scheduler.bin", "scaler.pt"])
def test_pickle_beside_checkpoint_files(main_of, pwned, tiny_run, tmp_path, name):
    """Such files are not asked for, and one that accelerate looks at is read as plain values; the run may end or go on."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    folder = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    (folder / name).write_bytes(evil(pwned, "torch.save"))
    seal_manifest(folder)
    with pytest.raises(SystemExit) as left:
        cli_main(main_of("train", "-e", run, "-r", "latest", "train.steps=5"))
    assert left.value.code in (0, 2)


def test_pickle_as_loss_scale(pwned, tmp_path):
    """A pickle in place of the loss scale."""
    own = distributed.build_accelerator()
    own.scaler = torch.amp.GradScaler("cpu")
    path = checkpoint.save(own, tmp_path, 1, {}, lambda folder: None)
    (path / "scaler.pt").write_bytes(evil(pwned, "torch.save"))
    with pytest.raises(UserError, match="holds something other than tensors and numbers"):
        checkpoint.load(own, path)


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_pickle_as_weights(error, pwned, tmp_path, kind):
    """A pickle in place of weights."""
    path = tmp_path / "evil.safetensors"
    path.write_bytes(evil(pwned, kind))
    ask = ["--weights", path, "--n_samples", "2", "--save_dir", tmp_path / "out"]
    assert "not a whole safetensors file" in error("sample", *ask)
    init = [*TINY_TRAIN, "-e", tmp_path / "run", f"train.init_from={path}"]
    assert "not a whole safetensors file" in error("train", *init)


@pytest.mark.parametrize("name", ["evil.pth", "evil.safetensors"])  # a name says nothing about the content
@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
@pytest.mark.parametrize("extractor", ["inception-v3-compat", "vgg16", "mnist"])
def test_pickle_as_feature_weights(pwned, tmp_path, name, kind, extractor):
    """A pickle in place of feature weights."""
    (tmp_path / name).write_bytes(evil(pwned, kind))
    with pytest.raises(ValueError, match="weights"):
        features.Extractor(extractor, None, tmp_path / name, torch.device("cpu"))


def test_pickle_as_inception_weights(pwned, tmp_path, monkeypatch):
    """A pickle where downloaded Inception weights are kept."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / features.INCEPTION_FILE).write_bytes(evil(pwned, "torch.save"))
    with pytest.raises(ValueError, match="could not be loaded"):
        features.Extractor(features.INCEPTION, None, None, torch.device("cpu"))


def test_code_from_the_network_is_refused(error, monkeypatch, tmp_path, tiny_run):
    """The dinov2 extractors, whose code torch.hub downloads: only where the user allows it, with their own weights."""
    calls = []
    monkeypatch.setattr(torch.hub, "load", lambda *args, **kwargs: calls.append(args) or torch.nn.Flatten())
    command = ["evaluate", "--weights", tiny_run, "--n_samples", 4, "--out", tmp_path / "out", "--feature_extractor"]
    line = error(*command, "dinov2-vit-s-14")
    assert "--feature_extractor dinov2-vit-s-14" in line and "--allow_remote_code" in line and not calls
    (tmp_path / "x.pth").touch()
    assert "takes none" in error(*command, "dinov2-vit-s-14", "--allow_remote_code", "--feature_weights", tmp_path / "x.pth")
    features.Extractor("dinov2-vit-s-14", None, None, torch.device("cpu"), allow_remote_code=True)
    assert calls == [("facebookresearch/dinov2", "dinov2_vits14")]


def test_pickle_as_statistics_or_features(pwned, tmp_path):
    """A pickle in place of statistics and cached features."""
    extractor = features.Extractor("digits", None, None, torch.device("cpu"))
    bad = np.array([Payload(pwned)], dtype=object)
    np.savez(tmp_path / "reference.npz", mu=bad, sigma=bad)
    np.savez(tmp_path / "cached.npz", digest=bad)
    (tmp_path / "raw.npz").write_bytes(evil(pwned, "pickle"))
    for name in ("reference.npz", "raw.npz"):
        with pytest.raises(ValueError, match="not an npz file with mu and sigma"):
            reference.from_npz(tmp_path / name, extractor, 64)
    with pytest.raises(ValueError):
        feature_cache.load_cached(tmp_path / "cached.npz", ["64"], "identity", 1)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_pickle_as_downloaded_data_set(pwned, tmp_path, monkeypatch, name):
    """A pickle in place of a downloaded data set."""

    def no_network(self):
        raise OSError("no network")

    for cls in (tv_datasets.MNIST, tv_datasets.CIFAR10):
        monkeypatch.setattr(cls, "download", no_network)
    places = [f"{folder}/processed/{part}.pt" for folder in ("MNIST", "FashionMNIST") for part in ("training", "test")]
    raw = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    places += [f"{folder}/raw/{part}" for folder in ("MNIST", "FashionMNIST") for part in raw]
    places += [
        f"cifar-10-batches-py/{part}" for part in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta")
    ]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(evil(pwned, "torch.save" if place.endswith("pt") else "pickle"))
    with pytest.raises(FileNotFoundError, match="FLOW_DATA"):
        datasets.build(name, tmp_path, {})


def test_pickle_as_pairs(pwned, tmp_path):
    """A pickle in place of pairs."""
    manifest = {"seed": 0, "generated": 4, "inverted": 0, "shard_pairs": 4, "class_names": [], "data": {"name": "digits"}}
    manifest["data"] |= {"root": None, "args": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "generated_00000.safetensors").write_bytes(evil(pwned, "torch.save"))
    with pytest.raises(ValueError, match=r"generated_00000\.safetensors is damaged"):
        datasets.build("pairs", tmp_path, {"path": str(tmp_path)})


OBJECTS = [
    "!!python/object/apply:os.system ['touch PWNED']",
    "!!python/object/new:os.system ['touch PWNED']",
    "!!python/name:os.system",
]


@pytest.mark.parametrize("yaml", OBJECTS)
def test_yaml_makes_no_objects(error, pwned, tiny_run, tmp_path, yaml):
    """Neither in a file, nor in an override, nor in what a run or a snapshot has stored."""
    yaml = yaml.replace("PWNED", str(pwned))
    (tmp_path / "c.yaml").write_text(f"data: {{args: {{a: {yaml}}}}}")
    assert "not a YAML file" in error("train", "-c", tmp_path / "c.yaml", "-e", tmp_path / "new")
    assert "is not YAML" in error("train", *TINY_TRAIN, "-e", tmp_path / "new", f"data.args={yaml}")
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "config.yaml").write_text(f"seed: {yaml}")
    assert "config.yaml: not YAML" in error("train", "-e", run, "-r", "latest")
    header = {"config": f"seed: {yaml}", "image_shape": "[1, 8, 8]", "step": "1", "images": "1", "half_life_images": "1"}
    save_file(load_file(locate.find(tiny_run)), tmp_path / "s.safetensors", metadata=header)
    line = error("sample", "--weights", tmp_path / "s.safetensors", "--n_samples", "2", "--save_dir", tmp_path / "out")
    assert "s.safetensors: not YAML" in line
    with pytest.raises(UserError, match="holds no `key: value` lines"):
        loading.parse("- a")


def test_a_manifest_cannot_name_files_elsewhere(tiny_run, tmp_path):
    folder = tmp_path / "step_00000002"
    shutil.copytree(checkpoint.list_checkpoints(tiny_run / "checkpoints")[0], folder)
    (tmp_path / "secret").write_text("x")
    for name in ("../secret", str(tmp_path / "secret")):
        entry = {name: {"bytes": 1, "sha256": files.sha256(tmp_path / "secret")}}
        (folder / "manifest.json").write_text(json.dumps(entry))
        assert "names a file outside of the checkpoint" in checkpoint.verify(folder)


def test_image_bomb_is_refused(tmp_path):
    """Two hundred bytes that claim 60,000 x 60,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"bomb\.png: not a readable image .*exceeds limit"):
        Folder(tmp_path, 32, 3)[0]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_image_reaches_ghostscript(pwned, monkeypatch, tmp_path):
    """Pillow starts it for EPS, whatever the file is called."""
    programs, pictures = tmp_path / "bin", tmp_path / "pictures"
    programs.mkdir()
    pictures.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {pwned}\nexit 1\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    file = pictures / "a.png"
    file.write_bytes(EPS)
    with pytest.raises(Exception), Image.open(file) as opened:  # noqa: B017 (of Pillow and of the program)
        opened.load()
    assert pwned.exists()  # it works
    pwned.unlink()
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        datasets.build("folder", tmp_path, {"path": str(pictures)})
    with pytest.raises(ValueError, match=r"a\.png: is no picture that can be read"):
        datasets.build("toys", tmp_path, {"name": "image", "path": str(file)})
    with pytest.raises(OSError):
        images.read_png(file)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF"])
def test_the_formats_of_image_folders_open(tmp_path, format):
    suffix = {"MPO": "jpg", "JPEG": "jpg", "TIFF": "tif"}.get(format, format.lower())
    Image.new("RGB", (8, 8), "red").save(tmp_path / f"a.{suffix}", format=format)
    pixel = Folder(tmp_path, None, 3)[0][0][:, 0, 0].int()
    assert (pixel - torch.tensor([255, 0, 0])).abs().max() <= 3


def open_ports() -> list[int]:
    """Those on which this process listens."""
    return [c.laddr.port for c in psutil.Process().net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]


def test_a_training_listens_on_no_port(here, monkeypatch, tmp_path):
    """Looked at in each of its four steps."""
    steps, looks = TrainingLoader.steps, []
    with socket.create_server(("localhost", 0)) as server:
        assert open_ports() == [server.getsockname()[1]]  # the look sees one

    def watched(loader, first, last):
        for batch in steps(loader, first, last):
            looks.append(open_ports())
            yield batch

    monkeypatch.setattr(TrainingLoader, "steps", watched)
    here("train", *TINY_TRAIN, "-e", tmp_path / "run", "train.log_with=[tensorboard]")
    assert looks == [[]] * 4
