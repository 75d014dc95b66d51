"""Captions made from class names by templates, for networks that read prompts."""

from collections.abc import Sequence

import numpy as np

ENGLISH = (
    "{}", "a {}", "the {}", "one {}", "a handwritten {}", "handwritten {}", "an image of a {}", "a picture of {}",
    "a drawing of a {}", "please draw a {}", "show me the {}", "a {} on black paper", "draw one {} please", "this is a {}",
)  # fmt: skip
ENGLISH_DIGIT = ("the digit {}", "number {}", "the number {} by hand", "a small {} in white ink", "the numeral {}")
CHINESE = ("{}", "数字{}", "手写的{}", "一个{}", "画一个{}", "数字{}的图片")

# Wordings that training never sees, to find out whether a network reads or has learnt sentences by heart.
HELD_OUT_ENGLISH = ("could you sketch a {} for me", "I want to see the {}", "some photo of a {}", "write {} with a thick pen")
HELD_OUT_CHINESE = ("请写出{}", "我想看{}这个字")

_DIGITS = {
    "0": ("zero", "零"), "1": ("one", "一"), "2": ("two", "二"), "3": ("three", "三"), "4": ("four", "四"),
    "5": ("five", "五"), "6": ("six", "六"), "7": ("seven", "七"), "8": ("eight", "八"), "9": ("nine", "九"),
}  # fmt: skip
_FILLED = 0.5  # share of captions whose word stands among random ones: the network must read the word, not its position
_FILLED_BYTES = 44  # of such a caption at most
_LETTERS = np.array([*"abcdefghijklmnopqrstuvwxyz", *5 * " "])  # words of six letters or so
_HAN = range(0x4E00, 0x9FA6)  # CJK unified ideographs


def plain(class_name: str) -> str:
    """One caption of the class: 'a handwritten seven' for '7 - seven', 'a picture of ship' for 'ship'."""
    digit = _digit(class_name)
    return f"a handwritten {_DIGITS[digit][0]}" if digit else f"a picture of {class_name}"


def draw(class_name: str, generator: np.random.Generator) -> str:
    """A caption for training."""
    digit = _digit(class_name)
    word, chinese = _words(class_name, generator)
    in_chinese = chinese is not None and generator.random() < 0.3
    if generator.random() < _FILLED:
        return _with_distractors(chinese if in_chinese else word, in_chinese, generator)
    if in_chinese:
        return CHINESE[generator.integers(len(CHINESE))].format(chinese)
    templates = ENGLISH + ENGLISH_DIGIT if digit else ENGLISH
    return templates[generator.integers(len(templates))].format(word)


def held_out(class_name: str) -> list[str]:
    """The class in every wording that `draw` never gives, digits also in Chinese."""
    digit = _digit(class_name)
    if not digit:
        return [template.format(class_name) for template in HELD_OUT_ENGLISH]
    word, chinese = _DIGITS[digit]
    return [t.format(word) for t in HELD_OUT_ENGLISH] + [t.format(chinese) for t in HELD_OUT_CHINESE]


def longest(class_names: Sequence[str]) -> int:
    """Bytes of the longest caption that `draw`, `plain` or `held_out` can give."""
    fixed = (*ENGLISH, *ENGLISH_DIGIT, *HELD_OUT_ENGLISH, *CHINESE, *HELD_OUT_CHINESE, "a picture of {}")
    words = [word for name in class_names for word in (_DIGITS[_digit(name)] if _digit(name) else (name,))]
    return max(_FILLED_BYTES, *(len(template.format(word).encode()) for template in fixed for word in words))


def _digit(class_name: str) -> str | None:
    """'7' for the names '7' and '7 - seven' of digit data sets."""
    first, _, rest = class_name.partition(" - ")
    return first if first in _DIGITS and rest in ("", _DIGITS[first][0]) else None


def _words(class_name: str, generator: np.random.Generator) -> tuple[str, str | None]:
    digit = _digit(class_name)
    if not digit:
        return class_name, None
    english, chinese = _DIGITS[digit]
    return (digit if generator.random() < 0.25 else english), (digit if generator.random() < 0.5 else chinese)


def _with_distractors(word: str, in_chinese: bool, generator: np.random.Generator) -> str:
    """The word at a random place of a sentence of random characters, of at most _FILLED_BYTES bytes."""
    remaining = max(0, _FILLED_BYTES - len(word.encode()) - 2)
    count = generator.integers(remaining // (3 if in_chinese else 1) + 1)
    before = generator.integers(count + 1)
    if in_chinese:
        digits = {chinese for _, chinese in _DIGITS.values()}
        characters = (chr(code) for code in generator.integers(_HAN.start, _HAN.stop, size=count))
        filler = "".join(character for character in characters if character not in digits)
        return filler[:before] + word + filler[before:]
    filler = "".join(_LETTERS[generator.integers(len(_LETTERS), size=count)])
    return " ".join(" ".join((filler[:before], word, filler[before:])).split())
