"""Flags that several scripts share."""

import pytest

from flow.runtime import flags


@pytest.mark.parametrize(
    ("names", "words"),
    [(("cat", "dog"), ["0", "1"]), (("1", "0"), ["1", "0"]), ((), ["0", "1"])],
    ids=["words", "numbers", "none"],
)
def test_labels_are_read_back(names, words):
    """Also where the number of a class is the name of another one."""
    assert flags.label_words((0, 1), names) == words
    assert flags.labels_of(words, names) == (0, 1)
