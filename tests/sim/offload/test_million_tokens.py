"""A recording of a million tokens of a large model is made, summarised and replayed in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeplan.base.units import GIB, KIB

LONG = os.environ.get("MOEPLAN_LONG") == "1"
# Linux counts the largest resident set in KiB; mapped pages of files count too.
_COMMAND = """
import resource, sys
from moeplan.cli import main
try:
    main()
finally:
    sys.stderr.write(f"\\npeak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\\n")
"""


def run(*arguments: str) -> dict[str, object]:
    """Return what a command prints as JSON, having checked that it never held a GiB."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND, *arguments, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stderr.split()[-1]) * KIB < GIB
    document: dict[str, object] = json.loads(done.stdout)
    return document


@pytest.mark.skipif(not LONG, reason="takes a minute or two")
def test_a_million_tokens_stay_under_a_gibibyte(tmp_path: Path) -> None:
    path = str(tmp_path / "t")
    made = run("trace", "synth", "--preset", "deepseek-r1", "--tokens", "1000000", "-o", path)
    assert [made[key] for key in ("num_layers", "num_experts", "top_k")] == [58, 256, 8]
    assert 10**6 <= made["num_tokens"] < 10**6 + 768  # type: ignore[operator]
    stats = run("trace", "stats", path)
    assert stats["num_tokens"] == made["num_tokens"]
    schedule = ["--set", "predictor.kind=none", "--set", "experts.bits=4"]
    found = run("simulate", "--model", "deepseek-v3", "--hardware", "h100-sxm", "--trace", path, *schedule)
    decode, requests = stats["num_decode_tokens"], stats["num_requests"]
    assert isinstance(decode, int) and isinstance(requests, int)
    assert found["num_tokens"] == made["num_tokens"] and decode < found["num_steps"] <= decode + requests  # type: ignore[operator]
