"""What processes agree on."""

import os

import pytest

from configs.errors import UserError
from flow.runtime import distributed


def refuse(rank: int) -> None:
    raise UserError(f"refused by {rank}")


def agree() -> None:
    """For each of two processes, which would decide otherwise on its own."""
    rank = int(os.environ["RANK"])
    distributed.build_accelerator()
    assert distributed.decided_by_main(lambda: ("decided by", rank)) == ("decided by", 0)
    with pytest.raises(UserError, match="refused by 0"):
        distributed.decided_by_main(lambda: refuse(rank))


def test_the_main_process_decides(pair):
    """One that looks later, at a folder that has changed since, gets the same answer."""
    pair(agree)


def test_a_process_on_its_own_decides():
    assert distributed.decided_by_main(lambda: 3) == 3
