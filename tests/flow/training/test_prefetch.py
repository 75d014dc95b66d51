"""Work done ahead: the same items in the same order, no further than asked, errors where they belong."""

import threading

import pytest

from flow.training.data_loader import prefetch


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_items_in_their_order(depth):
    assert list(prefetch(iter(range(20)), depth)) == list(range(20))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_works_ahead_by_depth_and_no_more(depth):
    """`depth` items are started while the first is held, one more with each that is taken, and none sooner."""
    started, taken, ahead = threading.Semaphore(0), [], []

    def items():
        for i in range(20):
            ahead.append(i - len(taken))
            started.release()
            yield i

    for item in prefetch(items(), depth):
        for _ in range(depth + 1 if item == 0 else int(item + depth < 20)):
            assert started.acquire(timeout=60)
        taken.append(item)
    assert taken == list(range(20)) and max(ahead) == depth


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
