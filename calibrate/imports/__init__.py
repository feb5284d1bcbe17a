"""Samples, constants and speeds from the output of other tools.

nvbandwidth, nccl_tests    links, as samples
profile                    a machine whose links are those
bench_line                 one measured speed: what was run, on what, how fast
llama_bench                llama-bench's JSON, JSON lines, CSV, Markdown and SQL
vllm_bench                 the JSON of `vllm bench serve` and `vllm bench latency`.
"""
