"""llama.cpp and ik_llama.cpp, plans made for them: ready command lines of llama-server and llama-bench, and what would settle the choice.

Modelled: the setting that was planned and the engine's own (`--fit`), with the plan's context, requests and cache type; every flag
stands in the table of its program. Ignored: sampling, addresses, threads: they are the user's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ....base.errors import InputError
from ....specs.models import ModelSpec
from .. import drafting
from ..choices import Emission, OffloadChoice, as_run
from ..flags import SWITCH, TEXT, WHOLE, FlagValue, command, program_and_flags
from ..served import Figures, ServedChoice, ServedSetting
from ..speeds import difference_words, figures_words, short, with_ends
from ..table import EngineTable, flags_of, names, row

SERVER_FILE, BENCH_FILE, DEFAULT_BENCH_FILE = "llama-server.sh", "llama-bench.sh", "llama-bench-default.sh"
IK_SERVER_FILE, IK_BENCH_FILE, IK_DEFAULT_BENCH_FILE = (
    "ik-llama-server.sh",
    "ik-llama-bench.sh",
    "ik-llama-bench-default.sh",
)
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
IK_KV_TYPES = ("f16", "bf16", "q8_0", "q8_KV", "q6_0", "q5_0", "q5_1", "q4_0", "q4_1", "iq4_nl")
MODEL_FILE = "MODEL.gguf"
_CHECKED, _HOW = "2026-11-28", "flags compared with each program's own list of options (not built)"
_EXPERTS = {
    "--n-gpu-layers": row(WHOLE, "layers on the card, the output matrix one more; more than there are is all", least=0),
    "--n-cpu-moe": row(WHOLE, "the first N layers' experts in host memory", since="pull request 15077 (August 2025)", least=1),
    "--split-mode": row(names("layer"), "whole layers over several cards"),
    "--tensor-split": row(TEXT, "shares of the cards, in order; the server takes commas between them, llama-bench slashes"),
    "--ubatch-size": row(WHOLE, "tokens of a forward pass", least=1),
    "--batch-size": row(WHOLE, "tokens handed over at once; at least a micro-batch", least=1),
    "--cache-type-k": row(names(*KV_TYPES), "type of cached keys"), "--cache-type-v": row(names(*KV_TYPES), "type of cached values"),
    "--model": row(TEXT, "the file"),
}  # fmt: skip
SERVER = EngineTable(
    engine="llama-server", checked=_CHECKED, how=_HOW, source="ggml-org/llama.cpp: tools/server/README.md",
    flags={
        **_EXPERTS,
        "--ctx-size": row(WHOLE, "tokens of context over all slots", least=1),
        "--parallel": row(WHOLE, "slots, requests decoded together", least=1),
        "--no-op-offload": row(SWITCH, "large passes compute experts of host memory on the cores"),
        **drafting.LLAMA_CPP,
    },
)  # fmt: skip
BENCH = EngineTable(
    engine="llama-bench", checked=_CHECKED, how=_HOW, source="ggml-org/llama.cpp: tools/llama-bench/README.md",
    flags={
        **_EXPERTS,
        "-pg": row(TEXT, "prompt,reply: a prompt and its reply as one test"),
        "--n-prompt": row(WHOLE, "tokens of a prompt test", least=0), "--n-gen": row(WHOLE, "tokens of a generation test", least=0),
        "--n-depth": row(WHOLE, "context before a test", least=0),
        "--no-op-offload": row(names("0", "1"), "large passes compute experts of host memory on the cores"),
        "--fit-target": row(WHOLE, "MiB that fitting leaves free", least=0),
        "--fit-ctx": row(WHOLE, "context that fitting makes room for", least=1),
    },
)  # fmt: skip
_IK_EXPERTS = _EXPERTS | {
    "--cache-type-k": row(names(*IK_KV_TYPES), "type of cached keys"),
    "--cache-type-v": row(names(*IK_KV_TYPES), "type of cached values"),
}
IK_SERVER = EngineTable(
    engine="llama-server", checked="2026-11-29", how=_HOW, source="ikawrakow/ik_llama.cpp of 2026-08: common/common.cpp",
    flags={**_IK_EXPERTS, "--ctx-size": SERVER.flags["--ctx-size"], "--parallel": SERVER.flags["--parallel"],
           **drafting.IK_LLAMA_CPP},
)  # fmt: skip
IK_BENCH = EngineTable(
    engine="llama-bench", checked="2026-11-29", how=_HOW, source="ikawrakow/ik_llama.cpp of 2026-08: examples/llama-bench/llama-bench.cpp",
    flags={**_IK_EXPERTS, **{name: BENCH.flags[name] for name in ("-pg", "--n-prompt", "--n-gen")}},
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What one engine's programs are called and take."""

    engine: str
    server_file: str
    bench_file: str
    default_bench_file: str
    kv_types: tuple[str, ...]
    has_depth: bool
    """Its llama-bench can begin at a depth of context."""
    unset: str
    """What it does with what is not said."""


