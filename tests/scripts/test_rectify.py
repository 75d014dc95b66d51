"""rectify: one command from 1-RF to the table, which goes on after a kill and ends with the same files."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, run_here, succeed
from PIL import Image
from safetensors.torch import load_file

from flow.evaluation import table
from flow.sampling import snapshot
from flow.training import checkpoint
from scripts import rectify

STAGE = {
    "data": {"name": "digits"},
    "model": {"name": "mini_unet", "args": {"width": 16, "head_channels": 16, "patch": 1, "num_classes": 10}},
    "train": {
        "steps": 4, "batch_size": 16, "checkpoint_every_steps": 2, "sample_every_steps": 0, "log_every_steps": 2,
        "log_with": [],
    },
    "preview": {"n_samples": 4, "sampling_steps": 1},
}  # fmt: skip
ON_PAIRS = {"data": {"name": "pairs", "args": {"path": "filled in by rectify"}}}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A rectify YAML for seconds, without its folder."""
    folder = tmp_path_factory.mktemp("configs")
    stages = {
        "first": STAGE,
        "reflow": STAGE | ON_PAIRS | {"flow": {"coupling": "paired", "label_dropout": 0.0}},
        "distill": STAGE | ON_PAIRS | {"flow": {"coupling": "paired", "label_dropout": 0.0}, "loss": {"name": "distillation"}},
    }
    for name, stage in stages.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(stage))
    round_of_pairs = {"n_pairs": 40, "sampling_steps": 2, "guidance_scale": 1.5}
    whole = {name: str(folder / f"{name}.yaml") for name in stages}
    whole |= {
        "first_pairs": round_of_pairs,
        "later_pairs": {"n_pairs": 40, "sampling_steps": 1},
        "nfe": [1, 2],
        "n_samples": 80,
    }
    whole |= {"feature_extractor": "digits", "straightness_images": 5, "straightness_steps": 4}
    (folder / "rectify.yaml").write_text(yaml.safe_dump(whole))
    return folder / "rectify.yaml"


def run_command_here(arguments: list[str], launcher: str | None = None) -> None:
    """`run_command` in this process."""
    script, *rest = [word for word in arguments if word != "-m"]
    run_here(script.removeprefix("scripts.").removesuffix(".py"), *rest)


@pytest.fixture(scope="module")
def rectified(tmp_path_factory, config) -> Path:
    """The whole chain, its commands run in this process, which saves the seconds of ten starts."""
    folder = tmp_path_factory.mktemp("rectify") / "whole"
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(rectify, "run_command", run_command_here)
        run_here("rectify", "-c", config, f"folder={folder}")
    assert "| model" in out.getvalue()
    stages = re.findall(r"^stage (\d+) of (\d+): (.*) \(\d+\.\d (?:s|min) so far\)$", out.getvalue(), re.M)
    assert [(int(k), int(n)) for k, n, _ in stages] == [(k, 10) for k in range(1, 11)]
    assert stages[1][2] == "pairs of 1-rf" and stages[6][2] == "evaluation of 1-rf with guidance 1.5"
    bars = re.findall(r"straightness deviation and figure [^|]*\|[^|]*\| (\d+)/(\d+)", err.getvalue())
    assert bars[-1][0] == bars[-1][1]
    (hint,) = re.findall(r"; sample in one step with: (.+)$", out.getvalue(), re.M)
    run_command_here([*shlex.split(hint)[1:], "--n_samples", "4", "--save_dir", str(folder.parent / "samples")])
    return folder


def results(folder: Path) -> dict:
    """Everything that the second of two equal runs has to repeat: all files but logs, clocks and machine descriptions."""
    files = {p.relative_to(folder): p.read_bytes() for p in sorted(folder.glob("pairs_*/*"))}
    weights = {}
    for name in ("1-rf", "2-rf", "distilled"):
        weights |= {f"{name} {key}": value.tolist() for key, value in load_file(snapshot.find(folder / name)).items()}
    rows = [
        {k: v for k, v in row.items() if k not in ("seconds", "identity")} for row in table.read_rows(folder / "evaluation")
    ]
    pictures = {p.name: p.read_bytes() for p in folder.glob("comparison.*")}
    return {"pairs": files, "weights": weights, "rows": rows, "pictures": pictures}


