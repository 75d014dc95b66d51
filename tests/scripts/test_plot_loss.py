"""Loss curves of runs in one picture."""

from conftest import succeed
from PIL import Image


def test_curves_of_two_runs(tmp_path, tiny_run):
    out = tmp_path / "plots" / "loss.png"
    result = succeed(
        "-m", "scripts.plot_loss", "--runs", tiny_run, tiny_run, "--against", "images", "--smooth", "2", "--out", out
    )
    assert "2 curve(s)" in result.stdout and min(Image.open(out).size) > 300


def test_mistakes(error, tmp_path, tiny_run):
    assert "holds no row of metrics.jsonl" in error("plot_loss", "--runs", tmp_path, "--out", tmp_path / "x.png")
    assert "must end in .png" in error("plot_loss", "--runs", tiny_run, "--out", tmp_path / "x.jpg")
