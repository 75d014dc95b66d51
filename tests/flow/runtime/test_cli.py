"""The command line: words of a flag, overrides of the configuration, and what is neither."""

import importlib
import io
import os
import sys
from argparse import Namespace
from collections.abc import Callable

import pytest
from conftest import MAINS, REPOSITORY

from configs import loading
from configs.errors import UserError
from flow.runtime import cli, flags
from flow.runtime.errors import cli_main

COMMANDS = sorted({
    *MAINS,
    *(path.stem for path in (REPOSITORY / "scripts").glob("*.py") if path.stem != "__init__"),
    *(f"dev.{path.stem}" for path in (REPOSITORY / "scripts/dev").glob("*.py") if path.stem != "__init__"),
} - {"fault_injection", "gallery", "train_classifier"})  # which are dev.NAME  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, main_of, capsys):
    main = main_of(name, "--help")
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().out
    assert left.value.code == 0 and said.startswith("usage: ") and "--help" in said
    assert importlib.import_module(main.__module__).__doc__.splitlines()[0].split(":")[0] in " ".join(said.split())


@pytest.fixture
def parse() -> Callable[..., Namespace]:
    """parse(*words): what a command makes of them that has --names of several words, --out of one and --fast of none."""
    parser = cli.Parser("what it does", "an example")
    parser.add_argument("--names", nargs="+")
    parser.add_argument("-o", "--out")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--count", type=flags.at_least(1))
    parser.add_argument("--seed", type=flags.at_least(0, flags.MOST_SEED))
    flags.add_launcher_flag(parser, "it")
    return lambda *words: parser.parse([*words])


def test_words_of_a_flag_may_hold_an_equals_sign(parse):
    for words in (["lr=1e-3", "lr=2e-3"], ["plain", "lr=2e-3"]):
        args = parse("--names", *words, "--out", "figures")
        assert (args.names, args.out, args.overrides) == (words, "figures", [])


@pytest.mark.parametrize("words", [["--out", "lr=3e-4"], ["-o", "lr=3e-4"], ["--out=lr=3e-4"], ["-o", "x", "--out", "lr=3e-4"]])
def test_value_of_a_flag_may_hold_an_equals_sign(parse, words):
    """That word alone; the next one is an override."""
    args = parse("--fast", *words, "seed=3")
    assert (args.out, args.overrides, args.fast) == ("lr=3e-4", ["seed=3"], True)


def test_key_in_place_of_a_value_is_named(parse):
    with pytest.raises(
        UserError, match=r"-o: a value is missing; 'train\.steps=3' sets a key \(as a value: -o=train\.steps=3\)"
    ):
        parse("-o", "train.steps=3")
    assert parse("-o=train.steps=3").out == "train.steps=3"


def test_numbers_that_nobody_can_count_to(parse):
    assert parse("--seed", "9223372036854775807", "--count", "2147483647").count == 2**31 - 1
    for flag, number, most in [("--count", 10**20, 2**31 - 1), ("--seed", 2**63, 2**63 - 1)]:
        with pytest.raises(UserError, match=f"argument {flag}: '{number}': must be at most {most}"):
            parse(flag, str(number))


@pytest.mark.parametrize(
    ("text", "reason"), [('torchrun "x', "No closing quotation"), ("", "must be a command"), (" ", "must be")]
)
def test_launchers_that_no_shell_starts(parse, text, reason):
    with pytest.raises(UserError, match=f"--launcher: .*{reason}"):
        parse("--launcher", text)
    assert parse("--launcher", "torchrun 'a b'").launcher == "torchrun 'a b'"


@pytest.mark.parametrize("word", ["optimizer.lr=1e-3", "--optimizer.lr=1e-3", "seed=3"])
def test_keys_after_words_are_overrides(parse, word):
    args = parse("--names", "lr=1e-3", word)
    assert (args.names, args.overrides) == (["lr=1e-3"], [word.removeprefix("--")])


@pytest.mark.parametrize(
    "words",
    [["lr=1e-3"], ["--out", "a", "lr=1e-3"], ["--names", "a", "--out", "b", "lr=1e-3"], ["--names", "a", "optimizer.rl=1e-3"]],
)
def test_unknown_keys_come_with_a_suggestion(parse, words):
    with pytest.raises(UserError, match=r"unknown key .* Did you mean 'optimizer\.lr'\?"):
        loading.load(None, parse(*words).overrides)


@pytest.mark.parametrize(
    ("command", "nearest"),
    [
        ("sample --n_sample 3", " Did you mean '--n_samples'?"),
        ("sample --steps 3", " Did you mean '--sampling_steps'?"),  # and not train.steps
        ("train --lr 3", " Did you mean 'optimizer.lr'?"),
        ("sample --lr 3", ""),  # and not optimizer.lr, which has no effect there
        ("evaluate --evaluation_dir x", ""),  # and not evaluate.seed
    ],
)
def test_unknown_flags_come_with_a_suggestion(error, command, nearest):
    script, *words = command.split()
    assert error(script, *words) == f"error: unknown flag {words[0]!r}.{nearest}"


def test_names_that_are_not_utf8_are_printed(parse, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8"))
    print(parse("--out", os.fsdecode(b"run-\xff")).out, flush=True)
    assert written.getvalue() == b"run-\xff\n"


def test_characters_that_the_terminal_lacks(parse, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "latin-1"))
    parse("--out", "run")
    print("0.63 ± 0.22 七", flush=True)
    assert written.getvalue() == b"0.63 \xb1 0.22 \\u4e03\n"


def test_killed_data_worker_is_one_line(capsys):
    """As the system does for want of memory; it is no mistake of the command line, hence 1."""

    def lose_worker() -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(SystemExit) as left:
        cli_main(lose_worker)
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 1
    assert line.startswith("error: DataLoader worker (pid 7) is killed by signal: Killed") and "data.num_workers" in line


def test_traceback_on_request(error, main_of, monkeypatch, tmp_path):
    """FLOW_TRACEBACK=1 leaves the error of a user to Python, which prints where it comes from."""
    given = ["sample", "--weights", tmp_path / "none", "--n_samples", 1, "--save_dir", tmp_path / "out"]
    assert "none" in error(*given)
    monkeypatch.setenv("FLOW_TRACEBACK", "1")
    with pytest.raises(UserError, match="none"):
        cli_main(main_of(*given))
