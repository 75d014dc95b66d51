"""Loss curves of runs in one figure."""

import json
import shutil

import pytest
from PIL import Image

from configs import loading
from flow.evaluation import plots
from flow.training.logging import read_metrics
from scripts.plot_loss import loss_names


def test_curves_of_two_runs(here, monkeypatch, tmp_path, tiny_run):
    """Of one name, seen from a folder in which one of them has no other: both are drawn."""
    for folder in ("tiny", "old/tiny"):
        shutil.copytree(tiny_run, tmp_path / folder)
    drawn = {}
    monkeypatch.setattr(plots, "loss_curves", lambda out, losses, *rest: drawn.update(losses))
    monkeypatch.chdir(tmp_path)
    printed = here("plot_loss", "--runs", "old/tiny", "tiny", "tiny", "--out", "loss.png")
    assert "2 run(s)" in printed and [list(curves) for curves in drawn.values()] == [["old/tiny", "tiny"]]


@pytest.mark.parametrize(("flags", "against", "x"), [([], "step", [2, 4]), (["--against", "images"], "images", [64, 128])])
def test_picture(here, monkeypatch, tmp_path, tiny_run, flags, against, x):
    """Every logged loss, over steps or images."""
    out = tmp_path / "plots" / "loss.png"
    draw, drawn = plots.loss_curves, []

    def loss_curves(path, losses, *rest):
        drawn.append((losses, *rest))
        draw(path, losses, *rest)

    monkeypatch.setattr(plots, "loss_curves", loss_curves)
    here("plot_loss", "--runs", tiny_run, *flags, "--smooth", "2", "--out", out)
    ((losses, *rest),) = drawn
    values = [row["loss"] for row in read_metrics(tiny_run / "metrics.jsonl")]
    assert [curves["tiny"] for curves in losses.values()] == [(x, values)] and rest[:2] == [against, 2]
    assert min(Image.open(out).size) > 300


def test_smooth_draws_means_of_rows(here, tmp_path):
    """--smooth 2 draws the picture of a run whose losses are the means of two rows, the first alone."""

    def picture(name: str, losses: list[float], *flags: str) -> bytes:
        run = tmp_path / name / "run"
        run.mkdir(parents=True)
        rows = [{"step": k + 1, "images": 32 * (k + 1), "loss": loss} for k, loss in enumerate(losses)]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        here("plot_loss", "--runs", run, "--out", tmp_path / f"{name}.png", *flags)
        return (tmp_path / f"{name}.png").read_bytes()

    rough = picture("rough", [4.0, 2.0, 5.0, 1.0])
    smooth = picture("smooth", [4.0, 2.0, 5.0, 1.0], "--smooth", "2")
    assert smooth == picture("means", [4.0, 3.0, 3.5, 3.0]) != rough


def test_mistakes(error, tmp_path, tiny_run):
    assert "holds no row of metrics.jsonl" in error("plot_loss", "--runs", tmp_path, "--out", tmp_path / "x.png")
    assert "must end in .png" in error("plot_loss", "--runs", tiny_run, "--out", tmp_path / "x.jpg")


@pytest.mark.parametrize(
    ("overrides", "same", "name"),
    [
        ([], True, "flow matching loss (mse of the velocity)"),
        (["loss.args.weight_power=1"], False, "flow matching loss (weighted mse of the velocity)"),
        (["flow.coupling=ot"], False, "flow matching loss (mse of the velocity)"),
        (["loss.name=mean_flow"], False, "mean flow loss (weighted mse of the velocity)"),
        (["loss.name=trajectory"], False, "trajectory loss (mse of the velocity)"),
    ],
)
def test_only_equal_losses_share_a_name(tmp_path, overrides, same, name):
    (tmp_path / "config.yaml").write_text(loading.dump(loading.load(None, overrides)))
    training, validation = loss_names(tmp_path / "config.yaml")
    assert training == name and (training == validation) == same
