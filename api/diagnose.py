"""Is a measured speed normal: the function behind `moeplan diagnose`.

Modelled: an engine's command line, or the output of llama-bench, on a machine and of a model named as everywhere. Ignored: how a verdict
comes about (`diagnosis/`), and printing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

from ..base.errors import InputError
from ..base.text_files import read_text
from ..base.units import MIB
from ..calibrate.imports.llama_bench import read_llama_bench
from ..diagnosis.calls.read import read_command
from ..diagnosis.case import DECODE, PREFILL
from ..diagnosis.diagnose import NORMAL, Diagnosis, diagnose_case
from ..diagnosis.lines import Measured, cases_of_lines
from ..diagnosis.origin import Asked, case_of_call
from ..diagnosis.share import report_rows
from ..diagnosis.share import share as write_rows

_MOST_BYTES = 64 * MIB


def diagnose(
    model: str | None,
    hardware: str,
    *,
    command: str,
    measured_decode: float | None = None,
    measured_prefill: float | None = None,
    quant: str | None = None,
    engine: str | None = None,
    prompt_tokens: int | None = None,
    reply_tokens: int | None = None,
    concurrency: int | None = None,
    built: str | None = None,
) -> Diagnosis:
    """Return whether measured speeds are normal for a run, what binds, what nothing can beat, what would help and what to look for.

    model: None: the one that the command names. command: how the engine was started, e.g. "llama-server -ngl 99 --n-cpu-moe 28 -c 16384";
    flags are those of llama.cpp, ik_llama.cpp (llama-server, llama-cli, llama-bench), vLLM, SGLang and KTransformers. measured_decode,
    measured_prefill: tokens per second of generation (all requests together) and of prompts; one at least. quant: weight format as files
    are named, where neither command nor model says it. prompt_tokens, reply_tokens: the requests that were measured (512 + 128). built:
    month of the engine's build.

    Raises InputError for flags that the engine does not have or that contradict each other, DoesNotFit where nothing would run.
    """
    asked = Asked(
        model=model,
        hardware=hardware,
        quant=quant,
        prompt=prompt_tokens,
        reply=reply_tokens,
        concurrency=concurrency or 1,
        built=built,
    )
    measured = {
        name: value for name, value in ((DECODE, measured_decode), (PREFILL, measured_prefill)) if value is not None
    }
    if not measured:
        raise InputError(
            "--measured-decode",
            "(absent)",
            "nothing was measured",
            "give --measured-decode, --measured-prefill, or both",
        )
    call = read_command(command, engine)
    return diagnose_case(case_of_call(call, asked), measured, call.text)


def diagnose_file(
    path: str | os.PathLike[str],
    hardware: str,
    *,
    model: str | None = None,
    quant: str | None = None,
    engine: str | None = None,
    built: str | None = None,
) -> list[tuple[Measured, Diagnosis | None]]:
    """Return every line of a llama-bench output with its diagnosis, None for lines that are not predicted.

    Raises InputError for a file that is none, and where the command line contradicts it.
    """
    lines = read_llama_bench(read_text(path, "--from", _MOST_BYTES))
    found: list[tuple[Measured, Diagnosis | None]] = []
    for one in cases_of_lines(lines, hardware=hardware, model=model, quant=quant, engine=engine, built=built):
        if one.case is None or one.metric is None:
            found.append((one, None))
        else:
            found.append((one, diagnose_case(one.case, {one.metric: one.line.tokens_per_s}, one.line.test)))
    return found


def file_document(lines: Sequence[tuple[Measured, Diagnosis | None]]) -> dict[str, Any]:
    """Return what `moeplan diagnose --from` prints: every line in short, and the one farthest from its prediction whole."""
    known = [(line, one) for line, one in lines if one is not None]
    line, worst = max(known, key=lambda pair: _distance(pair[1]))
    rows = [
        {"where": each.line.where, "test": each.line.test, "measured": each.line.tokens_per_s, "reason": each.reason}
        | ({"verdict": None, "predicted": None, "low": None, "high": None} if one is None else
           {name: value for name, value in one.speeds[0].to_dict().items() if name in ("verdict", "predicted", "low", "high")})
        for each, one in lines
    ]  # fmt: skip
    return worst.to_dict() | {"lines": rows, "shown": f"{line.line.where} ({line.line.test})"}


def _distance(found: Diagnosis) -> tuple[bool, float]:
    one = found.speeds[0]
    return one.verdict != NORMAL, abs(math.log(one.measured / one.predicted))


def share(found: Diagnosis | Iterable[Diagnosis], path: str | os.PathLike[str]) -> int:
    """Return how many lines of field reports were added to the file at `path`; raises InputError where there can be none."""
    every = [found] if isinstance(found, Diagnosis) else list(found)
    return write_rows(
        path,
        [row for one in every for row in report_rows(one.case, [(each.metric, each.measured) for each in one.speeds])],
    )
