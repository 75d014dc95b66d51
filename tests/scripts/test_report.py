"""The report of runs: what is in the page, damaged run folders, and nothing that leaves the page."""

import json
import os
import re
import shlex
import shutil
import socket
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, TINY_TRAIN
from PIL import Image
from report_runs import CONTROL, HOSTILE, ROW, add_grids, make_run
from safetensors.torch import save_file

import evaluate
import sample
import train
from configs.errors import UserError
from flow.evaluation.entries import aggregate
from flow.runtime import files, lock
from flow.sampling import trajectory_grids
from scripts import animate
from scripts.report import page, runs

FOLDER = {"weights": "pictures", "n": 100, "first": 0, "identity": {}, "requested": ["fid"], "metrics": {"FD-digits": 1.5},
          "seconds": 1.0}  # of evaluate.py --samples  # fmt: skip


class Page(HTMLParser):
    """Data, addresses and text of a page, the text also by section."""

    def __init__(self, path: Path):
        super().__init__()
        self.addresses: list[str] = []
        self.text = self.style = self._data = ""
        self.tags: list[str] = []
        self.sections: dict[str, str] = {}
        self._inside = self._section = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self._data)
        self.text = " ".join(self.text.split())
        self.sections = {name: " ".join(text.split()) for name, text in self.sections.items()}

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self._section = values["id"] if tag == "section" else self._section
        self._inside = "data" if values.get("id") == "data" else tag
        self.addresses += [values[key] for key in ("src", "href", "srcset", "action") if values.get(key)]

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "data":
            self._data += data
        elif self._inside == "style":
            self.style += data
        elif self._inside != "script":
            self.text += data
            self.sections[self._section] = self.sections.get(self._section, "") + data


def add_weights(run: Path) -> None:
    """A snapshot, of which a report reads the header."""
    counts = {"step": "10", "images": "80", "half_life_images": "1"}
    entries = {"config": "data: {}", "image_shape": "[1, 8, 8]", "class_names": '["zero", "one"]', **counts}
    save_file({"weight": torch.zeros(2)}, run / "snapshots/step_00000010.safetensors", metadata=entries)


@pytest.fixture
def report(here, tmp_path):
    """report(*arguments): the page that the command writes."""

    def call(*arguments) -> Page:
        out = tmp_path / "out"
        here("report", *arguments, "--out", out)
        return Page(out / "index.html")

    return call


def test_page_of_two_runs(report, tmp_path):
    a, b = make_run(tmp_path / "runs/a"), make_run(tmp_path / "runs/b", lr="0.002", ended="stopped at step")
    shown = report(tmp_path / "runs")
    assert [run["name"] for run in shown.data["runs"]] == ["a", "b"]
    assert "finished, resumed 1×" in shown.text and "stopped, resumed 1×" in shown.text
    for text in ("10 of 10", "20.0 s", "FD-digits 4.25 ± 0.98", "abcdef0123", "optimizer.lr", "0.002", "0.500", "1.12"):
        assert text in shown.text, text
    assert f"-e {a} -r latest" in shown.text and f"-e {b} -r latest" in shown.text
    columns = shown.data["runs"][0]["curves"]["columns"]
    assert columns["loss"]["y"][0] == 2.0 and columns["validation_loss"]["y"][-1] == 0.75
    assert shown.data["runs"][0]["curves"]["hours"][-1] == pytest.approx(20 / 3600, rel=1e-3)
    (line, _) = shown.data["lines"]
    assert line["name"] == "heun" and line["points"][0]["values"]["FD-digits"] == [4.25, pytest.approx(0.98, abs=0.01)]
    assert shown.data["floors"][0]["values"]["FD-digits"][0] == 1.125
    assert [preview["step"] for preview in shown.data["runs"][1]["previews"]] == [5, 10]
    assert all(preview["src"].startswith("data:image/webp;base64,") for preview in shown.data["runs"][1]["previews"])
    assert (tmp_path / "out/index.html").stat().st_size < 300_000


