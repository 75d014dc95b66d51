"""Random numbers as a function of a key: nothing random is carried in a state.

Every draw of the project comes from `generator(purpose, seed, position)`. Resuming a run, or sampling image 41,017
alone, needs only the key. The bit generator is Philox, made for this use (Salmon et al. 2011, "Parallel random numbers:
as easy as 1, 2, 3"). torch's CPU generator does not fit: it keeps 32 bits of its seed, so among 50,000 images two would
share their noise with probability 0.25.
"""

import hashlib

import numpy as np


def generator(*key: str | int) -> np.random.Generator:
    """A generator that is a function of the key alone, e.g. `generator("time", seed, step)`."""
    text = repr(tuple(part if isinstance(part, str) else int(part) for part in key))  # numpy's integers print otherwise
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()  # 128 bits, the key size of Philox
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