LLAMA_CPP = Dialect(
    engine="llama.cpp", server_file=SERVER_FILE, bench_file=BENCH_FILE, default_bench_file=DEFAULT_BENCH_FILE, kv_types=KV_TYPES,
    has_depth=True, unset="options that are not there keep llama.cpp's defaults (flash attention and memory mapping are automatic)",
)  # fmt: skip
IK_LLAMA_CPP = Dialect(
    engine="ik_llama.cpp", server_file=IK_SERVER_FILE, bench_file=IK_BENCH_FILE, default_bench_file=IK_DEFAULT_BENCH_FILE,
    kv_types=IK_KV_TYPES, has_depth=False,
    unset="options that are not there keep ik_llama.cpp's defaults (flash attention, fused experts and MLA 3 are on, --fit is off)",
)  # fmt: skip
DIALECTS = {one.engine: one for one in (LLAMA_CPP, IK_LLAMA_CPP)}
_TABLES = {
    SERVER_FILE: SERVER, BENCH_FILE: BENCH, DEFAULT_BENCH_FILE: BENCH,
    IK_SERVER_FILE: IK_SERVER, IK_BENCH_FILE: IK_BENCH, IK_DEFAULT_BENCH_FILE: IK_BENCH,
}  # fmt: skip
# More than any model has.
_ALL_LAYERS = 999
_CELLS, _BATCH, _UBATCH, _MARGIN_MIB = 256, 2048, 512, 1024
# Of a plan made from a recording, whose requests have no one length.
_USUAL_PROMPT, _USUAL_REPLY = 512, 128


def check_kv_type(engine: str, kv_type: str) -> None:
    """Raise InputError where `engine` cannot keep its KV cache as `kv_type` (one type, or that of keys and that of values)."""
    known = DIALECTS[engine].kv_types
    if not {kind.lower() for kind in kv_type.split("/")} <= {one.lower() for one in known}:
        raise InputError("--kv-type", kv_type, f"{engine} has {', '.join(known)}", "use one of these")


def render_served(choice: OffloadChoice, served: ServedChoice, model: ModelSpec) -> Emission:
    """Return the command lines of a plan made for either engine, what is predicted for them, and what would settle the choice."""
    dialect = DIALECTS[served.engine]
    check_kv_type(served.engine, served.kv_type)
    if served.chosen.told_layers > model.num_layers:
        raise InputError("plan: for.setting.told_layers", served.chosen.told_layers, f"{model.name} has {model.num_layers} layers",
                         "plan again with --for")  # fmt: skip
    told = drafting.llama_cpp_flags(choice.draft, ik=dialect is IK_LLAMA_CPP)
    server = {**_server(served), **_placed(served.chosen, served, bench=False), **told}
    bench = {**_bench(served), **_placed(served.chosen, served, bench=True)}
    files = {dialect.server_file: command("llama-server", server)}
    default = served.default
    if choice.draft is None:  # llama-bench drafts nothing
        files[dialect.bench_file] = command("llama-bench", bench)
    if choice.draft is None and default is not None and not served.is_default:
        other = {**_bench(served), **_placed(default, served, bench=True)}
        files[dialect.default_bench_file] = command("llama-bench", other)
    usage = [f"sh {dialect.server_file} starts the server; {MODEL_FILE} stands for your file" if served.model_file is None else
             f"sh {dialect.server_file} starts the server"]  # fmt: skip
    facts = [dialect.unset, *drafting.facts_of(choice.draft, model.name)]
    if not served.chosen.fitted and served.chosen.card and dialect is LLAMA_CPP:
        facts.append(
            "where --n-gpu-layers or --n-cpu-moe is given, automatic fitting (--fit) stays out of the way; some builds warn of it"
        )
    lines = predicted(served) + (["all of them with the drafts of the plan"] if choice.draft is not None else [])
    notes = []
    if default is not None and default.part_of_layer:
        notes.append(
            f"--fit also puts {default.part_of_layer:.0%} of one more layer's experts on the card; predicted are whole layers"
        )
    return Emission(
        engine=dialect.engine, files=files, usage=tuple(usage), notes=tuple(notes), facts=tuple(facts),
        runs=as_run(choice.schedule, ("cache", "kernel", "copy")), predicted=tuple(lines),
        measure=tuple(measurements(served) if choice.draft is None else _of_drafts(served, choice.draft)),
    )  # fmt: skip


