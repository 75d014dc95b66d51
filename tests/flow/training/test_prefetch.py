"""Work done ahead: the same items in the same order, no further than asked, errors where they belong."""

import threading
import time

import pytest

from flow.training.data_loader import prefetch


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_items_in_their_order(depth):
    assert list(prefetch(iter(range(20)), depth)) == list(range(20))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_no_further_than_asked(depth):
    begun = []

    def items():
        for i in range(20):
            begun.append(i)
            yield i

    for item in prefetch(items(), depth):
        time.sleep(0.01)
        assert len(begun) <= item + 1 + depth
    assert len(begun) == 20


def test_an_error_comes_where_its_item_was_expected():
    def items():
        yield 1
        raise ValueError("second")

    found = prefetch(items(), 1)
    assert next(found) == 1
    with pytest.raises(ValueError, match="second"):
        next(found)


def test_leaving_early_ends_the_thread():
    before = threading.active_count()
    found = prefetch(iter(range(1000)), 2)
    assert next(found) == 0 and threading.active_count() == before + 1
    found.close()
    assert threading.active_count() == before
