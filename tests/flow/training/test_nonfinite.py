"""Numbers that are not finite: the run stops or skips the step, as configured, and skipped steps leave no trace."""

from functools import partial

import pytest
import torch
from conftest import TINY_RUN
from safetensors.torch import load_file

import datasets
from flow.runtime import distributed, step_names
from flow.runtime.errors import cli_main
from flow.sampling import locate
from flow.training import checkpoint, optimizer
from flow.training.ema import Ema
from flow.training.logging import read_metrics
from flow.training.optimizer import OptimizerStep
from flow.training.trainer import Callback

# A network of two layers on the digits, without the configuration file: a step takes milliseconds.
MLP = [*TINY_RUN, "model.name=mlp", "model.args={width: 16, depth: 1}", "train.log_every_steps=1", "train.steps=6"]


@pytest.fixture
def ruin(monkeypatch):
    """ruin(step, value): put a value that is not finite into the gradient of that step (from 1)."""

    clip_and_step = OptimizerStep.clip_and_step

    def prepare(*steps: int, value: float = float("inf")) -> None:
        calls = [0]

        def broken(step):
            calls[0] += 1
            if not steps or calls[0] in steps:
                next(step.net.parameters()).grad.view(-1)[0] = value
            return clip_and_step(step)

        monkeypatch.setattr(OptimizerStep, "clip_and_step", broken)

    return prepare


@pytest.fixture
def watched(monkeypatch):
    """Learning rates of the steps that were taken, and the images after which the moving average moved."""
    seen = {"rates": [], "images": []}
    adam, update = torch.optim.AdamW.step, Ema.update

    def step(optimizer, *args, **kwargs):
        seen["rates"].append(optimizer.param_groups[0]["lr"])
        return adam(optimizer, *args, **kwargs)

    def averaged(ema, batch_size, images):
        seen["images"].append(images)
        update(ema, batch_size, images)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(Ema, "update", averaged)
    return seen


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("step", [3, 6])
def test_nonfinite_gradient_stops_run(error, ruin, tmp_path, value, step):
    """Also that of the last step, after which no loss would tell."""
    ruin(step, value=value)
    line = error("train", *MLP, "-e", tmp_path / "run", "train.log_every_steps=100")
    assert f"the loss or gradient of step {step} is not finite" in line
    saved = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [step_names.step_of(path) for path in saved] == [k for k in (2, 4) if k < step][-2:]
    assert all(value.isfinite().all() for path in saved for value in load_file(path / "model.safetensors").values())


def test_with_skip_such_a_step_leaves_no_trace(here, ruin, watched, tmp_path):
    """Weights, moving average and learning rate go on as if the step had not been."""
    ruin(2, 5)
    run = tmp_path / "run"
    warm = ["train.nonfinite_grad=skip", "optimizer.warmup_steps=6", "optimizer.lr=6"]
    here("train", *MLP, "-e", run, *warm, "train.steps=6")
    assert watched["rates"] == [1, 2, 3, 4] and watched["images"] == [32, 64, 96, 128]
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1, 2, 2]
    assert ["grad_norm" in row for row in rows] == [True, False, True, True, False, True]
    assert all(value.isfinite().all() for value in load_file(locate.find(run)).values())
    state = checkpoint.load(distributed.build_accelerator(), checkpoint.list_checkpoints(run / "checkpoints")[-1])
    assert (state["step"], state["updates"]) == (6, 4)


def test_a_run_that_only_skips_ends(error, ruin, monkeypatch, tmp_path):
    """At once, however rarely it logs."""
    monkeypatch.setattr(optimizer, "MAX_SKIPPED_IN_A_ROW", 10)
    ruin()
    skipping = ["train.nonfinite_grad=skip", "train.steps=100", "train.log_every_steps=100"]
    line = error("train", *MLP, "-e", tmp_path / "run", *skipping)
    assert "the gradients of the last 10 steps up to 10 were not finite, and all of them were skipped" in line


class BreakAverage(Callback):
    """A number of the moving average is infinite after step 3."""

    def on_step(self, trainer):
        if trainer.step == 3:
            next(iter(trainer.ema.shadow[0].values())).view(-1)[0] = float("inf")


