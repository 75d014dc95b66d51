"""The benchmark measures the scripts themselves: every job runs, and the clocks add up."""

import json
import time

import pytest
from conftest import TINY, succeed

from scripts.stopwatch import Stopwatch


def test_sections_add_up_and_do_not_count_twice():
    watch = Stopwatch()
    with watch.section("outer"):
        time.sleep(0.02)
        watch.watch("inner", time.sleep)(0.03)
    watch.lap()
    assert watch.seconds["inner"] == pytest.approx(0.03, abs=0.01)
    assert watch.seconds["outer"] == pytest.approx(0.02, abs=0.01)
    assert watch.laps == [pytest.approx(sum(watch.seconds.values()), abs=0.002)]
    watch.restart()
    assert watch.laps == [] and sum(watch.seconds.values()) < 0.01


@pytest.mark.slow
def test_every_job(tmp_path):
    options = [
        "-c",
        "configs/digits.yaml",
        TINY,
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
    assert {"data", "noise", "forward", "backward", "optimizer", "EMA", "logging"} <= rows["train, fp32"]["shares"].keys()
    assert sum(rows["train, fp32"]["shares"].values()) == pytest.approx(1)
    assert 0 < rows["train, fp32"]["outside"] < 1 and rows["train, fp32"]["seconds_to_first_step"] > 0.5
    assert result["cost"]["training"] == pytest.approx(3 * result["cost"]["forward"], rel=0.1)
    assert all(name in text for name in rows) and (tmp_path / "benchmark.md").read_text() in text + "\n"
