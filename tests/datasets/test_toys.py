"""Two-dimensional sets: what they hold, mistakes, and a flow that is trained, sampled and evaluated on them."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from datasets.toys import LOG_DENSITIES, TOYS
from flow.evaluation import results

SETS = [name for name in TOYS if name != "image"]


def toys(name: str, n: int, **args):
    return datasets.build("toys", None, {"name": name, "n": n, **args})


@pytest.mark.parametrize("name", SETS)
def test_point_k_is_a_function_of_seed_and_k(name):
    few, many = toys(name, 10), toys(name, 1000)
    assert torch.equal(few.images, many.images[:10]) and few.image_shape == (2,)
    assert not torch.equal(toys(name, 10, seed=1).images, few.images)
    assert many.images.dtype == torch.float32 and many.images.abs().max() < 3
    assert 0.5 < many.images.std() < 1.5


def test_pictures_of_16_bits_keep_their_grays(tmp_path):
    Image.fromarray(np.array([[0, 65535], [65535, 65535]], dtype=np.uint16)).save(tmp_path / "corner.png")
    points = datasets.build("toys", tmp_path, {"name": "image", "path": "corner.png", "n": 100}).images
    assert (points[:, 0] < 0).all() and (points[:, 1] > 0).all()


@pytest.mark.parametrize("name", LOG_DENSITIES)
def test_exact_densities(name):
    """They integrate to one, and the points come from them: the mean log-density is that of the integral."""
    side = 600
    line = (torch.arange(side, dtype=torch.float64) + 0.5) * (6 / side) - 3
    mesh = torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=2).flatten(0, 1)
    log_p = LOG_DENSITIES[name](mesh)
    cell = (6 / side) ** 2
    assert (log_p.exp().sum() * cell).item() == pytest.approx(1, abs=2e-3)
    wanted = (log_p.exp() * torch.where(log_p.isinf(), 0.0, log_p)).sum() * cell
    assert LOG_DENSITIES[name](toys(name, 50_000).images.double()).mean().item() == pytest.approx(wanted.item(), abs=0.02)


@pytest.mark.parametrize(("seed", "point"), [(34, 78_231), (46, 78_883)])
def test_rounding_stays_in_the_squares(seed, point):
    """These uniform numbers are so near to an edge that float32 rounds them onto it or over it."""
    assert LOG_DENSITIES["checkerboard"](toys("checkerboard", point + 1, seed=seed).images[point:].double()).isfinite().all()


def test_a_picture_is_a_density(tmp_path):
    picture = np.full((20, 40), 255, dtype=np.uint8)
    picture[5:10, 30:40] = 0  # to the right, above the middle
    Image.fromarray(picture).save(tmp_path / "p.png")
    found = datasets.build("toys", tmp_path, {"name": "image", "path": "p.png", "n": 2000}).images
    low, high = found.min(0).values, found.max(0).values
    assert torch.allclose(low, torch.tensor([1.0, 0.0]), atol=0.02) and torch.allclose(
        high, torch.tensor([2.0, 0.5]), atol=0.02
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"name": "checkerbord"}, "unknown 2-D data set 'checkerbord'; choose from checkerboard"),
        ({"name": "moons", "n": 0}, "n=0: must be a whole number from 1 to 10,000,000"),
        ({"name": "moons", "n": 10_000_001}, "n=10000001: must be a whole number from 1 to 10,000,000"),
        ({"name": "moons", "seed": -1}, "seed=-1: must be a whole number"),
        ({"name": "image"}, "name=image and a path need each other"),
        ({"name": "moons", "path": "white.png"}, "name=image and a path need each other"),
        ({"name": "image", "path": "white.png"}, "path=white.png: the picture is all white"),
        ({"name": "image", "path": "text.png"}, "path=text.png: is no picture that can be read"),
    ],
)
def test_mistakes(args, message, tmp_path):
    Image.new("L", (4, 4), 255).save(tmp_path / "white.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=message):
        datasets.build("toys", tmp_path, args)


def test_train_sample_and_evaluate(group, tmp_path, here):
    run = tmp_path / "run"
    small = ["train.steps=20", "train.batch_size=64", "model.args={width: 16}", "preview.n_samples=100", "train.log_with=[]"]
    here("train", "-c", "configs/toy.yaml", "-e", run, *small, "data.args.n=2000")
    assert "2,000 points" in (run / "log.txt").read_text() and (run / "samples" / "step_00000020.png").is_file()
    sample = ["--weights", run, "--n_samples", "70", "--sampling_steps", "3", "--bspp", "20"]
    here("sample", *sample, "--save_dir", tmp_path / "one")
    group("sample", *sample, "--save_dir", tmp_path / "two")
    one, two = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("one", "two"))
    assert one.shape == (70, 2) and np.array_equal(one, two)
    told = here("evaluate", "--weights", run, "--sampling_steps", "3", "--n_samples", "100", "--methods", "euler", "dopri5")
    assert all(name in told for name in ("SW2", "MMD", "energy", "held_out_log_p", "dopri5", "real (new points)"))
    control, *rows = results.read(run / "evaluation")
    assert control["metrics"]["held_out_log_p"] == pytest.approx(-math.log(8))  # of the density itself, which is uniform
    assert -6 < rows[0]["metrics"]["held_out_log_p"] == rows[1]["metrics"]["held_out_log_p"] < -math.log(8)