def test_runs_are_compared_at_equal_settings(report, tmp_path):
    """The best run of a setting, and whether it is better than the next one by more than the interval of the difference."""
    rows = {
        "a": [ROW, {**ROW, "steps": 10, "NFE": 19, "forwards": 19, "metrics": {"FD-digits": 2.0}}, CONTROL, FOLDER],
        "b": [{**ROW, "weights": "b@10", "metrics": {"FD-digits": 4.75}}, CONTROL, FOLDER],
        "c": [{**ROW, "weights": "c@10", "metrics": {"FD-digits": 9.0}}],
    }
    for name, of_run in rows.items():
        make_run(tmp_path / name)
        (tmp_path / name / "evaluation/results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_run))
    shown = report(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    quality = shown.sections["quality"]
    text = (tmp_path / "out/index.html").read_text()
    assert 'data-run="0 1"><td>a</td><td>real (test split)</td>' in text  # which stays while one of the two is shown
    table = quality.partition("Best run at each setting")[2].partition("Difference: ")[0]
    (line,) = re.findall(r"9heun, .*", table)
    assert line.strip() == "9heun, 5 steps100a4.25 ± 0.98b4.75 ± 0.980.50 ± 1.39not clear: within the interval"
    assert quality.count("real (test split)") == 1  # equal rows of real images come once
    assert quality.count("pictures") == 2  # rows of folders are in the table alone: they have no setting
    assert "a4.25 ± 0.98c9.00 ± 0.984.75 ± 1.39clear" in report(tmp_path / "a", tmp_path / "c").sections["quality"]
    assert "Best run at each setting" not in report(tmp_path / "a").sections["quality"]


@pytest.mark.parametrize(
    ("key", "values", "compared"),
    [
        ("seed", (1, 2), False),
        ("labels", ([3], None), False),
        ("mixed_precision", ("no", "bf16"), False),
        ("times", ([0, 0.3, 1], [0, 0.4, 1]), True),  # fitted to the weights: every run has its own
        ("reference", ("hash of a folder", "hash of another one"), False),  # both of them called "folder"
    ],
)
def test_other_samples_are_not_compared(report, tmp_path, key, values, compared):
    for name, value in zip("ab", values, strict=True):
        row = {**ROW, "weights": f"{name}@10", "identity": {key: value}}
        (make_run(tmp_path / name) / "evaluation/results.jsonl").write_text(json.dumps(row) + "\n")
    quality = report(tmp_path / "a", tmp_path / "b").sections["quality"]
    assert ("Best run at each setting" in quality) == compared
    assert key == "reference" or (key in quality) == (not compared)  # a column tells the two apart


def test_best_distance_is_of_the_most_images():
    """Of those on the reference that most entries have."""
    measured = [(100, "digits", 1.0), (1000, "digits", 3.0), (1000, "digits", 2.0), (9000, "other", 0.5)]
    rows = [
        {**ROW, "n": n, "reference": reference, "metrics": {"FD-digits": distance}, "identity": {"k": k}}
        for k, (n, reference, distance) in enumerate(measured)
    ]
    best = runs.Run(Path("run"), "run", entries=aggregate(rows)).best
    assert (best["n"], best["reference"], best["metrics"]["FD-digits"].mean) == (1000, "digits", 2.0)
    for k, row in enumerate(rows):  # the best one is on images of its own, which are called the same
        row |= {"n": 1000, "reference": "folder", "identity": {"k": k, "reference": "a" if k != 3 else "b"}}
    best = runs.Run(Path("run"), "run", entries=aggregate(rows)).best
    assert best["metrics"]["FD-digits"].mean == 1.0
    assert runs.Run(Path("run"), "run").best is None


def test_only_distances_have_a_best_run(report, tmp_path):
    """Of precision or accuracy the largest value is the best."""
    for name, share in {"a": 0.5, "b": 0.75}.items():
        row = {**ROW, "weights": f"{name}@10", "metrics": {"precision": share, "recall": share}, "standard_errors": {}}
        (make_run(tmp_path / name) / "evaluation/results.jsonl").write_text(json.dumps(row) + "\n")
    quality = report(tmp_path / "a", tmp_path / "b").sections["quality"]
    assert "0.500" in quality and "0.750" in quality and "Best run at each setting" not in quality


def test_jump_of_the_loss_is_named(report, tmp_path):
    a = make_run(tmp_path / "a")
    for last, told in ((9.0, "loss 0.25 to 30 at step 9, not recovered"), (0.3, "loss 0.25 to 30 at step 9, recovered")):
        rows = [{"step": k, "loss": loss} for k, loss in enumerate([2.0, 0.5, 0.6, 0.25, 0.3, 0.9, 1.2, 0.5, 30.0, last], 1)]
        (a / "metrics.jsonl").write_text("".join(json.dumps({**row, "step": row["step"]}) + "\n" for row in rows))
        assert told in report(a).sections["overview"]
    assert "recovered" not in report(make_run(tmp_path / "b")).sections["overview"]


def test_more_images_by_the_best_solver(report, tmp_path):
    a = make_run(tmp_path / "a")
    add_weights(a)
    samples = report(a).sections["samples"]
    assert re.search(
        r"sample\.py --weights \S+/a --n_samples 64 --save_dir samples/a --sampling_method heun --sampling_steps 5", samples
    )
    assert "FD-digits 4.25 ± 0.98at NFE 9, n = 100" in report(a).sections["overview"]
    row = {**ROW, "guidance_interval": "0.3 to 1", "guidance_scale": 2.0}  # which a scale alone does not say
    (a / "evaluation/results.jsonl").write_text(json.dumps(row) + "\n")
    assert "--save_dir samples/aCopy" in report(a).sections["samples"]


def test_nothing_is_requested(report, tmp_path):
    """Not by an address, a style or the scripts; the policy of the page forbids it as well."""
    shown = report(make_run(tmp_path / "run"))
    assert [a for a in shown.addresses if not a.startswith(("#", "data:"))] == []
    assert "url(" not in shown.style and "@import" not in shown.style
    assert "connect-src" not in (text := (tmp_path / "out/index.html").read_text()) and "default-src 'none'" in text


def test_typed_text_is_escaped(report, tmp_path):
    run = make_run(tmp_path / HOSTILE.replace("/", ""))
    with open(run / "config.yaml", "a") as file:
        file.write(f"prompt: '{HOSTILE}'\n")
    (run / "log.txt").write_text(f"error: {HOSTILE}")
    (run / "evaluation/results.jsonl").write_text(json.dumps({**ROW, "weights": HOSTILE, "metrics": {HOSTILE: 1.0}}))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, HOSTILE: 1.0}))
    shown = report(run)
    assert shown.tags.count("script") == 3 and shown.data["runs"][0]["name"] == run.name
    assert shown.data["metrics"] == [HOSTILE] and f"prompt: {json.dumps(HOSTILE)}" in shown.text


