"""The README as a new user follows it: every command in order and every command that a script suggests, at a tiny size."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from pages import blocks
from PIL import Image
from small_files import write_idx

import datasets
import sample
from configs import loading
from scripts import animate, quickstart
from scripts.dev import gallery

# What follows a command to make it tiny; a later flag or key wins over an earlier one.
TRAIN = (
    "train.steps=2 train.batch_size=4 train.mixed_precision=no train.compile=false train.log_with=[] train.log_every_steps=1 "
    "train.sample_every_steps=0 preview.n_samples=2 preview.sampling_steps=1 optimizer.warmup_steps=0 optimizer.lr=0.03 "
    "ema.half_life_images=1 data.num_workers=0"
)
EVALUATE = "evaluate.n_samples=4 evaluate.sampling_steps=1 evaluate.loss_samples=10"
NETWORKS = {
    "unet": "model.args.width=16 model.args.head_channels=16",
    "mini_unet": "model.args.width=16 model.args.head_channels=16",
    "dit": "model.args.width=32 model.args.depth=1 model.args.heads=2",
    "mlp": "model.args.width=8",
}
TINY = {
    "sample.py": "--n_samples 4 --sampling_steps 2 -mp no",
    "evaluate.py": "--n_samples 4 --sampling_steps 1 --metrics fid -mp no",
    "scripts.make_pairs": "--n_pairs 8 --sampling_steps 1 -mp no",
    "scripts.optimize_grid": "--methods ab2 --steps 6 --n_images 4 --reference_steps 16 --evaluations 30",
    "scripts.optimize_guidance": "--n_samples 4 --sampling_steps 1 -mp no",
    "scripts.solver_study": "--n_images 2 --sampling_steps 6 --methods ab2 --t_end 0.5 -mp no",
    "scripts.animate": "--n 4 --frames 2 --steps_a_frame 1 --sampling_method euler",
    "scripts.compare": "--n_samples 4 --frames 2",
    "scripts.restore": "--n_images 2 --steps 2 --draws 1",
    "scripts.likelihood": "--n_images 2 --rtol 0.5 --atol 0.5",
    "scripts.export_images": "--n_images 12",
    "scripts.train_vae": TRAIN.replace("preview.n_samples=2 preview.sampling_steps=1 ", "")
    + " autoencoder.channels=[8,8,8] preview_images=2",
    "scripts.cache_latents": "-mp no",
}
SHORTER = {
    "--nfe 5 10 20 50": "--nfe 10",
    "--num_fid_images 2000": "--num_fid_images 4",
    "--n_samples 1020": "--n_samples 4",
    "--bspp 5000": "",
}
SHORTER |= {"--keep_states 8": "--keep_states 1", "mnist.pt2 --sampling_steps 4": "mnist.pt2 --sampling_steps 1"}
SHORTER |= {"--sampling_steps 5 50 ": "", "--float64 --t_end 0.9": "--t_end 0.9"}
ELSEWHERE = ("make ", "source ")  # the environment
# Chains of processes, run by tests of their own, with what needs their runs; and Inception's features of CIFAR-10.
LEFT_OUT = ("scripts.rectify", "runs/mnist_rectify", "scripts.benchmark", "evaluate.py --weights runs/cifar10")
SUGGESTION = re.compile(r"with: (.+)$", re.M)


@pytest.fixture
def home(main_of, monkeypatch, tmp_path) -> Path:
    """A working folder with the shipped files and small data in the place of MNIST and CIFAR-10; the current one."""
    for name in ("configs", "docs", "train.py", "sample.py", "evaluate.py"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    rng = np.random.default_rng(0)
    raw = tmp_path / "data/MNIST/raw"
    digits = datasets.build("digits", None, {})
    for part, rows in {"train": slice(0, 20), "t10k": slice(20, 40)}.items():
        images = np.kron(digits.images[rows, 0].numpy(), np.ones((3, 3)))  # 24x24
        write_idx(raw / f"{part}-images-idx3-ubyte", np.pad(images, ((0, 0), (2, 2), (2, 2))))
        write_idx(raw / f"{part}-labels-idx1-ubyte", digits.labels[rows].numpy())
    (tmp_path / "cifar").mkdir()
    for k in range(4):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"cifar/{k}.png")
    monkeypatch.delenv("FLOW_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


PAGES = ("README.md", "docs/commands.md", "docs/results.md")


def commands_of(pages: tuple[str, ...]) -> list[list[str]]:
    """The words of every command of these pages, launchers taken away, from the script on."""
    text = "\n".join(block for page in pages for block in blocks(page, "bash")).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", *ELSEWHERE))]
    for old, new in SHORTER.items():
        lines = [line.replace(old, new) for line in lines]
    commands = [shlex.split(line, comments=True) for line in lines]
    return [words[next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m") :] for words in commands]


def tiny(words: list[str]) -> tuple[str, list[str]]:
    """The name of the script and its arguments, followed by what makes them small."""
    script, arguments = (words[1], words[2:]) if words[0] == "-m" else (Path(words[0]).name, words[1:])
    if script == "scripts.doctor" or script == "train.py":
        config = arguments[arguments.index("-c") + 1] if "-c" in arguments else None
        overrides = [word for word in arguments if "=" in word]
        network = loading.load(config, overrides).model.name
        more = [*shlex.split(TRAIN), *shlex.split(EVALUATE), *shlex.split(NETWORKS[network])]
        if config in ("configs/cifar10.yaml", "configs/cifar10_cpu.yaml") or "data.name=cifar10" in arguments:
            more += ["data.name=folder", "data.args={path: cifar, size: 32}", "ema.warmup_ratio=0.05"]
            more += ["model.args.num_classes=null", "preview.guidance_scale=1"]  # these pictures have no labels
        if config == "configs/toy.yaml":
            more += ["data.args.n=50"]
        return script, [*arguments, *more]
    more = shlex.split(TINY.get(script, ""))
    if "--nfe" in arguments:
        del more[more.index("--sampling_steps") : more.index("--sampling_steps") + 2]
    if "--samples" in arguments:  # these images are there already
        more = ["--metrics", "fid"]
    if "--num_fid_images" in arguments:  # of whole images, at t = 1
        del more[more.index("--t_end") : more.index("--t_end") + 2]
    if "dopri5" in arguments:
        more += ["--rtol", "0.5", "--atol", "0.5"]
    if "--keep_states" in arguments:
        more += ["--sampling_steps", "2"]
    if "optimized" in arguments:
        more += ["--sampling_steps", "6"]
    return script, [*arguments, *more]


def words_of(suggestion: str) -> list[str]:
    """The words of a suggested command from its program on, without the variable that makes `scripts` found elsewhere."""
    return [word for word in shlex.split(suggestion) if not word.startswith("PYTHONPATH=")]


@pytest.mark.parametrize("chain", [quickstart, gallery], ids=["quickstart", "gallery"])
def test_suggestion_after_chain_parses(here, monkeypatch, tmp_path, chain):
    """The commands of the chain are not run here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chain, "run_command", lambda arguments: None)
    monkeypatch.setattr(gallery, "outdated", lambda figures, weights: False)
    (line,) = SUGGESTION.findall(here(chain.__name__.rpartition(".")[2]))
    script, arguments = tiny(words_of(line)[1:])
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    parsed = {"sample.py": sample, "scripts.animate": animate}[script].parse_args()
    assert parsed.weights in ("runs/digits", "runs/gallery/checkerboard")


