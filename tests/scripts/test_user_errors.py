"""Bad input: one line that names the key, the value and what would be right, exit code 2, nothing written or lost."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ENTRY_SCRIPTS, TINY_TRAIN, contents, fail
from PIL import Image
from safetensors.torch import save_file

from configs import loading
from configs.errors import UserError
from flow.sampling import locate, snapshot
from flow.training import checkpoint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exp_dirr=x"], "unknown flag '--exp_dirr'. Did you mean '--exp_dir'?"),
        (["--exp_dirr", "x"], "unknown flag '--exp_dirr'. Did you mean '--exp_dir'?"),
        (["train.stesp=3"], "train.stesp=3: unknown key 'train.stesp'. Did you mean 'train.steps'?"),
        (["--train.stesp", "3"], "unknown key 'train.stesp'. Did you mean 'train.steps'?"),
        (["steps=3"], "unknown key 'steps'. Did you mean 'train.steps'?"),
        (["train=3"], "'train' is a section"),
        (["train.steps=many"], "train.steps=many: Value 'many'"),
        (["train.steps=1e5"], "write 100_000"),
        (["train.steps="], "train.steps=: Incompatible value 'None'"),
        (["train.steps=0"], "train.steps=0: must be at least 1"),
        (["seed=9223372036854775808"], "seed=9223372036854775808: must be less than 2^63"),
        ([f"optimizer.lr=1{400 * '0'}"], "int too large to convert to float"),
        (["seed=a\nb\x1b[2J"], "seed=a\\nb\\x1b[2J: the value"),
        (["data.args=[1]"], "data.args=[1]: must be a dictionary; write {name: value}"),
        (["train.timeout_minutes=0"], "train.timeout_minutes=0.0: must be more than 0 and at most 43200"),
        (["train.nonfinite_grad=go"], "train.nonfinite_grad=go: must be one of raise, skip"),
        (["preview.sampling_steps=0"], "preview.sampling_steps=0: must be at least 1"),
        (["optimizer.lr=nan"], "optimizer.lr=nan: must be greater than 0"),
        (["ema.half_life_images=abc"], "ema.half_life_images=abc: must be a number of images"),
        (["optimizer.schedule=step"], "optimizer.schedule=step: must be one of constant, linear, cosine"),
        (
            ["train.batch_size=33", "train.gradient_accumulation_steps=2"],
            "train.batch_size=33: must be divisible by 1 process(es) x train.gradient_accumulation_steps=2",
        ),
        (["train.mixed_precision=fp16"], "train.mixed_precision=fp16: needs a GPU"),
        (["train.log_with=[nothing]"], "train.log_with=['nothing']"),
        (["preview.sampling_method=foo"], "preview: unknown solver 'foo'; choose from euler"),
        (["flow.time_sampler=foo"], "flow.time_sampler: unknown time sampler 'foo'; choose from uniform"),
        (["data.name=mnst"], "data: unknown data set 'mnst'; choose from digits"),
        (["data.name=toys", "data.args={name: moon}"], "data: unknown 2-D data set 'moon'; choose from"),
        (["model.name=unett"], "model: unknown network 'unett'; choose from unet"),
        (["model.args.attention_resolutions=[5]"], "no level has 5 pixels; the levels of 8x8 images have 8, 4"),
        (["model.args.widht=3"], "unet has no argument 'widht'; it takes width"),
        (["model.args={width: abc}"], "width='abc': must be a whole number"),
        (["model.args.num_classes=3"], "model.args.num_classes=3: the data set has 10 classes; use 10"),
        (["loss.name=distillation"], "loss.name=distillation: needs pairs of a flow, made by make_pairs"),
        (["loss.args.distance_args=0.01"], "distance_args=0.01: must be arguments of the distance"),
        ([f"loss.args.weight_power=1{400 * '0'}"], "must be a finite number"),
        (
            ["loss.name=mean_flow", "loss.args.guidance_mix=0.5", "model.args={two_times: true, num_classes: null}"],
            "loss.args.guidance_mix=0.5: needs a network with labels (model.args.num_classes) or prompts",
        ),
        (["train.init_from=nowhere"], "train.init_from=nowhere: there is no such file or folder"),
        (["-c", "configs/digts.yaml"], "-c configs/digts.yaml: there is no such file. Did you mean 'configs/digits.yaml'?"),
        (["-r", "latest"], "there is no run in"),
        (["-r", "nowhere"], "-r nowhere: there is no such folder"),
        (["data.autoencoder=x"], "data.autoencoder=x: data.name=digits holds no latents; encode the images"),
        (["train.log_with=wandb"], "train.log_with=wandb: must be a list; write [wandb]"),
        (["train.log_with=none"], "train.log_with=none: must be a list; write []"),
        (["optimizer.betas=(0.9,0.95)"], "optimizer.betas=(0.9,0.95): must be a list; write [0.9, 0.95]"),
        (
            ["data.name=folder", "data.args.path=2024"],
            """data: path=2024: must be text; write path='"2024"' with both quotes""",
        ),
        (["data.name=folder", "data.args.path=no"], """data: path=False: must be text; write path='"..."' with both quotes"""),
        (["data.name=packed", "data.args={path: x, held_out: [y]}"], "data: held_out=['y']: must be text"),
        (["train.lr=0.3"], "unknown key 'train.lr'. Did you mean 'optimizer.lr'?"),
        (["-e", "README.md"], "-e README.md: is a file; name a folder"),
    ],
)
def test_training_that_cannot_start(arguments, message, error, tmp_path):
    run = tmp_path / "run"
    assert message in error("train", *TINY_TRAIN, "-e", run, *arguments)
    assert not run.exists()


def test_training_of_nothing(error, tmp_path):
    assert "-c: a configuration is needed, e.g. -c configs/digits.yaml" in error("train", "-e", tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {stesp: 3}", "unknown key 'train.stesp'. Did you mean 'train.steps'?"),
        ("train: 3", "'train' is a section"),
        ("- a", "holds a list"),
        ("optimizer: {betas: 0.9}", "bad.yaml: optimizer.betas: must be a list; write [0.9]"),
        ("model: {args: [1]}", "bad.yaml: model.args=[1]: must be a dictionary; write {name: value}"),
        ("a: [", "not a YAML file"),
    ],
)
def test_configuration_files(text, message, error, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    assert message in error("train", "-c", tmp_path / "bad.yaml", "-e", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_image_folders(here, error, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    plain = [*TINY_TRAIN, "data.name=folder", "model.args.num_classes=null", "data.num_workers=0", "-e", tmp_path / "run"]
    assert "holds no image" in error("train", *plain, f"data.args={{path: {folder}, size: 8, channels: 1}}")
    for k in range(80):
        Image.new("L", (9, 9), k).save(folder / f"{k:02d}.png")
    (folder / "04.png").write_bytes((folder / "04.png").read_bytes()[:40])  # none of the 64 that are looked at first
    line = error("train", *plain, f"data.args={{path: {folder}, size: 8, channels: 1}}", "train.batch_size=79")
    assert "04.png: not a readable image" in line and "python -m scripts.pack_images --skip_damaged" in line
    (folder / "04.png").unlink()  # mended, the run goes on, though it had no checkpoint yet
    here("train", "-e", tmp_path / "run", "-r", "latest", "train.steps=1")
    plain[-1] = tmp_path / "new"
    assert "there is no such folder" in error("train", *plain, "data.args={path: nowhere}")
    assert "data: folder cannot be built from {}" in error("train", *plain, "data.args={}")


def test_runs_are_not_overwritten(error, tiny_run, tmp_path):
    """Runs are not overwritten, and resuming does not change their settings."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = contents(run)
    assert "exists already; resume with -r latest, or name" in error("train", *TINY_TRAIN, "-e", run)
    assert "exists already; name another" in error("train", *TINY_TRAIN, "-e", run / "checkpoints")
    assert "; its config.yaml is missing" in error("train", "-e", run / "checkpoints", "-r", "latest")
    assert "seed=5: the run in" in error("train", "-e", run, "-r", "latest", "seed=5")
    assert "model.args" in error("train", "-e", run, "-r", "latest", "model.args.width=32")
    assert "would overwrite step_00000004" in error("train", "-r", run / "checkpoints" / "step_00000002")
    assert "belongs to" in error("train", "-e", tmp_path / "other", "-r", run)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("key", "value", "before"), [("seed", 5, 0), ("train.batch_size", 16, 32), ("flow.prediction", "data", "velocity")]
)
def test_edited_config_yaml_cannot_change_a_run(error, tiny_run, tmp_path, key, value, before):
    """An edited config.yaml does not change what resuming cannot change."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    stored = loading.parse((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(loading.dump(loading.load(None, [f"{key}={value}"], base=stored)))
    edited = contents(run)
    line = error("train", "-e", run, "-r", "latest", "train.steps=6")
    assert f"{key}={value}: the checkpoint {run / 'checkpoints' / 'step_00000004'} was made with {before}" in line
    assert contents(run) == edited


def test_samples_are_not_overwritten(here, error, tiny_run, tmp_path):
    out = tmp_path / "out"
    ask = ["--weights", tiny_run, "--n_samples", "2", "--sampling_steps", "1", "--save_dir", out]
    here("sample", *ask)
    before = contents(out)
    assert "holds images of another run (seed 8888, now 1)" in error("sample", *ask, "--seed", "1")
    assert "holds images of another run (guidance_scale" in error("sample", *ask, "--guidance_scale", "2")
    assert contents(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert "was not written by sample.py" in error("sample", *ask[:-1], tmp_path / "mine")


@pytest.mark.parametrize("script", ["sample", "evaluate"])
def test_weights(script, error, tiny_run, tmp_path):
    more = ["--n_samples", "2"] + (
        ["--save_dir", tmp_path / "out"] if script == "sample" else ["--feature_extractor", "digits"]
    )
    whole = locate.find(tiny_run)
    broken, text, foreign = (tmp_path / f"{name}.safetensors" for name in ("broken", "text", "foreign"))
    broken.write_bytes(whole.read_bytes()[:5000])
    text.write_text("these are no weights")
    save_file({"a": torch.zeros(1)}, foreign)
    for path in (broken, text):
        assert f"--weights {path}: not a whole safetensors file" in error(script, "--weights", path, *more)
    assert "not a snapshot of this project" in error(script, "--weights", foreign, *more)
    assert "there is no such file or folder" in error(script, "--weights", tmp_path / "none", *more)
    assert "holds no snapshot" in error(script, "--weights", tmp_path, *more)
    line = error(script, "--weights", tiny_run, *more, "model.args.width=32")
    assert "do not fit the network (model.name, model.args)" in line
    assert "seed=5: is a key of trainings without effect here; sample.py and evaluate.py have --seed" in error(
        script, "--weights", tiny_run, *more, "seed=5"
    )
    line = error(script, "--weights", tiny_run, *more, "preview.guidance_scale=2")
    assert "preview.guidance_scale=2: is a key of trainings without effect here" in line and "have --guidance_scale" in line
    assert error(script, "--weights", tiny_run, *more, "ema.warmup_ratio=0").endswith("without effect here")
    line = error(script, "--weights", tiny_run, *more, "--labels", "3", "10")
    assert line == "error: --labels 10: is out of range; this network has 0 to 9"
    assert "must be a whole number of at least 1" in error(script, "--weights", tiny_run, *more, "--sampling_steps", "0")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_width_start_no_run(error, tiny_run, tmp_path):
    line = error("train", *TINY_TRAIN, "-e", tmp_path / "run", f"train.init_from={tiny_run}", "model.args.width=32")
    assert "do not fit the network (model.name, model.args)" in line and "model.args=" not in line
    assert line.endswith("; was trained with model.args.width=16, here it is 32")
    shapes = re.search(r" is \((\d[\d, ]*)\) in the file, \((\d[\d, ]*)\) in the network;", line)
    assert shapes and shapes[1] != shapes[2] and not (tmp_path / "run").exists()


def test_guidance_needs_a_network_with_labels(here, error, tmp_path):
    """Labels and guidance need a network with labels."""
    run = tmp_path / "run"
    here("train", *TINY_TRAIN, "-e", run, "model.args.num_classes=null", "train.steps=1")
    ask = ["--weights", run, "--n_samples", "2", "--save_dir", tmp_path / "out"]
    assert "was trained without labels" in error("sample", *ask, "--labels", "1")
    assert "needs a network with labels" in error("sample", *ask, "--guidance_scale", "2")


def test_evaluation(error, tiny_run, tmp_path):
    ask = ["--weights", tiny_run, "--n_samples", "4", f"data.root={tmp_path}"]
    digits = [*ask, "--feature_extractor", "digits"]
    assert "--feature_extractor foo: unknown; choose one of" in error("evaluate", *ask, "--feature_extractor", "foo")
    assert "has no such layer; choose one of 64, logits" in error("evaluate", *digits, "--feature_layer", "9")
    assert "takes 28x28 images, not 8x8" in error("evaluate", *ask, "--feature_extractor", "mnist")
    assert "--weights: takes one value, 'b' is a second one" in error("evaluate", "--weights", "a", "b")
    assert "unknown argument 'b'" in error("evaluate", "--n_samples", "4", "--weights=a", "b")
    assert "give either --weights PATH or --samples DIR" in error("evaluate", "--n_samples", "4")
    assert "--reference is needed" in error("evaluate", "--samples", tmp_path)
    np.savez(tmp_path / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert "are not statistics of the 64 features" in error("evaluate", *digits, "--reference", tmp_path / "small.npz")


@pytest.mark.parametrize("script", ["train", *(pytest.param(name, marks=pytest.mark.slow) for name in ENTRY_SCRIPTS[1:])])
def test_exit_code_of_the_process(script):
    assert "unknown flag '--foo'" in fail(f"{script}.py", "--foo", "3")


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(kilobytes): the folder of a file system of that size, or a skip."""
    mounted = []

    def mount(kilobytes: int):
        disk = tmp_path / f"disk_{len(mounted)}"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk], capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", disk], check=True)


