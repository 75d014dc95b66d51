"""Flow maps by the commands: training, resuming, paths of a teacher, guidance inside, what is refused."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, TINY_TRAIN, run_here, succeed
from safetensors.torch import load_file

import datasets
from flow.sampling import locate, snapshot
from flow.sampling.generate import sample_batch
from flow.sampling.sampler import Sampler
from flow.sampling.settings import SamplerSettings
from flow.training.logging import read_metrics

TWO_TIMES = ["model.args.two_times=true", "model.args.time_frequency=30"]
MEAN_FLOW = [*TINY_TRAIN, *TWO_TIMES, "loss.name=mean_flow"]
ALPHA_FLOW = [*TINY_TRAIN, *TWO_TIMES, "loss.name=alpha_flow"]
PATHS = ["--n_pairs", "40", "--shard_pairs", "20", "--bspp", "10", "--sampling_steps", "6", "--seed", "4"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(locate.find(run))


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def paths_printed(tmp_path_factory, tiny_run) -> tuple[Path, str]:
    """The folder of paths, and the command that trains on them."""
    out = tmp_path_factory.mktemp("paths") / "paths"
    printed = run_here("make_pairs", "--weights", tiny_run, "--save_dir", out, *PATHS, "--keep_states", "2")
    (command,) = re.findall(r"train on them with: (.+)", printed)
    return out, command


@pytest.fixture(scope="module")
def paths(paths_printed) -> Path:
    return paths_printed[0]


@pytest.fixture(scope="module")
def alpha_flow(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("alpha_flow") / "run"
    run_here("train", *ALPHA_FLOW, "-e", run)
    return run


@pytest.mark.parametrize("method", [MEAN_FLOW, ALPHA_FLOW], ids=["mean_flow", "alpha_flow"])
def test_resumes_to_the_same_bits(here, tmp_path, method):
    """With dropout, guidance in the target, and a kill after the second of four steps."""
    arguments = [*method, "model.args.dropout=0.2", "loss.args.guidance_scale=2", "loss.args.guidance_mix=0.5"]
    here("train", *arguments, "-e", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "halves", ignore=shutil.ignore_patterns("step_00000004*"))
    assert "resuming from step 2" in here("train", "-e", tmp_path / "halves", "-r", "latest")
    assert same(tmp_path / "whole", tmp_path / "halves")


@pytest.mark.slow
@pytest.mark.parametrize("method", [MEAN_FLOW, ALPHA_FLOW], ids=["mean_flow", "alpha_flow"])
def test_two_processes_equal_one(tmp_path, method):
    steps = ["train.steps=40", "train.batch_size=32", "train.checkpoint_every_steps=40"]
    runs = [tmp_path / "one", tmp_path / "two"]
    for run, processes in zip(runs, (1, 2), strict=True):
        succeed("train.py", *method, *steps, "-e", run, processes=processes)
    one, two = map(weights, runs)
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)


def test_paths_of_a_teacher(paths, tiny_run):
    """The states are those of the solver, and lead from the noise of the pair to its image."""
    data = datasets.build("pairs", None, {"path": str(paths)})
    assert data.state_times == pytest.approx((1 / 3, 2 / 3)) and data.states.shape == (40, 2, 1, 8, 8)
    states: list[torch.Tensor] = []
    settings = SamplerSettings("heun", 6, 1.0, seed=4)
    model = snapshot.load(tiny_run).model(decode=False)
    with torch.inference_mode():
        x0 = model.draw_x0("pairs", 4, range(10))
        sample_batch(model, range(10), settings, torch.device("cpu"), x0=x0, callback=states.append)
    assert torch.equal(torch.stack([states[1], states[3]], dim=1).half(), data.states[:10])
    assert torch.equal(states[-1].half(), data.images[:10])


def test_the_command_for_paths_resumes_exactly(here, tmp_path, paths_printed):
    """As make_pairs prints it, but for the size of the run: from the weights of the teacher; 2 + 2 steps are 4, to the bit."""
    folder, command = paths_printed
    script, *arguments = shlex.split(command)[1:]
    assert Path(script).name == "train.py" and arguments[:2] == ["-e", str(folder.with_name("paths_trajectory"))]
    here("train", *arguments, *TINY_RUN, "-e", tmp_path / "whole")
    here("train", *arguments, *TINY_RUN, "-e", tmp_path / "cut", "train.steps=2")
    assert "resuming from step 2" in here("train", *arguments, *TINY_RUN, "-e", tmp_path / "cut", "-r", "latest")
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert snapshot.load(tmp_path / "whole").config.loss.name == "trajectory"
    assert {"mse", "grad_norm_median", "grad_norm_max"} <= read_metrics(tmp_path / "whole" / "metrics.jsonl")[-1].keys()


def test_another_network_than_the_weights_is_noted(here, tmp_path, paths_printed, tiny_run):
    _, command = paths_printed
    arguments = [*shlex.split(command)[2:], *TINY_RUN, "train.steps=1"]
    note = ": was trained with model.args."
    assert note not in here("train", *arguments, "-e", tmp_path / "same")
    printed = here("train", *arguments, "model.args.time_frequency=30", "-e", tmp_path / "other")
    assert f"{locate.find(tiny_run)}{note}time_frequency=its default, here it is 30" in printed


def test_two_ways_to_sample(alpha_flow):
    """One jump is the same by both; two differ, as one of them adds noise between."""
    sampler = Sampler.load(alpha_flow)
    one = [sampler.sample(4, method=method, steps=1) for method in ("euler", "consistency")]
    two = [sampler.sample(4, method=method, steps=2) for method in ("euler", "consistency")]
    assert torch.equal(*one) and not torch.equal(*two)


def test_pairs_of_a_flow_map_are_trained_on(here, tmp_path):
    """By its own loss, as flow matching has one time; guidance that was trained in is in the pairs."""
    here("train", *ALPHA_FLOW, "loss.args.guidance_scale=2", "train.steps=2", "-e", tmp_path / "guided")
    printed = here(
        "make_pairs", "--weights", tmp_path / "guided", "--n_pairs", 40, "--sampling_steps", 1, "--save_dir", tmp_path / "pairs"
    )
    words = shlex.split(printed.splitlines()[-1].partition("train on them with: ")[2])[2:]
    assert "loss.name=alpha_flow" in words
    short = ["train.steps=1", "train.batch_size=8", "train.log_with=[]", "preview.n_samples=1", "preview.sampling_steps=1"]
    here("train", *words, *short, "-e", tmp_path / "run")


def test_guidance_comes_with_notes(here, alpha_flow, tmp_path):
    here("train", *ALPHA_FLOW, "loss.args.guidance_scale=2", "-e", tmp_path / "run")
    sample = ["sample", "--weights", tmp_path / "run", "--n_samples", "2", "--sampling_steps", "2", "--save_dir"]
    assert "note: " not in here(*sample, tmp_path / "a")
    sampled = here(*sample, tmp_path / "b", "--guidance_scale", "2")
    assert "note: guidance_scale=2: comes on top of the scale 2 that the network was trained with" in sampled
    with pytest.warns(UserWarning, match="guides mean velocities of long steps"):
        Sampler.load(alpha_flow).sample(2, method="euler", steps=2, guidance_scale=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loss.name=mean_flow"], "loss.name=mean_flow: needs a network with two times; set model.args.two_times=true"),
        (TWO_TIMES, "model.args.two_times=true: loss.name=flow_matching trains one time, and sampling would use two"),
        ([*TWO_TIMES, "loss.name=trajectory"], "loss.name=trajectory: needs pairs with the paths that lead to them"),
        (
            [*TWO_TIMES, "loss.name=mean_flow", "loss.args.guidance_scale=2", "model.args.num_classes=null"],
            "loss.args.guidance_scale=2: needs a network with labels",
        ),
        ([*TWO_TIMES, "loss.name=alpha_flow", "loss.args.alpha_min=0"], "loss: alpha_min=0: must be more than 0"),
        ([*TWO_TIMES, "loss.name=alpha_flow", "flow.path=vp"], "two_times=true: a flow map needs flow.path=linear"),
    ],
)
def test_mistakes(error, tmp_path, arguments, message):
    assert message in error("train", *TINY_TRAIN, *arguments, "-e", tmp_path / "run")


def test_mistakes_of_paths(error, tmp_path, tiny_run):
    make = ["make_pairs", "--weights", tiny_run, "--save_dir", tmp_path / "pairs", *PATHS]
    assert "--keep_states 6: a path of 6 steps has 5 states" in error(*make, "--keep_states", "6")
    assert "not with --real_fraction" in error(*make, "--keep_states", "2", "--real_fraction", "0.5")
