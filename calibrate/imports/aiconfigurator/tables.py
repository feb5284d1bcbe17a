"""The tables of the `aiconfigurator-core` wheel: measured times of single kernels by system, engine, version and shape.

Modelled: where they lie in an installation, which version of each engine is current, and what its own collector did that makes
some rows no fact about a kernel. Such rows are left out, by rule and with the reason. A fit never reads what would judge it:
the wheel's sample of whole servers and its tables of wide expert parallelism. Ignored: the wheel's own model of performance, which is
never imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ....base.errors import InputError, UnknownName
from ....base.plain_yaml import parse
from ....base.text_files import read_text

if TYPE_CHECKING:
    import pandas as pd

WHEEL = "aiconfigurator_core"
FRAMEWORKS = {"tensorrt-llm": "trtllm", "vllm": "vllm", "sglang": "sglang"}
"""Engines by our names → folders of the tables."""
MACHINES = {"h100_sxm": "h100-sxm", "h200_sxm": "h200-sxm", "b200_sxm": "b200-sxm", "a100_sxm": "a100-80gb-sxm"}
"""Systems of the tables → bundled machines."""
LEFT_TO_JUDGE = ("silicon_sample", "wideep")
"""Parts of names of files that no fit may read: whole servers, and wide expert parallelism."""
_KNOWN_SLOTS = 1
"""Version of `query_versions.yaml` that is understood."""
_MOST_BYTES = 1 << 30
_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "moe/moe_perf": ("kernel_source", "moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size",
                     "moe_ep_size", "distribution", "latency"),
    "gemm/gemm_perf": ("gemm_dtype", "m", "n", "k", "latency"),
    "attention/generation_attention_perf": ("kernel_source", "batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim",
                                            "kv_cache_dtype", "step", "latency"),
    "attention/context_attention_perf": ("kernel_source", "batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim",
                                         "kv_cache_dtype", "attn_dtype", "step", "latency"),
    "mla/generation_mla_perf": ("kv_cache_dtype", "num_heads", "batch_size", "isl", "step", "latency"),
    "mla/context_mla_perf": ("kv_cache_dtype", "num_heads", "batch_size", "isl", "step", "latency"),
    "mla/mla_generation_module_perf": ("model", "kv_cache_dtype", "gemm_type", "num_heads", "batch_size", "isl", "step", "latency"),
    "mla/mla_context_module_perf": ("model", "kv_cache_dtype", "gemm_type", "num_heads", "batch_size", "isl", "step", "latency"),
    "comm/nccl_perf": ("op_name", "nccl_dtype", "num_gpus", "message_size", "latency"),
    "comm/custom_allreduce_perf": ("kernel_source", "allreduce_dtype", "num_gpus", "message_size", "latency"),
}  # fmt: skip
"""Tables that are read, and the columns that are needed of them."""
_USUAL: Mapping[str, Mapping[str, int]] = {
    "attention/generation_attention_perf": {"window_size": 0},
    "attention/context_attention_perf": {"window_size": 0},
}
"""Columns that older tables lack, and what they hold there."""
_GROUPS_SINCE = (0, 5, 14)
"""SGLang's tables from here on run whole layers, routing included, for models whose routing is no plain softmax."""
_WITHOUT_GATES = frozenset({
    (1024, 2688, 22, 512), (2048, 5120, 22, 512), (2688, 1856, 6, 128), (4096, 2688, 22, 512), (8192, 5120, 22, 512),
})  # fmt: skip
"""Experts of Nemotron 3: hidden width, intermediate width, choices, experts. They have two matrices, not three."""
_US = 1e3
"""Microseconds in a millisecond, in which latencies stand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """The tables of one system."""

    folder: Path
    """`systems` of the wheel."""
    system: str
    version: str
    """Of the wheel."""
    versions: Mapping[str, str]
    """Of each engine's tables."""

    def read(self, table: str, engine: str) -> pd.DataFrame | None:
        """Return a table (family/name) of an engine, or of NCCL, with `us`, its latencies in microseconds; None where there is none.

        Raises InputError naming the file where a column is missing or latencies are none.
        """
        import pandas as pd

        path = self.path(table, engine)
        if path is None:
            return None
        if any(word in path.name for word in LEFT_TO_JUDGE):
            raise InputError("--from aiconfigurator", path.name, "kept to judge fits by", "read another table")
        where, needed = f"{self.system}/{path.parent.parent.name}/{path.parent.name}/{path.name}", _COLUMNS[table]
        try:
            found = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:100]
            raise InputError(
                "--from aiconfigurator", where, f"not a table that can be read ({reason})", "install the wheel anew"
            ) from None
        missing = [name for name in needed if name not in found.columns]
        if missing:
            raise InputError("--from aiconfigurator", where, f"no column {', '.join(missing)}",
                             f"install a version of the wheel whose tables have it (0.12.0 does, this is {self.version})")  # fmt: skip
        usual = _USUAL.get(table, {})
        kept = found.loc[:, [*needed, *(name for name in usual if name in found.columns)]].copy()
        for name, value in usual.items():
            if name not in kept.columns:
                kept[name] = value
        kept["us"] = pd.to_numeric(kept.pop("latency"), errors="coerce").to_numpy(float) * _US
        if not (np.isfinite(kept["us"]) & (kept["us"] > 0)).all():
            raise InputError(
                "--from aiconfigurator", where, "latencies that are no positive numbers", "install the wheel anew"
            )
        return kept

    def path(self, table: str, engine: str) -> Path | None:
        """Return the file of a table, of the engine's current version or else of its newest that has it; None where there is none."""
        family, name = table.split("/")
        framework = FRAMEWORKS.get(engine, engine)
        beside = self.folder / "data" / self.system / family / framework
        if framework == "nccl":
            chosen = sorted(beside.glob(f"*/{name}.parquet"), key=lambda path: _numbers(path.parent.name))
            return chosen[-1] if chosen else None
        path = beside / self.versions.get(engine, "") / f"{name}.parquet"
        return path if path.exists() else None

    @property
    def engines(self) -> list[str]:
        """Engines with a table of experts."""
        return [engine for engine in FRAMEWORKS if self.path("moe/moe_perf", engine) is not None]


