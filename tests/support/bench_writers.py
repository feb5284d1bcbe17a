"""Files of benchmark tools as the tools write them, from their public sources: tools/llama-bench/llama-bench.cpp, vllm/benchmarks/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

FIELDS = (
    "build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename", "model_type", "model_size", "model_n_params",
    "n_batch", "n_ubatch", "n_threads", "cpu_mask", "cpu_strict", "poll", "type_k", "type_v", "n_gpu_layers", "n_cpu_moe", "split_mode",
    "main_gpu", "no_kv_offload", "flash_attn", "devices", "tensor_split", "tensor_buft_overrides", "load_mode", "embeddings",
    "no_op_offload", "no_host", "fit_target", "fit_min_ctx", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts",
    "stddev_ts",
)  # fmt: skip
_INT = {
    "build_number", "n_batch", "n_ubatch", "n_threads", "poll", "model_size", "model_n_params", "n_gpu_layers", "main_gpu", "n_prompt",
    "n_gen", "n_depth", "avg_ns", "stddev_ns", "no_op_offload", "n_cpu_moe", "fit_target", "fit_min_ctx", "flash_attn",
}  # fmt: skip
_BOOL = {"no_kv_offload", "cpu_strict", "embeddings", "no_host"}
_FLOAT = {"avg_ts", "stddev_ts"}
_WIDTH = {"model": -30, "t/s": 20, "size": 10, "params": 10, "ngl": 3, "test": 15}


def entry(
    *, prompt: int = 0, gen: int = 0, depth: int = 0, speed: float = 100.0, spread: float = 0.005, **other: Any
) -> dict[str, str]:
    """Return one test's values as the tool keeps them, all of them text: Qwen3-30B-A3B on an RTX 4090 unless `other` says otherwise."""
    nanoseconds = int(1e9 * (prompt + gen) / speed) if speed == speed and speed > 0 else 0
    values: dict[str, Any] = {
        "build_commit": "8cf427ff", "build_number": 6250, "cpu_info": "AMD Ryzen 9 7950X 16-Core Processor",
        "gpu_info": "NVIDIA GeForce RTX 4090", "backends": "CUDA", "model_filename": "models/Qwen3-30B-A3B-Q4_K_M.gguf",
        "model_type": "qwen3moe 30B.A3B Q4_K - Medium", "model_size": 18556688384, "model_n_params": 30532122624, "n_batch": 2048,
        "n_ubatch": 512, "n_threads": 16, "cpu_mask": "0x0", "cpu_strict": 0, "poll": 50, "type_k": "f16", "type_v": "f16",
        "n_gpu_layers": 99, "n_cpu_moe": 0, "split_mode": "layer", "main_gpu": 0, "no_kv_offload": 0, "flash_attn": 1, "devices": "auto",
        "tensor_split": "0.00", "tensor_buft_overrides": "none", "load_mode": "mmap", "embeddings": 0, "no_op_offload": 0, "no_host": 0,
        "fit_target": 0, "fit_min_ctx": 0, "n_prompt": prompt, "n_gen": gen, "n_depth": depth, "test_time": "2026-09-01T11:57:09Z",
        "avg_ns": nanoseconds, "stddev_ns": int(nanoseconds * spread), "avg_ts": f"{speed:f}", "stddev_ts": f"{speed * spread:f}",
    }  # fmt: skip
    return {name: str(value) for name, value in (values | other).items()}


def as_json(entries: Sequence[Mapping[str, str]]) -> str:
    """Return what `-o json` prints."""
    objects = []
    for one in entries:
        lines = "".join(f'    "{name}": {_json_value(name, one[name])},\n' for name in one)
        objects.append(
            "  {\n" + lines + f'    "samples_ns": [ {one["avg_ns"]} ],\n    "samples_ts": [ {one["avg_ts"]} ]\n  }}'
        )
    return "[\n" + ",\n".join(objects) + "\n]\n"


def as_jsonl(entries: Sequence[Mapping[str, str]]) -> str:
    """Return what `-o jsonl` prints."""
    return "".join(
        "{" + "".join(f'"{name}": {_json_value(name, one[name])}, ' for name in one)
        + f'"samples_ns": [ {one["avg_ns"]} ],"samples_ts": [ {one["avg_ts"]} ]}}\n'
        for one in entries
    )  # fmt: skip


def as_csv(entries: Sequence[Mapping[str, str]]) -> str:
    """Return what `-o csv` prints."""
    rows = [",".join('"' + value.replace('"', '""') + '"' for value in one.values()) for one in entries]
    return "\n".join([",".join(entries[0]), *rows]) + "\n"


def as_sql(entries: Sequence[Mapping[str, str]]) -> str:
    """Return what `-o sql` prints; values are not escaped."""
    names = list(entries[0])
    columns = ",\n".join(
        f"  {name} {'INTEGER' if name in _INT | _BOOL else 'REAL' if name in _FLOAT else 'TEXT'}" for name in names
    )
    found = f"CREATE TABLE IF NOT EXISTS llama_bench (\n{columns}\n);\n\n"
    for one in entries:
        found += (
            f"INSERT INTO llama_bench ({', '.join(names)}) VALUES ("
            + ", ".join(f"'{value}'" for value in one.values())
            + ");\n"
        )
    return found