def check_served(files: Mapping[str, str]) -> None:
    """Return nothing; raises for a flag that its program does not have, and where the programs are told different placements."""
    placed = {}
    for name, text in files.items():
        program, told = program_and_flags(text)
        table = _TABLES[name]
        if program != table.engine:
            raise InputError(name, program, f"not {table.engine}", "emit again")
        flags = flags_of(told, table, name)
        if flags.get("--batch-size", _BATCH) < flags.get("--ubatch-size", _UBATCH):
            raise InputError(
                f"{name}: --batch-size", flags.get("--batch-size", _BATCH), "less than a micro-batch", "emit again"
            )
        if name not in (DEFAULT_BENCH_FILE, IK_DEFAULT_BENCH_FILE):
            shares = str(flags.get("--tensor-split", "")).replace("/", ",")  # llama-bench takes commas between tests
            placed[name] = flags.get("--n-cpu-moe"), flags.get("--ubatch-size"), shares
    if len(set(placed.values())) > 1:
        raise InputError("files", placed, "the programs are told different placements", "emit again")


def _placed(one: ServedSetting, served: ServedChoice, *, bench: bool) -> dict[str, FlagValue]:
    """Return the flags that place experts and cut prompts."""
    found: dict[str, FlagValue] = {}
    if one.fitted and bench:  # the server fits of itself
        found |= {"--fit-target": _MARGIN_MIB, "--fit-ctx": context_of(served)}
    elif not one.fitted and one.card:
        found["--n-gpu-layers"] = _ALL_LAYERS
        if one.told_layers:
            found["--n-cpu-moe"] = one.told_layers
        if one.tensor_split:
            found["--split-mode"] = "layer"
            found["--tensor-split"] = ("/" if bench else ",").join(f"{share:.15g}" for share in one.tensor_split)
    if one.ubatch != _UBATCH:
        found["--ubatch-size"] = one.ubatch
    if one.ubatch > _BATCH:
        found["--batch-size"] = one.ubatch
    if not one.op_offload:
        found["--no-op-offload"] = "1" if bench else True
    return found


