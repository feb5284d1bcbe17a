"""What experts of few bits cost: `python -m benchmarks.quantised --model FOLDER --text HELD-OUT… [-o results.json]`.

For each weight format and rounding: bytes of an expert and of all experts as they lie in the store, bits per byte of held-out text and
how many more they are than with 32 bits (with its standard error over windows: the same bytes are scored), and tokens/s of greedy decoding
with every expert resident, formats in turns.

Modelled: a model whose tokens are bytes. Windows of 256 bytes, the last 128 of each scored. Activations are bfloat16 beside packed
weights, as the kernels have them. Ignored: offloading (`benchmarks.lookahead`), calibration data.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

from moeplan.base.text_files import write_atomic
from moeplan.base.units import MS_PER_S, NS_PER_S
from moeplan.devices.stores.slot_sizes import expert_layout
from moeplan.executor.model.align import windows_of
from moeplan.executor.model.session import Loaded, open_model, run_model
from moeplan.executor.model.taps import Taps
from moeplan.kernels.packing import HALF_QUADRATIC, NEAREST
from moeplan.specs.schedules.presets import load_preset
from moeplan.traces.recording import DECODE

FORMATS = (
    ("32", NEAREST),
    ("16", NEAREST),
    ("8", NEAREST),
    *((bits, way) for bits in "432" for way in (NEAREST, HALF_QUADRATIC)),
)
_LENGTH, _SCORED, _BATCH = 256, 128, 8


def main() -> None:
    """Score, run, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--windows", type=int, default=60, help="of each text, at even distances")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    texts = [Path(path).read_bytes() for path in given.text]
    rows = torch.cat([_spread(windows_of([list(text)], _LENGTH), given.windows) for text in texts])
    scores: dict[tuple[str, str], np.ndarray[Any, Any]] = {}
    for rounding in (NEAREST, HALF_QUADRATIC):
        with open_model(given.model, rounding=rounding) as loaded:
            spec = loaded.spec
            for bits, way in FORMATS:
                if way == rounding:
                    scores[bits, way] = _scores(loaded, bits, rows)
            if rounding == NEAREST:
                steps = _steps(loaded, list(texts[0][:64]), given.new_tokens, given.repeats)
    exact = scores["32", NEAREST]
    found = []
    for (bits, rounding), each in scores.items():
        more = each - exact
        low, middle, high = np.quantile(steps[bits], (0.25, 0.5, 0.75))
        size = expert_layout(spec, bits).slot_bytes
        found.append({
            "bits": bits, "rounding": rounding if int(bits) <= 4 else None, "expert_bytes": size,
            "store_bytes": size * spec.num_moe_layers * spec.num_experts, "bits_per_byte": float(each.mean()),
            "more_by": float(more.mean()), "standard_error": float(more.std(ddof=1) / math.sqrt(len(more))),
            "tokens_per_s": 1 / float(middle), "step_s": steps[bits], "quartiles_s": [float(low), float(high)],
        })  # fmt: skip
    document = {
        "model": spec.name, "expert_parameters": 3 * spec.expert_hidden * spec.expert_intermediate_size, "windows": len(rows),
        "scored_bytes": len(rows) * _SCORED, "repeats": given.repeats, "rows": found, "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0], "processor": platform.processor() or platform.machine()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
    }  # fmt: skip
    for row in found:
        print(
            f"{row['bits']:>2} bits {row['rounding'] or '':15} {row['expert_bytes']:>10,} bytes an expert; "
            f"{row['bits_per_byte']:.4f} bits/byte, {row['more_by']:+.4f} ± {row['standard_error']:.4f}; "
            f"{MS_PER_S / row['tokens_per_s']:.2f} ms a token"
        )
    if given.output is not None:
        write_atomic(given.output, json.dumps(document, indent=1) + "\n")


def _spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return at most `count` rows at even distances."""
    return rows[:: max(1, len(rows) // count)][:count]


def _scores(loaded: Loaded, bits: str, rows: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return bits per byte of each window, experts stored as `bits`."""
    found = []
    taps = Taps(loaded, bits)
    with taps.listening(), torch.no_grad():
        for part in rows.split(_BATCH):
            logits = loaded.assembled.model(part, use_cache=False).logits.float()[:, -_SCORED - 1 : -1]
            wanted = part[:, -_SCORED:]
            losses = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            found.append(losses.view(len(part), _SCORED).mean(1).numpy() / math.log(2))
    return np.concatenate(found)


def _steps(loaded: Loaded, prompt: list[int], new_tokens: int, repeats: int) -> dict[str, list[float]]:
    """Return mean decode steps of runs with every expert resident, seconds by weight format; formats take turns."""
    formats = list(dict.fromkeys(bits for bits, _ in FORMATS))
    everything = load_preset("mixtral-offloading-code").with_options(
        cache__experts_per_layer=loaded.spec.num_experts, copy__overlap=True, copy__write_back=False
    )
    found: dict[str, list[float]] = {bits: [] for bits in formats}
    for number in range(repeats + 1):
        for bits in formats:
            done = run_model(
                loaded, everything.with_options(experts__bits=bits), [prompt, prompt], max_new_tokens=new_tokens
            )
            mine = (done.step_phase == DECODE) & (done.step_request == 1)  # by then what the text needs is resident
            if number:
                found[bits].append(float((done.step_end_ns - done.step_begin_ns)[mine].mean()) / NS_PER_S)
    return found


if __name__ == "__main__":
    main()
