"""Two-dimensional sets, the network for points, distances between sets of points, and the scripts on them."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import models
from datasets.toys import LOG_DENSITIES, TOYS
from flow.evaluation import animation, metrics_2d, plots_2d, table
from flow.sampling import images

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
        ({"name": "moons", "n": 0}, "n=0: must be a whole number of at least 1"),
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


def test_mlp():
    net = models.build("mlp", (2,), {"width": 16, "depth": 2, "num_classes": 3})
    x, t, y = torch.randn(5, 2), torch.rand(5), torch.tensor([0, 1, 2, 3, 0])
    assert net(x, t, y).shape == x.shape and not net(x, t, y).any()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    assert not torch.allclose(net(x, t, y), net(x, t, y.roll(1))) and not torch.allclose(net(x, t, y), net(x, t / 2, y))
    assert (net.num_classes, net.null, net.max_prompt_bytes) == (3, 3, None)
    with pytest.raises(ValueError, match="unet is a network for images"):
        models.build("unet", (2,), {})
    with pytest.raises(ValueError, match="depth=0: must be a whole number"):
        models.build("mlp", (2,), {"depth": 0})


def test_distances_between_points():
    a, b = toys("moons", 2000).images, toys("moons", 2000, seed=1).images
    shift = torch.tensor([0.6, 0.8])
    assert metrics_2d.sliced_wasserstein(a, a) == 0
    # a shift by s moves every projection by s . direction, whose mean square over directions is |s|^2 / 2
    assert metrics_2d.sliced_wasserstein(a, a + shift) == pytest.approx(math.sqrt(0.5), rel=1e-6)
    assert metrics_2d.sliced_wasserstein(a, b[:1000]) < 0.1 < metrics_2d.sliced_wasserstein(a, toys("rings", 2000).images)
    for distance in (metrics_2d.mmd, metrics_2d.energy_distance):
        assert abs(distance(a, b)) < 0.005 and distance(a, b + shift) > 0.1
    # one point each: the kernel and the distance have a formula
    x, y = torch.zeros(2, 2), torch.full((2, 2), 3.0)
    assert metrics_2d.energy_distance(x, y) == pytest.approx(2 * math.sqrt(18))
    assert metrics_2d.mmd(x, y) == pytest.approx(2 - 2 * math.exp(-18 / 0.5))


def test_the_picture_of_points():
    cloud = images.scatter_image(torch.tensor([[0.0, 2.0], [9.0, 9.0]]), side=50)
    assert cloud.shape == (1, 50, 50) and cloud[0, 5, 25] == 0 and cloud[0, 40].min() == 255


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
    control, *rows = table.read_rows(run / "evaluation")
    assert control["metrics"]["held_out_log_p"] == pytest.approx(-math.log(8))  # of the density itself, which is uniform
    assert -6 < rows[0]["metrics"]["held_out_log_p"] == rows[1]["metrics"]["held_out_log_p"] < -math.log(8)


@pytest.mark.parametrize("std", [0.05, 1.0, 2.0])
def test_held_out_log_density(std):
    """Of standard normal points under the flow to a normal distribution of another width, which has a formula: it is largest
    for the right one, and a flow that has collapsed loses."""

    def velocity(x, t, t_next=None):  # of the linear path from N(0, 1) to N(0, std^2): E[x1 - x0 | x_t]
        return x * (t * std**2 - (1 - t)) / (t**2 * std**2 + (1 - t) ** 2)

    x1 = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.distributions.Normal(0, std).log_prob(x1).sum(1).mean().item()
    assert metrics_2d.mean_log_likelihood(velocity, x1) == pytest.approx(expected, rel=2e-2)


def test_points_that_are_not_finite_are_refused():
    real = toys("moons", 100).images
    with pytest.raises(ValueError, match="1 of 100 points of the samples are not finite"):
        metrics_2d.evaluate(real.index_fill(0, torch.tensor([3]), torch.nan), real)


def test_the_way_of_images_from_noise(tmp_path, tiny_run, here):
    here("animate", "--weights", tiny_run, "--out", tmp_path, "--n", "20", "--frames", "4", "--guidance_scale", "2")
    with Image.open(tmp_path / "trajectory.gif") as moving:
        assert moving.n_frames == 4
        first = np.asarray(moving.convert("L"), dtype=float)
    assert first.std() > 50  # noise


def test_gif_frames_keep_their_colours_and_their_time(tmp_path):
    frames = [np.full((10, 10, 3), level, dtype=np.uint8) for level in (0, 100, 200)]
    animation.write_gif(tmp_path / "a.gif", frames, seconds=0.3, hold_seconds=1.0)
    with Image.open(tmp_path / "a.gif") as moving:
        for i, level in enumerate((0, 100, 200)):
            moving.seek(i)
            assert abs(int(np.asarray(moving.convert("L")).mean()) - level) < 3
            assert moving.info["duration"] == (1100 if i == 2 else 100)


def test_the_density_map_is_where_the_points_are():
    _, (ax,) = plots_2d.panels(["one"])
    plots_2d.density(ax, np.array([[1.0, -1.0]] * 10))
    counts = ax.images[0].get_array()
    row, column = np.unravel_index(counts.argmax(), counts.shape)
    at = plots_2d.grid_centers(plots_2d.BINS).reshape(plots_2d.BINS, plots_2d.BINS, 2)[row, column]
    assert np.allclose(at, [1, -1], atol=2 * plots_2d.EXTENT / plots_2d.BINS)
