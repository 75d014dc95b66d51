"""Errors of a user, and what helps to read them."""

import difflib
from collections.abc import Sequence


class UserError(ValueError):
    """A mistake of the user: the entry scripts print its one line and leave with exit code 2."""


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """' Did you mean X?' or '' — the tail of an error about an unknown name."""
    last = word.split(".")[-1]  # `steps` for `train.steps`
    matches = [c for c in choices if c.endswith(f".{last}") and "/" not in c][:1]
    matches = matches or difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def first_line(error: Exception) -> str:
    """The first line of an error's message; its kind where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
