"""The small model that comes with a clone, as a checkpoint to run; and what three measured schedules say, in plain words.

Modelled: its committed weights (`examples/tiny_moe`, int8 with a scale a row) expanded into a folder as transformers opens it; which
schedules their own runs cannot tell apart. Ignored: installed packages, which bring no weights: there the demo replays a recording.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...base.units import MS_PER_S

_EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny_moe"
_WEIGHTS, _GATES, _SCALE = "tiny-moe-int8.safetensors", "lookahead-gates.safetensors", ".scale"


def available() -> bool:
    """Return whether the small model is here and can be run."""
    packages = ("torch", "transformers", "safetensors")
    return (_EXAMPLE / "weights" / _WEIGHTS).is_file() and all(importlib.util.find_spec(name) for name in packages)


def checkpoint(folder: Path) -> Path:
    """Write the small model as an ordinary checkpoint into `folder`, and return it."""
    from safetensors.numpy import load_file, save_file

    stored = load_file(_EXAMPLE / "weights" / _WEIGHTS)
    state = {}
    for name, values in stored.items():
        if not name.endswith(_SCALE):
            scale = stored.get(name + _SCALE)
            state[name] = values if scale is None else values.astype("float32") * scale[..., None]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((_EXAMPLE / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def gates() -> Path | None:
    """Return the small model's trained gates, which guess early; None where they are not here."""
    path = _EXAMPLE / "weights" / _GATES
    return path if path.is_file() else None


def texts(folder: Path) -> list[Path]:
    """Write two prompts into `folder`, beginnings of texts that every Python brings, and return their files."""
    prompts = {
        "code.txt": Path(json.__file__).read_text(encoding="utf-8")[-600:-480],
        "prose.txt": (json.__doc__ or "")[:120],
    }
    found = []
    for name, text in prompts.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        found.append(path)
    return found


def learnt(configurations: Sequence[dict[str, Any]]) -> list[str]:
    """Return what measured configurations say, a sentence a line: which is fastest, which cannot be told apart, how good predictions were.

    configurations: as `moeplan validate --json` lists them, `repeats_s` being the mean step of each repetition.
    """
    ranked = sorted(configurations, key=lambda one: one["measured_step_s"])
    first, *others = ranked
    lines = [f"{first['name']} took {first['measured_step_s'] * MS_PER_S:.2f} ms a token"]
    for one in others:
        more = one["measured_step_s"] / first["measured_step_s"] - 1
        if overlap(first["repeats_s"], one["repeats_s"]):
            lines.append(
                f"{one['name']} cannot be told apart from it on this machine: {more:.0%} more, and single repetitions of one schedule "
                f"differ by up to {max(map(_spread, (first['repeats_s'], one['repeats_s']))):.0%}"
            )
        else:
            lines.append(f"{one['name']} took {more:.0%} more, in every repetition")
    predicted = min(configurations, key=lambda one: one["predicted_step_s"])
    if predicted is first:
        lines.append("the prediction had named the fastest")
    elif overlap(first["repeats_s"], predicted["repeats_s"]):
        lines.append(f"the prediction had named {predicted['name']}, which is as fast as can be told")
    else:
        lost = predicted["measured_step_s"] / first["measured_step_s"] - 1
        lines.append(f"the prediction had named {predicted['name']}: trusting it costs {lost:.0%}")
    held = sum(one["interval_s"][0] <= one["measured_step_s"] <= one["interval_s"][1] for one in configurations)
    worst = max(abs(one["relative_error"]) for one in configurations)
    lines.append(
        f"predicted times were off by {worst:.0%} at most, and {held} of {len(configurations)} lie within their intervals"
    )
    return lines


def overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether some repetition of the slower schedule was no slower than some repetition of the faster."""
    return min(one) <= max(other) and min(other) <= max(one)


def _spread(repeats: Sequence[float]) -> float:
    return max(repeats) / min(repeats) - 1
