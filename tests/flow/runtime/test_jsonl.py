"""results.jsonl and metrics.jsonl: whole rows or none, and every damaged line is named."""

import json
import math
import os
import resource
import signal

import pytest

from configs import loading
from flow.evaluation import results, table
from flow.runtime import distributed, jsonl
from flow.training.logging import Logger, read_metrics

ROW = {"weights": "w", "method": "euler", "n": 9, "first": 0, "identity": {}, "metrics": {"FID": 3.0}, "seconds": 1.0}
ROW |= {"steps": 2, "NFE": 2, "forwards": 2, "guidance_scale": None, "requested": ["fid"]}
DAMAGE = {
    b"3": "it is not a JSON object", b"null": "it is not a JSON object", b'{"weights": "b", "met': "it is not JSON",
    b"\xff": "it is not UTF-8", b"\x00" * 9: "it is not JSON", b"[" * 10_000: "it is not JSON", b"{}": "it has no 'weights'",
    json.dumps(ROW).encode() * 2: "it is not JSON",
    json.dumps({**ROW, "identity": {"extractor": 5}}).encode(): "its 'extractor' is not a list",
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_results_are_named(tmp_path, capsys, content):
    path = tmp_path / "results.jsonl"
    path.write_bytes(json.dumps({**ROW, "first": 9}).encode() + b"\n\n" + content)
    results.append(tmp_path, ROW)
    assert [row["first"] for row in results.read(tmp_path)] == [9, 0]
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"{path}, line 3: {DAMAGE[content]}" in warning


@pytest.mark.parametrize("key", [*ROW])
def test_results_of_wrong_types_are_named(tmp_path, capsys, key):
    """Whatever a value is, there is a table with the row or a warning, never a traceback."""
    for i, value in enumerate(("x", 3, None, True, [3], {"a": "b"}, {"a": [1]}, 10**400, 1e300, "absent")):
        folder = tmp_path / str(i)
        folder.mkdir()
        row = {**ROW, key: value}
        if value == "absent":
            del row[key]
        results.append(folder, {**ROW, "first": 9})
        results.append(folder, row)
        rows = results.read(folder)
        warnings = capsys.readouterr().err.splitlines()
        assert len(rows) + len(warnings) == 2 and all("results.jsonl, line 2: it" in w for w in warnings)
        assert table.write(folder, rows).startswith("| weights")


def test_a_full_disk_leaves_whole_lines(tmp_path):
    """The largest size of a file stands for the disk."""
    path = tmp_path / "results.jsonl"
    jsonl.append(path, ROW)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            jsonl.append(path, ROW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    os.truncate(path, len(before) - 1)  # as an editor leaves it
    jsonl.append(path, ROW)
    assert path.read_bytes() == before * 2


def test_metrics_of_other_columns_add_up(tmp_path):
    """A row that is measured again with other metrics does not hide the first ones."""
    results.append(tmp_path, ROW)
    results.append(tmp_path, {**ROW, "metrics": {"KID": 0.5}, "requested": ["kid"]})
    (row,) = results.read(tmp_path)
    assert row["metrics"] == {"FID": 3.0, "KID": 0.5}
    assert set(results.find(tmp_path, {**ROW, "requested": ["prc"]})["requested"]) == {"fid", "kid"}


@pytest.mark.parametrize("odd", [b"", b"3", b"null", b'{"loss": 1}', b'{"step": true}', b'{"step": \xff}', b"\x00" * 9])
def test_resuming_loses_no_metrics(tmp_path, odd):
    """Rows after an odd line stay; the odd line moves to a file beside."""
    path, damaged = tmp_path / "metrics.jsonl", tmp_path / "metrics.damaged.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.50}\n' + odd + b'\n{"step": 2}\n{"step": 3}\n{"step": 4')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    config = loading.load(None, ["train.log_with=[]"])
    Logger(distributed.build_accelerator(), tmp_path, config, first_step=2).log(5, {"loss": 4.0})
    assert path.read_bytes() == b'{"step": 1, "loss": 2.50}\n{"step": 2}\n{"step": 5, "loss": 4.0}\n'
    assert damaged.read_bytes() == (odd + b"\n" if odd else b"") + b'{"step": 4\n'
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert ("line 2: it" in log) == bool(odd) and "line 5: it is not JSON" in log


def test_metrics_that_are_no_numbers_are_read(tmp_path):
    """The loss of a run that has diverged; a file without a row has none."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": NaN}\n')
    (row,) = read_metrics(path)
    assert row["step"] == 2 and math.isnan(row["loss"])
    path.write_text("")
    assert read_metrics(path) == []
