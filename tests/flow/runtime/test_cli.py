"""The command line: words of a flag, overrides of the configuration, and what is neither."""

from argparse import Namespace
from collections.abc import Callable

import pytest

from configs import loading
from configs.errors import UserError
from flow.runtime import cli
from flow.runtime.errors import cli_main


@pytest.fixture
def parse() -> Callable[..., Namespace]:
    """parse(*words): what a command makes of them that has --names of several words and --out of one."""
    parser = cli.Parser("what it does", "an example")
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--out")
    return lambda *words: parser.parse([*words])


def test_words_of_a_flag_may_hold_an_equals_sign(parse):
    for words in (["lr=1e-3", "lr=2e-3"], ["plain", "lr=2e-3"]):
        args = parse("--names", *words, "--out", "figures")
        assert (args.names, args.out, args.overrides) == (words, "figures", [])


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


def test_killed_data_worker_is_one_line(capsys):
    """As the system does for want of memory; it is no mistake of the command line, hence 1."""

    def lose_worker() -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(SystemExit) as left:
        cli_main(lose_worker)
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 1
    assert line.startswith("error: DataLoader worker (pid 7) is killed by signal: Killed") and "data.num_workers" in line
