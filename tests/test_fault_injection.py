"""Scripts that are killed anywhere and restarted leave what an uninterrupted run leaves; `make fault-injection` for more."""

import json
import shutil

import pytest
from conftest import succeed

from flow.sampling import snapshot
from scripts.dev import fault_injection


def test_killed_training(tmp_path):
    out = tmp_path / "out"
    succeed("-m", "scripts.dev.fault_injection", "--kills", "3", "--out", out)
    faults = json.loads((out / "faults.json").read_text())
    assert faults["kills"] == 3 == sum(faults["moments"].values()) and faults["differences"] == []
    assert not list(out.rglob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("script", fault_injection.JOBS)
def test_many_kills(tmp_path, script):
    printed = succeed(
        "-m", "scripts.dev.fault_injection", "--kills", "30", "--script", script, "--seed", "1", timeout=900
    ).stdout
    assert f"{script}: 30 kills in" in printed


def test_differences_are_reported(tiny_run, tmp_path):
    """A comparison that sees no difference would prove nothing."""
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


def test_output_folder_is_not_overwritten(error, tmp_path):
    (tmp_path / "other.txt").touch()
    assert "exists already" in error("fault_injection", "--kills", "1", "--out", tmp_path)
