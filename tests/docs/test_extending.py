"""docs/extending.md: its blocks are written into a copy of the repository, and its commands run there in a few steps."""

import ast
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from safetensors.torch import load_file

COPIED = ("configs", "datasets", "flow", "models", "train.py", "sample.py", "evaluate.py")
PAGE = (REPOSITORY / "docs/extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.S)
TRAIN = (
    "train.steps=4 train.batch_size=16 train.log_every_steps=1 train.checkpoint_every_steps=2 train.sample_every_steps=4 "
    "train.mixed_precision=no optimizer.warmup_steps=0 preview.n_samples=4 preview.sampling_steps=1"
)
TINY = {
    "train.py": TRAIN,
    "train_with_stop.py": TRAIN,
    "sample.py": "--n_samples 4 --sampling_steps 2",
    "evaluate.py": "--sampling_steps 1 --n_samples 40",
}
# Runs the mains one after another in one process, because each start takes seconds.
DRIVER = """
import importlib, shutil, sys
import torch
from accelerate.state import AcceleratorState, GradientState

torch.set_num_threads(1)
for line in sys.stdin:
    program, *arguments = line.rstrip("\\n").split("\\t")
    if program == "rm":
        shutil.rmtree(arguments[0])
        continue
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    sys.argv = [program, *arguments]
    importlib.import_module(program.removesuffix(".py")).main()
"""


def add_entry(source: str, registry: str, imports: str, entry: str) -> str:
    """A module with further imports and an entry of its dict `registry`."""
    tree, lines = ast.parse(source), source.splitlines(keepends=True)
    (value,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target) == registry
    ]
    row, column = value.lineno - 1, value.col_offset + 1  # behind the opening brace
    lines[row] = f"{lines[row][:column]}\n{entry}{lines[row][column:]}"
    first = next(node.lineno for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)) - 1
    return "".join([*lines[:first], imports, *lines[first:]])


def write_blocks(folder: Path) -> None:
    """Write each block into the file that its first line names."""
    for language, text in BLOCKS:
        if language == "bash":
            continue
        header, body = text.split("\n", 1)
        entry = re.fullmatch(r"# (\S+): .*an entry of (\w+)", header)
        if entry:
            path = folder / entry.group(1)
            imports, lines = re.fullmatch(r"((?:from [^\n]*\n)*)\n?(.*)", body, re.S).groups()
            path.write_text(add_entry(path.read_text(encoding="utf-8"), entry.group(2), imports, lines), encoding="utf-8")
        else:
            path = folder / header.removeprefix("# ")
            assert not path.exists(), path
            path.write_text(text.replace("StopAtLoss(0.5)", "StopAtLoss(100)"), encoding="utf-8")


def commands() -> list[list[str]]:
    """The words of the commands of the page from the script on, followed by what makes them small."""
    lines = [line for language, text in BLOCKS if language == "bash" for line in text.replace("\\\n", "").splitlines()]
    words = [shlex.split(line)[1:] for line in lines if line.startswith("accelerate-launch ")]
    assert len(words) == len(lines)
    small = [[*line, *shlex.split(TINY[line[0]])] for line in words]
    return [
        [*line, "train.log_with=[]"] if line[0] == "train.py" and "train.log_with=[csv]" not in line else line for line in small
    ]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The copy of the repository with everything on the page in it, after the commands of the page."""
    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        source, target = REPOSITORY / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    write_blocks(folder)
    digits = ["train.py", "-c", "configs/digits.yaml", *TRAIN.split(), "train.log_with=[]"]
    first, resumed, *others = commands()
    assert resumed[:5] == [*first[:3], "-r", "latest"]
    lost = "runs/digits_direction/checkpoints/step_00000004"  # a kill after the checkpoint of step 2
    lines = [digits, first, ["rm", lost], ["rm", "runs/digits_direction/snapshots"], resumed, *others]
    # The weights of the uninterrupted run are those of a run of the same configuration in another directory.
    lines.insert(1, [*first, "-e", "runs/uninterrupted"])
    result = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input="".join("\t".join(line) + "\n" for line in lines),
        cwd=folder, capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(folder), "FLOW_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict:
    (path,) = run.glob("snapshots/*00000004*.safetensors")
    return load_file(path)


def test_loss(copy):
    """It trains, resumes to the bit, logs its terms, samples."""
    run = copy / "runs/digits_direction"
    assert (run / "samples/step_00000004.png").exists()
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["loss"] == pytest.approx(row["mse"] + 0.2 * row["angle"], rel=1e-4) for row in rows)
    resumed, whole = weights(run), weights(copy / "runs/uninterrupted")
    assert resumed.keys() == whole.keys() and all(resumed[key].equal(whole[key]) for key in whole)
    assert len(list((copy / "samples/direction/images").iterdir())) == 4


def test_coupling(copy):
    """Its run has other weights than that of the same configuration with independent noise."""
    antithetic, independent = weights(copy / "runs/antithetic"), weights(copy / "runs/digits")
    assert antithetic.keys() == independent.keys() and any(not antithetic[key].equal(independent[key]) for key in antithetic)


def test_network(copy):
    config = (copy / "runs/residual/config.yaml").read_text()
    assert "residual_mlp" in config and any(key.startswith("blocks.2.") for key in weights(copy / "runs/residual"))


def test_data_set(copy):
    assert "gratings" in (copy / "runs/gratings/log.txt").read_text() and weights(copy / "runs/gratings")


def test_solver(copy):
    """One that is a tableau, and one with an option, which is a flag."""
    assert len(list((copy / "samples/ralston/images").iterdir())) == 4
    assert json.loads((copy / "samples/second_order/sampling.json").read_text())["options"] == [["alpha", 0.6]]


def test_metric(copy):
    rows = [json.loads(line) for line in (copy / "runs/digits/evaluation/results.jsonl").read_text().splitlines()]
    assert rows and all(row["metrics"]["mean_distance"] > 0 for row in rows)


def test_tracker(copy):
    with open(copy / "runs/csv/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4] and float(rows[0]["loss"]) > 0


def test_callback(copy):
    """The run ends after the first row of metrics, with a checkpoint."""
    run = copy / "runs/stopped"
    assert [row["step"] for row in metrics(run)] == [1]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000001"]
