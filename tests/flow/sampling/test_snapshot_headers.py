"""Snapshots of strangers: places, sizes and types in the header, weights that are not finite."""

import json

import pytest
from conftest import TINY_TRAIN, stranger
from safetensors.torch import load_file

from configs.errors import UserError
from flow.sampling import locate, snapshot


def test_foreign_paths_need_repetition(error, here, tiny_run, tmp_path):
    """Sampling needs none of them; inside a run folder they are the user's own."""
    place, path = tmp_path / "there", tmp_path / "run" / "snapshots" / "step_00000004.safetensors"
    path.parent.mkdir(parents=True)
    stranger(tiny_run, path, {"root: null": f"root: {place}"})
    here("sample", "--weights", path, "--n_samples", "2", "--sampling_steps", "1", "--save_dir", tmp_path / "out")
    ask = ["--weights", path, "--n_samples", "4", "--sampling_steps", "1", "--feature_extractor", "digits"]
    ask += ["--metrics", "fid", "--out", tmp_path / "table"]
    line = error("evaluate", *ask)
    assert f"lies in no run folder, so the place data.root={place} in it is used only where" in line
    assert f"add data.root={place}, or another place" in line and not place.exists()
    here("evaluate", *ask, f"data.root={tmp_path / 'elsewhere'}")
    assert not place.exists()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    here("evaluate", *ask, "--seed", "1")
    assert place.is_dir()


def test_foreign_autoencoder_is_not_loaded(error, tiny_run, tmp_path):
    """The autoencoder in a snapshot of strangers is not loaded or downloaded."""
    codec = {
        "name": "vae",
        "source": "owner/name",
        "digest": 64 * "0",
        "shift": [0.0],
        "scale": [1.0],
        "image_shape": [1, 16, 16],
    }
    path = stranger(tiny_run, tmp_path / "s.safetensors", codec=json.dumps(codec))
    ask = ["--weights", path, "--n_samples", "2", "--save_dir", tmp_path / "out"]
    assert "add data.autoencoder=owner/name, or another place" in error("sample", *ask)
    assert "data.autoencoder: /nowhere: there is no such folder" in error("sample", *ask, "data.autoencoder=/nowhere")
    stranger(tiny_run, path, {"autoencoder: null": "autoencoder: a/b"}, codec=json.dumps(codec))
    assert "add data.autoencoder=a/b, or another place" in error("sample", *ask)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"width: 16": "width: 1600000000"}, "width=1600000000: is more than these weights have room for"),
        ({"blocks_per_level: 1": "blocks_per_level: 1000000000"}, "blocks_per_level=1000000000: is more than"),
        ({"blocks_per_level: 1": "blocks_per_level: 90000"}, "asks for many more parameters than the weights have tensors"),
        ({"num_classes: 10": "num_classes: 1000000000000000000"}, "num_classes=1000000000000000000: is more than"),
        ({"width: 16": "width: 99999996"}, "width=99999996: is more than"),
        ({"width: 16": "width: 96000"}, "do not fit the network (model.name, model.args)"),
    ],
)  # fmt: skip
def test_sizes_in_a_header_are_bounded_by_the_weights(error, tiny_run, tmp_path, replaced, message):
    path = stranger(tiny_run, tmp_path / "s.safetensors", replaced)
    assert message in error("sample", "--weights", path, "--n_samples", "2", "--save_dir", tmp_path / "out")


@pytest.mark.parametrize("value", ["abc", "null", "0"])
def test_trained_guidance_is_a_number(error, tiny_run, tmp_path, value):
    """On the command line as in the configuration of a stranger."""
    file, loss = tmp_path / "s.safetensors", "flow_matching\n  args: {"
    stranger(tiny_run, file, {f"{loss}}}": f"{loss}guidance_scale: {value}}}"})
    for weights in ([file], [tiny_run, f"loss.args.guidance_scale={value}"]):
        line = error("sample", "--weights", *weights, "--n_samples", "2", "--save_dir", tmp_path / "out")
        assert "loss.args.guidance_scale=" in line and "must be more than 0; 1 is off" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("image_shape", "[1000000000000000000]"), ("image_shape", "[1, 60000, 60000]"), ("image_shape", "[true, 8, 8]"),
        ("image_shape", "[1, -8, 8]"), ("image_shape", "{}"), ("image_shape", "[1, 8.5, 8]"), ("image_shape", 9999 * "["),
        ("step", "-1"), ("images", 30 * "9"), ("half_life_images", "nan"), ("codec", "3"), ("codec", '{"name": 3}'),
        ("codec", '{"name": "vae", "source": "a", "digest": "a", "shift": [NaN], "scale": [1], "image_shape": [1, 8, 8]}'),
        ("codec", '{"name": "vae", "source": "a", "digest": "a", "shift": [0, 0], "scale": [1], "image_shape": [1, 8, 8]}'),
        ("codec", '{"name": "vae", "source": "a", "digest": "a", "shift": [0], "scale": [1]}'),
        ("class_names", '["0", 1]'), ("class_names", r'["\ud800"]'), ("class_names", r'["a\u0000b"]'),
    ],
)  # fmt: skip
def test_a_header_of_other_types_is_broken(tiny_run, tmp_path, entry, value):
    path = stranger(tiny_run, tmp_path / "s.safetensors", **{entry: value})
    with pytest.raises(UserError, match=rf"its header is broken \({entry}") as refused:
        snapshot.load(path)
    assert len(str(refused.value)) < 400


def test_broken_header_is_one_line(error, tiny_run, tmp_path):
    path = stranger(tiny_run, tmp_path / "s.safetensors", image_shape="[1, 60000, 60000]")
    line = error("sample", "--weights", path, "--n_samples", "2", "--save_dir", tmp_path / "out")
    assert f"--weights {path}: " in line and "its header is broken (image_shape" in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("{name: moons, seed: abc}", "flow.source: seed='abc': must be a whole number"),
        ("{name: moons, 'n': 2000000000}", "flow.source: n=2000000000: must be a whole number from 1 to 10,000,000"),
    ],
)
def test_source_in_a_header_is_checked(error, tiny_run, tmp_path, args, message):
    """Before its points are made: 2,000,000,000 of them would take 64 GB."""
    noise, points = "name: gaussian\n    args: {}", f"name: toys\n    args: {args}"
    path = stranger(tiny_run, tmp_path / "s.safetensors", {noise: points})
    assert message in error("sample", "--weights", path, "--n_samples", "2", "--save_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(error, tiny_run, tmp_path, number):
    path, weights = tmp_path / "s.safetensors", load_file(locate.find(tiny_run))
    weights["conv_in.weight"].view(-1)[3] = number
    whole = snapshot.load(tiny_run)
    snapshot.save(path, weights, whole.config, whole.image_shape, 1, 1)
    message = "conv_in.weight holds numbers that are not finite"
    assert message in error("sample", "--weights", path, "--n_samples", "2", "--save_dir", tmp_path / "out")
    assert message in error("train", *TINY_TRAIN, "-e", tmp_path / "run", f"train.init_from={path}")
