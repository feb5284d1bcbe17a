"""A byte model of order 3 beside the tiny model: bits per byte on the same held-out bytes of this machine's text.

Orders 3 to 0 are interpolated by Witten and Bell's method, as in `order2`; contexts of three bytes are too many for tables, so that
counts are kept of those that occur. Per domain, as the harder of two yardsticks: it is told which text it reads, and has read all of
it, while the network has seen a fifth. `python examples/tiny_moe/order3.py` prints the comparison.
"""

import argparse
import math

import corpus
import numpy as np
import numpy.typing as npt
from order2 import BYTES, Order2

Keys = npt.NDArray[np.int64]


class Order3:
    """Counts of a training text; `bits` gives the code length of bytes after their three predecessors."""

    def __init__(self, text: bytes) -> None:
        """Count single bytes and runs of two to four bytes of `text`."""
        self._lower = Order2(text)
        symbols = np.frombuffer(text, np.uint8).astype(np.int64)
        contexts = (symbols[:-3] * BYTES + symbols[1:-2]) * BYTES + symbols[2:-1]
        self._runs, self._counts = np.unique(contexts * BYTES + symbols[3:], return_counts=True)
        self._contexts, first = np.unique(self._runs // BYTES, return_index=True)
        self._kinds = np.diff(np.append(first, len(self._runs)))
        self._totals = np.add.reduceat(self._counts, first)

    def bits(self, before: npt.NDArray[np.uint8], here: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Code length in bits of each byte of `here` [n] after its three predecessors in `before` [n, 3]."""
        wide = before.astype(np.int64)
        context = (wide[:, 0] * BYTES + wide[:, 1]) * BYTES + wide[:, 2]
        lower = self._lower.probability(before[:, 1:], here)
        seen, kinds = (
            _looked_up(self._contexts, context, self._totals),
            _looked_up(self._contexts, context, self._kinds),
        )
        mine = _looked_up(self._runs, context * BYTES + here, self._counts)
        mixed = (mine + kinds * lower) / np.maximum(seen + kinds, 1)
        return -np.log2(np.where(seen > 0, mixed, lower))


def _looked_up(keys: Keys, wanted: Keys, values: Keys) -> Keys:
    """Return the value of each wanted key, 0 where there is none; `keys` rise."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def order3_bits(counts: Order3, rows: npt.NDArray[np.uint8], counted: int) -> npt.NDArray[np.float64]:
    """Bits of the last `counted` bytes of each row, [windows, counted]."""
    here = rows[:, -counted:]
    before = np.stack([rows[:, -counted - back : -back] for back in (3, 2, 1)], axis=-1)
    return counts.bits(before.reshape(-1, 3), here.reshape(-1)).reshape(here.shape)


def main() -> None:
    """Print the comparison."""
    import torch
    from evaluate import COUNTED, model_bits, windows
    from quantise import load_int8

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--windows", type=int, default=300, help="of each domain, at most 300")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, found, means = load_int8(), corpus.documents(), []
    for domain in corpus.DOMAINS:
        held = corpus.joined(found, domain, held_out=True)
        if not held:
            continue
        every = windows(held)
        rows = every[:: max(1, len(every) // given.windows)][: given.windows]
        both = order3_bits(Order3(corpus.joined(found, domain, held_out=False)), rows, COUNTED), model_bits(model, rows)
        means.append([float(bits.mean()) for bits in both])
        errors = [float(bits.mean(1).std(ddof=1)) / math.sqrt(len(rows)) for bits in both]
        print(
            f"{domain:8s} order-3 per domain {means[-1][0]:.3f} ± {errors[0]:.3f}   model {means[-1][1]:.3f} ± {errors[1]:.3f}",
            flush=True,
        )
    order3, network = np.mean(means, axis=0)
    print(f"{'mean':8s} order-3 per domain {order3:.3f}           model {network:.3f}")


if __name__ == "__main__":
    main()
