"""The command line of a script: flags by argparse, configuration keys by `key=value`, nothing unknown accepted."""

import argparse
import codecs
import io
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from configs import schema
from configs.errors import UserError, did_you_mean, first_line
from configs.keys import all_keys
from flow.runtime import files

_KEY = re.compile(r"[A-Za-z_][\w]*(\.[\w]+)*")
_ARGUMENT = re.compile(r"(?P<name>\w+)(=(?P<value>.*?))?: (?P<reason>.*)")  # the beginning of an error of a library call
_OTHER_NAMES = {"sampling_method": ["methods"], "steps": ["sampling_steps"], "noise_scale": ["sde_noise_scale"]}  # of flags


class Arguments(argparse.Namespace):
    """The flags of a command by their names, `overrides`, a list of `key=value`, and `start`, the time for
    `messages.summary`."""

    overrides: list[str]
    start: float
    flags: dict[str, tuple[str, Any]]  # by the names: the flag and its default

    def typed(self, *names: str) -> list[str]:
        """The words of these flags, without those at their defaults: for a command that takes the same flags."""
        words = []
        for name in names:
            (flag, default), value = self.flags[name], getattr(self, name)
            if value != default:
                values = [] if value is True else value if isinstance(value, list | tuple) else [value]
                words += [flag, *(f"{each:.15g}" if isinstance(each, float) else str(each) for each in values)]
        return words

    @contextmanager
    def naming_flags(self, command: str) -> Iterator[None]:
        """ValueErrors of library calls become errors of the user that begin with the flag of the argument at fault, `labels=11`
        as `--labels 11`; those of no argument begin with the command."""
        try:
            yield
        except UserError:
            raise
        except ValueError as error:
            message = first_line(error)
            parts = _ARGUMENT.fullmatch(message)
            name = parts["name"] if parts else ""
            known = next((each for each in (name, *_OTHER_NAMES.get(name, ())) if each in self.flags), None)
            if parts is None or known is None:
                raise UserError(f"{command}: {message}") from error
            words = [self.flags[known][0], *(parts["value"] or "").strip("[]").replace(",", "").split()]
            raise UserError(f"{' '.join(words)}: {parts['reason']}") from error

    def refuse_typed(self, names: Iterable[str], reason: str) -> None:
        """Raises UserError for the first of these flags that is not at its default."""
        for name in names:
            if self.typed(name):
                raise UserError(f"--{name}: {reason}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that also takes configuration overrides and whose errors are one line with the nearest name.

    An override is written `key=value`, `--key=value` or `--key value`; a flag of the script wins over a key of the same name.
    After a flag that takes one value, `name=value` is its value; an error where the name is a key.
    """

    def __init__(self, description: str, examples: str, kind: type = schema.Config, keys: str = "configs/schema.py"):
        super().__init__(
            description=description,
            epilog=f"examples:\n{examples}\n\nevery configuration key: {keys}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.kind = kind  # whose keys can be overridden
        self.sections: tuple[str, ...] = ()  # those whose keys have an effect; empty: all

    def error(self, message: str):  # called by argparse
        raise UserError(message)

    def parse(self, argv: list[str] | None = None, takes_keys: bool = True) -> Arguments:
        """takes_keys: of the configuration. Raises UserError for an unknown flag or key, naming the nearest."""
        _print_any_name()
        flags, keys = list(self._option_string_actions), all_keys(self.kind)
        rest, overrides = [], []
        flag, takes = "", 0.0  # the last flag, and the words that it still takes, which may look like name=value
        argv = list(sys.argv[1:] if argv is None else argv)
        while argv:
            token = argv.pop(0)
            name, equals, value = token.partition("=")
            key = name.removeprefix("--")
            if name in flags:
                flag = name
                takes = 0 if equals else self._most_words(name)
            is_word = not name.startswith("--") and (not equals or (takes > 0 and key not in keys and "." not in key))
            if name in flags or not _KEY.fullmatch(key) or is_word:
                rest.append(token)
                takes -= name not in flags
            elif equals and (key in keys or not name.startswith("--") or "." in key):
                if takes == 1:
                    raise UserError(f"{flag}: a value is missing; {token!r} sets a key (as a value: {flag}={token})")
                overrides.append(f"{key}={value}")
            elif not equals and (key in keys or "." in key):
                if not argv or argv[0].startswith("--"):
                    raise UserError(f"--{key}: a value is missing")
                overrides.append(f"{key}={argv.pop(0)}")
            else:
                useful = [k for k in keys if takes_keys and (not self.sections or k.split(".")[0] in self.sections)]
                nearest = did_you_mean(name, flags) or did_you_mean(key, useful)
                raise UserError(f"unknown flag {name!r}.{nearest}")
        namespace, unknown = self.parse_known_args(rest, Arguments())
        if unknown:
            flag = dict(zip(rest[2:], rest, strict=False)).get(unknown[0], "")  # the word two places before
            if flag in flags and self._option_string_actions[flag].nargs is None and not unknown[0].startswith("-"):
                raise UserError(f"{flag}: takes one value, {unknown[0]!r} is a second one")
            raise UserError(f"unknown argument {unknown[0]!r}.{did_you_mean(unknown[0], flags)}")
        if overrides and not takes_keys:
            raise UserError(f"{overrides[0]}: this command takes no configuration keys")
        namespace.overrides = overrides
        namespace.start = time.perf_counter()
        options = [action for action in self._actions if action.option_strings]
        namespace.flags = {each.dest: (each.option_strings[0], self.get_default(each.dest)) for each in options}
        return namespace

    def _most_words(self, flag: str) -> float:
        """How many words a flag takes at most; none for one with an optional word."""
        nargs = self._option_string_actions[flag].nargs
        if nargs is None:
            return 1
        return nargs if isinstance(nargs, int) else math.inf if nargs in ("+", "*") else 0


def _print_any_name() -> None:
    """Names of files are any bytes, and those that are not UTF-8 would end a script where it prints them; so would every other
    character that a terminal with another encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
        sys.stdout.reconfigure(errors=files.NAMES if utf8 else "backslashreplace")
