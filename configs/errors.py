"""Errors of a user, and what helps to read them."""

import difflib
from collections.abc import Sequence


class UserError(ValueError):
    """A mistake of the user: the entry scripts print its one line and leave with exit code 2."""


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """' Did you mean X?' or '' — the tail of an error about an unknown name."""
    names = {choice.removeprefix("--"): choice for choice in choices}  # the dashes of flags would make all of them alike
    word = word.removeprefix("--")
    last = word.split(".")[-1]  # `steps` for `train.steps` and `--sampling_steps`
    ends = [name for mark in "._" for name in names if name.endswith(mark + last) and "/" not in name]
    matches = ends or difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f" Did you mean {names[matches[0]]!r}?" if matches else ""


def first_line(error: Exception) -> str:
    """The first line of an error's message; its kind where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
