"""Damaged files: flipped, cut, emptied or lost, each is found and named, and nothing wrong is taken for right."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_TRAIN
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from flow.runtime import files, step_names
from flow.runtime.errors import cli_main
from flow.sampling import digest, locate, snapshot
from flow.training import checkpoint

TRIALS = 30  # damages to each file


def damages(whole: bytes, rng: np.random.Generator):
    """`whole` with a bit flipped, cut off, or longer by a byte, at random places."""
    for trial in range(TRIALS):
        place = int(rng.integers(len(whole)))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        yield [bytes(flipped), whole[:place], whole + b"x"][trial % 3]


def test_every_damage_to_a_checkpoint_is_found(tiny_run, tmp_path):
    path = tmp_path / "step_00000004"
    shutil.copytree(checkpoint.list_checkpoints(tiny_run / "checkpoints")[-1], path)
    rng = np.random.default_rng(0)
    tried = 0
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for damaged in damages(whole, rng):
            file.write_bytes(damaged)
            tried += 1
            same = file.name == "manifest.json" and damaged.strip() == whole.strip()
            assert checkpoint.verify(path) or same, (file.name, tried)
        file.unlink()
        assert checkpoint.verify(path)
        file.write_bytes(whole)
    assert checkpoint.verify(path) is None and tried == TRIALS * 5


def test_every_damage_to_a_snapshot_is_found(tiny_run, tmp_path):
    """But for one that hits the digest's own name, which leaves the weights as they were."""
    path, whole = tmp_path / "a.safetensors", locate.find(tiny_run).read_bytes()
    path.write_bytes(whole)
    right = snapshot.load(path)
    rng = np.random.default_rng(1)
    for _ in range(3):
        for damaged in damages(whole, rng):
            path.write_bytes(damaged)
            try:
                found = snapshot.load(path)
            except UserError as error:
                assert f"--weights {path}: " in str(error)
                continue
            assert digest.stored_and_actual(path)[0] is None and found.config == right.config
            assert all(torch.equal(found.weights[name], right.weights[name]) for name in right.weights)


def test_the_same_weights_are_the_same_file(tiny_run, tmp_path):
    """The library writes metadata in a random order; the hash of the weights stands in tables and beside images."""
    found = snapshot.load(tiny_run)
    for _ in range(5):
        settings = found.config, found.image_shape, found.step, 10_000, found.codec, found.class_names
        snapshot.save(tmp_path / "a.safetensors", found.weights, *settings)
        assert (tmp_path / "a.safetensors").read_bytes() == found.path.read_bytes()


def test_a_snapshot_of_before_there_were_digests_loads(tiny_run, tmp_path):
    weights = load_file(locate.find(tiny_run))
    header = {"config": "seed: 3", "image_shape": "[1, 8, 8]", "step": "3", "images": "96", "half_life_images": "500"}
    path = tmp_path / "a.safetensors"
    save_file(weights, path, metadata=header)
    assert snapshot.load(path).config.seed == 3 and snapshot.load(path).image_shape == (1, 8, 8)
    for name, value in (("image_shape", "3"), ("image_shape", "[a]"), ("step", "many")):
        save_file(weights, path, metadata={**header, name: value})
        with pytest.raises(UserError, match="not a snapshot of this project: its header is broken"):
            snapshot.load(path)


CONTENTS = [b"", b"\xff\xfe\x00", b"[" * 100_000, b"{", b"[3]", b"3", b"\x00" * 100]
DAMAGED = [
    *((name, content) for name in ("config.yaml", "environment.json") for content in CONTENTS),
    *(("metrics.jsonl", content) for content in CONTENTS[:3]),  # test_jsonl.py has more
]


@pytest.mark.parametrize(("name", "content"), DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_files_of_a_run_are_named(main_of, capsys, tiny_run, tmp_path, name, content):
    """Or the run goes on, where nothing is lost by it."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / name).write_bytes(content)
    with pytest.raises(SystemExit) as left:
        cli_main(main_of("train", "-e", run, "-r", "latest", "train.steps=5"))
    told = capsys.readouterr().err
    if left.value.code:
        assert left.value.code == 2 and str(run / name) in told and "Traceback" not in told
    else:
        assert step_names.step_of(checkpoint.list_checkpoints(run / "checkpoints")[-1]) == 5
        assert name == "metrics.jsonl" or (name, content) == ("environment.json", b"[3]")


STATES = ["", "3", "[]", "{}", "[" * 100_000, '{"step": 4, "updates": null}', '{"step": 4, "updates": 4}']


@pytest.mark.parametrize("text", STATES, ids=range(len(STATES)))
def test_damaged_state_with_a_fitting_manifest(error, tiny_run, tmp_path, text):
    """A damaged state is named even if its manifest fits."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    path = run / "checkpoints" / "step_00000004"
    (path / "state.json").write_text(text)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.json"] = {"bytes": len(text), "sha256": files.sha256(path / "state.json")}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert f"-r {path}: does not fit this configuration" in error("train", "-e", run, "-r", "latest", "train.steps=5")


@pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
def test_damaged_settings_beside_samples_are_named(error, tiny_run, tmp_path, content):
    (tmp_path / "sampling.json").write_text(content)
    ask = ["--weights", tiny_run, "--n_samples", "2", "--sampling_steps", "1", "--save_dir", tmp_path]
    assert "sampling.json: is damaged; name another folder" in error("sample", *ask)


def test_a_read_only_folder_is_one_line(error, tmp_path):
    """A bind mount, as root is not stopped by permissions."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a disk needs root")
    try:
        assert "Read-only file system" in error("train", *TINY_TRAIN, "-e", folder / "run")
        assert not list(Path(folder).iterdir())
    finally:
        subprocess.run(["umount", folder], check=True)
