"""The registry of readers: what `--from KIND` means, and the one function that runs them.

Modelled: a reader is a function from a path and keyword options to a recording; its options are read from its
signature, so that a wrong one is refused by name. Ignored: guessing the kind from the file.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ..errors import InputError, UnknownName
from .read_llamacpp import read_llama_csv, read_llama_imatrix
from .read_megatron import read_megatron
from .read_moe_infinity import read_moe_infinity
from .read_npz import read_npz_trace
from .read_routed_experts import read_sglang_routed_experts, read_vllm_routed_experts
from .read_sglang import read_sglang_per_pass, read_sglang_per_token, read_sglang_stat
from .read_trtllm import read_trtllm
from .read_verl import read_verl
from .recording import LoadProfile, RoutingTrace

Reader = Callable[..., RoutingTrace | LoadProfile]

READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "llama-csv": read_llama_csv,
        "llama-imatrix": read_llama_imatrix,
        "megatron": read_megatron,
        "moe-infinity": read_moe_infinity,
        "npz": read_npz_trace,
        "sglang-per-pass": read_sglang_per_pass,
        "sglang-per-token": read_sglang_per_token,
        "sglang-routed-experts": read_sglang_routed_experts,
        "sglang-stat": read_sglang_stat,
        "trtllm": read_trtllm,
        "verl": read_verl,
        "vllm-routed-experts": read_vllm_routed_experts,
    }
)


def import_trace(kind: str, path: str | os.PathLike[str], **options: Any) -> RoutingTrace | LoadProfile:
    """Return the recording in `path`, read as `kind`; sources that only counted give a LoadProfile.

    Raises UnknownName for a kind or an option that does not exist, InputError for a file that is not of that kind.
    """
    reader = READERS.get(kind)
    if reader is None:
        raise UnknownName("kind", kind, READERS)
    known = reader_options(kind)
    for name in options:
        if name not in known:
            raise UnknownName(f"option of {kind}", name, known)
    needed = [name for name, default in known.items() if default is inspect.Parameter.empty and name not in options]
    if needed:
        raise InputError(needed[0], "missing", f"the {kind} format does not say it", f"give {', '.join(needed)}")
    return reader(path, **options)


def reader_options(kind: str) -> Mapping[str, Any]:
    """Return option name → default (`inspect.Parameter.empty` when it must be given) of one reader."""
    reader = READERS.get(kind)
    if reader is None:
        raise UnknownName("kind", kind, READERS)
    parameters = inspect.signature(reader).parameters.values()
    return MappingProxyType({p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY})
