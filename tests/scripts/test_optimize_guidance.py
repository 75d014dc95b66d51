"""scripts.optimize_guidance: a table that grows, halving, and the hint."""

import re
import shlex

import pytest

from flow.evaluation import plots, results
from flow.runtime import step_names, subprocesses
from flow.sampling import locate
from scripts import optimize_guidance

FLAGS = ["--feature_extractor", "digits", "--sampling_method", "euler", "--sampling_steps", "2"]


@pytest.fixture
def optimize(monkeypatch, here, main_of, tiny_run, tmp_path):
    """optimize(*flags): what the script prints; evaluate.py runs in this process."""

    def run_command(arguments: list[str], launcher: str | None = None) -> None:
        main_of("evaluate", *arguments[1:])()

    def call(*flags: str) -> str:
        monkeypatch.setattr(subprocesses, "run_command", run_command)
        return here("optimize_guidance", "--weights", tiny_run, *FLAGS, "--out", tmp_path / "guidance", *flags)

    return call


def rows_of(tmp_path) -> list[dict]:
    return [row for row in results.read(tmp_path / "guidance/evaluation") if row["method"]]


def test_table_grows_and_the_best_is_named(optimize, here, tmp_path):
    optimize("--guidance_scale", "0", "1", "--n_samples", "80")
    assert {row["guidance_scale"] for row in rows_of(tmp_path)} == {0, 1} and (tmp_path / "guidance/guidance.png").is_file()
    out = optimize("--guidance_scale", "1", "1.3333333", "--n_samples", "80", "--intervals", "0:1", "0.4:1")
    rows = [row for row in rows_of(tmp_path) if row["guidance_scale"]]
    settings = [(row["guidance_scale"], row.get("guidance_interval")) for row in rows]
    assert settings == [(1, None), (1.3333333, None), (1.3333333, "0.4 to 1")]
    best = min(rows, key=lambda row: row["metrics"]["FD-digits"])
    last = out.splitlines()[-1]
    assert f"best: guidance {best['guidance_scale']:g}" in last and f"FD-digits {best['metrics']['FD-digits']:.2f} ±" in last
    assert ("--guidance_interval 0.4 1" in last) == bool(best.get("guidance_interval"))
    command = shlex.split(last.partition("sample with it: ")[2])  # python sample.py ...
    here("sample", *command[2:], "--n_samples", "2", "--save_dir", tmp_path / "samples")
    assert (tmp_path / "samples/grid.png").is_file()


def test_rows_of_another_reference_are_not_taken(optimize):
    """Also where those lie behind the own ones in the same table."""
    flags = ["--guidance_scale", "1", "2", "--n_samples", "80"]
    first, other, again = (optimize(*flags, *words).splitlines()[-1] for words in ([], ["data.args.split=test"], []))
    distances = [re.search(r"FD-digits [\d.]+", line)[0] for line in (first, other, again)]
    assert distances[0] == distances[2] != distances[1]


def test_halving(optimize, tmp_path, tiny_run, monkeypatch):
    """The better half goes on; the figure has the last row of each candidate, and the real images of both rounds."""
    drawn: dict[str, list[dict]] = {}
    floors = []

    def draw(path, lines: dict[str, list[dict]], real: list[dict]) -> None:
        drawn.update(lines)
        floors.extend(real)

    monkeypatch.setattr(plots, "distance_against_scale", draw)
    monkeypatch.setattr(optimize_guidance, "FEWEST", 70)
    weak = min(step_names.by_step(tiny_run / "snapshots", ".safetensors").items())[1]
    out = optimize("--guidance_scale", "1", "2", "--guide_weights", weak, "--n_samples", "140", "--halving")
    counts = [row["n"] for row in rows_of(tmp_path)]
    assert counts == [70] * 3 + [140] * 2 and "round 2 of 2: 2 kinds of guidance on 140 images" in out
    seventy = sorted(row["metrics"]["FD-digits"] for row in rows_of(tmp_path) if row["n"] == 70)[:2]
    kept = {(r["guidance_scale"], r.get("guide")) for r in rows_of(tmp_path) if r["n"] == 140}
    assert kept == {(r["guidance_scale"], r.get("guide")) for r in rows_of(tmp_path) if r["metrics"]["FD-digits"] in seventy}
    points = {(entry["guidance_scale"], entry["guide"], entry["n"]) for line in drawn.values() for entry in line}
    assert (
        len(points) == 3 and sorted(n for *_, n in points) == [70, 140, 140] and [floor["n"] for floor in floors] == [70, 140]
    )
    assert all(name.endswith(f", n = {entry['n']}") for name, line in drawn.items() for entry in line)


