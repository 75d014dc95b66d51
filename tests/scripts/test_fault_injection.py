"""Killed runs that are restarted end as the reference run. `make fault-injection` does it a hundred times a script."""

import json
import shutil

import pytest
from conftest import succeed

from flow.sampling import locate
from scripts.dev import fault_injection


@pytest.mark.slow
@pytest.mark.parametrize("script", fault_injection.JOBS)
def test_script_equals_reference_after_many_kills(tmp_path, script):
    if script in ("train_vae", "cache_latents"):
        pytest.importorskip("diffusers")
    flags = ["--kills", "30", "--script", script, "--seed", "1"]
    out = tmp_path / "out"
    printed = succeed("-m", "scripts.dev.fault_injection", *flags, "--out", out, timeout=900).stdout
    assert f"{script}: 30 kills in" in printed
    result = json.loads((out / "fault_injection.json").read_text())
    assert result["kills"] == 30 == sum(result["moments"].values()) and result["differences"] == []
    assert not list(out.rglob(".tmp-*"))


def test_compare_reports_each_difference(tiny_run, tmp_path):
    """A comparison that sees no difference would prove nothing."""
    same = shutil.copytree(tiny_run, tmp_path / "same")
    assert fault_injection.compare(tiny_run, same) == []
    for number, damage in enumerate((
        lambda run: (run / "snapshots" / "new.txt").touch(),
        lambda run: locate.find(run).unlink(),
        lambda run: locate.find(run).write_bytes(locate.find(run).read_bytes()[:-1] + b"x"),
        lambda run: (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace('"step": 4', '"step": 5')),
        lambda run: shutil.copy(*(run / "checkpoints" / f"step_0000000{k}" / "optimizer.bin" for k in (2, 4))),
    )):  # fmt: skip
        run = tmp_path / str(number)
        shutil.copytree(tiny_run, run)
        damage(run)
        assert len(fault_injection.compare(tiny_run, run)) == 1, number


def test_output_folder_is_not_overwritten(error, tmp_path):
    (tmp_path / "other.txt").touch()
    assert "exists already" in error("fault_injection", "--kills", "1", "--out", tmp_path)
