"""The README: its example runs, its tables and commands are those of the code, in both languages."""

import functools
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from pages import blocks

import evaluate
import sample
import train
from configs import loading, schema
from configs.rectify import RectifyConfig
from configs.vae import VaeConfig
from scripts import (  # fmt: skip
    animate,
    cache_latents,
    compare,
    export,
    export_images,
    likelihood,
    make_pairs,
    optimize_grid,
    optimize_guidance,
    pack_images,
    plot_loss,
    posthoc_ema,
    restore,
    solver_study,
    train_vae,
)
from scripts.benchmark import __main__ as benchmark
from scripts.benchmark import baseline, quality
from scripts.dev import fault_injection, gallery, strip, write_configuration
from scripts.doctor import __main__ as doctor
from scripts.rectify import __main__ as rectify
from scripts.report import __main__ as report

SCRIPTS = {
    "train.py": train, "sample.py": sample, "evaluate.py": evaluate, "-m scripts.make_pairs": make_pairs,
    "-m scripts.rectify": rectify, "-m scripts.plot_loss": plot_loss, "-m scripts.optimize_grid": optimize_grid,
    "-m scripts.optimize_guidance": optimize_guidance, "-m scripts.solver_study": solver_study,
    "-m scripts.likelihood": likelihood, "-m scripts.restore": restore,
    "-m scripts.animate": animate, "-m scripts.compare": compare, "-m scripts.dev.gallery": gallery,
    "-m scripts.dev.strip": strip, "-m scripts.doctor": doctor, "-m scripts.dev.fault_injection": fault_injection,
    "-m scripts.benchmark quality": quality, "-m scripts.benchmark": benchmark,
    "-m scripts.export": export, "-m scripts.benchmark.baseline": baseline, "-m scripts.export_images": export_images,
    "-m scripts.train_vae": train_vae, "-m scripts.cache_latents": cache_latents, "-m scripts.posthoc_ema": posthoc_ema,
    "-m scripts.report": report, "-m scripts.pack_images": pack_images,
}  # fmt: skip
KINDS = {rectify: RectifyConfig, train_vae: VaeConfig}  # of configuration, where it is not that of train.py
COMMAND = rf"(?<![\w/])({'|'.join(map(re.escape, SCRIPTS))}) (.*)$"
READMES = ("README.md", "README_zh.md")


def lines() -> list[str]:
    """Those of the README and the pages of docs/ that are bash, and the headers of configs/, line continuations joined."""
    docs = [p for p in sorted((REPOSITORY / "docs").glob("*.md")) if p.name != "extending.md"]  # which has a test of its own
    pages = ["README.md", *(str(p.relative_to(REPOSITORY)) for p in docs)]
    files = sorted((REPOSITORY / "configs").rglob("*.yaml"))
    headers = ["\n".join(re.findall("^#(.*)", p.read_text(encoding="utf-8"), re.M)) for p in files]
    text = "\n".join([*(block for page in pages for block in blocks(page, "bash")), *headers])
    return text.replace("\\\n", " ").splitlines()


def commands() -> list[str]:
    """Every command of a script in them, each once, without what starts it."""
    matches = (match.groups() for line in lines() if (match := re.search(COMMAND, line)))
    return list(dict.fromkeys(f"{script} {shlex.join(shlex.split(rest, comments=True))}" for script, rest in matches))


load = functools.cache(lambda path, overrides, kind: loading.load(path, list(overrides), kind=kind))


def test_example_runs_as_shown(capsys):
    """With a tenth of its steps: what is shown is the same program. Its samples are better than noise by little then, but the
    velocity is neither too small nor too large."""
    (code,) = blocks("README.md", "python")
    assert len(code.splitlines()) <= 45
    names: dict = {}
    exec(compile(code.replace("range(4000)", "range(400)"), "README.md", "exec"), names)
    share = re.search(r"(\d+)% of the samples lie on dark squares, NFE 99", capsys.readouterr().out)
    assert share and int(share.group(1)) > 49  # noise alone gives 46
    x0, x1, t = torch.randn(20_000, 2), names["checkerboard"](20_000), torch.rand(20_000)
    with torch.no_grad():
        velocity = names["net"](torch.lerp(x0, x1, t[:, None]), t)
    best_scale = ((x1 - x0) * velocity).sum() / velocity.square().sum()
    assert 0.9 < best_scale < 1.1  # 0.95 to 1.00 with four seeds


def test_configuration_page_is_that_of_the_schema():
    """Stale: python -m scripts.dev.write_configuration."""
    assert (REPOSITORY / "docs/configuration.md").read_text(encoding="utf-8") == write_configuration.page()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_images_exist():
    missing = []
    for page in [
        *(REPOSITORY / name for name in (*READMES, "CONTRIBUTING.md", "CHANGELOG.md")),
        *sorted((REPOSITORY / "docs").glob("*.md")),
    ]:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"(?:\]\(|src=\")([^)\"\s]+)", text):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            if not target.startswith("http") and not (file.exists() and (not anchor or anchor in anchors(file))):
                missing.append(f"{page.name}: {target}")
    assert missing == []


def test_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_every_command_is_of_a_known_script():
    """A misspelt one would not be looked at below."""
    started = [line for line in lines() if re.search(r"^[^#]*\b(python|accelerate-launch|torchrun)\b.* (-m |\S*\.py\b)", line)]
    assert [line for line in started if not re.search(COMMAND, line) and "-m pytest" not in line] == []


@pytest.mark.parametrize("command", commands())
def test_commands_are_accepted(command, monkeypatch):
    """Each command parses, and its configuration keys and files exist."""
    script, arguments = re.fullmatch(COMMAND, command).groups()
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(arguments)])
    args = SCRIPTS[script].parse_args()
    if getattr(args, "config", None):
        load(str(REPOSITORY / args.config), tuple(args.overrides), KINDS.get(SCRIPTS[script], schema.Config))


def test_both_languages_have_the_same_code():
    for language in ("bash", "python"):
        strip = [[re.sub(r"#.*", "", line).rstrip() for b in blocks(n, language) for line in b.splitlines()] for n in READMES]
        assert strip[0] == strip[1]
