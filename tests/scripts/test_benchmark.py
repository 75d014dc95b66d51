"""The benchmark measures the scripts themselves: every job runs, and the clocks add up."""

import itertools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, TINY, succeed

from configs.errors import UserError
from flow.runtime import distributed
from scripts.benchmark import __main__ as benchmark
from scripts.benchmark import baseline, report
from scripts.benchmark.timer import Timer


def test_sections_add_up_and_do_not_count_twice():
    now = 0.0

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds

    watch = Timer(clock=lambda: now)
    work(1)
    with watch.section("outer"):
        work(20)
        watch.watch("inner", work)(300)
    watch.lap()
    assert watch.seconds == {"other": 1, "outer": 20, "inner": 300}
    assert watch.laps == [321]
    watch.restart()
    work(4)
    watch.lap()
    assert watch.laps == [4] and watch.seconds == {"other": 4}


def test_work_of_a_loss_of_more_passes():
    """A loss of twice the passes of flow matching does twice the work in the same time."""
    lap = {"laps": [2.0], "images_per_lap": 64, "seconds": {"forward": 1.0, "ema": 1.0}, "forwards": 10}
    lap |= {"peak_memory_gib": 1.0, "seconds_to_first_step": 3.0}
    job = {"variant": "project", "kind": "train", "processes": 1, "precision": "no"}
    ceilings, cost = {"device": "cpu", "fp32": {"matmul": 1e9}}, {"training": 1e6, "forward": 3e5}
    rows = [report.medians("a", job, [lap], {**cost, "passes": passes}, ceilings) for passes in (3.0, 6.0)]
    assert [row["flops_per_second"] for row in rows] == [32e6, 64e6] and rows[0]["images_per_second"] == 32


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes(monkeypatch, platform, unit):
    """The system counts kibibytes, but for that of Apple."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3))
    assert distributed.peak_bytes() == 3 * unit


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is a file; name a folder"),
        ("{", "its benchmark.json is damaged; name another folder"),
        ('{"overrides": [3]}', "its benchmark.json is damaged; name another folder"),
        ('{"config": "configs/mnist.yaml", "overrides": []}', "holds a benchmark of configs/mnist.yaml, now configs"),
        ('{"config": "configs/digits.yaml", "overrides": [], "plan": {}}', "holds a benchmark with other flags"),
    ],
)
def test_folder_is_looked_at_before_the_jobs(error, monkeypatch, tmp_path, content, message):
    """And one that can be written is left as it was, where the jobs fail."""

    def fail(job, args, scratch):
        raise UserError("no job")

    monkeypatch.setattr(benchmark, "run_job", fail)
    out = tmp_path / "out"
    command = ["benchmark", "-c", "configs/digits.yaml", "--out", out]
    assert "no job" in error(*command) and not out.exists()
    if content is None:
        out.touch()
    else:
        out.mkdir()
        (out / "benchmark.json").write_text(content)
    assert message in error(*command)
    if content is not None:
        (out / "benchmark.json").write_text('{"config": "configs/digits.yaml", "overrides": []}')
        assert "no job" in error(*command)


def test_plain_loop_lasts_as_long_as_it_shall(main_of, capsys, monkeypatch, tmp_path):
    """Its bar counts the seconds; each step takes one of this clock."""
    monkeypatch.setattr(baseline, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    out, minutes = tmp_path / "plain.safetensors", 0.05
    command = ["benchmark.baseline", "-c", "configs/digits.yaml", *TINY, "train.batch_size=4", "--minutes", minutes, "--out"]
    main_of(*command, out)()
    captured = capsys.readouterr()
    assert "4 steps of 4 images" in captured.out
    assert "3/3 " in captured.err and [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.slow
def test_every_job(tmp_path):
    options = [
        "-c",
        "configs/digits.yaml",
        *TINY,
        "train.batch_size=16",
        "--parts",
        "train",
        "sample",
        "evaluate",
        "--against",
        "eager",
    ]
    options += ["--rounds", "1", "--steps", "2", "--warmup", "1", "--precisions", "no", "--sampling_batches", "1"]
    options += ["--sampling_batch", "4", "--n_samples", "8", "--feature_extractor", "digits", "--out", tmp_path]
    text = succeed("-m", "scripts.benchmark", *options).stdout
    result = json.loads((tmp_path / "benchmark.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["train, eager, fp32", "train, fp32", "sample, eager, fp32", "sample, fp32", "evaluate, fp32"]
    assert {"data", "forward", "backward", "optimizer", "ema"} <= rows["train, fp32"]["shares"].keys()
    assert sum(rows["train, fp32"]["shares"].values()) == pytest.approx(1)
    assert 0 < rows["train, fp32"]["outside"] < 1 and rows["train, fp32"]["seconds_to_first_step"] > 0
    [cost] = result["costs"].values()
    assert cost["training"] == pytest.approx(3 * cost["forward"], rel=0.1)
    assert text.splitlines()[-1].startswith(f"5 row(s) in {tmp_path}, in ") and "train.py -c configs/digits.yaml" in text
    assert all(name in text for name in rows) and (tmp_path / "benchmark.md").read_text() in text + "\n"


@pytest.mark.slow
def test_the_gpu_check_on_a_cpu_with_tiny_numbers(tmp_path, real_data):
    environment = {
        **os.environ, "MINUTES": "0.15", "SAMPLES": "20", "NFE": "2", "FLOW_DATA": str(real_data),
        "CONFIG": "configs/mnist.yaml",
        "FEATURES": "--feature_extractor mnist", "BENCHMARK": "--steps 1 --warmup 1 --rounds 1 --sampling_batches 1",
        "OVERRIDES": "model.args.width=32 train.batch_size=8", "RACE": "--curve 1", "METHODS": "euler",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    command = ["scripts/benchmark/gpu_check.sh", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = (tmp_path / "out" / "evaluation_20" / "results.md").read_text()
    assert rows.count("euler") == 2 and rows.count("plain@") == 1
    assert (tmp_path / "out" / "half.safetensors").is_file() and (tmp_path / "out" / "benchmark" / "benchmark.md").is_file()


@pytest.mark.parametrize(
    ("config", "minutes", "message"),
    [
        ("digits", "nan", "argument --minutes: 'nan': must be a finite number above 0"),
        ("mnist_ddpm", "1", "flow.path=vp: must be linear, as the plain loop trains nothing else"),
        ("mnist_transfer", "1", "flow.source.name=mnist: must be gaussian"),
        ("digits_mean_flow", "1", "loss.name=mean_flow: must be flow_matching"),
    ],
)
def test_what_the_plain_loop_does_not_train(error, tmp_path, config, minutes, message):
    out = tmp_path / "plain.safetensors"
    command = ["benchmark.baseline", "-c", f"configs/{config}.yaml", "--minutes", minutes, "--out", out]
    assert message in error(*command) and not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "-c: a configuration is needed"),
        (["-c", "configs/digits.yaml", "--processes", "2"], "--processes: is for --parts scaling"),
        (["-c", "configs/digits.yaml", "--parts", "train", "--sampling_steps", "2"], "is for --parts sample or evaluate"),
    ],
)
def test_flags_of_other_parts(error, words, message):
    assert message in error("benchmark", *words)


def test_plain_loop_needs_a_place_for_its_file(error, tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file/plain.safetensors"
    assert f"{tmp_path / 'file'}" in error("benchmark.baseline", "-c", "configs/digits.yaml", "--minutes", "1", "--out", out)


@pytest.mark.parametrize("flags", [["train.compile=true"], ["--vary", "train.mixed_precision", "no", "bf16"]])
def test_keys_that_the_benchmark_sets(error, flags):
    key, flag = ("train.compile", "--compile") if len(flags) == 1 else ("train.mixed_precision", "--precisions")
    assert f"{key}: {flag} says what is measured" in error("benchmark", "-c", "configs/digits.yaml", *flags)