def as_markdown(entries: Sequence[Mapping[str, str]], *, extra: Sequence[str] = ()) -> str:
    """Return what the tool prints without `-o`; extra: columns for settings that are not at their default."""
    shown = {"n_ubatch": "n_ubatch", "n_cpu_moe": "n_cpu_moe", "tensor_buft_overrides": "ot", "flash_attn": "fa", "n_threads": "threads",
             "type_k": "type_k", "type_v": "type_v"}  # fmt: skip
    on_cores = "CPU" in entries[0]["backends"]
    columns = [
        "model",
        "size",
        "params",
        "backend",
        *([] if on_cores else ["ngl"]),
        *(shown[name] for name in extra),
        "test",
        "t/s",
    ]
    found = "|" + "".join(f" {_padded(name, name)} |" for name in columns) + "\n"
    found += (
        "|"
        + "".join(f" {'-' * (abs(_width(name)) - 1)}{':' if _width(name) > 0 else '-'} |" for name in columns)
        + "\n"
    )
    for one in entries:
        size, params = int(one["model_size"]), int(one["model_n_params"])
        prompt, gen, depth = int(one["n_prompt"]), int(one["n_gen"]), int(one["n_depth"])
        test = f"pp{prompt}" if not gen else f"tg{gen}" if not prompt else f"pp{prompt}+tg{gen}"
        cells = {
            "model": one["model_type"], "size": f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB",
            "params": f"{params / 1e9:.2f} B" if params >= 1e9 else f"{params / 1e6:.2f} M", "backend": one["backends"],
            "ngl": one["n_gpu_layers"], "test": test + (f" @ d{depth}" if depth else ""),
            "t/s": f"{float(one['avg_ts']):.2f} ± {float(one['stddev_ts']):.2f}",
        } | {shown[name]: one[name] for name in extra}  # fmt: skip
        found += "|" + "".join(f" {_padded(name, cells[name])} |" for name in columns) + "\n"
    return found + f"\nbuild: {entries[0]['build_commit']} ({entries[0]['build_number']})\n"


FORMATS = {"json": as_json, "jsonl": as_jsonl, "csv": as_csv, "sql": as_sql, "md": as_markdown}


def serve(*, prompt: int = 1024, reply: int = 128, requests: int = 32, concurrency: int | None = 8, itl_ms: float = 12.0,
          ttft_ms: float = 90.0, rate: float = 9000.0, model: str = "Qwen/Qwen3-30B-A3B", **other: Any) -> dict[str, Any]:  # fmt: skip
    """Return what `vllm bench serve --save-result` writes, without the details that it drops by default."""
    total = (prompt + reply) * requests
    found: dict[str, Any] = {
        "date": "20260901-120000", "endpoint_type": "vllm", "backend": "vllm", "label": None, "model_id": model, "tokenizer_id": model,
        "num_prompts": requests, "request_rate": "inf", "burstiness": 1.0, "max_concurrency": concurrency, "duration": total / rate,
        "completed": requests, "failed": 0, "total_input_tokens": prompt * requests, "total_output_tokens": reply * requests,
        "request_throughput": requests * rate / total, "request_goodput": None, "output_throughput": reply * requests * rate / total,
        "total_token_throughput": rate, "max_output_tokens_per_s": 1.0, "max_concurrent_requests": concurrency,
    }  # fmt: skip
    for name, value in (("ttft", ttft_ms), ("tpot", itl_ms), ("itl", itl_ms)):
        found |= {
            f"mean_{name}_ms": value,
            f"median_{name}_ms": value,
            f"std_{name}_ms": value / 10,
            f"p99_{name}_ms": 2 * value,
        }
    return found | other


def latency(seconds: Sequence[float]) -> str:
    """Return what `vllm bench latency --output-json` writes."""
    mean = sum(seconds) / len(seconds)
    percentiles = {str(share): sorted(seconds)[len(seconds) * share // 100] for share in (10, 25, 50, 75, 90, 99)}
    return json.dumps(
        {"avg_latency": mean, "std_latency": 0.01, "latencies": list(seconds), "percentiles": percentiles}, indent=4
    )


def latency_records(seconds: Sequence[float], **arguments: Any) -> str:
    """Return the same in PyTorch's benchmark format, which keeps the arguments."""
    args = {
        "input_len": 32,
        "output_len": 128,
        "batch_size": 8,
        "model": "Qwen/Qwen3-30B-A3B",
        "tensor_parallel_size": 1,
    } | arguments
    benchmark = {"name": "vLLM benchmark", "extra_info": {"args": args, "compilation_config.mode": None}}
    metric = {
        "name": "latency",
        "benchmark_values": list(seconds),
        "extra_info": {"avg_latency": sum(seconds) / len(seconds)},
    }
    return json.dumps([{"benchmark": benchmark, "model": {"name": args["model"]}, "metric": metric}])


def _json_value(name: str, value: str) -> str:
    if name in _BOOL:
        return "false" if value == "0" else "true"
    return value if name in _INT | _FLOAT else json.dumps(value, ensure_ascii=False)


def _width(name: str) -> int:
    return _WIDTH.get(name, -10 if name in ("backend", "ot") else 10)


def _padded(name: str, text: str) -> str:
    width = _width(name)
    return text.ljust(-width) if width < 0 else text.rjust(width)