def test_status_of_runs(tmp_path):
    """Running is a run whose lock is held; it can be read while it is."""
    run = make_run(tmp_path / "run", ended="")
    assert runs.read_run(run, "run", 100, []).status.kind == "stopped"
    with lock.folder(run):
        signature = (run / files.LOCK).read_text()
        status = runs.read_run(run, "run", 100, []).status
        assert (status.kind, status.resumed) == ("running", 1) and str(os.getpid()) in status.detail
        assert (run / files.LOCK).read_text() == signature
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": "1999-01-01 00:00:00 +0000"}
    (run / files.LOCK).write_text(json.dumps(holder))  # of a process before this one that had the same number
    assert runs.read_run(run, "run", 100, []).status.kind == "stopped"
    (run / files.LOCK).write_text(json.dumps({**holder, "host": "elsewhere"}))
    assert runs.read_run(run, "run", 100, []).status.kind == "running"  # it has just written
    for path in run.iterdir():
        os.utime(path, (1, 1))
    assert runs.read_run(run, "run", 100, []).status.kind == "stopped"
    (run / "log.txt").write_text("device: cpu\nerror: the loss of step 3 is not finite\n")
    assert runs.read_run(run, "run", 100, []).status == runs.Status("failed", "the loss of step 3 is not finite", 1)
    (run / "log.txt").write_text("device: cpu\nerror: process 1: out of memory\nerror: another process has ended\n")
    assert runs.read_run(run, "run", 100, []).status.detail == "process 1: out of memory"  # the other error follows from it
    (run / "log.txt").write_text("device: cpu\nstopped by SIGTERM; the latest checkpoint is x\n")
    assert runs.read_run(run, "run", 100, []).status == runs.Status("stopped", "stopped by SIGTERM", 1)


def test_failed_training_says_why(main_of, tmp_path, tiny_run):
    """The error of a training is in its log, from where the report has it."""
    run = tmp_path / "run"
    with pytest.raises(UserError, match="not finite"):
        main_of("train", *TINY_TRAIN, "-e", run, "optimizer.lr=1e30")()
    status = runs.read_run(run, "run", 100, []).status
    assert status.kind == "failed" and "is not finite" in status.detail
    assert runs.read_run(tiny_run, "tiny", 100, []).status.kind == "finished"