def installed_folder() -> Path | None:
    """Return the folder `systems` of the installed wheel; None without one."""
    spec = importlib.util.find_spec(WHEEL)
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(place) / "systems" / "data").is_dir():
            return Path(place) / "systems"
    return None


def open_tables(system: str, folder: Path | None = None, version: str | None = None) -> Tables:
    """Return the tables of a system; folder, version: those of the installed wheel where None.

    Raises InputError without the wheel, for its file of versions in an unknown shape, and for systems without tables of experts;
    UnknownName for a system that the wheel does not have.
    """
    if folder is None:
        folder = installed_folder()
        version = importlib.metadata.version("aiconfigurator-core") if folder is not None else None
    if folder is None:
        raise InputError(
            "--from", "aiconfigurator", "needs the wheel aiconfigurator-core", "pip install 'moeplan[aic]'"
        )
    known = sorted(path.name for path in (folder / "data").iterdir() if path.is_dir())
    if system not in known:
        raise UnknownName("--system", system, known)
    tables = Tables(folder=folder, system=system, version=version or "unknown", versions=_versions(folder, system))
    if not tables.engines:
        raise InputError(
            "--system", system, "the wheel has no table of experts (moe_perf) for it", f"choose {', '.join(MACHINES)}"
        )
    if system not in MACHINES:
        raise InputError("--system", system, "no bundled machine is of this kind", f"choose {', '.join(MACHINES)}")
    return tables


