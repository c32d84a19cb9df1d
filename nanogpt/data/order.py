"""Seeded orders by arithmetic on the index: no table, so any position of any epoch is reached at once.

A Feistel network over pairs (i mod a, i div a) with a*b >= n is a bijection whatever its round function is; walking each cycle
until it re-enters [0, n) restricts it to a permutation of n (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002,
who add modulo a and b where Feistel xors). With a near sqrt(n), fewer than one walk in sqrt(n) takes a second step.
"""

import hashlib
import math

import numpy as np

ROUNDS = 6  # each changes one half


def keys(*labels: object) -> np.ndarray:
    """8 uint64 words that depend on every label and are the same on every machine and for every numpy version."""
    digest = hashlib.blake2b("/".join(map(str, labels)).encode(), digest_size=64).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): uint64 -> uint64, bijective, every bit affects every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """The images of some indices under the permutation of range(n) that key picks.

    Args:
        index: (K,) integers in [0, n).
        n: size of the permutation.
        key: what :func:`keys` gives.

    Returns:
        (K,) int64 in [0, n).
    """
    a = math.isqrt(n - 1) + 1
    a, b = np.uint64(a), np.uint64(-(-n // a))
    x = index.astype(np.uint64)
    outside = np.arange(len(x))
    while len(outside):
        right, left = np.divmod(x[outside], a)
        for i in range(0, ROUNDS, 2):
            left = (left + mix(right + key[i])) % a
            right = (right + mix(left + key[i + 1])) % b
        x[outside] = right * a + left
        outside = outside[x[outside] >= n]
    return x.astype(np.int64)