def test_full_disk_leaves_last_checkpoint(here, error, small_disk, tmp_path):
    """On a file system with room for two checkpoints and a half."""
    disk = small_disk(6500)
    many = [*TINY_TRAIN, "train.steps=8", "train.keep_checkpoints=0", "train.checkpoint_every_steps=1"]
    line = error("train", *many, "-e", disk / "run")
    assert "was not written" in line and "the latest checkpoint is" in line
    whole = checkpoint.list_checkpoints(disk / "run" / "checkpoints")
    assert whole and checkpoint.verify(whole[-1]) is None and str(whole[-1]) in line
    assert not list((disk / "run" / "checkpoints").glob(".tmp-*"))
    roomy = tmp_path / "roomy"
    shutil.copytree(disk / "run", roomy)
    here("train", "-e", roomy, "-r", "latest")


@pytest.mark.parametrize(
    ("name", "option"),
    [("metrics.jsonl", "train.log_every_steps=1"), ("samples/step_", "train.sample_every_steps=1 train.log_every_steps=2000")],
)
def test_full_disk_names_file_and_checkpoint(error, small_disk, tiny_run, name, option):
    """On a file system with room for the run and a little more."""
    sizes = {p.stat().st_ino: p.stat().st_size for p in tiny_run.rglob("*") if p.is_file()}  # a snapshot has two names
    run = small_disk(sum(4 * -(-size // 4096) for size in sizes.values()) + 20) / "run"
    subprocess.run(["cp", "-a", tiny_run, run], check=True)
    line = error("train", "-e", run, "-r", "latest", "train.steps=2000", "train.checkpoint_every_steps=0", *option.split())
    assert "No space left on device" in line and f"{run / name}" in line
    assert f"the latest checkpoint is {run / 'checkpoints' / 'step_00000004'}" in line
    rows = (run / "metrics.jsonl").read_text()
    assert rows.endswith("\n") and [json.loads(row)["step"] for row in rows.splitlines()][:2] == [2, 4]  # no half of a row


def test_full_disk_of_a_tracker_is_named(error, small_disk, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "tensorboard").symlink_to(small_disk(4))
    line = error("train", "-e", run, "-r", "latest", "train.steps=60", "train.log_with=[tensorboard]")
    assert f"{run / 'tensorboard'}" in line and "step_00000004" in line


def test_full_disk_while_making_data_names_the_file(error, small_disk, tiny_run, vae_folder):
    pairs = ["--n_pairs", "1000", "--shard_pairs", "100", "--sampling_steps", "1"]
    out = small_disk(60) / "out"
    line = error("make_pairs", "--weights", tiny_run, "--save_dir", out, *pairs)
    assert f"{out / 'generated_'}" in line and "No space left on device" in line
    out = small_disk(300) / "out"
    line = error("cache_latents", "--vae", vae_folder, "--save_dir", out, "data.name=digits")
    assert f"{out / 'latents_'}" in line and "No space left on device" in line
    assert not list(out.glob(".tmp-*"))


def test_the_precision_no_is_a_word(tmp_path):
    """YAML reads an unquoted `no` as false."""
    (tmp_path / "c.yaml").write_text("train: {mixed_precision: no}\n")
    assert loading.load(tmp_path / "c.yaml").train.mixed_precision == "no"
    assert loading.load(None, ["train.mixed_precision=bf16", "train.mixed_precision=no"]).train.mixed_precision == "no"
    assert loading.parse(loading.dump(loading.load())).train.mixed_precision == "no"
    with pytest.raises(UserError, match="mixed_precision=fp8: must be one of auto, no, fp16, bf16"):
        loading.load(None, ["train.mixed_precision=fp8"])


def test_velocity_without_a_solution(error, points_flow, tmp_path):
    """Which a solver with tolerances finds out."""
    snap = snapshot.load(points_flow("mixture", 1))
    steep = tmp_path / "steep.safetensors"
    weights = {name: 1e20 * value for name, value in snap.weights.items()}
    snapshot.save(steep, weights, snap.config, snap.image_shape, 10, 1000)
    flags = ["--weights", steep, "--out", tmp_path / "out", "--frames", "2", "--sampling_method", "dopri5"]
    for script in ("compare", "animate"):
        assert "sampling_method=dopri5: dopri5: the velocity is not finite" in error(script, *flags)
    assert "sampling_method=dopri5: " in error("animate", *flags, "--trajectory_grids")
    del flags[4:]  # this figure has no frames, and a solver of its own
    assert "--figures likelihood: dopri5: the velocity is not finite" in error("animate", *flags, "--figures", "likelihood")