MANIFEST = "samples/trajectory/trajectory.json"
FIRST_GRID = "samples/trajectory/step_0_None.webp"
PANELS = {  # every file that a report reads, and the panel that lacks it
    "config.yaml": "overview",
    "environment.json": "overview",
    "log.txt": "overview",
    "metrics.jsonl": "curves",
    "evaluation/results.jsonl": "quality",
    "samples/step_00000005.png": "samples",
    MANIFEST: "samples",
    FIRST_GRID: "samples",
    "evaluation/nfe.png": "figures",
    "animation/flow.gif": "figures",
    "snapshots/step_00000010.safetensors": "runs",
}
NOISE = np.random.default_rng(0).bytes(3000)
WRONG_TYPES = {  # content that parses, of other types
    "config.yaml": b"data:\n  name: [3]\n  args: 7\ntrain:\n  steps: {a: 1}\nevaluate: 5\n",
    "environment.json": b'{"time": 3}',
    "metrics.jsonl": b'{"step": "x", "loss": 1.0}\n',
    "evaluation/results.jsonl": b'{"weights": 3, "n": []}\n',
    MANIFEST: b'{"weights": "a", "solver": "heun", "steps": 4, "seed": 1, "n": 3, "columns": [], "grids": [[]]}',
}
DAMAGE = {
    "truncated": lambda path, content: path.write_bytes(content[: len(content) * 2 // 3]),
    "empty": lambda path, content: path.write_bytes(b""),
    "noise": lambda path, content: path.write_bytes(NOISE),
    "wrong types": lambda path, content: path.write_bytes(next(v for k, v in WRONG_TYPES.items() if path.match(k))),
    "missing": lambda path, content: path.unlink(),
    "a folder": lambda path, content: (path.unlink(), path.mkdir()),
}
# Files that stay readable: any bytes are lines of a log; an empty file of lines has none; two thirds of some are whole entries.
HARMLESS = {
    ("log.txt", "truncated"), ("log.txt", "empty"), ("log.txt", "noise"), ("metrics.jsonl", "empty"),
    ("evaluation/results.jsonl", "empty"), ("config.yaml", "truncated"), ("config.yaml", "wrong types"),
}  # fmt: skip
# Files that a run may be without.
OPTIONAL = set(PANELS) - {"config.yaml", "environment.json", "log.txt", "metrics.jsonl", FIRST_GRID}


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> Path:
    """A run folder with every file that a report reads."""
    run = make_run(tmp_path_factory.mktemp("whole") / "run", rows=40)
    add_weights(run)
    add_grids(run, steps=2, scales=(1.0,))
    (run / "animation").mkdir()
    frames = [Image.fromarray(np.full((9, 9, 3), shade, np.uint8)) for shade in (0, 99, 200)]
    frames[0].save(run / "animation/flow.gif", save_all=True, append_images=frames[1:])
    return run


CASES = [(file, damage) for file in PANELS for damage in DAMAGE if damage != "wrong types" or file in WRONG_TYPES]


@pytest.mark.parametrize(("file", "damage"), CASES)
def test_damaged_file_costs_its_panel(report, tmp_path, whole_run, file, damage):
    """The panel names the file; the others show what they have, and the overview where something is missing."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    DAMAGE[damage](run / file, (run / file).read_bytes())
    shown, panel = report(run), PANELS[file]
    (data,) = shown.data["runs"]
    if (file, damage) not in HARMLESS and not (damage == "missing" and file in OPTIONAL):
        assert file in shown.sections[panel]
        assert panel == "overview" or f"could not be read are named in {panel.capitalize()}" in shown.sections["overview"]
    has = {
        "curves": "loss" in data["curves"]["columns"],
        "quality": "FD-digits" in shown.data["metrics"],
        "samples": len(data["previews"]) == 2 and len(data["grids"]) == 3,
        "figures": all(name in shown.sections["figures"] for name in ("nfe.png", "flow.gif")),
        "runs": file == "config.yaml" or "--trajectory_grids" in shown.sections["runs"],
        "overview": "finished" in shown.sections["overview"] or file == "log.txt",
    }
    assert all(there for name, there in has.items() if name != panel), has
    if file == "samples/step_00000005.png":
        assert len(data["grids"]) == 3 and len(data["previews"]) == 1
    if panel == "samples" and file != "samples/step_00000005.png":
        assert len(data["previews"]) == 2


def test_unreadable_lines_keep_the_others(report, tmp_path):
    """Of a file of lines, and of deeply nested JSON."""
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\n[]\n3\n" + b"[" * 100_000 + b'\n{"step": 11, "loss": "x", "grad_norm": [1]}\n')
    (run / "environment.json").write_bytes(b"[" * 100_000)
    shown = report(run)
    assert "loss" in shown.data["runs"][0]["curves"]["columns"]
    assert "not UTF-8" in shown.sections["curves"] and "metrics.jsonl: 1 further problems" in shown.sections["curves"]
    assert "environment.json" in shown.sections["overview"]


def test_odd_numbers_and_types_keep_the_page(report, tmp_path):
    """Rows that no command writes, but that are rows; a lock file of anything; a file in the place of a folder."""
    run = make_run(tmp_path / "run", ended="")
    odd = [{"NFE": float("inf")}, {"forwards": float("nan")}, {"method": None, "guidance_interval": "0.2 0.8"}, {"n": 10**18}]
    with open(run / "evaluation/results.jsonl", "a") as file:
        file.writelines(json.dumps({**ROW, "seed": k, "weights": f"odd@{k}", **row}) + "\n" for k, row in enumerate(odd))
    shutil.rmtree(run / "samples")
    (run / "samples").write_text("x")
    (run / "environment.json").write_text(
        json.dumps([{"command": [], "commit": {}, "device": 3, "processes": "x", "time": []}])
    )
    for signature in (
        "",
        "[]",
        '{"host": "x", "pid": [], "since": 3}',
        json.dumps({"host": socket.gethostname(), "pid": 10**30, "since": ""}),
    ):
        (run / files.LOCK).write_text(signature)
        shown = report(run)
        assert "odd@3" in shown.sections["quality"] and "stopped" in shown.sections["overview"]
        assert "samples: is no folder" in shown.sections["samples"]
    assert all(point["NFE"] == 9 for line in shown.data["lines"] for point in line["points"])


def test_reference_that_is_no_text_is_a_damaged_row(report, tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "evaluation/results.jsonl", "a") as file:
        file.write(json.dumps({**CONTROL, "identity": {"reference": ["a"]}}) + "\n")
    assert "its 'reference' is not text" in report(run).sections["quality"]


@pytest.mark.parametrize(
    ("values", "marked"), [("aab", {"b"}), ("ab", {"a", "b"}), ("aabb", {"a", "b"}), ("abc", {"a", "b", "c"})]
)
def test_marked_values(report, tmp_path, values, marked):
    """Those that are not the most common one, and all where none is."""
    for k, value in enumerate(values):
        run = make_run(tmp_path / f"run{k}")
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config + f"some_key: {value}\n")
    report(*(tmp_path / f"run{k}" for k in range(len(values))))
    text = (tmp_path / "out/index.html").read_text()
    assert set(re.findall(r"<mark>(.)</mark>", text)) == marked


def test_numbers_near_the_limits_keep_the_page(report, tmp_path):
    """A rate whose times, and losses whose sums are no finite numbers."""
    run = make_run(tmp_path / "run")
    rows = [{"step": k, "loss": 1e308 if k > 9 else 2.0, "images": k, "images_per_second": 1e-320} for k in range(1, 2001)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = report(run).data["runs"][0]["curves"]
    assert curves["columns"]["loss"]["y"][0] == 2.0 and curves["step"][-1] == 2000 and curves["hours"][-1] == 0


def test_manifest_names_only_files_beside_it(report, tmp_path):
    """And says which entry is wrong."""
    run = make_run(tmp_path / "run")
    add_grids(run)
    path = run / MANIFEST
    content = json.loads(path.read_text())
    for key, value in {"file": "../step_00000005.png", "step": 5, "t": 1.5, "guidance_scale": -1}.items():
        grids = [dict(grid) for grid in content["grids"]]
        grids[2][key] = value
        path.write_text(json.dumps({**content, "grids": grids}))
        shown = report(run)
        assert f"{MANIFEST}: grids[2]: {key}={value!r}" in shown.sections["samples"]
        assert shown.data["runs"][0]["grids"] == []


def test_new_grids_leave_other_pictures(tmp_path):
    """Those of the set before them go, what somebody else put there stays."""
    add_grids(tmp_path, steps=4)
    folder = tmp_path / trajectory_grids.FOLDER
    (folder / "mine.webp").touch()
    add_grids(tmp_path, steps=2, scales=())
    names = {*(f"step_{step}_None.webp" for step in range(3)), trajectory_grids.MANIFEST, "mine.webp"}
    assert {path.name for path in folder.iterdir()} == names


def test_grids_of_two_runs(report, tmp_path):
    """Side by side in the page; noise is in it once; unconditional ones have no scale."""
    a, b = make_run(tmp_path / "runs/a"), make_run(tmp_path / "runs/b")
    add_grids(a)
    add_grids(b, steps=2, scales=())
    shown = report(tmp_path / "runs")
    first, second = shown.data["runs"]
    assert sorted((grid["step"], grid["scale"]) for grid in first["grids"] if grid["step"]) == [
        (step, scale) for step in range(1, 5) for scale in (1.0, 2.0)
    ]
    assert [grid["scale"] for grid in first["grids"] if grid["t"] == 0] == [None]
    assert {grid["scale"] for grid in second["grids"]} == {None} and len(second["grids"]) == 3
    assert first["trajectory"] == {
        "weights": "run@10",
        "solver": "heun",
        "steps": 4,
        "seed": 8888,
        "columns": ["zero", HOSTILE],
    }
    assert all(grid["src"].startswith("data:image/webp;base64,") for run in (first, second) for grid in run["grids"])
    assert shown.tags.count("script") == 3
    linked = report(tmp_path / "runs", "--linked").data["runs"][0]["grids"]
    assert all((tmp_path / "out" / grid["src"]).is_file() for grid in linked)


def test_animate_writes_grids_of_the_report(here, report, tmp_path, tiny_run):
    """The command that the summary and the empty panel of a report name makes them; the one it names shows them."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    said = here("report", run, "--out", tmp_path / "out")
    (command,) = re.findall(r"are made with: (.+)$", said, re.M)
    assert command in Page(tmp_path / "out/index.html").sections["samples"]
    _, dash_m, script, *arguments = shlex.split(command)
    assert (dash_m, script) == ("-m", "scripts.animate")
    small = ["--frames", "3", "--steps_a_frame", "2", "--n", "10"]
    said = here("animate", *arguments, *small)
    folder = run / trajectory_grids.FOLDER
    assert f"11 grids in {folder}, of 4 solver steps" in said
    (command,) = re.findall(r"with: (.+)$", said, re.M)
    assert shlex.split(command)[2:4] == ["scripts.report", str(run)]
    shown = report(run)
    (data,) = shown.data["runs"]
    assert {grid["scale"] for grid in data["grids"]} == {None, *animate.GRID_SCALES}
    assert {(grid["step"], grid["t"]) for grid in data["grids"]} == {(0, 0.0), (2, 0.5), (4, 1.0)}
    assert data["trajectory"]["columns"] == [str(k) for k in range(10)] and data["trajectory"]["weights"] == "run@4"
    assert "are made" not in here("report", run, "--out", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.glob("*.webp")}
    here("animate", *arguments, *small, "--guidance_scale", "2", "2")  # others are deleted, the same ones are the same
    after = {path.name: path.read_bytes() for path in folder.glob("*.webp")}
    assert len(after) == 3 and after.items() <= before.items()


def test_grids_of_an_unconditional_network(here, report, tmp_path):
    """They have steps of the solver alone; points are drawn as in previews."""
    run = tmp_path / "run"
    here(
        "train", "-c", "configs/toy.yaml", "-e", run, *TINY_RUN, "model.args={width: 16}", "data.args.n=50",
        "train.mixed_precision=no",
    )  # fmt: skip
    said = here("animate", "--weights", run, "--trajectory_grids", "--frames", "3", "--n", "10")
    assert "3 grids in" in said and "guidance scales: none" in said
    (data,) = report(run).data["runs"]
    assert [grid["scale"] for grid in data["grids"]] == [None] * 3 and data["trajectory"]["columns"] == []


def test_grids_need_a_run_folder(error, tmp_path, tiny_run):
    weights = next((tiny_run / "snapshots").glob("*.safetensors"))
    assert f"--weights {weights}: is no run folder" in error("animate", "--weights", weights, "--trajectory_grids")
    assert "--guidance_scale 1 2: must be one number" in error(
        "animate", "--weights", tiny_run, "--out", tmp_path / "x", "--guidance_scale", "1", "2"
    )
    assert "--out is missing" in error("animate", "--weights", tiny_run)


def test_folders_with_little_in_them(report, here, error, tmp_path):
    empty, bare = tmp_path / "empty", tmp_path / "bare"
    empty.mkdir()
    bare.mkdir()
    (bare / "log.txt").write_bytes(b"\xff\n")
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "samples")
    assert f"it is empty: no run in {empty}; give run folders, or a folder of runs" in here(
        "report", empty, "--out", tmp_path / "none"
    )
    shown = report(empty, bare, run)
    assert "holds no file of a run" in shown.text
    assert [len(run["previews"]) for run in shown.data["runs"]] == [0, 0, 0]
    assert "there is no such folder" in error("report", tmp_path / "nothing")
    assert "takes no configuration keys" in error("report", run, "train.steps=3")
    assert "is the folder of a run" in error("report", run, "--out", run)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("mine")
    assert "did not write" in error("report", run, "--out", tmp_path / "site")


def test_long_run_is_thinned(report, tmp_path):
    """Extremes stay, and so does the beginning for logarithmic axes."""
    run = make_run(tmp_path / "run")
    values = np.random.default_rng(0).normal(5, 0.1, 30_000)
    values[12_345], values[20_000] = 99.0, -7.0
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {k + 1}, "loss": {v}}}\n' for k, v in enumerate(values.tolist())))
    curves = report(run).data["runs"][0]["curves"]
    loss = curves["columns"]["loss"]
    assert max(loss["high"]) == 99 and min(loss["low"]) == -7 and len(loss["y"]) <= 1000
    assert curves["step"][:3] == [1, 2, 3] and curves["step"][-1] == 30_000
    assert (tmp_path / "out/index.html").stat().st_size < 300_000