def context_of(served: ServedChoice) -> int:
    """Return the context of one slot, in whole cells as llama.cpp counts them."""
    return max(1, -(-served.context_tokens // _CELLS)) * _CELLS


def _server(served: ServedChoice) -> dict[str, FlagValue]:
    found: dict[str, FlagValue] = {
        "--model": served.model_file or MODEL_FILE, "--ctx-size": context_of(served) * served.concurrency,
        "--parallel": served.concurrency,
    }  # fmt: skip
    return found | _cache_types(served)


def _bench(served: ServedChoice) -> dict[str, FlagValue]:
    """Return the flags of one test of prompt and reply."""
    prompt, reply = _lengths(served)
    found: dict[str, FlagValue] = {"--model": served.model_file or MODEL_FILE, "--n-prompt": 0, "--n-gen": 0}
    if served.lengths is not None and any(served.lengths.cached) and DIALECTS[served.engine].has_depth:
        found["--n-depth"] = _mean(served.lengths.cached)
    if prompt and reply:
        found["-pg"] = f"{prompt},{reply}"
    else:
        found |= {"--n-prompt": prompt, "--n-gen": reply}
    return found | _cache_types(served)


def _cache_types(served: ServedChoice) -> dict[str, FlagValue]:
    written = {one.lower(): one for one in DIALECTS[served.engine].kv_types}
    keys, _, values = (written.get(one, one) for one in served.kv_type.lower().partition("/"))
    return {} if served.kv_type == "f16" else {"--cache-type-k": keys, "--cache-type-v": values or keys}


def _lengths(served: ServedChoice) -> tuple[int, int]:
    """Return the prompt tokens that are computed and the reply of one request, of the mean one where they differ."""
    if served.lengths is None:
        return _USUAL_PROMPT, _USUAL_REPLY
    return _mean(served.lengths.computed.tolist()), _mean(served.lengths.reply)


def _mean(values: Sequence[int]) -> int:
    return round(sum(values) / len(values))


def predicted(served: ServedChoice) -> list[str]:
    """Return what is predicted for the command lines, beside what the engine does of itself."""
    found = [f"{served.chosen.name}: {figures_words(served.figures)}"]
    if served.default is not None and not served.is_default and served.default_figures is not None:
        found.append(f"{served.default.name}: {figures_words(served.default_figures)}")
    if served.difference is not None:
        found.append(difference_words(served.difference))
    return found


def measurements(served: ServedChoice) -> list[str]:
    """Return the two or three measurements that would settle the choice, with what each is predicted to show."""
    dialect = DIALECTS[served.engine]
    found = [f"sh {dialect.bench_file}: {_rate(served, served.figures)}"]
    if served.is_default or served.default is None or served.default_figures is None:
        return found
    other = f"sh {dialect.default_bench_file}: {_rate(served, served.default_figures)}"
    leave = f"leave {dialect.engine}'s defaults" if served.default.fitted else f"take {served.default.name}"
    found.append(f"{other}; where it is the faster one, {leave}")
    shares = (served.difference or {}).get("shares") or {}
    cause = next(iter(shares), None)
    prompt, reply = _lengths(served)
    if cause == "the link" and prompt:
        found.append(f"most of the doubt is the link: run {dialect.bench_file} with --n-prompt {prompt} in place of -pg; prompts of "
                     f"{with_ends(served.figures, 'prefill_tokens_per_s')} tokens/s are predicted")  # fmt: skip
    elif cause in ("the cores", "the card", "the host") and reply:
        depth = f" --n-depth {prompt}" if dialect.has_depth else ""
        found.append(f"most of the doubt is {cause}: run {dialect.bench_file} with --n-gen {reply}{depth} in place of -pg; "
                     f"{with_ends(served.figures, 'decode_tokens_per_s')} generated tokens/s are predicted")  # fmt: skip
    return found


def _of_drafts(served: ServedChoice, draft: drafting.DraftChoice) -> list[str]:
    """Return the measurements that would settle whether drafting pays; llama-bench drafts nothing."""
    dialect = DIALECTS[served.engine]
    told = " ".join(drafting.llama_cpp_flags(draft, ik=dialect is IK_LLAMA_CPP))
    return [
        f"sh {dialect.server_file} and a request of the plan's lengths: {figures_words(served.figures)} predicted",
        f"the same without {told}: where it is the faster one, leave drafts out",
    ]


def _rate(served: ServedChoice, figures: Figures) -> str:
    """Return the tokens per second that llama-bench prints for the test of a bench file."""
    prompt, reply = _lengths(served)
    if served.lengths is None:
        return f"{figures_words(figures)} predicted (of the recording's requests)"
    if not served.lengths.are_alike:
        return "one request of mean length alone, as llama-bench runs it; the plan is for requests that differ"
    if not (prompt and reply):
        name = "prefill_tokens_per_s" if prompt else "decode_tokens_per_s"
        return f"{with_ends(figures, name)} tokens/s predicted"
    if served.concurrency > 1:
        return "one request alone, as llama-bench runs it; the plan is for several at once"
    took, (low, high) = figures["request_s"], figures["request_s_interval"]
    tokens = prompt + reply
    return f"{short(tokens / took)} tokens/s over both ({short(tokens / high)} to {short(tokens / low)}) predicted"
