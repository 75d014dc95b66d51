"""Mutated configurations and command lines: each runs or ends in one line, exit code 2, and leaves no half of a run behind."""

import tempfile
from pathlib import Path

import hypothesis
import pytest
from conftest import TINY_RUN
from fuzzing import CASES, Outcomes, attempt
from hypothesis import given
from hypothesis import strategies as st

from configs.keys import all_keys
from configs.schema import Config

SMALL = [*TINY_RUN, "model.name=mlp", "model.args={width: 8, depth: 1, num_classes: 10}", "train.steps=2"]
SMALL += ["evaluate.feature_extractor=digits", "evaluate.n_samples=10"]
SLOW_OR_REMOTE = ("train.compile", "train.steps")  # left alone: minutes of compilation, endless runs

NUMBERS = st.one_of(
    st.integers(-2, 64).map(str),
    st.floats(-2, 2).map(repr),
    st.sampled_from(["-1", "0", "0.5", "1e-30", "1e400", "nan", ".nan", "inf", "-.inf", "1_0", "0x10", "-0"]),
)
WORDS = st.sampled_from([
    "", "null", "~", "no", "true", "''", "[]", "{}", "[1, 2]", "{a: 1}", "[[]]", "digits", "mlp", "unet", "dit", "mini_unet",
    "toys", "pairs", "folder", "linear", "vp", "cosine", "data", "noise", "ot", "paired", "independent", "uniform", "heun",
    "logit_normal", "dopri5", "unipc", "euler_maruyama", "ancestral", "skip", "bf16", "fp16", "tensorboard", "[tensorboard]",
    "[nothing]", "mean_flow", "alpha_flow", "trajectory", "auto",
    "pseudo_huber", "l1", "constant", "???", "${seed}", "${nowhere}", "${oc.env:HOME}", "!!python/name:os.system",
    "*a", "&a 1", "{a: ", "[", "'", "\\", "a\nb", "\u0000", "数字", "😀", "{path: nowhere}", "{name: moons}", "{width: 8}",
    "{width: -8}", "{block: 2}", "{num_classes: 3}", "{width: {a: 1}}", "{two_times: true}", "{map_share: 0.5}",
    "2026-01-01", "../../etc", "%", "=", "a=b",
])  # fmt: skip
VALUES = st.one_of(NUMBERS, WORDS, st.text(max_size=6))
KEYS = st.sampled_from([k for k in all_keys(Config) if k not in SLOW_OR_REMOTE])
LARGE = st.sampled_from(
    ["99999999999999999999", "9223372036854775807", "1" + 400 * "0", "1e308", "5e-324", "-99999999999999999999"]
)
NO_SIZES = st.sampled_from([
    "seed", "preview.seed", "train.log_every_steps", "train.sample_every_steps", "train.checkpoint_every_steps",
    "train.keep_checkpoints", "train.keep_snapshots", "train.timeout_minutes", "train.log_every_steps", "optimizer.lr",
    "optimizer.eps", "optimizer.weight_decay", "optimizer.warmup_steps", "optimizer.clip_grad_norm", "ema.half_life_images",
    "ema.warmup_ratio", "flow.label_dropout", "preview.guidance_scale",
])  # fmt: skip
INNER = st.sampled_from(
    [
        "model.args.width",
        "model.args.depth",
        "model.args.x",
        "data.args.path",
        "flow.time_sampler_args.mean",
        "loss.args.map_share",
        "a.b.c",
    ]
)


@st.composite
def misspelt(draw) -> str:
    key = draw(KEYS)
    at = draw(st.integers(0, len(key)))
    return key[:at] + draw(st.text("abc._-é", min_size=1, max_size=2)) + key[at + draw(st.integers(0, 1)) :]


@st.composite
def override(draw) -> list[str]:
    some, large = st.tuples(st.one_of(KEYS, KEYS, KEYS, INNER, misspelt()), VALUES), st.tuples(NO_SIZES, LARGE)
    key, value = draw(st.one_of(some, some, some, large))
    form = draw(st.sampled_from(["{}={}", "--{}={}", "--{} {}"]))
    return form.format(key, value).split(" ", 1) if " " in form else [form.format(key, value)]


