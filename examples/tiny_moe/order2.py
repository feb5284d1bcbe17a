"""A byte model of order 2: the yardstick for the tiny model, with nothing to train but counts.

The probability of a byte after two others is interpolated with orders 1 and 0 and the uniform distribution by Witten
and Bell's method (IEEE Transactions on Information Theory 37(4), 1991, method C): a context seen n times with t
different successors gives weight t / (n + t) to the next lower order. It has no parameter to tune.
"""

import numpy as np
import numpy.typing as npt

BYTES = 256


class Order2:
    """Counts of a training text; `bits` gives the code length of bytes after their two predecessors."""

    def __init__(self, text: bytes) -> None:
        """Count single bytes, pairs and triples of `text`."""
        symbols = np.frombuffer(text, np.uint8).astype(np.int64)
        pairs = symbols[:-1] * BYTES + symbols[1:]
        triples = pairs[:-1] * BYTES + symbols[2:]
        self.counts = [
            np.bincount(keys, minlength=BYTES**order).astype(np.int32).reshape(-1, BYTES)
            for order, keys in ((1, symbols), (2, pairs), (3, triples))
        ]
        self.totals = [table.sum(axis=1) for table in self.counts]
        self.kinds = [(table > 0).sum(axis=1) for table in self.counts]

    def probability(self, before: npt.NDArray[np.uint8], here: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Probability of each byte of `here` [n] after its two predecessors in `before` [n, 2]."""
        first, second = before[:, 0].astype(np.int64), before[:, 1].astype(np.int64)
        result = np.full(len(here), 1 / BYTES)
        for order, context in enumerate((np.zeros_like(first), second, first * BYTES + second)):
            seen, kinds = self.totals[order][context], self.kinds[order][context]
            mixed = (self.counts[order][context, here] + kinds * result) / np.maximum(seen + kinds, 1)
            result = np.where(seen > 0, mixed, result)
        return result

    def bits(self, before: npt.NDArray[np.uint8], here: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Code length in bits of each byte of `here` [n] after its two predecessors in `before` [n, 2]."""
        return -np.log2(self.probability(before, here))
