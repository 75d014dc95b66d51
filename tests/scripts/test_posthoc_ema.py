"""Averages after the training: equal to tracked ones, exact after a resume, one-line errors, rows and figure of evaluate.py."""

import hashlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, run_here
from safetensors.torch import load_file
from torch import Tensor

from flow.evaluation import plots, results
from flow.evaluation.entries import aggregate
from flow.runtime import step_names
from flow.sampling import locate, snapshot
from flow.sampling.sampler import Sampler

MLP = [
    "-c", "configs/digits.yaml", *TINY_RUN, "model.name=mlp", "model.args={width: 16, depth: 1, num_classes: 10}",
    "train.steps=120", "train.checkpoint_every_steps=64", "train.log_every_steps=60", "optimizer.warmup_steps=10",
]  # fmt: skip
WIDTHS = "ema.power_widths=[0.05, 0.1]"
STEPS = (64, 120)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run that has stored averages of two widths 15 times. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_here("train", *MLP, WIDTHS, "ema.power_every_steps=8", "-e", folder)
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def flat(path: Path) -> Tensor:
    return torch.cat([value.double().flatten() for _, value in sorted(load_file(path).items()) if value.is_floating_point()])


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def stored(run: Path, width: str, step: int) -> Path:
    return run / f"power_averages/width_{width}/step_{step:08d}.safetensors"


def test_reconstructed_equals_tracked(here, run, copy, tmp_path):
    """The difference is below 2% of that between the tracked average and the nearest stored one (measured: up to 0.6%)."""
    tracked, widths = tmp_path / "tracked", ("0.070", "0.120", "0.150")
    here("train", *MLP, f"ema.power_widths=[{', '.join(widths)}]", "ema.power_every_steps=64", "-e", tracked)
    for step in STEPS:
        here("posthoc_ema", "--weights", copy, "--width", *widths, "--step", str(step))
        for width in widths:
            sought = flat(stored(tracked, width, step))
            actual = flat(copy / f"posthoc_ema/width_{width}_step_{step:08d}.safetensors")
            nearest = min((sought - flat(stored(run, other, step))).norm() for other in ("0.050", "0.100"))
            assert (actual - sought).norm() < 0.02 * nearest


def test_resume_is_exact(here, run, copy):
    """From the first checkpoint: the averages that were stored after it are stored again, to the bit."""
    shutil.rmtree(copy / "checkpoints/step_00000120")
    stored(copy, "0.050", 120).write_bytes(stored(copy, "0.050", 112).read_bytes())
    (stored(copy, "0.050", 120).parent / ".tmp-1-step_00000120.safetensors").touch()
    here("train", "-e", copy, "-r", "latest")
    for folder in ("power_averages", "snapshots", "checkpoints/step_00000120"):
        actual, expected = hashes(copy / folder), hashes(run / folder)
        assert actual.keys() == expected.keys() and len(actual) >= 2
        assert {name for name in actual if actual[name] != expected[name]} <= {"manifest.json", "state.json"}


def test_averages_of_an_abandoned_training_are_deleted(here, copy):
    """Those past the checkpoint that is resumed do not belong to the training that goes on from there."""
    shutil.rmtree(copy / "checkpoints/step_00000120")
    here("train", "-e", copy, "-r", "latest", "train.steps=72", "ema.power_every_steps=0")
    assert [p.name for p in step_names.by_step(copy / "power_averages/width_0.100", ".safetensors").values()][-2:] == [
        "step_00000064.safetensors",
        "step_00000072.safetensors",
    ]


def test_snapshots_are_used_and_kept(here, copy):
    printed = here("posthoc_ema", "--weights", copy, "--width", "0.05", "0.0125", "0.2")
    assert "width 0.0125 from 30 stored averages: profile error " in printed
    folder = copy / "posthoc_ema"
    names = ["width_0.0125", "width_0.050", "width_0.200"]
    assert sorted(p.name for p in folder.iterdir()) == [f"{name}_step_00000120.safetensors" for name in names]
    exact, last = folder / f"{names[1]}_step_00000120.safetensors", stored(copy, "0.050", 120)
    assert (flat(exact) - flat(last)).norm() < 1e-6 * flat(last).norm()
    snap = snapshot.load(exact)
    assert snap.power_average.width == 0.05 and snap.power_average.updates == 120 and snap.step == 120
    (command,) = re.findall(r"sample from the first with: (.+)", printed)
    script, *arguments = shlex.split(command)[1:]
    here(Path(script).stem, *arguments, "--n_samples", "2", "--sampling_steps", "1", "--save_dir", copy / "samples_of_it")
    assert Sampler.load(exact).sample(2, steps=1).shape == (2, 1, 8, 8)

    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    damaged = folder / f"{names[2]}_step_00000120.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    said = here("posthoc_ema", "--weights", copy, "--width", "0.05", "0.0125", "0.2")
    assert "width 0.200" in said and "width 0.050" not in said
    assert {p for p, time in before.items() if p.stat().st_mtime_ns != time} == {damaged}
    assert snapshot.load(damaged).power_average.width == 0.2
    stored(copy, "0.050", 8).unlink()  # other inputs, with one width only at this step
    assert "width 0.050 from 28 stored averages" in here("posthoc_ema", "--weights", copy, "--width", "0.05")


