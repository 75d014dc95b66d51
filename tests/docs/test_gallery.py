"""Flows in the plane, looked at: side by side, their likelihood, pairs of points, and the gallery with its page."""

import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY_TRAIN
from PIL import Image

import datasets
import models
import train
from configs import schema
from flow.evaluation.metrics_2d import sliced_wasserstein
from flow.noise import gaussian_noise
from flow.sampling import snapshot
from scripts import animate, compare, make_pairs
from scripts.dev import gallery

N = 2000  # points of a set
PAGE = (REPOSITORY / "docs" / "gallery.md").read_text(encoding="utf-8")
PARSERS = {"train.py": train, "scripts.animate": animate, "scripts.compare": compare, "scripts.make_pairs": make_pairs}


@pytest.fixture
def flow(tmp_path):
    """flow("mixture", 3): a snapshot of an untrained network, whose random weights are those of the seed, for that set."""

    def make(name: str, seed: int, args: str = "{width: 16}") -> Path:
        data = ["data.name=toys", f"data.args={{name: {name}, n: {N}}}"]
        cfg = schema.load(None, [*data, "model.name=mlp", f"model.args={args}"])
        net = models.build("mlp", (2,), cfg.model.args)
        torch.manual_seed(seed)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
        path = tmp_path / f"{name}_{seed}{'_labels' * ('num_classes' in args)}.safetensors"
        snapshot.save(path, net.state_dict(), cfg, (2,), 10, 1000)
        return path

    return make


def test_flows_side_by_side(flow, tmp_path, here):
    a, b, out = flow("moons", 1), flow("moons", 2), tmp_path / "out"
    flags = ["--n_samples", "300", "--frames", "3", "--sampling_steps", "1", "4", "--names", "first", "second"]
    told = here("compare", "--weights", a, b, *flags, "--out", out)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if line.startswith("|")][2:]
    assert [row[:4] for row in rows] == [[name, "euler", n, n] for n in "14" for name in ("first", "second")]
    assert (out / "compare.md").read_text().strip() in told
    with Image.open(out / "compare.gif") as moving, Image.open(out / "compare.png") as still:
        assert moving.n_frames == 3 and still.width > 800
    here("sample", "--weights", a, "--n_samples", "300", "--sampling_steps", "4", "--save_dir", tmp_path / "s", "--bspp", "300")
    made = torch.from_numpy(np.load(tmp_path / "s" / "samples.npz")["arr_0"])  # the same noise, the same points
    real = datasets.build("toys", None, {"name": "moons", "n": N}).images
    assert float(rows[2][4]) == pytest.approx(sliced_wasserstein(made, real), abs=1e-4)
    assert "straightness deviation" in told and rows[0][5] == rows[2][5] != rows[1][5]  # of the flow, whatever the steps
    told = here("compare", "--weights", a, *flags[:4], "--sampling_method", "scipy_solver", "--out", out)
    assert re.search(r"moons_1 +\| scipy_solver +\| +\| +\d\d+ ", told)


def test_particles_go_straight_within_a_step():
    states = np.array([[[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 2.0]]])
    panel = compare.Panel("", 2, 2, 0.0, 0.0, [0.0, 0.5, 1.0], states)
    assert panel.at(0.25).tolist() == [[[0, 0]], [[0.5, 0]]]
    assert panel.at(0.75).tolist() == [[[0, 0]], [[1, 0]], [[1, 1]]]
    assert panel.at(1.0).tolist() == states.tolist()


def test_mistakes(flow, tmp_path, error):
    a, labelled = flow("moons", 1), flow("moons", 1, "{width: 16, num_classes: 2}")
    out = ["--out", tmp_path / "out"]
    assert "--names: 1 for 2 weights; give one for each" in error("compare", "--weights", a, a, "--names", "one", *out)
    assert "is not a flow of points without labels" in error("compare", "--weights", a, labelled, *out)
    assert "'moon' (choose from " in error("gallery", "--only", "moon")
    Image.new("L", (4, 4), 255).save(tmp_path / "white.png")
    toys = [*TINY_TRAIN[2:], "-e", tmp_path / "run", "data.name=toys", "model.name=mlp", "model.args={}"]
    for args, message in {
        "{name: moon}": "data: unknown 2-D data set 'moon'; choose from",
        "{name: moons, n: 0}": "data: n=0: must be a whole number of at least 1",
        f"{{name: image, path: {tmp_path / 'white.png'}}}": "the picture is all white",
    }.items():
        assert message in error("train", *toys, f"data.args={args}")
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_likelihood_by_both_divergences(flow, tmp_path, here, monkeypatch):
    monkeypatch.setattr(animate, "MAP_CELLS", 12)
    out = tmp_path / "out"
    told = here(
        "animate", "--weights", flow("mixture", 1), "--out", out, "--figures", "likelihood", "--hutchinson_samples", "2"
    )
    exact, estimate = (float(x) for x in re.findall(r"mean absolute error ([\d.]+) nats", told))
    assert exact > 0.3 and exact != estimate  # of a flow that has not been trained
    assert [p.name for p in out.iterdir()] == ["likelihood.png"]


