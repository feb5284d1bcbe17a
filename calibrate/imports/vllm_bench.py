"""What `vllm bench serve` and `vllm bench latency` save (`--save-result`, `--output-json`), as measured speeds.

Modelled: a server kept busy by a fixed number of requests (`--request-rate inf`): its whole rate, and the rate of decoding from the median
time between tokens; one request at a time: prompt and decoding apart. Latency of one batch, whose lengths come from the command line
unless the file is in PyTorch's benchmark format, which has them. Several results in one file (`--append-result`). Ignored: rates of
arriving requests (how many are decoded together is not stated), percentiles, goodput.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...base import plain_json
from ...base.errors import InputError
from ...base.units import MS_PER_S
from .bench_line import MOST_LINES, BenchLine, checked

TOOL = "vllm-bench"
_REMEDY = "give the JSON that vllm bench serve --save-result or vllm bench latency --output-json writes"
_BATCHED_TOKENS = 8192
"""Tokens of a pass, unless the server is told otherwise (max_num_batched_tokens)."""
_MOST_SEQUENCES = 256
"""Requests that a server decodes together, unless told otherwise (max_num_seqs)."""
_SERVE = ("duration", "completed", "total_input_tokens", "total_output_tokens", "total_token_throughput")
# Up to this share of decoding steps with a prompt's tokens in them, the median step has none.
_MOST_MIXED = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """What a latency file does not say."""

    prompt_tokens: int | None = None
    reply_tokens: int | None = None
    requests: int | None = None
    ubatch_tokens: int | None = None


def read_vllm_bench(text: str, given: Lengths | None = None) -> list[BenchLine]:
    """Return the speeds of saved results, in order; raises InputError for files that are none, or lack what a speed needs."""
    given = given or Lengths()
    found: list[BenchLine] = []
    entries = _entries(text)
    for number, entry in enumerate(entries, 1):
        where = f"result {number}"
        if "latencies" in entry or "avg_latency" in entry:
            found.append(_latency(entry, given, where))
        elif "total_output_tokens" in entry or "request_throughput" in entry:
            found += _serve(entry, given, where)
        else:
            raise InputError(
                f"{TOOL}: {where}", sorted(entry)[:6], "neither a result of serve nor one of latency", _REMEDY
            )
    if not found:
        raise InputError(TOOL, "(JSON)", "no result", _REMEDY)
    if len(found) > MOST_LINES:
        raise InputError(TOOL, f"{len(found)} speeds", f"more than {MOST_LINES}", "give fewer results")
    return found


def _entries(text: str) -> list[dict[str, Any]]:
    """Return the objects of a file: one, an array, or one a line; of PyTorch's format, results with their arguments."""
    try:
        document = plain_json.parse(text, allow_nan=True)
    except ValueError as whole:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2 or not all(line.lstrip().startswith("{") for line in lines):
            raise InputError(TOOL, "(JSON)", str(whole), _REMEDY) from None
        try:
            document = [plain_json.parse(line, allow_nan=True) for line in lines]
        except ValueError as error:
            raise InputError(TOOL, "(JSON)", str(error), _REMEDY) from None
    if (
        isinstance(document, list)
        and document
        and all(isinstance(one, dict) and "benchmark" in one for one in document)
    ):
        return _of_pytorch(document)
    entries = document if isinstance(document, list) else [document]
    for entry in entries:
        if not isinstance(entry, dict):
            raise InputError(TOOL, entry, "not a result", _REMEDY)
    return entries


