"""Which documents are validation, by their number alone, so that it is known before the corpus has been read to its end."""

import math

import numpy as np

from nanogpt.data import order

SEED = 2357  # nanoGPT's


class Draw:
    """Each document by its own lot: a hash of its number, below the fraction."""

    def __init__(self, fraction: float):
        self.bound = np.uint64(int(fraction * 2**64))
        self.salt = order.keys("split", SEED)[0]

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """(N,) numbers of documents -> (N,) bool."""
        return order.mix(order.mix(numbers.astype(np.uint64)) ^ self.salt) < self.bound


class NanoGPTDraw(Draw):
    """The documents that nanoGPT's preparation of OpenWebText draws: the head of numpy's seeded permutation of all of them.

    ``datasets`` permutes by ``np.random.default_rng(seed).permutation(n)`` and holds out the first ``ceil(fraction * n)``.
    """

    def __init__(self, documents: int, fraction: float):
        self.documents, self.fraction = documents, fraction
        self.table: np.ndarray | None = None  # (documents,) bool, made when first asked

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        if self.table is None:
            self.table = np.zeros(self.documents, dtype=bool)
            held_out = np.random.default_rng(SEED).permutation(self.documents)[: math.ceil(self.fraction * self.documents)]
            self.table[held_out] = True
        known = numbers < self.documents
        return known & self.table[np.where(known, numbers, 0)]
