"""The doctor: a healthy run passes, each sickness is named with its fix, nothing is left behind."""

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, succeed
from PIL import Image

from configs import loading
from flow.runtime.errors import cli_main
from flow.training.ema import Ema
from scripts.doctor import configuration, machine
from scripts.doctor.trial import Trial

HEALTHY = [
    "-c", "configs/digits.yaml", *TINY, "train.batch_size=32", "train.steps=1200", "train.checkpoint_every_steps=400",
    "preview.n_samples=4", "preview.sampling_steps=1",
]  # fmt: skip


def patient(*overrides: str, device: str = "cpu", processes: int = 1, **given) -> SimpleNamespace:
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=processes, mixed_precision="no")
    cfg = loading.load(None, list(overrides))
    return SimpleNamespace(**({"cfg": cfg, "accelerator": accelerator, "data": None, "trial": None, "lines": []} | given))


def results_of(check, *overrides: str, **given) -> list[tuple[str, str]]:
    return list(check(patient(*overrides, **given)))


def test_a_healthy_run_passes_and_leaves_nothing(here, tmp_path):
    said = here("doctor", *HEALTHY, "-e", tmp_path / "run")
    lines = said.splitlines()
    assert lines[-1].startswith("0 failed, 0 warned") and "; start the training with: " in lines[-1], said
    assert any("images/s; the first took" in line for line in lines) and any("until 20" in line for line in lines)
    assert any("disk: 2 checkpoint(s) and 3 snapshot(s) need 0.0" in line for line in lines)
    assert not list(tmp_path.iterdir())


EVALUATED = ["evaluate.every_steps=400", "evaluate.feature_extractor=digits", "evaluate.n_samples=80"]
EVALUATED += ["evaluate.sampling_method=euler", "evaluate.sampling_steps=2"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "of 80 images, euler, 2 steps, every 400 steps"),
        ([], "if it starts now; 3 of the evaluation come on top of that"),
        (["evaluate.metrics=[fis]"], "fail  evaluation: evaluate.metrics=['fis']: unknown metric 'fis'; choose from fid, "),
        (["evaluate.keep_best=fidd"], "evaluate.keep_best=fidd: must be a distance or one of fid, precision, recall, "),
        (["evaluate.sampling_method=eulr"], "evaluate.sampling_method=eulr: there is no such solver. Did you mean 'euler'?"),
        (["evaluate.sampling_steps=0"], "evaluate.sampling_steps=0: must be at least 1"),
        (["evaluate.feature_extractor=cats"], "fail  evaluation: evaluate.feature_extractor=cats: unknown; choose one of"),
        (["evaluate.reference=nowhere"], "nowhere: there is no such folder"),
        (
            ["evaluate.loss_every_steps=400"],
            "evaluate.loss_every_steps=400: data.name=digits has no held-out part",
        ),
    ],
)
def test_section_evaluate(main_of, capsys, tmp_path, overrides, told):
    with suppress(SystemExit):
        cli_main(main_of("doctor", *HEALTHY, *EVALUATED, "-e", tmp_path / "run", *overrides))
    captured = capsys.readouterr()
    assert told in captured.out + captured.err, captured.out + captured.err
    assert not list(tmp_path.iterdir())