def test_averages_not_finite_are_not_saved(main_of, capsys, tmp_path):
    """One line, and the checkpoint before stays the last one."""
    with pytest.raises(SystemExit) as left:
        cli_main(partial(main_of("train", *MLP, "-e", tmp_path / "run"), [BreakAverage()]))
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    (saved,) = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert left.value.code == 2 and step_names.step_of(saved) == 2
    assert "is not finite after step 4" in line and line.startswith("error: the average of ") and str(saved) in line


def broken_pairs(monkeypatch, which: int | slice = 7) -> None:
    """Digits as floats in [-1, 1], one image of which, or several, is not a number."""
    build = datasets.build

    def broken(*args):
        data = build(*args)
        data.images = data.images.float() / 127.5 - 1
        data.images[which] = float("nan")
        return data

    monkeypatch.setattr(datasets, "build", broken)


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_nan_in_the_data(error, here, monkeypatch, tmp_path, mode):
    """One image in 1,797: it comes once an epoch, in one of 57 batches of 32."""
    broken_pairs(monkeypatch)
    run = tmp_path / "run"
    arguments = [*MLP, "-e", run, f"train.nonfinite_grad={mode}", "train.steps=60", "train.checkpoint_every_steps=0"]
    if mode == "raise":
        assert "is not finite" in error("train", *arguments)
        return
    here("train", *arguments)
    rows = read_metrics(run / "metrics.jsonl")
    assert rows[-1]["skipped_steps"] in (1, 2) and all(row["loss"] < 5 for row in rows)


def test_rows_without_a_number(here, monkeypatch, tmp_path):
    """What has no finite value is left out, as JSON has no NaN; a line of the log says nan."""
    broken_pairs(monkeypatch, slice(None))
    printed = here("train", *MLP, "-e", tmp_path / "run", "train.nonfinite_grad=skip", "train.checkpoint_every_steps=0")
    assert "loss nan  gradient norm nan" in printed and "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    assert all(row.keys().isdisjoint({"loss", "grad_norm"}) for row in read_metrics(tmp_path / "run/metrics.jsonl"))


@pytest.fixture
def loss_scaler(monkeypatch):
    """The loss scaler of fp16, on a CPU: accelerate's own way through it, with float32 networks. False takes it away."""
    start = distributed.build_accelerator

    def started(*args, **kwargs):
        accelerator = start(*args, **kwargs)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1000)
        prepare = accelerator.prepare

        def prepared(net, optimizer):
            net, optimizer = prepare(net, optimizer)
            accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(optimizer.optimizer)
            return net, optimizer

        accelerator.prepare = prepared
        return accelerator

    def use(scaled: bool) -> None:
        monkeypatch.setattr(distributed, "build_accelerator", started if scaled else start)

    use(True)
    return use


def test_scaler_overflow_leaves_no_trace(here, ruin, watched, loss_scaler, tmp_path):
    """A fused optimizer's step is called all the same, and does nothing, so that nobody counting calls would see it."""
    ruin(1, 4)
    warm = ["optimizer.warmup_steps=6", "optimizer.lr=6"]
    here("train", *MLP, "-e", tmp_path / "run", *warm)
    assert watched["rates"] == [1, 1, 2, 3, 3, 4] and watched["images"] == [32, 64, 96, 128]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert [row["loss_scale"] for row in rows] == [8, 8, 8, 4, 4, 4]
    loss_scaler(False)  # the same steps left out without one: scales are powers of two, so that nothing is rounded
    ruin(1, 4)
    here("train", *MLP, "-e", tmp_path / "plain", *warm, "train.nonfinite_grad=skip")
    a, b = (load_file(locate.find(tmp_path / name)) for name in ("run", "plain"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_loss_scale_that_collapses_is_reported(error, ruin, loss_scaler, tmp_path):
    ruin()
    line = error("train", *MLP, "-e", tmp_path / "run")
    assert "the loss scale of fp16 has collapsed to 0.5 at step 5" in line


def test_fp16_needs_the_loss_scale_of_a_run(here, error, loss_scaler, tmp_path):
    """A run in another precision has none."""
    loss_scaler(False)
    here("train", *MLP, "-e", tmp_path / "run")
    loss_scaler(True)
    line = error("train", "-e", tmp_path / "run", "-r", "latest", "train.steps=8")
    assert "train.mixed_precision=fp16: " in line and "has no loss scale, as it was trained in another precision" in line
