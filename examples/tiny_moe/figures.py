"""Figures of a recording (recall of the early guesses, load, reuse) as the Markdown that READMEs and tests share.

Recall of width w at distance d: share of the experts really chosen that are among the w best guesses made d layers
earlier, over the decode tokens and the layers that have such a guess. Chance is w / num_experts for guesses drawn
blindly.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplan.traces.format import DECODE, RoutingTrace, load_trace

BUNDLED = Path(__file__).resolve().parents[2] / "traces" / "bundled" / "tiny-moe.safetensors"
WEIGHT_FIGURES = Path(__file__).with_name("weights") / "figures.json"


def recall(trace: RoutingTrace) -> npt.NDArray[np.float64]:
    """Recall of the early guesses on decode tokens, [distance, width]."""
    if trace.predicted is None:
        raise ValueError("the recording has no early guesses")
    chosen, guessed = trace.experts[trace.phase == DECODE], trace.predicted[trace.phase == DECODE]
    _, num_layers, num_distances, max_width = guessed.shape
    table = np.zeros((num_distances, max_width))
    for distance in range(1, num_distances + 1):
        made = guessed[:, distance:num_layers, distance - 1]
        hit = made[..., None, :] == chosen[:, distance:, :, None].astype(np.int16)  # [tokens, layers, top_k, width]
        table[distance - 1] = hit.mean(axis=(0, 1, 2)).cumsum()
    return table


def load(trace: RoutingTrace) -> npt.NDArray[np.int64]:
    """Decode choices per layer and expert, [num_layers, num_experts]."""
    chosen = trace.experts[trace.phase == DECODE]
    counts = [
        np.bincount(chosen[:, layer].reshape(-1), minlength=trace.num_experts) for layer in range(trace.num_layers)
    ]
    return np.stack(counts)


def reuse(trace: RoutingTrace) -> tuple[float, float]:
    """Share of a decode token's experts that the token before it also chose; the same for independent draws."""
    here = np.flatnonzero((trace.phase[1:] == DECODE) & (trace.request[1:] == trace.request[:-1])) + 1
    same = trace.experts[here][..., :, None] == trace.experts[here - 1][..., None, :]
    per_token = load(trace) / int((trace.phase == DECODE).sum())  # chance of each expert to be among a token's choices
    return float(same.any(axis=-1).mean()), float((per_token**2).sum(axis=1).mean() / trace.top_k)


def markdown(trace: RoutingTrace) -> str:
    """All figures of a recording as Markdown."""
    table, counts = recall(trace), load(trace)
    by_layer = counts.max(axis=1) / counts.mean(axis=1)
    again, chance = reuse(trace)
    widths = range(1, table.shape[1] + 1)
    lines = ["| made | " + " | ".join(f"best {width}" for width in widths) + " |", "|---" * (len(widths) + 1) + "|"]
    for distance, row in enumerate(table, start=1):
        lines.append(
            f"| {distance} layer{'s' * (distance > 1)} early | " + " | ".join(f"{value:.3f}" for value in row) + " |"
        )
    lines.append("| blind | " + " | ".join(f"{width / trace.num_experts:.3f}" for width in widths) + " |")
    domains = json.loads(trace.metadata["domains"])
    num_decode = int((trace.phase == DECODE).sum())
    loads = ", ".join(f"{value:.2f}" for value in by_layer)
    lines += [
        "",
        f"- {trace.num_tokens:,} tokens of {len(domains)} requests, {num_decode:,} of them decode",
        f"- requests by domain: {', '.join(f'{name} {domains.count(name)}' for name in dict.fromkeys(domains))}",
        f"- load max/mean per layer, decode: {loads} (mean {by_layer.mean():.2f})",
        f"- next token uses an expert again: {again:.3f}; independent draws with the same loads: {chance:.3f}",
    ]
    return "\n".join(lines) + "\n"


def held_out_markdown(table: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Held-out bits per byte as Markdown, from the `held_out` entry of `weights/figures.json`."""
    names = list(table["mean"])
    lines = ["| held-out bits/byte | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for domain, row in table.items():
        cells = [
            f"{row[n]['bits_per_byte']:.3f}" + (f" ± {e:.3f}" if (e := row[n].get("standard_error")) else "")
            for n in names
        ]
        lines.append(f"| {domain} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the figures of a recording and of the committed weights."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trace", type=Path, nargs="?", default=BUNDLED)
    print(markdown(load_trace(parser.parse_args().trace)))
    print(held_out_markdown(json.loads(WEIGHT_FIGURES.read_text())["held_out"]), end="")


if __name__ == "__main__":
    main()