TRAIN_FLAGS = st.one_of(
    st.tuples(st.just("-mp"), st.sampled_from(["no", "bf16", "fp16", "fp8", ""])).map(list),
    st.tuples(st.just("-r"), st.sampled_from(["latest", "nowhere", ""])).map(list),
    st.tuples(st.just("-c"), st.sampled_from(["configs/digits.yaml", "configs", "nowhere.yaml", "README.md", ""])).map(list),
    st.sampled_from([["--help!"], ["-x"], ["--"], [""], ["stray"], ["-e"], ["--exp_dir"], ["=3"], ["--=3"]]),
)
SAMPLE_NUMBERS = ["--n_samples", "--sampling_steps", "--nfe", "--bspp", "--seed", "--labels", "--guidance_scale", "--eta"]
SAMPLE_NUMBERS += ["--sde_noise_scale", "--rtol", "--atol"]
SAMPLE_WORDS = ["--sampling_method", "--time_grid", "--diffusion", "--prompts", "-mp", "--weights", "-c"]
SAMPLE_FLAGS = st.one_of(
    st.tuples(st.sampled_from(SAMPLE_NUMBERS), NUMBERS).map(list),
    st.tuples(st.sampled_from(SAMPLE_WORDS), WORDS).map(list),
    st.sampled_from([["--npz"], ["--grid_by_class"], ["--no_such_flag"], ["--labels"], ["--prompts"], ["-c", ""]]),
)


def check_training(main_of, capsys, parts: list[list[str]]) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        arguments = [*SMALL, "-e", str(run), f"data.root={scratch}", *(word for part in parts for word in part)]
        outcome = attempt(main_of, capsys, "train", arguments)
        if outcome == "ran":
            assert (run / "checkpoints" / "step_00000002" / "manifest.json").is_file(), arguments
        elif "not finite" not in outcome:  # which a run can only find out after it has begun
            assert not list(Path(scratch).iterdir()), f"{arguments}: {outcome}; left {list(Path(scratch).rglob('*'))}"
        return outcome


def check_sampling(main_of, capsys, run: Path, parts: list[list[str]]) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        first = ["--weights", str(run), "--n_samples", "2", "--save_dir", str(out), "--sampling_steps", "1"]
        outcome = attempt(main_of, capsys, "sample", [*first, *(word for part in parts for word in part)])
        if outcome == "ran":
            assert (out / "grid.png").is_file()
        else:
            assert not list(Path(scratch).iterdir()), f"{parts}: {outcome}; left {list(Path(scratch).rglob('*'))}"
        return outcome


def fuzz(cases: int, seed: int, main_of, capsys, tiny_run) -> Outcomes:
    """So many cases, three of four of them trainings."""
    outcomes = Outcomes()
    trainings = st.tuples(st.just("train"), st.lists(st.one_of(override(), override(), TRAIN_FLAGS), min_size=1, max_size=3))
    samplings = st.tuples(
        st.just("sample"), st.lists(st.one_of(SAMPLE_FLAGS, SAMPLE_FLAGS, override()), min_size=1, max_size=3)
    )

    @hypothesis.example(("train", [["seed=1"]]))
    @hypothesis.example(("train", [["train.stesp=1"]]))
    @hypothesis.example(("sample", [["--npz"]]))
    @hypothesis.example(("sample", [["--no_such_flag"]]))
    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    @given(st.one_of(trainings, trainings, trainings, samplings))
    def case(drawn) -> None:
        script, parts = drawn
        with outcomes.case(drawn):
            if script == "train":
                outcome = check_training(main_of, capsys, parts)
            else:
                outcome = check_sampling(main_of, capsys, tiny_run, parts)
            outcomes[f"{script}: ran" if outcome == "ran" else f"{script}: ended in one line"] += 1

    case()
    return outcomes


def test_some_mutated_command_lines(main_of, capsys, tiny_run):
    outcomes = fuzz(12, 3, main_of, capsys, tiny_run)
    assert outcomes.failures == []
    assert len(outcomes) == 4, str(outcomes)


@pytest.mark.slow
def test_many_mutated_command_lines(main_of, capsys, tiny_run):
    outcomes = fuzz(CASES, 0, main_of, capsys, tiny_run)
    with capsys.disabled():
        print(f"\nfuzz: {outcomes}")
    assert outcomes.failures == []
    assert outcomes.total() >= CASES
