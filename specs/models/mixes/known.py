"""Names of weight formats as people write them, as the rest of the house knows them.

Modelled: engines' and quantisers' names in any case, editions of a quantiser ("smol-IQ2_KS", "QAT-Q4_0", rows repacked "Q4_0_8_8"), bits of
MLX, EXL, AWQ and GPTQ files. Ignored: which matrices such a file leaves at 16 bits.
"""

from __future__ import annotations

import re

from .names import mix

_KNOWN = {
    "BF16": "16", "FP16": "16", "F16": "16", "FP32": "32", "F32": "32", "FP8": "8", "FP8-DYNAMIC": "8", "INT8": "8", "W8A8": "8",
    "W8A16": "8", "INT8-W8A8": "8", "INT4": "int4-g64", "W4A16": "int4-g128", "AUTOROUND": "int4-g128", "HQQ": "int4-g64",
    "NVFP4": "nvfp4", "NF4": "nf4-g64", "BNB-NF4": "nf4-g64", "BNB-4BIT": "nf4-g64", "Q4F16_1": "int4-g32", "Q4K": "Q4_K_M",
    "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "Q3_K": "Q3_K_M", "Q8": "Q8_0",
    "INT4-AWQ": "int4-g128-zero", "FP4": "nvfp4",
}  # fmt: skip
USUAL = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "UD-Q4_K_XL", "IQ4_XS",
         "UD-Q3_K_XL", "UD-Q2_K_XL", "MXFP4_MOE", "BF16", "FP8", "NVFP4", "AWQ", "GPTQ-Int4",
         "W4A16", "mlx-4bit", "exl3_4bpw", "4.58bpw")  # fmt: skip
"""Names that people look for, for messages."""
_EXL = re.compile(r"exl[23][-_]?([0-9.]+) ?bpw")
_BITS = re.compile(r"(?:mlx[-_]?)?([2-8])[-_]?bits?|mlx[-_]?q?([2-8])")
_GROUPS = re.compile(r"(awq|gptq|autoround)(?:[-_](?:int)?([2348])(?:[-_]?bits?)?)?(?:[-_]marlin)?")
_EDITION = re.compile(r"^(?:smol-|qat-|ud-)|(?<=^q4_0)_(?:4_4|4_8|8_8)$")
_DYNAMIC = re.compile(r"q[2-8]_k_xl")


def known_name(name: str) -> str:
    """Return the name that the house knows a format by; another text as it is."""
    whole = name.strip().lower()
    found = _KNOWN.get(whole.upper())
    if found is not None:
        return found
    if mix(whole) is not None:
        return name.strip()
    low = _EDITION.sub("", whole)
    if exl := _EXL.fullmatch(low):
        return f"{float(exl[1]):.4g}bpw"
    if bits := _BITS.fullmatch(low):
        return f"mlx{bits[1] or bits[2]}-g64"
    if groups := _GROUPS.fullmatch(low):
        width = groups[2] or "4"
        return "8" if width == "8" else f"int{width}-g128" + ("-zero" if groups[1] == "awq" else "")
    if _DYNAMIC.fullmatch(low):
        return f"UD-{low.upper()}"
    return low.upper() if low != whole else name
