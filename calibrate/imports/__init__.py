"""Readers of what other tools print of speeds, as they print it.

bench_line    one measured speed: what was run, on what, how fast
llama_bench   llama-bench's JSON, JSON lines, CSV, Markdown and SQL
vllm_bench    the JSON of `vllm bench serve` and `vllm bench latency`.
"""