def _versions(folder: Path, system: str) -> dict[str, str]:
    """Return the current version of each engine's tables."""
    path = folder / "query_versions.yaml"
    if not path.exists():
        raise InputError(
            "--from aiconfigurator", path.name, "the wheel lacks it", "install aiconfigurator-core 0.12 or later"
        )
    try:
        data = parse(read_text(path, "--from aiconfigurator", _MOST_BYTES))
        if data.get("schema_version") != _KNOWN_SLOTS:
            raise ValueError(f"schema_version {data.get('schema_version')}, {_KNOWN_SLOTS} is known")
        rows: dict[str, Any] = data["defaults"] | data.get("overrides", {}).get(system, {})
        return {engine: str(rows[name]["current"]) for engine, name in FRAMEWORKS.items() if name in rows}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0][:100]
        raise InputError(
            "--from aiconfigurator", path.name, f"another form than is known ({reason})", "install 0.12.0"
        ) from None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version.split("."))


# --- what is wrong with some rows ----------------------------------------------------------------------------------------


def fair_experts(rows: pd.DataFrame, engine: str, version: str = "") -> pd.DataFrame:
    """Return the rows of experts that measure what they say; version: of the engine's tables.

    vLLM's and, since 0.5.14, SGLang's collectors route DeepSeek-V3's shape by groups, so that half of the experts are read: on two GPUs
    it takes as long as on one, in every format. Kernels without gates are other operations: only TensorRT-LLM's table names them, so those
    of the other engines go by their shapes.
    """
    shapes = rows[["hidden_size", "inter_size", "topk", "num_experts"]].itertuples(index=False, name=None)
    out = rows["kernel_source"].str.contains("nongated|min_latency") | np.array(
        [shape in _WITHOUT_GATES for shape in shapes], bool
    )
    if engine == "vllm" or (engine == "sglang" and _numbers(version) >= _GROUPS_SINCE):
        out |= (
            (rows["hidden_size"] == 7168)
            & (rows["inter_size"] == 2048)
            & (rows["topk"] == 8)
            & (rows["num_experts"] == 256)
        )
    return rows.loc[~out & (rows["num_experts"] % rows["moe_ep_size"] == 0)]


def counts_others(engine: str, version: str) -> bool:
    """Return whether an engine's rows of experts on several GPUs compute choices of other GPUs too, as those of their first expert.

    SGLang's collector of 0.5.10 passes tokens with a choice on the GPU, and sets choices elsewhere to expert 0 (`topk_ids.clamp(min=0)`,
    collect_moe.py at cb4d907c): on eight GPUs 16,384 tokens take as long as on one.
    """
    return engine == "sglang" and _numbers(version) < _GROUPS_SINCE


def fair_products(rows: pd.DataFrame, engine: str) -> pd.DataFrame:
    """Return the rows of products that measure a kernel: vLLM's of 8-bit blocks are timed without a graph, host time and all."""
    large = rows["n"].between(1024, 20480) & rows["k"].between(1024, 20480)
    return rows.loc[large & ~((rows["gemm_dtype"] == "fp8_block") & (engine == "vllm"))]


def fair_attention(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of attention without windows, with 2 to 16 heads a key–value head.

    With more than 32, TensorRT-LLM falls back to kernels several times slower.
    """
    ratio, whole = rows["num_heads"] / rows["num_key_value_heads"], rows["num_heads"] % rows["num_key_value_heads"] == 0
    return rows.loc[(rows["window_size"] == 0) & whole & ratio.between(2, 16) & rows["head_dim"].isin((64, 128))]


def fair_latent_layers(engine: str, system: str) -> bool:
    """Return whether an engine's tables of whole latent layers measure kernels: vLLM's on Hopper have 60 µs of host time in them."""
    return engine != "vllm" or not system.startswith("h")


def replayed(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of an engine's own reduction that were replayed from a graph, as engines run it."""
    return rows.loc[~rows["kernel_source"].str.contains("eager")]
