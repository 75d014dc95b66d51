"""Batches of samples over processes."""

from types import SimpleNamespace

import pytest

from flow.sampling.generate import shard


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (100, 7), (64, 8)])
@pytest.mark.parametrize("processes", [1, 3, 8])
def test_every_index_has_one_process(count, batch_size, processes):
    """Also where there are fewer batches than processes."""
    shards = [
        shard(SimpleNamespace(process_index=i, num_processes=processes), range(count), batch_size) for i in range(processes)
    ]
    assert sorted(k for batches in shards for batch in batches for k in batch) == list(range(count))
    counts = [len(batches) for batches in shards]
    assert max(counts) - min(counts) <= 1
