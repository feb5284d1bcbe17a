"""The project's own scenarios: what `tests/baselines/default.json` pins.

Modelled: every published schedule for one device on six machines with half of the experts' room; plans for many devices; the papers;
the public reports of every kind, on one box and of many ranks; stored validations on a CPU; machines made of parts under several
engines. Ignored: plans for one device, whose search is made of the simulations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..papers.field.parallel.rows import KINDS as PARALLEL_KINDS
from ..papers.field.scores import KINDS
from ..papers.registry import PAPERS
from ..specs.schedules.presets import PRESETS
from .document import Scenario

_VALIDATED = "../../benchmarks/results/validate_cpu.json"
"""As seen from the file of pinned figures."""
VALIDATIONS = (
    "tenth: calibrated before, five passes, fresh clone",
    "eleventh: calibrated in the same run, fresh clone",
)
_WINDOW = 300
# A laptop, desktops of two generations, a cloud instance and two data centre cards. The budget is the runtime's own memory and room for
# about half of the bundled model's 96 experts, so that caches, guesses and cores have something to decide.
_MACHINES = {
    "rtx-3080-mobile": "540MiB", "rtx-4090": "540MiB", "rtx-5090": "640MiB",
    "t4": "435MiB", "a100-80gb-sxm": "540MiB", "b200-sxm": "745MiB",
}  # fmt: skip
_TINY = {"model": "tiny-moe", "routing": None}
_PLANS: dict[str, dict[str, Any]] = {
    "tiny-moe on one a100 server": {
        **_TINY, "hardware": "a100-80gb-sxm", "num_nodes": 1, "ranks_per_node": 4, "phase": "prefill", "tokens_per_rank": 128,
        "search_moves": 500,
    },
    "tiny-moe on two h100 servers": {
        **_TINY, "hardware": "h100-sxm", "num_nodes": 2, "ranks_per_node": 2, "num_redundant": 4, "tokens_per_rank": 32,
        "search_moves": 500,
    },
    "mixtral-8x7b on one h800 server": {
        "model": "mixtral-8x7b", "routing": {"requests": 12, "prompt_tokens": 64, "reply_tokens": 8}, "hardware": "h800-sxm",
        "num_nodes": 1, "ranks_per_node": 4, "num_redundant": 8, "phase": "prefill", "tokens_per_rank": 64, "search_moves": 200,
    },
    "gpt-oss-20b on two b200 servers, from loads": {
        "model": "gpt-oss-20b", "routing": {"requests": 16, "prompt_tokens": 128, "reply_tokens": 8, "counts": True},
        "hardware": "b200-sxm", "num_nodes": 2, "ranks_per_node": 4, "num_redundant": 8, "tokens_per_rank": 64,
    },
}  # fmt: skip
_DESKTOP = "rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB"
_SERVER = "rtx-4090 + 2 x epyc-9355 + ddr5-6400x24:768GiB"
_ENGINES: dict[str, dict[str, Any]] = {
    "gpt-oss-20b under llama.cpp": {"model": "gpt-oss-20b", "hardware": _DESKTOP},
    "qwen3-30b-a3b under llama.cpp, experts on the cores": {
        "model": "qwen3-30b-a3b", "hardware": "rtx-3060 + ryzen-7-7700x + ddr5-5600x2:64GiB", "quant": "Q4_K_M", "schedule": "n-cpu-moe",
    },
    "qwen3-30b-a3b on cores alone": {"model": "qwen3-30b-a3b", "hardware": "epyc-9355 + ddr5-6400x12:384GiB", "engine": "ik_llama.cpp",
                                     "quant": "Q4_K_M"},
    "glm-4.5-air in unified memory": {"model": "glm-4.5-air", "hardware": "apple-m4-max", "quant": "Q4_K_M"},
    "gpt-oss-120b on strix halo": {"model": "gpt-oss-120b", "hardware": "strix-halo", "prompt_tokens": 256, "reply_tokens": 32},
    "deepseek-v3 under ktransformers": {"model": "deepseek-v3", "hardware": _SERVER, "engine": "ktransformers", "quant": "Q4_K_M",
                                        "prompt_tokens": 128, "reply_tokens": 16},
    "qwen3-30b-a3b under vllm, 16 at once": {"model": "qwen3-30b-a3b", "hardware": "h100-sxm5-80gb", "engine": "vllm", "concurrency": 16,
                                             "prompt_tokens": 128, "reply_tokens": 32},
    "qwen3-30b-a3b under exllamav3": {"model": "qwen3-30b-a3b", "hardware": "rtx-3090", "engine": "exllamav3", "quant": "Q4_K"},
    "olmoe-1b-7b under transformers": {"model": "olmoe-1b-7b", "hardware": "rtx-4090", "engine": "transformers"},
    "deepseek-v3 does not fit": {"model": "deepseek-v3", "hardware": "rtx-4090", "engine": "vllm"},
}  # fmt: skip


def default_scenarios() -> dict[str, Scenario]:
    """Return the scenarios of the default file, by name: what comes before the last slash is run together."""
    return {each.name: each for each in _all()}


def _all() -> Iterator[Scenario]:
    for machine, memory in _MACHINES.items():
        for preset in PRESETS:
            options = {"model": "tiny-moe", "hardware": machine, "trace": "bundled", "memory": memory, "window": _WINDOW,
                       "schedule": preset}  # fmt: skip
            yield Scenario(name=f"schedules/{machine}/{preset}", command="simulate", options=options)
    for name, options in _ENGINES.items():
        yield Scenario(name=f"engines/{name}", command="simulate", options={"trace": None, **options})
    for name, options in _PLANS.items():
        yield Scenario(name=f"plans/{name}", command="plan --mode ep", options=options)
    for paper in PAPERS:
        yield Scenario(name=f"papers/{paper}", command="reproduce", options={"paper": paper})
    for kind in KINDS:
        yield Scenario(name=f"field/{kind}", command="reproduce", options={"paper": "field", "kind": kind})
    for kind in PARALLEL_KINDS:
        yield Scenario(
            name=f"field of many ranks/{kind}",
            command="reproduce",
            options={"paper": "field", "kind": kind, "parallel": True},
        )
    for run in VALIDATIONS:
        yield Scenario(
            name=f"validation on a CPU/{run}", command="validation", options={"file": _VALIDATED, "run": run}
        )