def test_mistakes(error, tiny_run, copy, tmp_path):
    posthoc = ["posthoc_ema", "--weights", copy, "--width"]
    assert "--step 12: no averages were stored at this step; the nearest are 8, 16" in error(*posthoc, "0.1", "--step", "12")
    assert "'0.3': must be a number above 0 and below 0.2887" in error(*posthoc, "0.3")
    assert "holds no stored averages; give the folder of a run" in error("posthoc_ema", "--weights", tiny_run, "--width", "0.1")
    assert "holds no stored averages" in error("evaluate", "--weights", tiny_run, "--ema_width", "0.1")
    line = error("evaluate", "--samples", copy, "--reference", "x", "--ema_width", "0.1")
    assert "--ema_width: does not go with --samples" in line
    for value in ("[0.1, 0.1]", "[0.3]", "[0]", "[.nan]"):
        line = error("train", *MLP, f"ema.power_widths={value}", "-e", tmp_path / "new")
        assert "ema.power_widths=" in line and "must be a list of distinct numbers above 0 and below 0.2887" in line
    assert "ema.power_widths=[0.07]: the run in" in error("train", "-e", copy, "-r", "latest", "ema.power_widths=[0.07]")
    assert "ema.power_widths" in error("train_vae", "-c", "configs/mnist_vae.yaml", WIDTHS)

    damaged = stored(copy, "0.100", 88)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert f"--weights {damaged}: has changed since it was written" in error(*posthoc, "0.2")
    shutil.copyfile(locate.find(tiny_run), damaged)
    assert f"--weights {damaged}: not a stored average" in error(*posthoc, "0.2")
    damaged.write_bytes(content[:100])
    assert f"--weights {damaged}: not a whole safetensors file" in error(*posthoc, "0.2")
    assert not (copy / "posthoc_ema").exists()


def test_runs_without_stay_as_they_were(tiny_run):
    """The files are those of any run, and no header names an average of this kind."""
    steps = ("step_00000002", "step_00000004")
    expected = {"config.yaml", "environment.json", "log.txt", "metrics.jsonl", "samples/step_00000004.png"}
    for step in steps:
        names = ("ema.safetensors", "manifest.json", "model.safetensors", "optimizer.bin", "state.json")
        expected |= {f"snapshots/{step}.safetensors", *(f"checkpoints/{step}/{name}" for name in names)}
    assert {str(path.relative_to(tiny_run)) for path in tiny_run.rglob("*") if path.is_file()} == expected
    assert all(snapshot.load(tiny_run / f"snapshots/{step}.safetensors").power_average is None for step in steps)


def test_rows_and_figure_of_the_widths(here, copy, monkeypatch):
    figures, save = {}, plots.save

    def save_and_keep(path, figure, **options):
        figures[path.name] = figure
        save(path, figure, **options)

    monkeypatch.setattr(plots, "save", save_and_keep)
    common = ["--weights", copy, "--n_samples", "70", "--sampling_steps", "1", "--feature_extractor", "digits"]
    evaluate = ["evaluate", *common, "--metrics", "fid", "--no_control"]
    here(*evaluate)
    figure = copy / "evaluation/ema_width.png"
    here(*evaluate, "--ema_width", "0.05")
    assert not figure.exists()
    printed = here(*evaluate, "--ema_width", "0.05", "0.2")
    assert figure.is_file()
    entries = aggregate(results.read(copy / "evaluation"))
    assert [(e["weights"], e["ema_width"]) for e in entries] == [("copy@120", width) for width in (None, 0.05, 0.2)]
    half_life, *of_widths = (e["metrics"]["FD-digits"].mean for e in entries)
    assert len({half_life, *of_widths}) == 3
    (axes,) = figures["ema_width.png"].axes
    solid, dashed = (line for line in axes.lines if line.get_linestyle() in ("-", "--") and len(line.get_xdata()) == 2)
    assert (list(solid.get_xdata()), list(solid.get_ydata())) == ([0.05, 0.2], of_widths)
    assert list(dashed.get_ydata()) == [half_life, half_life]
    assert "| ema_width |" in printed
    lines = (copy / "evaluation/results.jsonl").read_text().splitlines()
    assert len(lines) == 3  # the row of 0.05 was not computed again
    (command,) = re.findall(r"sample as in the last row with: (.+)", printed)
    assert "posthoc_ema/width_0.200_step_00000120.safetensors" in command
