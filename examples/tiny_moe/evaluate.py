"""Bits per byte on held-out text: the tiny model and the order-2 byte model on exactly the same bytes.

Per domain `NUM_WINDOWS` windows of 256 bytes at even distances; only the last 128 bytes of a window count, so every
counted byte has at least 128 bytes of context. Windows do not share counted bytes. The standard error is over windows
and says nothing about other corpora.
"""

import math

import corpus
import numpy as np
import numpy.typing as npt
import torch
import transformers
from order2 import Order2

NUM_WINDOWS = 300
LENGTH = 256
COUNTED = 128


def windows(text: bytes) -> npt.NDArray[np.uint8]:
    """Held-out windows of one domain, uint8 [NUM_WINDOWS, LENGTH + 1], at even distances of at least COUNTED bytes."""
    symbols = np.frombuffer(text, np.uint8)
    stride = (len(symbols) - LENGTH - 1) // NUM_WINDOWS
    if stride < COUNTED:
        raise ValueError(f"{len(symbols)} held-out bytes are too few for {NUM_WINDOWS} windows")
    return np.stack([symbols[start : start + LENGTH + 1] for start in range(0, stride * NUM_WINDOWS, stride)])


@torch.inference_mode()
def model_bits(model: transformers.MixtralForCausalLM, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Bits of every counted byte under the model, [windows, COUNTED]."""
    found = []
    for part in torch.from_numpy(rows.astype(np.int64)).split(20):
        logits = model(part[:, :-1], use_cache=False).logits[:, -COUNTED:]
        wanted = part[:, -COUNTED:]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), wanted.flatten(), reduction="none")
        found.append((losses / math.log(2)).view(len(part), COUNTED).numpy())
    return np.concatenate(found)


def order2_bits(counts: Order2, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Bits of every counted byte under the order-2 model, [windows, COUNTED]."""
    here = rows[:, -COUNTED:]
    before = np.stack([rows[:, -COUNTED - 2 : -2], rows[:, -COUNTED - 1 : -1]], axis=-1)
    return counts.bits(before.reshape(-1, 2), here.reshape(-1)).reshape(here.shape)


def compare(models: dict[str, transformers.MixtralForCausalLM]) -> dict[str, dict[str, dict[str, float]]]:
    """Bits per byte, `{domain: {model: {"bits_per_byte", "standard_error"}}}`, and their mean over domains.

    Two order-2 models are counted: one on all training text, one per domain, which is told the domain and is
    therefore the harder one to beat.
    """
    found = corpus.documents()
    domains = [domain for domain in corpus.DOMAINS if corpus.joined(found, domain, held_out=True)]
    everything = Order2(corpus.SEPARATOR.join(corpus.joined(found, domain, held_out=False) for domain in domains))
    table: dict[str, dict[str, dict[str, float]]] = {}
    for domain in domains:
        rows = windows(corpus.joined(found, domain, held_out=True))
        own = Order2(corpus.joined(found, domain, held_out=False))
        bits = {"order-2": order2_bits(everything, rows), "order-2 per domain": order2_bits(own, rows)}
        bits |= {name: model_bits(model, rows) for name, model in models.items()}
        table[domain] = {}
        for name, values in bits.items():
            by_window = values.mean(axis=1)
            error = by_window.std(ddof=1) / math.sqrt(len(by_window))
            table[domain][name] = {
                "bits_per_byte": round(float(values.mean()), 4),
                "standard_error": round(float(error), 4),
            }
    names = list(next(iter(table.values())))
    means = {name: round(float(np.mean([row[name]["bits_per_byte"] for row in table.values()])), 4) for name in names}
    table["mean"] = {name: {"bits_per_byte": value} for name, value in means.items()}
    return table
