"""Random numbers as a function of a key; no random state is kept.

Every draw of the project comes from `generator(purpose, seed, position)`. Resuming a run, or sampling image 41,017
alone, needs only the key. The bit generator is Philox, a counter-based generator (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"). torch's CPU generator does not fit: it keeps 32 bits of its seed, so among 50,000 images two
would share their noise with probability 0.25.
"""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor


def generator(*key: str | int) -> np.random.Generator:
    """A generator that is a function of the key alone, e.g. `generator("time", seed, step)`."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(key), "little")))


def generators(*key: str | int, positions: Iterable[int]) -> Iterator[np.random.Generator]:
    """`generator(*key, p)` for each of the positions, ten times as fast: one object is reused, so draw from it before
    asking for the next, and the common part of the keys is hashed once."""
    bits = np.random.Philox(key=0)
    result = np.random.Generator(bits)
    state = bits.state
    common = _hash("(" + "".join(f"{part!r}, " for part in _plain(key)))
    for p in positions:
        hashed = common.copy()
        hashed.update(b"%d)" % p)
        state["state"]["key"] = np.frombuffer(hashed.digest(), dtype="<u8")
        bits.state = state
        yield result


def _digest(key: tuple[str | int, ...]) -> bytes:
    return _hash(repr(_plain(key))).digest()


def _hash(text: str):
    """A BLAKE2b hash of 128 bits, the key size of Philox."""
    return hashlib.blake2b(text.encode(), digest_size=16)


def _plain(key: tuple[str | int, ...]) -> tuple[str | int, ...]:
    return tuple(part if isinstance(part, str) else int(part) for part in key)  # numpy's integers print otherwise


def gaussian_noise(stream: str, seed: int, indices: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise [n, *shape], float32, on the CPU; row i is a function of (stream, seed, indices[i]) alone.

    Drawn on the CPU so that the same index gives the same noise on every device, for every batch size and number of
    processes. `stream` keeps training and sampling apart.
    """
    indices = list(indices)
    x0 = np.empty((len(indices), *shape), dtype=np.float32)
    for row, g in zip(x0, generators(stream, seed, positions=indices), strict=True):
        g.standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(x0)