@pytest.mark.parametrize(("count", "most"), [(12, 500), (40, 200)])
def test_many_runs_share_the_points(report, tmp_path, count, most):
    """6,000 of a curve of all runs together, but at least 200 of each."""
    rows = "".join(f'{{"step": {k}, "loss": {k % 7}}}\n' for k in range(1, 2001))
    for i in range(count):
        (make_run(tmp_path / f"runs/{i}") / "metrics.jsonl").write_text(rows)
    lengths = [len(run["curves"]["columns"]["loss"]["y"]) for run in report(tmp_path / "runs").data["runs"]]
    assert len(lengths) == count and all(0.8 * most < length <= most for length in lengths)


def test_figures_of_other_folders(report, tmp_path):
    """Those in a folder of the name of a run are its own, others are of the first run."""
    folders = [make_run(tmp_path / name) for name in ("a", "b")]
    for name in ("b", "elsewhere"):
        (tmp_path / "figures" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "figures" / name / f"of_{name}.png")
    report(*folders, "--figures", *(tmp_path / "figures").iterdir())
    html = (tmp_path / "out/index.html").read_text()
    assert sorted(re.findall(r'alt="[^"]*?(of_\w+\.png) of (\w+)"', html)) == [("of_b.png", "b"), ("of_elsewhere.png", "a")]


