"""Sampling: an image is a function of the weights, the settings and its index, and nothing is lost or overwritten."""

import json
import math
import os
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import contents, run_here, succeed
from PIL import Image

from flow.path import PATHS
from flow.sampling import snapshot
from flow.sampling.conditions import labels_for
from flow.sampling.generate import NFECounter, SampleBatch, generate, index_batches
from flow.sampling.settings import SamplerSettings, build_time_grid
from flow.solvers import time_grids

ARGUMENTS = ["--n_samples", "25", "--bspp", "4", "--sampling_steps", "3", "--sampling_method", "heun", "--guidance_scale", "2"]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, tiny_run) -> Path:
    out = tmp_path_factory.mktemp("samples") / "one"
    printed = run_here("sample", "--weights", tiny_run, "--save_dir", out, "--npz", *ARGUMENTS)
    assert "NFE 5 (10 network calls)" in printed
    return out


@pytest.fixture(scope="module")
def model(tiny_run):
    return snapshot.load(tiny_run).model(decode=False)


def images_of(model, indices: range, batch_size: int, settings: SamplerSettings) -> torch.Tensor:
    accelerator = Accelerator(cpu=True)
    return torch.cat([g.images for g in generate(accelerator, model, index_batches(indices, batch_size), settings)])


def test_folder_is_whole(sampled):
    names = sorted(p.name for p in (sampled / "images").iterdir())
    assert names == [f"{k:06d}.png" for k in range(25)]
    with np.load(sampled / "samples.npz") as file:
        assert file["arr_0"].shape == (25, 8, 8, 1) and file["arr_0"].dtype == np.uint8
        assert file["labels"].tolist() == [k % 10 for k in range(25)]
        for k in (0, 24):
            assert np.array_equal(file["arr_0"][k, :, :, 0], np.asarray(Image.open(sampled / "images" / names[k])))
    assert Image.open(sampled / "grid.png").size[0] >= 90


def test_two_processes_write_the_same_bytes(group, tmp_path, tiny_run, sampled):
    group("sample", "--weights", tiny_run, "--save_dir", tmp_path / "two", "--npz", *ARGUMENTS)
    assert contents(tmp_path / "two") == contents(sampled)


def test_a_run_that_was_cut_off_goes_on_where_it_was(here, tmp_path, tiny_run, sampled):
    """Whole batches stay untouched; a missing image, damaged ones (a crash of the machine) and one of another size are made
    again."""
    out = tmp_path / "cut"
    shutil.copytree(sampled, out)
    (out / "samples.npz").unlink()
    (out / "images" / "000009.png").unlink()
    (out / "images" / "000024.png").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(out / "images" / "000020.png")
    (out / "images" / "000016.png").write_bytes((sampled / "images" / "000016.png").read_bytes()[:60])
    (out / "images" / ".tmp-1-000010.png").write_bytes(b"half")
    os.utime(out / "images" / "000000.png", (1, 1))
    here("sample", "--weights", tiny_run, "--save_dir", out, "--npz", *ARGUMENTS)
    assert contents(out) == contents(sampled)
    assert (out / "images" / "000000.png").stat().st_mtime == 1
    again = here("sample", "--weights", tiny_run, "--save_dir", out, *ARGUMENTS)
    assert f"note: {out / 'samples.npz'} is of an earlier call" in again


