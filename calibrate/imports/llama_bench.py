"""What `llama-bench` prints (`-o json`, `jsonl`, `csv`, `md`, `sql`), of llama.cpp and ik_llama.cpp, as measured speeds.

Modelled: prompts (pp), generation (tg), both (pg; ik_llama.cpp also generation after a prompt), at any depth (`-d`), several models,
builds and settings in one file, log lines around a table. Column names changed over the years: absent ones take the tool's default, but
for what no speed can be read without. Ignored: single repetitions, and settings that say nothing of speed by themselves.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...base import plain_json
from ...base.errors import InputError
from ...base.units import GIB, GIGA, KIB, KILO, MEGA, MIB, NS_PER_S, TERA, TIB
from .bench_line import MOST_LINES, BenchLine, checked

TOOL = "llama-bench"
_WHOLE_REMEDY = "give the whole output of llama-bench -o json, jsonl, csv, md or sql"
_NEEDED = ("model_type", "n_prompt", "n_gen", "avg_ts")
# What Markdown calls its columns.
_COLUMNS = {
    "model": "model_type", "ngl": "n_gpu_layers", "sm": "split_mode", "threads": "n_threads", "nkvo": "no_kv_offload", "fa": "flash_attn",
    "nopo": "no_op_offload", "dev": "devices", "ts": "tensor_split", "ot": "tensor_buft_overrides", "fitt": "fit_target",
    "fitc": "fit_min_ctx", "backend": "backends", "size": "model_size", "params": "model_n_params", "fmoe": "fused_moe", "mla": "mla_attn",
    "rtr": "repack",
}  # fmt: skip
_TEST = re.compile(r"(?:pp ?(\d+))?\+?(?:tg ?(\d+))?(?: ?@ ?pp ?(\d+))?(?: ?@ ?d ?(\d+))?\Z")
_SPEED = re.compile(r"([0-9.eE+naif-]+)\s*(?:(?:±|Â±|\+/?-)\s*([0-9.eE+naif-]+))?\Z")
_SCALE = {"KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB, "K": KILO, "M": MEGA, "B": GIGA, "T": TERA}
_SIZED = re.compile(r"([0-9.]+) (KiB|MiB|GiB|TiB|K|M|B|T)\Z")
_INSERT = re.compile(r"INSERT INTO (?:llama_bench|test\w*) \(([\w, ]+)\) VALUES \((.*)\);\s*\Z", re.DOTALL)
_BACKENDS = {
    "cuda": "cuda",
    "rocm": "rocm",
    "hip": "rocm",
    "vulkan": "vulkan",
    "metal": "metal",
    "mtl": "metal",
    "cpu": "cpu",
    "blas": "cpu",
}
"""By the first word of a back end's name; others are not predicted."""
_IK_ONLY = ("fused_moe", "mla_attn", "attn_max_batch", "ser", "grouped_er")
_DIFFER = 0.5
_FTYPE = re.compile(
    r"(?P<before>.*?)\s(?P<name>all F32|BF16|F16|MXFP4 MoE|NVFP4|(?:IQ|TQ|Q)\d\w*(?: mix)?(?: - .*)?|mostly \w+)(?: \(guessed\))?\Z"
)
_OTHER_NAMES = {"all F32": "F32", "MXFP4 MoE": "MXFP4_MOE", "IQ3_S mix": "IQ3_M"}
_SIZES = {"Small": "S", "Medium": "M", "Large": "L"}


def read_llama_bench(text: str) -> list[BenchLine]:
    """Return the speeds of a llama-bench output, in its order; raises InputError for what is none, or damaged."""
    rows = _rows(text)
    if not rows:
        raise InputError(TOOL, "(text)", "no measured line", _WHOLE_REMEDY)
    if len(rows) > MOST_LINES:
        raise InputError(TOOL, f"{len(rows)} lines", f"more than {MOST_LINES}", "give fewer lines")
    return [_line(where, row) for where, row in rows]