def test_linked_pictures(report, tmp_path):
    """As files beside the page; those that it no longer shows are deleted, others are not touched."""
    run = make_run(tmp_path / "run")
    shown = report(run, "--linked")
    addresses = [
        a for a in [*shown.addresses, *(p["src"] for p in shown.data["runs"][0]["previews"])] if a.startswith("pictures/")
    ]
    folder = tmp_path / "out/pictures"
    assert len(addresses) == 3 and {folder / Path(a).name for a in addresses} == set(folder.iterdir())
    (folder / "own.txt").write_text("x")
    (run / "evaluation/nfe.png").unlink()
    report(run, "--linked")
    assert len(list(folder.iterdir())) == 3


def test_pictures_keep_the_page_small(monkeypatch, tmp_path):
    """What does not fit is left out: previews and grids between others first."""
    monkeypatch.setattr(page, "PICTURE_BYTES", 400_000)
    run = make_run(tmp_path / "run")
    noise = np.random.default_rng(0)
    for step in range(20):
        Image.fromarray(noise.integers(0, 256, (130, 130, 3), dtype=np.uint8)).save(
            run / f"samples/step_{step:08d}.png", compress_level=0
        )
    read = runs.read_run(run, "run", 100, [])
    path = page.write([read], tmp_path / "out", linked=False, reload_seconds=None)
    steps = [preview["step"] for preview in Page(path).data["runs"][0]["previews"]]
    assert path.stat().st_size < 500_000 and steps[0] == 0 and steps[-1] == 19 and 4 < len(steps) < 20
    add_grids(run, steps=20, scales=())
    for grid in (run / trajectory_grids.FOLDER).glob("*.webp"):
        Image.fromarray(noise.integers(0, 256, (105, 105, 3), dtype=np.uint8)).save(grid, "WEBP", quality=95, method=0)
    path = page.write([runs.read_run(run, "run", 100, [])], tmp_path / "out", linked=False, reload_seconds=None)
    data = Page(path).data["runs"][0]
    steps = sorted(grid["step"] for grid in data["grids"])
    assert path.stat().st_size < 500_000 and len(data["previews"]) > 2
    assert steps[0] == 0 and steps[-1] == 20 and 4 < len(steps) < 20
    assert f"{21 - len(steps)} grids between others are left out" in Page(path).sections["samples"]