def test_hint_of_training_works_after_quickstart(here, home, monkeypatch):
    """Its samples lie elsewhere. The tables of the chain are left out."""
    hints = {}

    def run_command(words: list[str]) -> None:
        script, arguments = tiny(words)
        if script != "evaluate.py":
            hints[script] = SUGGESTION.findall(here(script.removesuffix(".py"), *arguments))

    monkeypatch.setattr(quickstart, "run_command", run_command)
    here("quickstart")
    (hint,) = hints["train.py"]
    script, arguments = tiny(words_of(hint)[1:])
    here(script.removesuffix(".py"), *arguments)
    assert {path.parent.name for path in home.glob("samples/*/grid.png")} == {"digits", "quickstart"}


@pytest.mark.parametrize("pages", [PAGES[:1], pytest.param(PAGES, marks=pytest.mark.slow)], ids=["readme", "all"])
def test_commands_in_order_with_every_suggested_one(here, home, pages):
    """In one folder, from top to bottom; after each command those that it suggests, as they are printed."""
    suggested: dict[str, set[str]] = {}  # by a command of the page: the scripts whose suggested commands have run
    for words in commands_of(pages):
        if any(mark in " ".join(words) for mark in LEFT_OUT):
            continue
        script, arguments = tiny(words)
        said = here(script.removeprefix("scripts.").removesuffix(".py"), *arguments)
        for line in SUGGESTION.findall(said):
            program, *rest = words_of(line)
            assert shutil.which(program) or Path(program).is_file(), line
            if program == "cat":
                assert Path(*rest).is_file()
                suggested.setdefault(script, set()).add(program)
                continue
            script_of, smaller = tiny(rest)
            here(script_of.removeprefix("scripts.").removesuffix(".py"), *smaller)
            suggested.setdefault(script, set()).add(script_of)
            if script == "scripts.doctor":  # the page starts the same training next
                shutil.rmtree(rest[rest.index("-e") + 1])
    assert pages == PAGES or suggested == {
        "train.py": {"sample.py"}, "sample.py": {"scripts.animate"}, "evaluate.py": {"sample.py"}
    }  # fmt: skip
    assert pages != PAGES or suggested.keys() == {
        "train.py", "sample.py", "evaluate.py",
        *(f"scripts.{name}" for name in (
            "animate", "cache_latents", "compare", "doctor", "export", "export_images", "likelihood", "make_pairs",
            "optimize_grid", "optimize_guidance", "pack_images", "plot_loss", "posthoc_ema", "report", "restore",
            "solver_study", "train_vae",
        )),
    }  # fmt: skip