def _rows(text: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (where, columns) of each line of an output, whatever its format."""
    begins = [(line, line.lstrip()) for line in text.splitlines() if line.strip()]
    for number, (_, line) in enumerate(begins):
        if line.startswith("[") and (line.rstrip() == "[" or line.startswith(("[{", "[ {", "[]"))):
            return _json_rows("\n".join(whole for whole, _ in begins[number:]))
        if line.startswith("{"):
            return _jsonl_rows([one for _, one in begins[number:]])
        if line.startswith("build_commit,"):
            return _csv_rows("\n".join(whole for whole, _ in begins[number:]))
        if line.startswith(("CREATE TABLE", "INSERT INTO")):
            return _sql_rows([one for _, one in begins[number:]])
        if line.startswith("|"):
            return _markdown_rows([one for _, one in begins[number:]])
    raise InputError(TOOL, "(text)", "empty" if not begins else "none of the tool's formats", _WHOLE_REMEDY)


def _json_rows(text: str) -> list[tuple[str, Mapping[str, Any]]]:
    try:
        document = plain_json.parse(text)
    except ValueError as error:
        raise InputError(TOOL, "(JSON)", str(error), _WHOLE_REMEDY) from None
    found: list[tuple[str, Mapping[str, Any]]] = []
    for number, row in enumerate(document, 1):
        if not isinstance(row, dict):
            raise InputError(TOOL, row, "not one of the tool's objects", _WHOLE_REMEDY)
        found.append((f"entry {number}", row))
    return found


def _jsonl_rows(lines: Sequence[str]) -> list[tuple[str, Mapping[str, Any]]]:
    found: list[tuple[str, Mapping[str, Any]]] = []
    for line in lines:
        if not line.startswith("{"):
            continue  # what the tool logs between its lines
        try:
            row = plain_json.parse(line)
        except ValueError as error:
            raise InputError(f"{TOOL}: line {len(found) + 1}", line, str(error), _WHOLE_REMEDY) from None
        found.append((f"line {len(found) + 1}", row))
    return found


def _csv_rows(text: str) -> list[tuple[str, Mapping[str, Any]]]:
    found: list[tuple[str, Mapping[str, Any]]] = []
    names: list[str] = []
    try:
        for cells in csv.reader(io.StringIO(text), strict=True):
            if cells and cells[0] == "build_commit":  # again where several outputs were put together
                names = cells
                continue
            where = f"row {len(found) + 1}"
            if len(cells) != len(names):
                rule = f"{len(cells)} cells where the header names {len(names)} columns"
                raise InputError(f"{TOOL}: {where}", ",".join(cells), rule, _WHOLE_REMEDY)
            found.append((where, dict(zip(names, cells, strict=True))))
    except csv.Error as error:
        raise InputError(TOOL, "(CSV)", str(error), _WHOLE_REMEDY) from None
    return found


def _sql_rows(lines: Sequence[str]) -> list[tuple[str, Mapping[str, Any]]]:
    found: list[tuple[str, Mapping[str, Any]]] = []
    for line in lines:
        if not line.startswith("INSERT"):
            continue
        where, match = f"row {len(found) + 1}", _INSERT.match(line)
        if match is None:
            raise InputError(f"{TOOL}: {where}", line, "not a statement that the tool writes", _WHOLE_REMEDY)
        names = [name.strip() for name in match[1].split(",")]
        # Values stand in quotes that the tool does not double.
        inside = match[2].strip()
        cells = inside[1:-1].split("', '") if inside.startswith("'") and inside.endswith("'") else []
        if len(cells) != len(names):
            rule = f"{len(cells)} values where {len(names)} columns are named"
            raise InputError(f"{TOOL}: {where}", line, rule, _WHOLE_REMEDY)
        found.append((where, dict(zip(names, cells, strict=True))))
    return found


def _markdown_rows(lines: Sequence[str]) -> list[tuple[str, Mapping[str, Any]]]:
    found: list[tuple[str, Mapping[str, Any]]] = []
    names: list[str] = []
    build = next((line.removeprefix("build:").strip() for line in lines if line.startswith("build:")), None)
    for line in lines:
        if not line.startswith("|"):
            continue
        where = f"row {len(found) + 1}"
        if not line.rstrip().endswith("|"):
            raise InputError(f"{TOOL}: {where}", line, "a row that ends too early", _WHOLE_REMEDY)
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0] == "model":
            names = [_COLUMNS.get(cell, cell) for cell in cells]
            continue
        if set(line) <= set("|-: "):
            continue
        if not names or len(cells) != len(names):
            rule = f"{len(cells)} cells where the header names {len(names)} columns"
            raise InputError(f"{TOOL}: {where}", line, rule, _WHOLE_REMEDY)
        found.append((where, _as_columns(dict(zip(names, cells, strict=True)), where) | {"build_commit": build}))
    return found


def _as_columns(cells: dict[str, str], where: str) -> dict[str, Any]:
    """Return a row of Markdown with the columns that the other formats have for what it puts into one cell."""
    for needed in ("test", "t/s"):
        if needed not in cells:
            raise InputError(f"{TOOL}: column", needed, "missing from the table", _WHOLE_REMEDY)
    test, speed = _TEST.match(cells["test"]), _SPEED.match(cells["t/s"])
    if test is None or not any(test.groups()[:2]):
        raise InputError(f"{TOOL}: {where}: test", cells["test"], "not pp, tg or both", _WHOLE_REMEDY)
    if speed is None:
        raise InputError(f"{TOOL}: {where}: t/s", cells["t/s"], "not a speed with its deviation", _WHOLE_REMEDY)
    prompt, generated, after, depth = (int(_digits(each, where)) for each in test.groups())
    row: dict[str, Any] = {
        **cells,
        "n_prompt": prompt or after,
        "n_gen": generated,
        "n_depth": depth,
        "avg_ts": speed[1],
    }
    row["stddev_ts"] = speed[2] or "0"
    if not after:
        del row["test"]
    for name in ("model_size", "model_n_params"):
        if name in cells:
            sized = _SIZED.match(cells[name])
            if sized is None:
                raise InputError(f"{TOOL}: {where}: {name}", cells[name], "not a size", _WHOLE_REMEDY)
            row[name] = _float(sized[1], name, where) * _SCALE[sized[2]]
    return row


def _digits(text: str | None, where: str) -> str:
    if text is not None and len(text) > 9:
        raise InputError(f"{TOOL}: {where}: test", text, "a count of more than nine digits", "measure again")
    return text or "0"


# --- one line ------------------------------------------------------------------------------------------------------------


def _line(where: str, row: Mapping[str, Any]) -> BenchLine:
    for name in _NEEDED:
        if row.get(name) in (None, ""):
            rule = f"the column is missing from {where}: another version of the tool, or not its output"
            raise InputError(f"{TOOL}: {name}", "(absent)", rule, _WHOLE_REMEDY)
    prompt, generated = _whole(row, "n_prompt", where), _whole(row, "n_gen", where)
    depth = _whole(row, "n_depth", where, 0)
    speed = _float(row["avg_ts"], "avg_ts", where)
    after_prompt = "@pp" in str(row.get("test") or "").replace(" ", "")
    if after_prompt:  # only what was generated is counted, after a prompt that was not
        prompt, depth = 0, depth + prompt
    _agree(row, prompt + generated, speed, where)
    deviation = _float(row.get("stddev_ts") or 0, "stddev_ts", where)
    architecture, quant = _described(str(row["model_type"]))
    batch, ubatch = _whole(row, "n_batch", where, 2048), _whole(row, "n_ubatch", where, 512)
    backend, reason = _backend(row)
    gpus, cards_reason = _cards(row)
    stated = {
        name: row[name] for name in ("build_commit", "flash_attn", "test_time") if row.get(name) not in (None, "")
    }
    return checked(
        BenchLine(
            where=where, test=_named(prompt, generated, depth), prompt_tokens=prompt, generated_tokens=generated, depth_tokens=depth,
            tokens_per_s=speed, relative_deviation=deviation / speed if speed > 0 else 0.0, ubatch_tokens=min(batch, ubatch),
            kv_types=(str(row.get("type_k") or "f16"), str(row.get("type_v") or "f16")),
            engine="ik_llama.cpp" if any(row.get(name) not in (None, "") for name in _IK_ONLY) else None,
            backend=backend, model=str(row["model_type"]), architecture=architecture, quant=quant,
            model_bytes=_optional(row, "model_size", where), model_parameters=_optional(row, "model_n_params", where),
            gpus=gpus, cpu=str(row["cpu_info"]) if row.get("cpu_info") else None,
            threads=_whole(row, "n_threads", where) if row.get("n_threads") not in (None, "") else None,
            gpu_layers=_whole(row, "n_gpu_layers", where) if row.get("n_gpu_layers") not in (None, "") else None,
            cpu_moe_layers=_whole(row, "n_cpu_moe", where, 0), overrides=_overrides(row), uploads=not _true(row.get("no_op_offload")),
            reason=reason or cards_reason or _cannot(row), notes=stated,
        ),
        TOOL,
    )  # fmt: skip


def _described(text: str) -> tuple[str | None, str | None]:
    """Return (architecture, weight format) of a model's description: architecture, size, type of the file."""
    match = _FTYPE.match(text.strip())
    before = text if match is None else match["before"]
    architecture = before.split()[0] if before.split() else None
    if match is None:
        return architecture, None
    name, _, size = match["name"].removeprefix("mostly ").partition(" - ")
    if size in _SIZES and name.endswith("_K") and name != "Q2_K":
        return architecture, f"{name}_{_SIZES[size]}"
    if name == "Q2_K" and size == "Small":
        return architecture, "Q2_K_S"
    return architecture, _OTHER_NAMES.get(name, name)


def _named(prompt: int, generated: int, depth: int) -> str:
    parts = [f"pp{prompt}" if prompt else "", f"tg{generated}" if generated else ""]
    return "+".join(part for part in parts if part) + (f" @ d{depth}" if depth else "")


def _agree(row: Mapping[str, Any], tokens: int, speed: float, where: str) -> None:
    """Return nothing; raises InputError where the stated time is of another speed."""
    stated = row.get("avg_ns")
    if stated in (None, "") or not tokens or not (math.isfinite(speed) and speed > 0):
        return
    nanoseconds = _float(stated, "avg_ns", where)
    if not nanoseconds > 0 or abs(math.log(max(NS_PER_S * tokens / nanoseconds, 1e-12) / speed)) > _DIFFER:
        rule = f"avg_ns = {str(stated)[:20]} for {tokens} tokens is another speed"
        raise InputError(f"{TOOL}: {where}: avg_ts", speed, rule, "measure again")


def _backend(row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return (back end, why it cannot be predicted)."""
    text = row.get("backends")
    if text in (None, ""):
        on = [name for name in ("cuda", "vulkan", "metal", "sycl", "kompute") if _true(row.get(name))]
        if not any(name in row for name in ("cuda", "metal", "blas")):
            return None, None
        text = ",".join(on) or "CPU"
        if _true(row.get("rpc")):
            text += ",RPC"
    names = [name.strip() for name in str(text).split(",")]
    if "RPC" in names:
        return None, "several machines took part (RPC)"
    known = [_BACKENDS.get(re.sub(r"[^a-z].*", "", name.lower())) for name in names]
    cards = [one for one in known if one not in (None, "cpu")]
    if None in known and not cards:
        return None, f"back end {str(text)[:30]} is not predicted"
    return (cards[0] if cards else "cpu"), None


def _cards(row: Mapping[str, Any]) -> tuple[tuple[str, ...], str | None]:
    """Return (names of the cards that took part, why that cannot be predicted)."""
    if _on_cores(row):
        return (), None
    names = [name.strip() for name in str(row.get("gpu_info") or "").split(",") if name.strip()]
    chosen = str(row.get("devices") or "auto")
    if len(names) > 1:
        number = None
        if chosen not in ("auto", "") and "/" not in chosen:
            digits = re.search(r"(\d{1,3})\Z", chosen)
            number = int(digits[1]) if digits else None
        elif str(row.get("split_mode")) == "none" and str(row.get("main_gpu", "0")).isdigit():
            number = int(str(row.get("main_gpu", "0"))[:3])
        if number is None or number >= len(names):
            return tuple(names), "several cards took part"
        names = [names[number]]
    if "/" in chosen or "/" in str(row.get("tensor_split") or ""):
        return tuple(names), "several cards took part"
    return tuple(names), None


def _on_cores(row: Mapping[str, Any]) -> bool:
    return str(row.get("devices")) == "none"


def _cannot(row: Mapping[str, Any]) -> str | None:
    """Return why a line cannot be predicted, None where it can."""
    if str(row.get("fit_target") or "0") != "0" or str(row.get("fit_min_ctx") or "0") != "0":
        return "the tool placed layers itself (-fitt), and does not say where"
    if _true(row.get("no_kv_offload")):
        return "keys and values were kept in host memory (-nkvo)"
    if _true(row.get("embeddings")):
        return "it computed embeddings"
    if str(row.get("n_draft") or "0") not in ("0", "-"):
        return "it drafted tokens"
    return None


def _overrides(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    text = str(row.get("tensor_buft_overrides") or row.get("override_tensor") or "none")
    if text in ("none", "-"):
        return ()
    pairs = (part.rpartition("=") for part in re.split(r"[;]", text) if part and part != "none")
    return tuple((pattern, buffer.strip()) for pattern, _, buffer in pairs)


def _true(value: object) -> bool:
    return value is True or str(value).strip().lower() in ("1", "true")


def _float(value: object, name: str, where: str) -> float:
    try:
        return float(str(value)) if not isinstance(value, bool) else math.nan
    except ValueError:
        raise InputError(f"{TOOL}: {where}: {name}", value, "not a number", "measure again") from None


def _optional(row: Mapping[str, Any], name: str, where: str) -> float | None:
    return None if row.get(name) in (None, "") else _float(row[name], name, where)


def _whole(row: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = row.get(name)
    if value in (None, "") and default is not None:
        return default
    text = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"-?\d{1,12}", text):
        raise InputError(f"{TOOL}: {where}: {name}", value, "not a whole number", "measure again")
    return int(text)