def test_what_had_no_room_is_counted(monkeypatch, tmp_path):
    """Also where no picture of a kind is in the page; --linked, which has room for all, says nothing."""
    monkeypatch.setattr(page, "PICTURE_BYTES", 10)
    monkeypatch.setattr(page, "MIN_RUN_BYTES", 10)
    run = make_run(tmp_path / "run")
    add_weights(run)
    add_grids(run, steps=2, scales=(1.0,))
    read = runs.read_run(run, "run", 100, [])
    shown = Page(page.write([read], tmp_path / "out", linked=False, reload_seconds=None))
    assert shown.data["runs"][0]["previews"] == shown.data["runs"][0]["grids"] == []
    for text in ("2 previews left out", "3 grids of its trajectory left out"):
        assert f"{text} to keep the page small; --linked shows all" in shown.sections["samples"]
    assert "1 figures left out" in shown.sections["figures"] and "could not be read" not in shown.sections["overview"]
    assert "--trajectory_grids" not in shown.sections["samples"]  # they are there already
    assert "No run has" not in shown.sections["samples"]
    linked = Page(page.write([read], tmp_path / "out", linked=True, reload_seconds=None))
    assert len(linked.data["runs"][0]["previews"]) == 2 and "left out" not in linked.text


def test_commands_work_as_printed(tiny_run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    commands = runs.read_run(tiny_run, "tiny", 100, []).commands
    assert set(commands) == {"train again", "resume", "sample", "evaluate", "animate", "trajectory"}
    scripts = {"train.py": train, "sample.py": sample, "evaluate.py": evaluate, "scripts.animate": animate}
    for command in commands.values():
        words = [word for word in shlex.split(command) if not word.startswith("PYTHONPATH=")]
        _, script, *arguments = [word for word in words if word != "-m"]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        scripts[Path(script).name].parse_args()
    again = shlex.split(commands["train again"])
    assert Path(again[again.index("-c") + 1]).is_file() and not Path(again[again.index("-e") + 1]).exists()


@pytest.mark.parametrize(
    ("argv", "program"),
    [
        (["/my code/scripts/train_vae.py", "-c", "x.yaml"], "-m scripts.train_vae"),
        (["/code/scripts/train_vae.py", "data.name=digits", "-e", "x"], "-m scripts.train_vae"),
        (["/my train_vae/train.py", "-c", "x.yaml"], "train.py"),
    ],
)
def test_commands_are_of_what_trained_the_run(tmp_path, argv, program):
    """Its path may be quoted, and keys may come before flags."""
    run = make_run(tmp_path / "run")
    (run / "environment.json").write_text(json.dumps([{"command": shlex.join(argv)}]))
    commands = runs.read_run(run, "run", 100, []).commands
    assert all(f"{program} -" in commands[name] for name in ("train again", "resume"))


def test_the_current_folder_is_a_run(report, monkeypatch, tmp_path):
    run = make_run(tmp_path / "run")
    add_weights(run)
    monkeypatch.chdir(run)
    shown = report(".")
    assert shown.data["runs"][0]["name"] == "run"
    assert f"-e {run}_again" in shown.text and f"-e {run} -r latest" in shown.text
    assert f"--weights {run} --n_samples 64 --save_dir samples/run " in shown.sections["samples"]


@pytest.mark.parametrize("known", [{"processes_per_machine": 8}, {"processes_per_machine": 16, "sharded": True}])
def test_launcher_of_several_machines_is_not_invented(tmp_path, known):
    run = make_run(tmp_path / "run")
    (run / "environment.json").write_text(json.dumps([{"command": "train.py", "processes": 16, **known}]))
    commands = runs.read_run(run, "run", 100, []).commands
    assert all("LAUNCHER_OF_THE_RUN train.py " in commands[name] for name in ("train again", "resume"))


def test_watched_page_reloads(here, monkeypatch, tmp_path):
    """The last page, after Ctrl-C, does not."""
    run, pages = make_run(tmp_path / "run"), []

    def wait(seconds: float) -> None:
        pages.append((tmp_path / "out/index.html").read_text())
        if len(pages) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", wait)
    here("report", run, "--out", tmp_path / "out", "--watch", 7)
    assert all('data-seconds="7"' in text for text in pages)
    assert "data-seconds" not in (tmp_path / "out/index.html").read_text().split("<script>")[0]