def _of_pytorch(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return latency results of PyTorch's format with the arguments it keeps; of serve the plain file says more."""
    found = []
    for record in records:
        benchmark, metric, model = (record.get(name) for name in ("benchmark", "metric", "model"))
        if not isinstance(benchmark, dict) or not isinstance(metric, dict) or metric.get("name") != "latency":
            continue
        extra = benchmark.get("extra_info")
        arguments = extra.get("args") if isinstance(extra, dict) else None
        if not isinstance(arguments, dict):
            raise InputError(f"{TOOL}: benchmark.extra_info.args", extra, "missing", _REMEDY)
        name = model.get("name") if isinstance(model, dict) else None
        found.append({"latencies": metric.get("benchmark_values"), "model_id": name, "arguments": arguments})
    if not found:
        raise InputError(TOOL, "(JSON)", "no latency among its records", _REMEDY)
    return found


def _latency(entry: Mapping[str, Any], given: Lengths, where: str) -> BenchLine:
    arguments = entry.get("arguments") or {}
    prompt, reply, requests = (
        _length(given_value, arguments.get(key), option, where)
        for given_value, key, option in (
            (given.prompt_tokens, "input_len", "--prompt-tokens"), (given.reply_tokens, "output_len", "--reply-tokens"),
            (given.requests, "batch_size", "--concurrency"),
        )
    )  # fmt: skip
    times = entry.get("latencies")
    if not isinstance(times, list) or not times:
        raise InputError(f"{TOOL}: {where}: latencies", times, "no list of seconds", _REMEDY)
    seconds = [_positive(value, f"{where}: latencies") for value in times]
    mean = math.fsum(seconds) / len(seconds)
    stated = entry.get("avg_latency")
    if stated is not None and abs(_positive(stated, f"{where}: avg_latency") / mean - 1) > 0.01:
        raise InputError(
            f"{TOOL}: {where}: avg_latency", stated, f"not the mean of its latencies, {mean:.4g}", "measure again"
        )
    spread = math.sqrt(math.fsum((one - mean) ** 2 for one in seconds) / len(seconds)) / mean
    # A prompt's pass gives the first token.
    return _checked(
        entry, given, where, prompt=prompt * requests, generated=max(0, reply - 1) * requests, requests=requests, depth=0, deviation=spread,
        rate=(prompt + max(0, reply - 1)) * requests / mean, test=f"{requests} × {prompt} + {reply}",
    )  # fmt: skip


def _length(given: int | None, stated: Any, option: str, where: str) -> int:
    if stated is not None:
        if isinstance(stated, bool) or not isinstance(stated, int) or stated < 0:
            raise InputError(f"{TOOL}: {where}", stated, "not a count", _REMEDY)
        if given is not None and given != stated:
            raise InputError(option, given, f"the file says {stated}", "leave it out")
        return stated
    if given is None:
        raise InputError(
            option,
            "(absent)",
            "a latency file does not say how long its requests were",
            f"give {option} as vllm bench was told",
        )
    return given


def _serve(entry: Mapping[str, Any], given: Lengths, where: str) -> list[BenchLine]:
    for name in _SERVE:
        if entry.get(name) is None:
            raise InputError(
                f"{TOOL}: {name}", "(absent)", f"missing from {where}: another version, or not its result", _REMEDY
            )
    for option, value in (
        ("--prompt-tokens", given.prompt_tokens),
        ("--reply-tokens", given.reply_tokens),
        ("--concurrency", given.requests),
    ):
        if value is not None:
            raise InputError(option, value, "a result of serve says it itself", "leave it out")
    if entry.get("failed"):
        raise InputError(
            f"{TOOL}: {where}: failed", entry["failed"], "its rates are of fewer requests than ran", "measure again"
        )
    completed = _positive(entry["completed"], f"{where}: completed")
    prompt = round(_positive(entry["total_input_tokens"], f"{where}: total_input_tokens") / completed)
    reply = round(_positive(entry["total_output_tokens"], f"{where}: total_output_tokens") / completed)
    rate = _positive(entry["total_token_throughput"], f"{where}: total_token_throughput")
    seconds = _positive(entry["duration"], f"{where}: duration")
    if abs(math.log(rate * seconds / completed / max(1, prompt + reply))) > 0.1:
        raise InputError(
            f"{TOOL}: {where}: total_token_throughput", rate, "not its tokens over its duration", "measure again"
        )
    if entry.get("request_rate") not in (None, "inf"):
        reason = "requests arrived at a rate: how many were decoded together is not stated"
        return [_checked(entry, given, where, prompt=prompt, generated=reply, requests=1, depth=0, rate=rate,
                         test=f"{prompt} + {reply}", reason=reason)]  # fmt: skip
    together = entry.get("max_concurrency")
    if together is None:
        together = completed
        if completed > _MOST_SEQUENCES:
            raise InputError(f"{TOOL}: {where}: max_concurrency", None, "how many requests ran together is not stated",
                             "measure with a bound on requests in flight")  # fmt: skip
    count = min(int(_positive(together, f"{where}: max_concurrency")), int(completed))
    shown = f"{count} × {prompt} + {reply}"
    if count == 1:
        parts = []
        if entry.get("median_ttft_ms") is not None:
            first = _positive(entry["median_ttft_ms"], f"{where}: median_ttft_ms")
            parts.append(_checked(entry, given, where, prompt=prompt, generated=0, requests=1, depth=0, rate=prompt * MS_PER_S / first,
                                  test=f"first token of {prompt}"))  # fmt: skip
        if entry.get("median_tpot_ms") is not None and reply > 1:
            each = _positive(entry["median_tpot_ms"], f"{where}: median_tpot_ms")
            parts.append(_checked(entry, given, where, prompt=0, generated=reply - 1, requests=1, depth=prompt, rate=MS_PER_S / each,
                                  test=f"{reply} tokens after {prompt}"))  # fmt: skip
        if parts:
            return parts
    found = [
        _checked(entry, given, where, prompt=prompt * count, generated=(reply - 1) * count, requests=count, depth=0,
                 rate=rate * (prompt + reply - 1) / (prompt + reply), test=shown)
    ]  # fmt: skip
    if entry.get("median_itl_ms") is not None and count / max(1, reply) <= _MOST_MIXED:
        each = _positive(entry["median_itl_ms"], f"{where}: median_itl_ms")
        found.append(_checked(entry, given, where, prompt=0, generated=(reply - 1) * count, requests=count, depth=prompt,
                              rate=count * MS_PER_S / each, test=f"{shown}, between tokens"))  # fmt: skip
    return found


def _checked(entry: Mapping[str, Any], given: Lengths, where: str, *, prompt: int, generated: int, requests: int, depth: int, rate: float,
             test: str, deviation: float = 0.0, reason: str | None = None) -> BenchLine:  # fmt: skip
    model = entry.get("model_id")
    return checked(
        BenchLine(
            where=where, test=test, prompt_tokens=prompt, generated_tokens=generated, tokens_per_s=rate, relative_deviation=deviation,
            depth_tokens=depth, requests=requests, ubatch_tokens=given.ubatch_tokens, engine="vllm",
            model=str(model) if model else None, quant=_quant(str(model)) if model else None, reason=reason or _cannot(entry),
        ),
        TOOL,
    )  # fmt: skip


def _cannot(entry: Mapping[str, Any]) -> str | None:
    arguments = entry.get("arguments")
    ways = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    if isinstance(arguments, dict) and any(
        isinstance(arguments.get(name), int) and arguments[name] > 1 for name in ways
    ):
        return "several cards took part"
    return None


def _quant(model: str) -> str | None:
    """Return the weight format that a checkpoint's name ends in, None where it names none."""
    last = model.rstrip("/").rpartition("/")[2].upper()
    for ending, name in (
        ("FP8", "FP8"),
        ("AWQ", "AWQ"),
        ("GPTQ-INT4", "GPTQ"),
        ("GPTQ", "GPTQ"),
        ("NVFP4", "NVFP4"),
        ("FP4", "NVFP4"),
        ("BF16", "BF16"),
    ):
        if f"-{ending}" in last:
            return name
    return None


def _positive(value: Any, where: str) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 < value < 1e15
        or not math.isfinite(value)
    ):
        raise InputError(f"{TOOL}: {where}", value, "not a number above zero", "measure again")
    return float(value)
