"""One way to derive seeds, so that every random choice depends on the user's seed and on its own name only."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for the purpose that ``names`` spell; independent of the order of calls and of threads."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: object) -> np.random.Generator:
    """A numpy generator seeded by ``derive_seed``."""
    return np.random.default_rng(derive_seed(seed, *names))
