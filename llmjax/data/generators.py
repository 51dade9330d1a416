"""Random generators that never share a stream: each is named by what it is for and by the numbers it depends on.

Numbers alone do not name a stream: to NumPy the seeds (1, 2, 3) and (1, 2, 3, 0) are the same.
"""

import hashlib

import numpy as np


def generator(purpose: str, *numbers: int) -> np.random.Generator:
    """The generator of a purpose and whole numbers of any size; other ones give an independent stream."""
    name = " ".join([purpose, *map(str, numbers)])
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest()))