def test_kill_before_first_file_leaves_usable_folder(tmp_path, tiny_run, here):
    """A kill before the first file leaves a folder that can be used."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".tmp-1-sampling.json").write_text("{")
    here("sample", "--weights", tiny_run, "--save_dir", out, "--n_samples", 1, "--sampling_steps", 1)
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "images", "sampling.json"]


def test_image_depends_on_its_index_alone(model):
    """Batch size and the images around it change nothing but the rounding of the kernels."""
    settings = SamplerSettings("midpoint", 4, seed=3)
    alone = images_of(model, range(17, 18), 1, settings).int()
    among = images_of(model, range(20), 7, settings)[17:18].int()
    assert (alone - among).abs().max() <= 1
    other = images_of(model, range(17, 18), 1, SamplerSettings("midpoint", 4, seed=4)).int()
    assert (alone - other).abs().max() > 1


def test_labels_follow_index(model):
    """Labels follow the index, and guidance changes images."""
    assert labels_for(range(8, 13), SamplerSettings(), 10).tolist() == [8, 9, 0, 1, 2]
    assert labels_for(range(3), SamplerSettings(labels=(4, 7)), 10).tolist() == [4, 7, 4]
    assert labels_for(range(3), SamplerSettings(), None) is None
    plain, guided, unconditional = (images_of(model, range(10), 10, SamplerSettings("euler", 2, w)) for w in (1.0, 3.0, 0.0))
    assert not torch.equal(plain, guided)
    assert not torch.equal(plain, unconditional)
    # without labels in the picture, the label of an image no longer matters
    sevens = images_of(model, range(10), 10, SamplerSettings("euler", 2, 0.0, labels=(7,)))
    assert torch.equal(unconditional, sevens)


def test_batches_are_cut_by_index():
    assert index_batches(range(10, 17), 3) == [range(10, 13), range(13, 16), range(16, 17)]


def test_sampling_json_records_what_decides_an_image(sampled, tiny_run):
    snap = snapshot.load(tiny_run)
    expected = {
        "weights_sha256": snap.sha256, **asdict(SamplerSettings("heun", 3, 2.0, seed=8888)), "num_classes": 10,
        "mixed_precision": "no", "image_shape": [1, 8, 8],
        "flow": {"path": "linear", "prediction": "velocity", "source": {"name": "gaussian", "args": {}}},
        "model": {"name": "unet", "args": snap.config.model.args}, "class_names": snap.class_names,
    }  # fmt: skip
    assert json.loads((sampled / "sampling.json").read_text()) == json.loads(json.dumps(expected))


def test_nfe_buys_as_many_steps_as_it_pays(here, tmp_path, tiny_run):
    """Two evaluations a step of heun but the last: five steps take 9, six would take 11."""
    few = ["--n_samples", 1, "--sampling_method", "heun", "--nfe", 10]
    assert "NFE 9 (" in here("sample", "--weights", tiny_run, "--save_dir", tmp_path / "out", *few)


@pytest.mark.parametrize("script", ["sample", "evaluate"])
def test_mistakes_about_solvers(error, tmp_path, tiny_run, script):
    flag = "--sampling_method" if script == "sample" else "--methods"
    more = (
        ["--save_dir", tmp_path / "out"] if script == "sample" else ["--feature_extractor", "digits", "--out", tmp_path / "out"]
    )
    command = [script, "--weights", tiny_run, "--n_samples", "4", *more]
    assert "'foo' (choose from " in error(*command, flag, "foo")
    assert "'foo' (choose from " in error(*command, "--time_grid", "foo")
    assert "--rtol=0.0: must be greater than 0 and less than 1" in error(*command, flag, "dopri5", "--rtol", "0")
    assert "--nfe: NFE 2: rk4 needs at least 3" in error(*command, flag, "rk4", "--nfe", "2")
    assert "dopri5 chooses its own number of evaluations" in error(*command, flag, "dopri5", "--nfe", "20")
    assert "not allowed with argument" in error(*command, "--nfe", "2", "--sampling_steps", "2")
    assert "--sde_noise_scale=-1.0: must be 0 or more" in error(*command, flag, "euler_maruyama", "--sde_noise_scale", "-1")
    assert "at most 100" in error(*command, flag, "euler_maruyama", "--sde_noise_scale", "1e200")
    assert "--time_grid edm: dopri5 chooses its own times" in error(*command, flag, "dopri5", "--time_grid", "edm")
    line = error(*command, flag, "dopri5", "--sde_noise_scale", "1")
    assert "--sde_noise_scale: dopri5 has no such option; it is for euler_maruyama, stochastic_heun" in line
    assert "none is stored for euler with 100 steps" in error(*command, "--time_grid", "optimized")
    assert not (tmp_path / "out").exists()


def test_stochastic_images_depend_on_seed_and_index(model):
    """Whatever the batches: the increments belong to the image and the step."""
    settings = SamplerSettings("stochastic_heun", 5, options=(("noise_scale", 0.7),))
    whole = images_of(model, range(10), 10, settings)
    assert (whole.int() - images_of(model, range(10), 3, settings).int()).abs().max() <= 1
    assert not torch.equal(whole, images_of(model, range(10), 10, SamplerSettings("heun", 5)))
    still = SamplerSettings("stochastic_heun", 5, options=(("noise_scale", 0.0),))
    assert torch.equal(images_of(model, range(10), 10, still), images_of(model, range(10), 10, SamplerSettings("heun", 5)))


def two_images(here, out: Path, weights: Path, *flags: str) -> dict[str, bytes]:
    """The files of two images of eight steps."""
    here("sample", "--weights", weights, "--save_dir", out, "--n_samples", "2", "--sampling_steps", "8", *flags)
    return contents(out / "images")


def test_ancestral_with_eta_0_is_ddim(here, tmp_path, tiny_run):
    flags = {
        "ddim": ["--sampling_method", "ddim"],
        "still": ["--sampling_method", "ancestral", "--eta", "0"],
        "noisy": ["--sampling_method", "ancestral"],
    }
    images = {name: two_images(here, tmp_path / name, tiny_run, *given) for name, given in flags.items()}
    assert len(images["ddim"]) == 2 and images["still"] == images["ddim"] != images["noisy"]


def test_diffusion_is_a_coefficient_of_the_sde(here, tmp_path, tiny_run):
    """sigma where nothing is given. With fewer steps the limit on the noise of a step would hide the difference."""
    flags = {"default": [], "sigma": ["--diffusion", "sigma"], "constant": ["--diffusion", "constant"]}
    method = ["--sampling_method", "euler_maruyama"]
    images = {name: two_images(here, tmp_path / name, tiny_run, *method, *given) for name, given in flags.items()}
    assert len(images["sigma"]) == 2 and images["default"] == images["sigma"] != images["constant"]


@pytest.mark.slow
def test_adaptive_cost_counts_all_batches(tmp_path, tiny_run, error):
    """Their step sizes are those of a batch: the cost is the mean over images, for any number of processes."""
    sample = ["--weights", tiny_run, "--n_samples", "7", "--sampling_method", "bosh3", "--rtol", "0.1", "--atol", "0.1"]
    told = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        result = succeed("sample.py", *sample, "--bspp", "2", "--save_dir", out, processes=processes)
        told.append(re.search(r"NFE ([\d.]+)", result.stdout).group(1))
    assert told[0] == told[1] and contents(tmp_path / "1") == contents(tmp_path / "2")
    assert "(bspp 2, now 3)" in error("sample", *sample, "--bspp", "3", "--save_dir", tmp_path / "1")


def test_the_cost_of_batches_is_their_mean():
    cost = NFECounter()
    for indices, nfe in ((range(3), 10), (range(3, 4), 14)):
        cost.add(SampleBatch(indices, torch.zeros(1), None, nfe, 2 * nfe))
    assert cost.mean(Accelerator(cpu=True)) == (11, 22)
    cost.add(SampleBatch(range(4, 5), torch.zeros(1), None, 15, 15))
    assert cost.mean(Accelerator(cpu=True)) == (11.8, 20.6)


def test_the_edm_grid_is_one_of_noise_ratios():
    settings = SamplerSettings(steps=8, time_grid="edm")
    for path in ("vp", "linear"):
        assert build_time_grid(settings, PATHS[path]()) == time_grids.edm(8)


def test_numbers_that_are_not_finite_are_refused(model):
    """They would be black images."""

    class Endless(torch.nn.Module):
        num_classes = max_prompt_bytes = null = None
        two_times = False

        def forward(self, x, t, y=None, t_next=None):
            return x * torch.where(x.flatten(1)[:, :1] > 0, math.inf, 1.0).view(-1, 1, 1, 1)

    endless = replace(model, net=Endless())
    with pytest.raises(ValueError, match=r"image \d+: its numbers are not finite; a smaller guidance_scale"):
        images_of(endless, range(10), 10, SamplerSettings("euler", 2))


@pytest.mark.parametrize("method", ["explicit_adams", "dopri5"])
def test_even_steps_are_even_on_every_path(method):
    """Where a method steps evenly in the solver's time, the grid has those times: pairs store states at them."""
    for path in PATHS.values():
        assert build_time_grid(SamplerSettings(method, 4), path()) == [0, 0.25, 0.5, 0.75, 1]
