"""The program that a report measured: whose kernels it runs, and the month that it was built in.

Modelled: servers and desktop programs as the engine inside them; builds of llama.cpp by their number. Ignored: what such programs
add themselves, and engines pinned to a build that is older than the program.
"""

from __future__ import annotations

import re

from ...specs.machines.engines import engines
from .rows import Report

_MONTH = re.compile(r"20[0-9]{2}(?:-[01][0-9])?(?![0-9])")
_BUILD = re.compile(r"b?([0-9]{4,5})(?![0-9a-z])", re.IGNORECASE)
_FIRST_BUILDS = (
    (2750, "2024-05"), (3070, "2024-06"), (3280, "2024-07"), (3490, "2024-08"), (3650, "2024-09"), (3860, "2024-10"),
    (4010, "2024-11"), (4230, "2024-12"), (4400, "2025-01"), (4610, "2025-02"), (4800, "2025-03"), (5020, "2025-04"),
    (5230, "2025-05"), (5560, "2025-06"), (5790, "2025-07"), (6060, "2025-08"), (6330, "2025-09"), (6660, "2025-10"),
    (6910, "2025-11"), (7210, "2025-12"), (7590, "2026-01"), (7900, "2026-02"), (8180, "2026-03"), (8600, "2026-04"),
    (9000, "2026-05"), (9470, "2026-06"), (9850, "2026-07"), (10200, "2026-08"), (10550, "2026-09"), (11300, "2026-10"),
)  # fmt: skip
"""About the first build of llama.cpp of each month, by its release page and by dated reports."""
_LATE_MONTHS = 12
"""A build is not told of so much later; other numbers are those of somebody's own builds."""
_SAME_KERNELS = {
    "llama.cpp": ("lmstudio", "koboldcpp", "jan", "llamacpp", "llamacpppython", "llamaserver", "ramalama", "localai",
                  "gpt4all", "lemonade", "oobabooga", "textgenerationwebui", "textgenwebui", "llamaswap", "unslothstudio"),
    "ik_llama.cpp": ("ikllama", "ikllamacpp", "crococpp", "llamafile"),  # llamafile since its 0.8: pull request 394 there
    "tensorrt-llm": ("tensorrtedgellm", "trtllm", "tensorrt"),
    "vllm": ("vllmomni", "aphrodite", "aphroditeengine"),
    "ktransformers": ("ktkernel", "kt", "sglangkt"),
    "exllamav3": ("tabbyapi",),
    "mlx": ("mlxlm", "mlxvlm", "mlxserver", "omlx"),
    "transformers": ("huggingface", "hf", "hftransformers"),
}  # fmt: skip
"""Servers and desktop programs by the engine whose kernels they run."""


def program(report: Report) -> str:
    """Return the name of the program that a report measured, in small letters; "generic" where it names none."""
    return str(report.part("engine").get("name") or "generic").strip().lower()


def engine_of(report: Report) -> str | None:
    """Return the known engine whose kernels a report's program runs: by its own name, or as the first word of it ("llama.cpp (Vulkan)").

    None where no engine is known to.
    """
    name = program(report)
    if name in engines():
        return name
    plain = re.sub(r"[^a-z0-9]", "", name)
    for engine, names in _SAME_KERNELS.items():
        if plain in names:
            return engine
    for engine in sorted(engines(), key=len, reverse=True):
        if re.match(rf"{re.escape(engine)}(?![a-z0-9])", name):
            return engine
    return None


def built_in(report: Report) -> str | None:
    """Return the month that a report's engine was built, or measured, in: "2025-03", or "2023" of a year; None where nothing says so.

    A build of llama.cpp says its month by its number, which may be some months before a report of it.
    """
    version, dated = report.part("engine").get("version"), None
    for text in (report.row.get("date"), version):
        found = _MONTH.match(text) if isinstance(text, str) else None
        if found is not None:
            dated = found[0]
            break
    build = _BUILD.match(version.strip()) if isinstance(version, str) else None
    if build is None or engine_of(report) != "llama.cpp":
        return dated
    number, numbered = int(build[1]), None
    for first, month in _FIRST_BUILDS:
        numbered = month if number >= first else numbered
    if numbered is None or dated is None:
        return dated or numbered
    late = _months(dated) - _months(numbered)
    return numbered if 0 <= late <= _LATE_MONTHS else dated


def _months(month: str) -> int:
    """Return a month ("2025-03", or "2025" for its last) as a number."""
    return int(month[:4]) * 12 + int(month[5:7] or 12)
