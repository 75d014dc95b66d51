"""Killed anywhere and started again: in the end as if never killed. `make torture` does it a hundred times."""

import json
import shutil

import pytest
from conftest import succeed

from flow.sampling import snapshot
from scripts.dev import fault_injection


def test_training_survives_some_kills(tmp_path):
    out = tmp_path / "out"
    succeed("-m", "scripts.dev.fault_injection", "--kills", "3", "--out", out)
    found = json.loads((out / "torture.json").read_text())
    assert found["kills"] == 3 == sum(found["moments"].values()) and found["differences"] == []
    assert not list(out.rglob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("script", fault_injection.JOBS)
def test_a_script_survives_many_kills(tmp_path, script):
    said = succeed("-m", "scripts.dev.fault_injection", "--kills", "30", "--script", script, "--seed", "1", timeout=900).stdout
    assert f"{script}: 30 kills in" in said


def test_what_differs_is_found(tiny_run, tmp_path):
    """A torture that sees no difference would prove nothing."""
    for number, harm in enumerate((
        lambda run: (run / "snapshots" / "new.txt").touch(),
        lambda run: snapshot.find(run).unlink(),
        lambda run: snapshot.find(run).write_bytes(snapshot.find(run).read_bytes()[:-1] + b"x"),
        lambda run: (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace('"step": 4', '"step": 5')),
        lambda run: shutil.copy(*(run / "checkpoints" / f"step_0000000{k}" / "optimizer.bin" for k in (2, 4))),
    )):  # fmt: skip
        run = tmp_path / str(number)
        shutil.copytree(tiny_run, run)
        assert fault_injection.compare(tiny_run, run) == []
        harm(run)
        assert len(fault_injection.compare(tiny_run, run)) == 1, number


def test_an_output_folder_is_not_overwritten(error, tmp_path):
    (tmp_path / "mine.txt").touch()
    assert "exists already" in error("fault_injection", "--kills", "1", "--out", tmp_path)