def test_table_and_figure(rectified):
    text = (rectified / "comparison.md").read_text()
    rows = ("1-rf ", "1-rf, w = 1.5", "2-rf", "distilled")
    for word in ("NFE 1", "NFE 2", "straightness deviation", *rows, "FD-digits / accuracy"):
        assert word in text
    assert len([row for row in table.read_rows(rectified / "evaluation") if not table.is_control(row)]) == 8
    assert min(Image.open(rectified / "comparison.png").size) > 200


def test_the_stages_build_on_each_other(rectified):
    configs = {name: (rectified / name / "config.yaml").read_text() for name in ("2-rf", "distilled")}
    assert f"init_from: {rectified / '1-rf'}" in configs["2-rf"] and f"path: {rectified / 'pairs_1-rf'}" in configs["2-rf"]
    assert f"init_from: {rectified / '2-rf'}" in configs["distilled"]
    assert f"path: {rectified / 'pairs_2-rf'}" in configs["distilled"]


def test_mistakes_come_out_before_anything_is_trained(error, tmp_path, config):
    command = ["rectify", "-c", config, f"folder={tmp_path / 'never'}"]
    assert "unknown key 'round'. Did you mean 'rounds'?" in error(*command, "round=3")
    assert "rounds=0: must be at least 1" in error(*command, "rounds=0")
    assert "flow.coupling=independent: must be paired" in error(*command, "reflow=configs/digits.yaml")
    assert "first_pairs.sampling_method: unknown solver 'hen'" in error(*command, "first_pairs.sampling_method=hen")
    assert "feature_extractor=mnst: unknown; choose one of" in error(*command, "feature_extractor=mnst")
    assert "model: must be that of" in error(*command, "reflow=configs/mnist_reflow.yaml")
    (tmp_path / "noise.yaml").write_text("{flow: {prediction: noise}, loss: {name: distillation}}")
    assert "use velocity or data" in error(*command, f"distill={tmp_path / 'noise.yaml'}")
    assert not (tmp_path / "never").exists()


def test_sigterm_lets_the_step_save_and_ends(tmp_path, config):
    """The training that is under way writes its checkpoint; nothing is left running."""
    folder = tmp_path / "stopped"
    first = yaml.safe_load((config.parent / "first.yaml").read_text())
    first["train"] |= {"steps": 100_000, "checkpoint_every_steps": 0}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(first))
    command = [
        sys.executable,
        "-m",
        "scripts.rectify",
        "-c",
        str(config),
        f"folder={folder}",
        f"first={tmp_path / 'long.yaml'}",
    ]
    process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "FLOW_NUM_THREADS": "1"})
    while not (folder / "1-rf" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert checkpoint.list_checkpoints(folder / "1-rf" / "checkpoints")


@pytest.mark.slow
def test_killed_rectify_ends_with_same_files(tmp_path, config, rectified):
    """Killed again and again, it ends with the same files."""
    folder = tmp_path / "cut"
    # the folder's name is part of the configurations inside the weights' headers, so not the bytes but the values are compared
    command = [sys.executable, "-m", "scripts.rectify", "-c", str(config), f"folder={folder}"]
    environment = {**os.environ, "FLOW_NUM_THREADS": "1"}
    for seconds in (7, 8, 9, 11, 13, 17, 23, 31, 43, 60, 85):
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the script and the step that it was at
            process.wait()
            time.sleep(0.1)
    succeed("-m", "scripts.rectify", "-c", config, f"folder={folder}", timeout=600)
    cut, whole = results(folder), results(rectified)
    manifests = [name for name in whole["pairs"] if name.name == "manifest.json"]  # these hold the hash of the weights' file
    assert len(manifests) == 2
    for name in manifests:
        del cut["pairs"][name], whole["pairs"][name]
    assert cut == whole