def test_every_obstacle_is_reported(main_of, capsys, tmp_path):
    """All that keeps a run from starting is reported in one go."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as left:
        cli_main(main_of(
            "doctor", *HEALTHY, "-e", run, "train.batch_size=33", "train.gradient_accumulation_steps=2",
            "optimizer.warmup_steps=1200",
            "model.args.attention_resolutions=[5]", "ema.warmup_ratio=0", "ema.half_life_images=1000000",
        ))  # fmt: skip
    said = capsys.readouterr().out
    assert left.value.code == 2
    for message in (
        "fail  folder: -e ", "fail  network: model: attention_resolutions=[5]: no level has 5 pixels",
        "fail  batch: train.batch_size=33: must be divisible by 1 process(es) x train.gradient_accumulation_steps=2; 32 would",
        "warn  learning rate: optimizer.warmup_steps=1200 of train.steps=1200", "warn  ema: half-life 1,000,000",
        "warn  trial: skipped", "3 failed",
    ):  # fmt: skip
        assert message in said, said


def test_a_trial_that_fails_is_a_line(main_of, capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli_main(main_of("doctor", *HEALTHY, "-e", tmp_path / "run", "optimizer.lr=1e30", "optimizer.clip_grad_norm=0",
                            "optimizer.warmup_steps=0"))  # fmt: skip
    assert "fail  trial: the loss or gradient of step" in capsys.readouterr().out


def test_weights_to_start_from_are_loaded(main_of, capsys, tmp_path):
    """As the training will: a wrong place is named before it."""
    with pytest.raises(SystemExit):
        cli_main(main_of("doctor", *HEALTHY, "-e", tmp_path / "run", f"train.init_from={tmp_path / 'none'}"))
    said = capsys.readouterr().out
    assert f"fail  trial: train.init_from={tmp_path / 'none'}: " in said, said


@pytest.mark.parametrize(("half_life", "ratio"), [(1000, 0), (1000, 0.05), (400, 0.3), (10**6, 0.5), (64, 1.0)])
def test_share_of_the_start_in_the_average(half_life, ratio):
    """The reported share of the start is what the average holds."""
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(net.weight)
    ema = Ema(net, [half_life], ratio)
    torch.nn.init.zeros_(net.weight)
    for step in range(1, 41):
        ema.update(32, 32 * step)
    left = ema.state_dict(0)["weight"].item()
    assert configuration.start_left(40, 32, half_life, ratio) == pytest.approx(left, rel=1e-3, abs=1e-9)


def test_half_life_that_is_not_reached():
    run = ["train.steps=100", "train.batch_size=10", "ema.warmup_ratio=0.05"]
    ((_, text),) = results_of(configuration.ema, *run, "ema.half_life_images=1000")
    assert text.startswith("half-life 50 of 1,000 images (ema.warmup_ratio allows no more; ema.half_life_images=1000 is not")
    ((_, text),) = results_of(configuration.ema, *run, "ema.half_life_images=40")
    assert text.startswith("half-life 40 of 1,000 images, ")


@pytest.mark.parametrize(
    ("gpus", "processes", "level", "told"),
    [(8, 1, "warn", "but 8 GPUs; start with accelerate-launch --multi_gpu --num_processes 8"),
     (1, 2, "fail", "only 1 GPU(s)"), (2, 2, "pass", "2 process(es) on cuda")],
)  # fmt: skip
def test_processes_against_gpus(monkeypatch, gpus, processes, level, told):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    (first, text), (second, _) = results_of(machine.devices, device="cuda", processes=processes)
    assert first == level and told in text
    assert second == "warn"  # fp32 where bf16 is to be had


def test_memory_and_disk(tmp_path):
    def trial(checkpoint: int, peak: int) -> dict:
        return {"trial": Trial(1.0, 1.0, 1.0, 1.0, checkpoint, checkpoint // 4, peak), "run_dir": tmp_path / "a" / "run"}

    def examined(check, **given) -> list[tuple[str, str]]:
        sick = patient("train.checkpoint_every_steps=1000")
        vars(sick).update(given)
        return list(check(sick))

    assert [level for level, _ in examined(machine.disk, **trial(10**6, 0))] == ["pass"]
    ((level, text),) = examined(machine.disk, **trial(10**15, 0))
    assert level == "fail" and "2 checkpoint(s) and 100 snapshot(s)" in text and "train.keep_checkpoints=1" in text
    assert [level for level, _ in examined(machine.memory, **trial(1, 10**6))] == ["pass"]
    ((level, text),) = examined(machine.memory, **trial(1, 10**15))
    assert level == "warn" and "double train.gradient_accumulation_steps" in text


@pytest.mark.parametrize(
    ("own", "evaluation", "count"),
    [(400, 0, 3), (0, 0, 1), (500, 0, 3), (0, 300, 4), (400, 300, 6), (400, 200, 6), (2000, 5000, 1)],
)
def test_checkpoints_of_evaluations_are_counted(tmp_path, own, evaluation, count):
    """Each once, with the last one."""
    intervals = [f"train.checkpoint_every_steps={own}", f"evaluate.every_steps={evaluation}", "train.steps=1200"]
    assert configuration.num_checkpoints(loading.load(None, intervals)) == count
    trial = Trial(1.0, 1.0, 1.0, 1.0, 10**6, 10**5, 0)
    ((_, text),) = results_of(machine.disk, *intervals, "train.keep_snapshots=0", trial=trial, run_dir=tmp_path)
    assert f" and {count} snapshot(s) need" in text


@pytest.mark.parametrize(("every", "level"), [(30, "pass"), (300, "warn"), (0, "warn")])
def test_stored_averages_are_counted(tmp_path, every, level):
    averages = ["ema.power_widths=[0.05, 0.1]", f"ema.power_every_steps={every}", "train.steps=1200", "train.batch_size=32"]
    result, text = results_of(configuration.ema, *averages, "ema.half_life_images=3000")[-1]
    assert result == level and ("set ema.power_every_steps=30" in text) == (level == "warn")
    trial = Trial(1.0, 1.0, 1.0, 1.0, 10**6, 10**5, 0)
    ((_, text),) = results_of(machine.disk, *averages, trial=trial, run_dir=tmp_path)
    assert f"and {2 * (1200 // every if every else 1)} stored averages need" in text


@pytest.mark.parametrize(
    ("overrides", "level", "told"),
    [
        (["flow.time_sampler=uniform"], "pass", "2.00% of the steps"),
        (["flow.time_sampler=logit_normal", "flow.time_sampler_args.mean=-0.4"], "warn", "0.03% of the steps"),
        (["flow.time_sampler=logit_normal", "flow.time_sampler_args={mean: 2.0, std: 2.0}"], "pass", "1.65% of the steps"),
    ],
)
def test_long_steps_of_a_flow_map(overrides, level, told):
    (line,) = results_of(configuration.long_steps, "loss.name=mean_flow", *overrides)
    assert line[0] == level and line[1].startswith(told), line
    assert not results_of(configuration.long_steps, *overrides)


def test_files_of_a_folder_are_opened(main_of, capsys, tmp_path):
    for k in range(3):
        Image.new("L", (8, 8), k).save(tmp_path / f"{k}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    with pytest.raises(SystemExit):
        cli_main(main_of("doctor", *HEALTHY, "-e", tmp_path / "run", "data.name=folder",
                            f"data.args={{path: {tmp_path}, size: 8, channels: 1}}"))  # fmt: skip
    said = capsys.readouterr().out
    assert "fail  data: " in said and "1.png: not a readable image" in said


def test_versions_and_feature_weights(tmp_path, monkeypatch):
    file = tmp_path / "requirements.txt"
    file.write_text("torch>=99\nno-such-package>=1.0\nnumpy>=1.0\n# for the tests\nalso-absent>=1\n")
    level, text = machine.versions(file)
    assert level == "fail" and "torch is" in text and "no-such-package is not installed" in text and "also-absent" not in text
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    level, text = machine.feature_weights((3, 32, 32))
    assert level == "warn" and "--feature_weights" in text
    weights = Path(tmp_path) / "checkpoints" / machine.INCEPTION_FILE
    weights.parent.mkdir()
    weights.touch()
    assert machine.feature_weights((3, 32, 32))[0] == "pass"
    assert machine.feature_weights((1, 28, 28)) == (
        "pass", "evaluate with --feature_extractor mnist, whose weights are part of the repository",
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_are_examined_together(tmp_path):
    said = succeed("-m", "scripts.doctor", *HEALTHY, "-e", tmp_path / "run", processes=2).stdout
    assert "pass  devices: 2 process(es) on cpu" in said and "32 images = 2 process(es) x 1 micro-batch(es) x 16" in said
    assert "images/s; the first took" in said and said.count("passed") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-c", "configs/photos64.yaml", "data.args.path=no/such"], "unet, 4.81 M parameters (for data of shape 3x64x64)"),
        (
            ["-c", "configs/mnist_latent_dit.yaml", "data.args.path=no/such"],
            "dit, about 1.85 M parameters (for data of shape 4x32x32)",
        ),
        (["-c", "configs/mnist_reflow.yaml", "data.args.path=no/such"], "mini_unet, about 1.19 M parameters"),
    ],
)
def test_network_is_checked_without_data(main_of, capsys, tmp_path, arguments, told):
    """The network is reported even where the data are missing."""
    with pytest.raises(SystemExit):
        cli_main(main_of("doctor", *arguments, "-e", tmp_path / "run", "train.mixed_precision=no"))
    said = capsys.readouterr().out
    assert "fail  data: " in said and told in said


def test_wrong_network_is_named_without_data(main_of, capsys, tmp_path):
    """A network that cannot be built is named even without the data."""
    with pytest.raises(SystemExit):
        cli_main(main_of("doctor", "-c", "configs/photos64.yaml", "-e", tmp_path / "run", "data.args.path=no/such",
                            "model.args.attention_resolutions=[5]"))  # fmt: skip
    assert "fail  network: model: attention_resolutions=[5]: no level has 5 pixels" in capsys.readouterr().out
