"""The report of runs: what is in the page, damaged run folders, and nothing that leaves the page."""

import json
import os
import shlex
import shutil
import socket
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_TRAIN
from PIL import Image

import evaluate
import sample
import train
from configs.schema import UserError
from flow.runtime import files, lock
from scripts.report import page, runs

HOSTILE = '<script>alert("x")</script>'
ROW = {
    "weights": "run@10", "method": "heun", "steps": 5, "guidance_scale": 1.0, "n": 100, "first": 0, "identity": {"seed": 1},
    "asked": ["fid"], "NFE": 9, "forwards": 9, "metrics": {"FD-digits": 4.25, "precision": 0.5},
    "standard_errors": {"FD-digits": 0.5}, "seconds": 1.0,
}  # fmt: skip
CONTROL = {**ROW, "weights": "real (test split)", "method": None, "NFE": None, "forwards": None, "steps": None,
           "metrics": {"FD-digits": 1.125}, "standard_errors": {}}  # fmt: skip


class Page(HTMLParser):
    """Data, addresses and text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.addresses: list[str] = []
        self.text = self.style = self._data = ""
        self.tags: list[str] = []
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self._data)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
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


def make_run(folder: Path, rows: int = 10, lr: str = "0.001", ended: str = "finished step") -> Path:
    """A run folder with everything that a report reads."""
    for name in ("samples", "evaluation", "snapshots"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text(f"data:\n  name: digits\noptimizer:\n  lr: {lr}\ntrain:\n  steps: {rows}\n")
    start = {"time": "2026-01-02T03:04:05+0000", "command": "train.py -c x.yaml", "commit": "abcdef0123456789", "device": "cpu",
             "processes": 1}  # fmt: skip
    (folder / "environment.json").write_text(json.dumps([start, start]))
    log = f"device: cpu, precision no, 1 thread(s); run directory: {folder}\n"
    (folder / "log.txt").write_text(log + (f"{folder}: {ended} {rows}, in 1.0 s; x\n" if ended else ""))
    metrics = [
        {"step": k, "loss": 2.0 / k, "loss_t_0.0": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "images": 8 * k,
         "images_per_second": 4.0}
        for k in range(1, rows + 1)
    ]  # fmt: skip
    metrics.append({"step": rows, "validation_loss": 0.75, "images": 8 * rows})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "evaluation/results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (ROW, CONTROL)))
    for step in (5, 10):
        Image.fromarray(np.full((8, 8), 20 * step, np.uint8)).save(folder / f"samples/step_{step:08d}.png")
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(folder / "evaluation/nfe.png")
    return folder


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


DAMAGE = {
    "metrics.jsonl": ("metrics.jsonl", lambda data: data[:-20], "not JSON"),
    "no rows": ("metrics.jsonl", lambda data: b"\xff\n[]\n3\n", "not UTF-8"),
    "config.yaml": ("config.yaml", lambda data: b"a: [", "config.yaml: not YAML"),
    "environment.json": ("environment.json", lambda data: b"[1]", "environment.json"),
    "deep": ("environment.json", lambda data: b"[" * 100_000, "environment.json"),
    "results.jsonl": ("evaluation/results.jsonl", lambda data: data.replace(b'"n": 100', b'"n": "x"', 1), "wrong type"),
    "preview": ("samples/step_00000005.png", lambda data: data[:30], "step_00000005.png: is no picture"),
    "figure": ("evaluation/nfe.png", lambda data: b"", "nfe.png: is no picture"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_file_costs_its_panel(report, tmp_path, name):
    """The other panels stay, and a line says what is damaged."""
    file, change, said = DAMAGE[name]
    run = make_run(tmp_path / "run")
    (run / file).write_bytes(change((run / file).read_bytes()))
    shown = report(run)
    assert said in shown.text
    (run_data,) = shown.data["runs"]
    assert ("loss" in run_data["curves"]["columns"]) == (name != "no rows")
    assert ("optimizer.lr" in shown.text) == (name != "config.yaml")
    assert len(run_data["previews"]) == (1 if name == "preview" else 2)


def test_folders_with_little_in_them(report, error, tmp_path):
    empty, bare = tmp_path / "empty", tmp_path / "bare"
    empty.mkdir()
    bare.mkdir()
    (bare / "log.txt").write_bytes(b"\xff\n")
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "samples")
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


def test_pictures_keep_the_page_small(tmp_path):
    """What does not fit is left out: previews between others first."""
    run = make_run(tmp_path / "run")
    noise = np.random.default_rng(0)
    for step in range(20):
        Image.fromarray(noise.integers(0, 256, (700, 700, 3), dtype=np.uint8)).save(
            run / f"samples/step_{step:08d}.png", compress_level=0
        )
    read = runs.read_run(run, "run", 100, [])
    path = page.write([read], tmp_path / "out", linked=False, reload_seconds=None)
    steps = [preview["step"] for preview in Page(path).data["runs"][0]["previews"]]
    assert path.stat().st_size < 8_000_000 and steps[0] == 0 and steps[-1] == 19 and 4 < len(steps) < 20


def test_commands_work_as_printed(tiny_run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    commands = runs.read_run(tiny_run, "tiny", 100, []).commands
    assert set(commands) == {"train again", "resume", "sample", "evaluate", "animate"}
    scripts = {"train.py": train, "sample.py": sample, "evaluate.py": evaluate}
    for command in commands.values():
        _, script, *arguments = shlex.split(command)
        if script in scripts or Path(script).name in scripts:
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            scripts[Path(script).name].parse_args()
    again = shlex.split(commands["train again"])
    assert Path(again[again.index("-c") + 1]).is_file() and not Path(again[again.index("-e") + 1]).exists()


def test_watched_page_reloads(tmp_path):
    """The last page, after Ctrl-C, does not."""
    read = runs.read_run(make_run(tmp_path / "run"), "run", 100, [])
    for seconds in (7, None):
        text = page.write([read], tmp_path / "out", linked=False, reload_seconds=seconds).read_text()
        assert ('data-seconds="7"' in text) == (seconds == 7)
