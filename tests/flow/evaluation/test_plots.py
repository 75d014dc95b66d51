"""Plots and grids as a reader sees them: ticks at what was measured, nothing on top of each other, names at the margin."""

import itertools
import math
import os

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from flow.evaluation import animation, pictures, plots, plots_2d
from flow.evaluation.entries import Statistic, without_earlier_snapshots
from flow.sampling import images


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Every figure that was to be saved."""
    saved = []
    monkeypatch.setattr(plots, "save", lambda path, figure, **options: saved.append(figure))
    return saved


def entry(nfe: float, fd: float, method: str = "euler", scale: float | None = None) -> dict:
    about = {"weights": "w", "captions": None, "method": method, "guidance_scale": scale, "grid": "uniform", "error": fd}
    return {
        **about,
        "images": None,
        "NFE": nfe,
        "forwards": nfe * (1 if scale in (None, 1) else 2),
        "metrics": {"FID": Statistic(fd, math.nan)},
    }


def ticks(axes: Axes, axis: str) -> list[float]:
    """The labelled numbers of an axis, after a check that no two labels touch."""
    axes.figure.draw_without_rendering()
    low, high = sorted(getattr(axes, f"get_{axis}lim")())
    axis_ = getattr(axes, f"{axis}axis")
    shown = [t for t in axis_.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_text()]
    boxes = [t.label1.get_window_extent() for t in shown]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    return [t.get_loc() for t in shown]


def test_ticks_are_measured_numbers(figures, tmp_path):
    for nfes in ((74, 120), (7, 8, 9, 10, 11, 74.33, 75, 1000), (10, 10), (1, 2, 4, 8, 16, 32, 64, 128, 256)):
        rows = [entry(nfe, 5 / (i + 1)) for i, nfe in enumerate(nfes)]
        plots.distance_against_nfe(tmp_path / "nfe.png", rows)
        plots.error_against_nfe(tmp_path / "study.png", rows, "error", "distance")
        for figure in figures[-2:]:
            (axes,) = figure.axes
            labelled = ticks(axes, "x")
            assert set(labelled) <= set(nfes) and {min(nfes), max(nfes)} <= set(labelled)
            assert len(ticks(axes, "y")) >= 3


def test_guidance_is_plotted_by_network_calls(figures, tmp_path):
    rows = [entry(5, 4.0), entry(10, 3.0), entry(5, 2.0, scale=2.0), entry(10, 1.0, scale=2.0)]
    plots.distance_against_nfe(tmp_path / "a.png", rows[:2])
    plots.distance_against_nfe(tmp_path / "b.png", rows)
    plots.error_against_nfe(tmp_path / "c.png", rows[2:], "error", "distance")
    plain, both, study = (figure.axes[0] for figure in figures)
    assert "velocity evaluations" in plain.get_xlabel() and "NFE" in plain.get_xlabel()
    for axes in (both, study):
        assert "network calls" in axes.get_xlabel() and "NFE" in axes.get_xlabel()
        assert 20 in ticks(axes, "x") and 20 in axes.lines[-1].get_xdata()


def test_intervals_and_the_floor_are_drawn(figures, tmp_path):
    """Bars of the rows, a band of the real images; distances of classes are no lines."""
    rows = [entry(nfe, 4 / nfe) for nfe in (1, 2)]
    for row in rows:
        row["metrics"] = {"FD-x[3]": Statistic(9.0, math.nan), "FID": row["metrics"]["FID"]._replace(interval=0.5)}
    floor = {**entry(1, 0.5), "weights": "real (test split)", "method": None, "NFE": None, "n": 9}
    floor["metrics"] = {"FID": Statistic(0.5, math.nan, 0.2)}
    plots.distance_against_nfe(tmp_path / "nfe.png", [*rows, floor])
    (axes,) = figures[0].axes
    assert axes.get_ylabel().startswith("FID")
    (container,) = axes.containers
    low, high = container.lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((3.5, 4.5))
    (band,) = axes.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((0.3, 0.7))


def test_closest_images_are_pairs(figures, tmp_path):
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)
    pictures.closest_images(tmp_path / "a.png", images, images + 100, [0.5 + 0.1 * k for k in range(10)], "row")
    shown = [(ax.get_title(), int(ax.images[0].get_array().flat[0])) for ax in figures[0].axes if ax.images]
    titles = [title for title, _ in shown if title]
    assert len(shown) == 20 and sorted(titles) == sorted(f"{0.5 + 0.1 * k:.2f}" for k in range(10))
    assert shown[0] == ("0.50", 0) and ("", 100) in shown


def snapshot_entry(step: int, nfe: int, fd: float, interval: float) -> dict:
    about = {"weights": f"run@{step}", "images": 100 * step, "steps": nfe, "n": 50}
    return {**entry(nfe, fd), **about, "metrics": {"FID": Statistic(fd, math.nan, interval)}}


def test_snapshots_are_plotted_by_images(figures, tmp_path):
    """A line for each number of steps that two snapshots have, with intervals; nothing for a single snapshot."""
    real = {**entry(0, 0.5), "weights": "real (test split)", "method": None, "n": 50}
    rows = [snapshot_entry(step, 10, 300 / step, 3.0) for step in (1000, 200, 600)]
    plots.distance_against_images(tmp_path / "a.png", [*rows, snapshot_entry(200, 1, 9.0, 1.0), real])
    plots.distance_against_images(tmp_path / "b.png", rows[:1])
    (figure,) = figures
    (axes,) = figure.axes
    line, floor = axes.lines[0], axes.lines[-1]
    assert line.get_xdata().tolist() == [20_000, 60_000, 100_000] and floor.get_ydata()[0] == 0.5
    (bars,) = axes.collections
    assert [float(bar[1, 1] - bar[0, 1]) for bar in bars.get_segments()] == pytest.approx([6.0] * 3)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["real (test split), n = 50", "euler, 10 steps"]
    assert len(ticks(axes, "x")) >= 3 and axes.get_xlim()[0] == 0


def test_earlier_snapshots_leave_nfe_plot():
    """Unless they have a curve of their own."""
    rows = [snapshot_entry(1, 10, 3.0, 0), snapshot_entry(2, 10, 2.0, 0), snapshot_entry(2, 5, 2.0, 0), entry(7, 1.0)]
    last = snapshot_entry(3, 10, 1.0, 0)
    assert without_earlier_snapshots([*rows, last]) == [*rows[1:], last]


@pytest.mark.parametrize("values", [(0.0, 3.0), (-0.1, 2.0), (math.nan, 1.0), (1e-12, 1e3), (3.0, 3.0)])
def test_odd_distances_are_drawn(figures, tmp_path, values):
    plots.distance_against_nfe(tmp_path / "a.png", [entry(i + 1, v) for i, v in enumerate(values)])
    assert ticks(figures[0].axes[0], "y")


@pytest.mark.parametrize(
    ("column", "values", "names"),
    [
        ("n", (1000, 50_000), ["euler, n = 1000", "euler, n = 50000"]),
        ("reference", ("mnist", "mnist:test"), ["euler to mnist", "euler to mnist:test"]),
        ("source", (None, "digits:test"), ["euler", "euler from digits:test"]),
        ("labels", (None, "3 5"), ["euler", "euler, labels 3 5"]),
        ("seed", ("0", "1"), ["euler, seed 0", "euler, seed 1"]),
        ("mixed_precision", ("no", "bf16"), ["euler, precision no", "euler, precision bf16"]),
        ("variant", (None, "1a2b3c4d"), ["euler", "euler, variant 1a2b3c4d"]),
    ],
)
def test_distances_of_another_kind_are_another_line(figures, tmp_path, column, values, names):
    """What they were measured with is named where it differs, and only there."""
    rows = [{**entry(nfe, 3.0), column: value} for value in values for nfe in (1, 2)]
    several, alike = plots.several_of(rows), plots.several_of(rows[2:])
    assert list(dict.fromkeys(plots.line_name(row, several) for row in rows)) == names
    assert {plots.line_name(row, alike) for row in rows[2:]} == {"euler"}
    plots.distance_against_nfe(tmp_path / "nfe.png", rows)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == names


def test_different_losses_have_panels_of_their_own(figures, tmp_path, tiny_run, here):
    run = tmp_path / "vae"
    run.mkdir()
    (run / "config.yaml").write_text("autoencoder: {distance: mse}\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n{"step": 2}\n{"step": 12345678, "loss": NaN}\n')
    out = here("plot_loss", "--runs", tiny_run, run, "--out", tmp_path / "loss.png")
    assert "1 of 3 rows have no loss" in out and "2 run(s)" in out
    flow, vae = figures[0].axes
    assert flow.get_ylabel() == "flow matching loss (mse of the velocity)" and len(flow.lines) == 1
    assert vae.get_ylabel() == "autoencoder loss (mse + 1e-06 KL)" and len(vae.lines) == 1
    for axes in (flow, vae):
        assert len(ticks(axes, "x")) >= 2 and ticks(axes, "y")


def test_validation_loss_is_dashed(figures, tmp_path, here):
    """In the panel of the training loss where both are the same quantity, else in one of its own."""
    for name, config in {"same": "seed: 0", "other": "flow: {time_sampler: logit_normal}"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"{config}\n")
        rows = ['"validation_loss": 2.0', '"loss": 1.0', '"FD-digits": 3.0']
        lines = [f'{{"step": {step}, "images": {step}, {row}}}' for step in (1, 2) for row in rows]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    out = here("plot_loss", "--runs", tmp_path / "same", tmp_path / "other", "--out", tmp_path / "loss.png")
    assert "rows have no loss" not in out
    training, validation = figures[0].axes
    dashes = [[line.get_linestyle() for line in axes.lines] for axes in (training, validation)]
    assert dashes == [["-", "--", "-"], ["--"]]
    assert validation.get_ylabel() == "validation loss (mse of the velocity)"


def test_every_run_has_a_legend_entry(figures, tmp_path, here, monkeypatch):
    """The current folder by its name, and names that matplotlib leaves out."""
    for name in ("current", "_warmup"):
        (tmp_path / name).mkdir()
        rows = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0, "validation_loss": 1.5}\n'
        (tmp_path / name / "metrics.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path / "current")
    here("plot_loss", "--runs", ".", "../_warmup", "--out", tmp_path / "loss.png")
    training, validation = ([text.get_text().strip() for text in axes.get_legend().get_texts()] for axes in figures[0].axes)
    assert training == ["current", "_warmup"]
    assert [text.partition(",")[0] for text in validation] == ["current", "_warmup"]


def text_in(pixels: torch.Tensor) -> bool:
    return bool((pixels < 128).any() and (pixels == 255).any())


@pytest.mark.parametrize("channels", [1, 3])
def test_names_stand_at_the_margin(channels):
    x = torch.full((7, channels, 8, 8), 200, dtype=torch.uint8)
    plain = images.labelled_grid(x, 3, [])
    above = images.labelled_grid(x, 3, ["one", "a handwritten two", "3"])
    beside = images.labelled_grid(x, 3, ["one", "a handwritten two", "3"], transposed=True)
    assert torch.equal(plain, images.grid(x, 3))
    height, width = (3 * 9 + 1), (3 * 9 + 1)  # of a grid of three by three, with its lines
    zoom = above.shape[2] // width
    margin = above[:, : above.shape[1] - zoom * height]
    assert all(text_in(third) for third in margin.chunk(3, dim=2))
    zoom = beside.shape[1] // height
    margin = beside[:, :, : beside.shape[2] - zoom * width]
    assert all(text_in(third) for third in margin.chunk(3, dim=1))


def test_prompts_without_glyphs_are_numbered():
    shown, legend = images.margin_names(["a seven", "数字7", "Größe"])
    assert shown == ["a seven", "#2", "#3"] and legend == ["#2: 数字7", "#3: Größe"]


def test_sample_names_its_columns(tmp_path, tiny_run, here):
    sample = ["sample", "--weights", tiny_run, "--n_samples", "4", "--sampling_steps", "1", "--save_dir"]
    sizes = []
    for name, flags in {"columns": [], "rows": ["--grid_by_class"]}.items():
        here(*sample, tmp_path / name, "--labels", "3", "7", *flags)
        with Image.open(tmp_path / name / "grid.png") as grid:
            sizes.append(grid.size)
            pixels = torch.from_numpy(np.asarray(grid).copy())
        assert text_in(pixels[:20] if name == "columns" else pixels[:, :12])
    assert sizes[0][1] > sizes[0][0] and sizes[1][0] > sizes[1][1]  # square but for the margin


def test_time_bar_fills_up():
    frame = np.zeros((40, 200, 3), np.uint8)
    dark = [int((animation.with_time_bar(frame, t)[40 + 16, :, 0] == 89).sum()) for t in (0.0, 0.5, 1.0)]
    assert animation.with_time_bar(frame, 0.5).shape == (72, 200, 3)
    assert dark[0] < dark[1] < dark[2]


def test_time_bar_says_where_the_flow_starts():
    frame = np.zeros((40, 200, 3), np.uint8)
    unnamed, noise, source = (animation.with_time_bar(frame, 0.5, *start) for start in ((), ("noise",), ("source",)))
    assert np.array_equal(unnamed, noise)
    (columns,) = (noise != source).any((0, 2)).nonzero()
    assert len(columns) and columns.max() < 52  # left of the bar


def test_distance_against_width_needs_two_widths(figures, tmp_path):
    """Of one run with the same settings; widths with one point each are no lines against NFE. A dashed line is the half-life
    average."""
    keys = {"captions": None, "method": "heun", "guidance_scale": None, "NFE": 19, "forwards": 19, "n": 50}
    entries = [
        {**keys, "weights": weights, "ema_width": width, "metrics": {"FID": Statistic(value, 0.1, 0.2)}}
        for weights, width, value in (("a@8", None, 3.0), ("a@8", 0.05, 2.0), ("b@8", 0.1, 2.5))
    ]
    plots.distance_against_width(tmp_path / "width.png", entries)
    plots.distance_against_nfe(tmp_path / "nfe.png", entries)
    assert figures == []
    wider = {**entries[1], "ema_width": 0.2, "metrics": {"FID": Statistic(1.5, 0.1, 0.2)}}
    plots.distance_against_width(tmp_path / "width.png", [*entries, wider])
    (axes,) = figures[0].axes
    solid, dashed = (line for line in axes.lines if line.get_linestyle() in ("-", "--") and len(line.get_xdata()) == 2)
    assert (list(solid.get_xdata()), list(solid.get_ydata())) == ([0.05, 0.2], [2.0, 1.5])
    assert dashed.get_linestyle() == "--" and list(dashed.get_ydata()) == [3.0, 3.0]


def test_plot_is_drawn_only_where_there_is_a_line(tmp_path):
    entry = {
        "weights": "w",
        "captions": None,
        "method": "euler",
        "guidance_scale": 1.0,
        "NFE": 2,
        "metrics": {"FID": Statistic(4.0, math.nan)},
    }
    plots.distance_against_nfe(tmp_path / "one.png", [entry])
    assert not (tmp_path / "one.png").exists()
    plots.distance_against_nfe(tmp_path / "two.png", [entry, {**entry, "NFE": 4}])
    assert Image.open(tmp_path / "two.png").width > 400
    control = {
        **entry,
        "weights": "real (test split)",
        "method": None,
        "NFE": None,
        "n": 9,
        "metrics": {"FID": Statistic(1.0, math.nan)},
    }
    plots.distance_against_nfe(tmp_path / "control.png", [entry, control])
    assert not (tmp_path / "control.png").exists()
    plots.distance_against_nfe(tmp_path / "control.png", [entry, {**entry, "NFE": 4}, control])
    assert (tmp_path / "control.png").read_bytes() != (tmp_path / "two.png").read_bytes()


def test_many_kinds_of_guidance_leave_nfe_plot(figures, tmp_path):
    """Names of more lines than a legend has room for; what has several NFEs stays."""
    rows = [{**entry(10, 2.0), "guidance_scale": 1 + k / 10} for k in range(20)]
    (tmp_path / "nfe.png").write_text("of a smaller table")
    plots.distance_against_nfe(tmp_path / "nfe.png", rows)
    assert figures == [] and not (tmp_path / "nfe.png").exists()
    plots.distance_against_nfe(tmp_path / "nfe.png", [*rows, {**entry(20, 1.0), "guidance_scale": 1.5}])
    (axes,) = figures[0].axes
    assert [line.get_xdata().tolist() for line in axes.lines if len(line.get_xdata()) == 2] == [[10, 20]]


def test_gif_frames_keep_their_colours_and_their_time(tmp_path):
    frames = [np.full((10, 10, 3), level, dtype=np.uint8) for level in (0, 100, 200)]
    animation.write_gif(tmp_path / "a.gif", frames, seconds=0.3, hold_seconds=1.0)
    with Image.open(tmp_path / "a.gif") as moving:
        for i, level in enumerate((0, 100, 200)):
            moving.seek(i)
            assert abs(int(np.asarray(moving.convert("L")).mean()) - level) < 3
            assert moving.info["duration"] == (1100 if i == 2 else 100)


def test_only_the_video_has_even_sides(monkeypatch, tmp_path):
    """As its coders want them; a stub in the place of ffmpeg notes its arguments and counts its bytes."""
    stub = tmp_path / "bin/ffmpeg"
    stub.parent.mkdir()
    stub.write_text(f"#!/bin/sh\necho \"$@\" > '{tmp_path}/arguments'\nwc -c > '{tmp_path}/bytes'\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(stub.parent), prepend=os.pathsep)
    frame = animation.figure_to_array(Figure(figsize=(1, 3), dpi=25))
    assert frame.shape == (75, 25, 3)
    assert animation.write(tmp_path / "a.gif", [frame, 255 - frame]) == ["a.gif", "a.mp4"]
    assert "-s 24x74 " in (tmp_path / "arguments").read_text()
    assert int((tmp_path / "bytes").read_text()) == 2 * 24 * 74 * 3
    with Image.open(tmp_path / "a.gif") as moving:
        assert moving.size == (25, 75)


def test_the_density_map_is_where_the_points_are():
    _, (ax,) = plots_2d.panels(["one"])
    plots_2d.density(ax, np.array([[1.0, -1.0]] * 10))
    counts = ax.images[0].get_array()
    row, column = np.unravel_index(counts.argmax(), counts.shape)
    at = plots_2d.grid_centers(plots_2d.BINS).reshape(plots_2d.BINS, plots_2d.BINS, 2)[row, column]
    assert np.allclose(at, [1, -1], atol=2 * plots_2d.EXTENT / plots_2d.BINS)