def test_pairs_of_points_are_trained_on(flow, tmp_path, here):
    teacher, folder = flow("moons", 1), tmp_path / "pairs"
    here("make_pairs", "--weights", teacher, "--n_pairs", "50", "--real_fraction", "0.2", "--save_dir", folder)
    pairs = datasets.build("pairs", None, {"path": str(folder)})
    assert pairs.images.shape == (50, 2) and pairs.noise.shape == (10, 2) and pairs.labels is None
    real = datasets.build("toys", None, {"name": "moons", "n": N}).images.half()
    assert all((real == x1).all(1).any() for x1 in pairs.images[40:])
    here("sample", "--weights", teacher, "--n_samples", "1", "--save_dir", tmp_path / "s")  # another stream of noise
    x0 = gaussian_noise("pairs", 0, range(40), (2,))
    assert not torch.allclose(pairs.images[:40].float(), x0)
    small = ["train.steps=2", "train.batch_size=20", "train.log_with=[]", "preview.n_samples=20", "model.args={width: 16}"]
    given = [f"data.args.path={folder}", f"train.init_from={teacher}", "-e", tmp_path / "run"]
    here("train", "-c", "configs/toy_reflow.yaml", *small, *given)
    told = here("evaluate", "--weights", tmp_path / "run", "--n_samples", "50", "--sampling_steps", "2")
    assert "| toys moons |" in told and "SW2" in told  # against the real points


# ---- the gallery and its page


@pytest.fixture
def gallery_commands(monkeypatch, here):
    """gallery_commands(*arguments): what the script would run."""
    run: list[list[str]] = []
    monkeypatch.setattr(gallery, "run_command", run.append)
    monkeypatch.setattr(gallery, "outdated", lambda figures, weights: True)

    def call(*arguments) -> list[list[str]]:
        run.clear()
        here("gallery", *arguments)
        return list(run)

    return call


def test_commands_of_the_gallery_are_those_of_its_page(gallery_commands, monkeypatch, tmp_path):
    monkeypatch.setattr(
        gallery, "train_arguments", lambda config, run, given: ["train.py", "-c", config, "-e", str(run), *given]
    )
    commands = gallery_commands()
    shown = re.sub(r" *\\\n *", " ", PAGE)
    for command in commands:
        assert f"python {shlex.join(command)}\n" in shown
        script = command[1] if command[0] == "-m" else command[0]
        monkeypatch.setattr(sys, "argv", command[command.index(script) :])
        args = PARSERS[script].parse_args()
        if getattr(args, "config", None):
            schema.load(str(REPOSITORY / args.config), args.overrides)
    assert len(re.findall(r"^python ", shown, re.M)) == len(commands)


def test_every_picture_is_there_and_light():
    shown = {Path(p) for p in re.findall(r'(?:\]\(|src=")(images/[^)"]+)', PAGE)}
    expected = {Path("images/gallery") / e.name / picture for e in gallery.exhibits(Path()) for picture in e.figures}
    assert expected <= shown
    for picture in shown:
        assert (REPOSITORY / "docs" / picture).stat().st_size < 3_000_000


def test_gallery_makes_requested_pictures(gallery_commands, tmp_path):
    """The gallery makes what is asked for, and what that needs."""
    commands = gallery_commands("--only", "reflow", "--runs", tmp_path, "train.steps=3")
    assert [c[0] if c[0] != "-m" else c[1] for c in commands] == [
        "train.py", "scripts.make_pairs", "train.py", "scripts.compare"
    ]  # fmt: skip
    assert all(c[-1] == "train.steps=3" for c in commands if c[0] == "train.py")


def test_outdated_pictures_are_drawn_again(flow, tmp_path):
    """Pictures older than their weights are drawn again."""
    weights, picture = flow("moons", 1), tmp_path / "flow.gif"
    assert gallery.outdated([picture], [weights])
    picture.write_bytes(b"")
    os.utime(picture, (weights.stat().st_mtime + 5,) * 2)
    assert not gallery.outdated([picture], [weights])
    os.utime(weights, (weights.stat().st_mtime + 10,) * 2)
    assert gallery.outdated([picture], [weights])