def test_a_line_is_of_one_number_of_images():
    """It begins without guidance where that was measured on as many; what is left alone is a line of its own."""
    none, two, three = (optimize_guidance.Guidance(scale) for scale in (1.0, 2.0, 3.0))
    few, more, most = ({"n": 500, "k": k} for k in range(3))
    assert optimize_guidance.curves({none: few, two: more, three: most}) == {"classifier-free guidance": [few, more, most]}
    later = {**most, "n": 1000}
    name = "classifier-free guidance, n = {}"
    curves = optimize_guidance.curves({none: few, two: more, three: later})
    assert curves == {name.format(500): [few, more], name.format(1000): [later]}
    curves = optimize_guidance.curves({none: {**few, "n": 1000}, two: more, three: most})
    assert curves == {name.format(500): [more, most], "no guidance, n = 1000": [{**few, "n": 1000}]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--guidance_scale 1", "--guidance_scale 1: needs two kinds of guidance at least"),
        ("--guidance_scale 1 2 --intervals 0.5:0.2", "guidance_interval=0.5 0.2: must be two times from 0 to 1"),
        ("--guidance_scale 1 2 --intervals 0.5", "argument --intervals: '0.5': must be LO:HI, two numbers from 0 to 1"),
    ],
)
def test_errors(flags, message, error, tiny_run, tmp_path):
    line = error("optimize_guidance", "--weights", tiny_run, *FLAGS, "--out", tmp_path / "out", *shlex.split(flags))
    assert message in line


def test_a_run_and_its_latest_file_are_one_guide(optimize, tmp_path, tiny_run):
    latest = locate.find(tiny_run)
    optimize("--guidance_scale", "1", "2", "--guide_weights", tiny_run, latest, "--n_samples", "40")
    assert len(rows_of(tmp_path)) == 3  # none, with the null label, with the guide


def test_adaptive_methods(optimize, tmp_path):
    out = optimize("--guidance_scale", "1", "2", "--n_samples", "40", "--sampling_method", "bosh3")
    distances = [row["metrics"]["FD-digits"] for row in rows_of(tmp_path)]
    assert len(distances) == 2 and "--sampling_method bosh3" in out
    assert f": FD-digits {min(distances):.2f}; table and" in out.splitlines()[-1]  # no interval: fewer images than features


def test_floor_of_fewer_real_images_is_drawn(optimize, monkeypatch):
    """Digits have no other split, so one half of them is compared with the other one."""
    drawn = []
    monkeypatch.setattr(plots, "distance_against_scale", lambda path, lines, floors: drawn.extend(floors))
    optimize("--guidance_scale", "1", "2", "--n_samples", "900", "--sampling_steps", "1")
    assert [(floor["weights"], floor["n"]) for floor in drawn] == [("real (half against half)", 898)]


def test_unfit_guide_is_named_before_any_row(error, points_flow, tiny_run, tmp_path):
    weak, out = points_flow("moons", 1), tmp_path / "out"
    flags = [*FLAGS, "--out", out, "--guidance_scale", "1", "2", "--guide_weights", weak]
    line = error("optimize_guidance", "--weights", tiny_run, *flags)
    assert f"--guide_weights {weak}: is a model of images of (2,), --weights of (1, 8, 8)" in line and not out.exists()
