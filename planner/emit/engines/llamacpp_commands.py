"""llama.cpp, plans made for it: ready command lines of llama-server and llama-bench, and which measurements would settle the choice.

Modelled: the setting that was planned and the engine's own (`--fit`), with the plan's context, requests and cache type; every flag
stands in the table of its program. Ignored: sampling, addresses, threads: they are the user's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ....base.errors import InputError
from ....specs.models import ModelSpec
from ..choices import Emission, OffloadChoice, as_run
from ..flags import SWITCH, TEXT, WHOLE, FlagValue, flag_lines
from ..served import Figures, ServedChoice, ServedSetting
from ..table import EngineTable, flags_of, names, row

SERVER_FILE, BENCH_FILE, DEFAULT_BENCH_FILE = "llama-server.sh", "llama-bench.sh", "llama-bench-default.sh"
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
MODEL_FILE = "MODEL.gguf"
_CHECKED, _HOW = "2026-11-28", "flags compared with each program's own list of options (not built)"
_EXPERTS = {
    "--n-gpu-layers": row(WHOLE, "layers on the card, the output matrix one more; more than there are is all", least=0),
    "--n-cpu-moe": row(WHOLE, "the first N layers' experts in host memory", since="pull request 15077 (August 2025)", least=1),
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
_TABLES = {SERVER_FILE: SERVER, BENCH_FILE: BENCH, DEFAULT_BENCH_FILE: BENCH}
# More than any model has.
_ALL_LAYERS = 999
_CELLS, _BATCH, _UBATCH, _MARGIN_MIB = 256, 2048, 512, 1024
# Of a plan made from a recording, whose requests have no one length.
_USUAL_PROMPT, _USUAL_REPLY = 512, 128


def render_served(choice: OffloadChoice, served: ServedChoice, model: ModelSpec) -> Emission:
    """Return the command lines of a plan made for llama.cpp, what is predicted for them, and what would settle the choice."""
    if served.kv_type not in KV_TYPES:
        raise InputError(
            "--kv-type", served.kv_type, f"llama.cpp has {', '.join(KV_TYPES)}", "plan again with one of these"
        )
    if served.chosen.told_layers > model.num_layers:
        raise InputError("plan: for.setting.told_layers", served.chosen.told_layers, f"{model.name} has {model.num_layers} layers",
                         "plan again with --for")  # fmt: skip
    server = {**_server(served), **_placed(served.chosen, served, bench=False)}
    bench = {**_bench(served), **_placed(served.chosen, served, bench=True)}
    files = {SERVER_FILE: command("llama-server", server), BENCH_FILE: command("llama-bench", bench)}
    default = served.default
    if default is not None and not served.chosen.fitted:
        files[DEFAULT_BENCH_FILE] = command("llama-bench", {**_bench(served), **_placed(default, served, bench=True)})
    usage = [f"sh {SERVER_FILE} starts the server; {MODEL_FILE} stands for your file" if served.model_file is None else
             f"sh {SERVER_FILE} starts the server"]  # fmt: skip
    facts = ["options that are not there keep llama.cpp's defaults (flash attention and memory mapping are automatic)"]
    if not served.chosen.fitted and served.chosen.card:
        facts.append(
            "where --n-gpu-layers or --n-cpu-moe is given, automatic fitting (--fit) stays out of the way; some builds warn of it"
        )
    notes = []
    if default is not None and default.part_of_layer:
        notes.append(
            f"--fit also puts {default.part_of_layer:.0%} of one more layer's experts on the card; predicted are whole layers"
        )
    return Emission(
        engine="llama.cpp", files=files, usage=tuple(usage), notes=tuple(notes), facts=tuple(facts),
        runs=as_run(choice.schedule, ("cache", "kernel", "copy")), predicted=tuple(predicted(served)), measure=tuple(measurements(served)),
    )  # fmt: skip


def check_served(files: Mapping[str, str]) -> None:
    """Return nothing; raises for a flag that its program does not have, and where the programs are told different placements."""
    placed = {}
    for name, text in files.items():
        program, *lines = (line.removesuffix("\\").strip() for line in text.splitlines())
        table = _TABLES[name]
        if program != table.engine:
            raise InputError(name, program, f"not {table.engine}", "emit again")
        flags = flags_of("\n".join(lines), table, name)
        if flags.get("--batch-size", _BATCH) < flags.get("--ubatch-size", _UBATCH):
            raise InputError(
                f"{name}: --batch-size", flags.get("--batch-size", _BATCH), "less than a micro-batch", "emit again"
            )
        if name != DEFAULT_BENCH_FILE:
            placed[name] = flags.get("--n-cpu-moe"), flags.get("--ubatch-size")
    if len(set(placed.values())) > 1:
        raise InputError("files", placed, "the programs are told different placements", "emit again")


def command(program: str, flags: Mapping[str, FlagValue]) -> str:
    """Return a program's call as a line of a shell, one flag a line."""
    lines = [program, *(f"  {line}" for line in flag_lines(flags).splitlines())]
    return " \\\n".join(lines) + "\n"


def one_line(text: str) -> str:
    """Return a call as one line."""
    return " ".join(line.removesuffix("\\").strip() for line in text.splitlines())


def _placed(one: ServedSetting, served: ServedChoice, *, bench: bool) -> dict[str, FlagValue]:
    """Return the flags that place experts and cut prompts."""
    found: dict[str, FlagValue] = {}
    if one.fitted and bench:  # the server fits of itself
        found |= {"--fit-target": _MARGIN_MIB, "--fit-ctx": context_of(served)}
    elif not one.fitted and one.card:
        found["--n-gpu-layers"] = _ALL_LAYERS
        if one.told_layers:
            found["--n-cpu-moe"] = one.told_layers
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
    if served.lengths is not None and any(served.lengths.cached):
        found["--n-depth"] = _mean(served.lengths.cached)
    if prompt and reply:
        found["-pg"] = f"{prompt},{reply}"
    else:
        found |= {"--n-prompt": prompt, "--n-gen": reply}
    return found | _cache_types(served)


def _cache_types(served: ServedChoice) -> dict[str, FlagValue]:
    return {} if served.kv_type == "f16" else {"--cache-type-k": served.kv_type, "--cache-type-v": served.kv_type}


def _lengths(served: ServedChoice) -> tuple[int, int]:
    """Return the prompt tokens that are computed and the reply of one request, of the mean one where they differ."""
    if served.lengths is None:
        return _USUAL_PROMPT, _USUAL_REPLY
    return _mean(served.lengths.computed.tolist()), _mean(served.lengths.reply)


def _mean(values: Sequence[int]) -> int:
    return round(sum(values) / len(values))


def predicted(served: ServedChoice) -> list[str]:
    """Return what is predicted for the command lines, beside what the engine does of itself."""
    found = [f"{served.chosen.name}: {_figures(served.figures)}"]
    if served.default is not None and not served.chosen.fitted and served.default_figures is not None:
        found.append(f"{served.default.name}: {_figures(served.default_figures)}")
    if served.difference is not None:
        ratio, low, high = (served.difference[name] for name in ("ratio", "low", "high"))
        said = f"{ratio:.2f} times as fast ({low:.2f} to {high:.2f})"
        found.append(f"{said}, errors that both share cancelled" if served.difference["promised"] else
                     f"no difference that this prediction can promise: {said}")  # fmt: skip
    return found


def measurements(served: ServedChoice) -> list[str]:
    """Return the two or three measurements that would settle the choice, with what each is predicted to show."""
    found = [f"sh {BENCH_FILE}: {_rate(served, served.figures)}"]
    if served.chosen.fitted or served.default_figures is None:
        return found
    other = f"sh {DEFAULT_BENCH_FILE}: {_rate(served, served.default_figures)}"
    found.append(f"{other}; where it is the faster one, leave llama.cpp's defaults")
    shares = (served.difference or {}).get("shares") or {}
    cause = next(iter(shares), None)
    prompt, reply = _lengths(served)
    if cause == "the link" and prompt:
        found.append(f"most of the doubt is the link: run {BENCH_FILE} with --n-prompt {prompt} in place of -pg; prompts of "
                     f"{_with_ends(served.figures, 'prefill_tokens_per_s')} tokens/s are predicted")  # fmt: skip
    elif cause in ("the cores", "the card", "the host") and reply:
        found.append(f"most of the doubt is {cause}: run {BENCH_FILE} with --n-gen {reply} --n-depth {prompt} in place of -pg; "
                     f"{_with_ends(served.figures, 'decode_tokens_per_s')} generated tokens/s are predicted")  # fmt: skip
    return found


def _rate(served: ServedChoice, figures: Figures) -> str:
    """Return the tokens per second that llama-bench prints for the test of a bench file."""
    prompt, reply = _lengths(served)
    if served.lengths is None:
        return f"{_figures(figures)} predicted (of the recording's requests)"
    if not served.lengths.are_alike:
        return "one request of mean length alone, as llama-bench runs it; the plan is for requests that differ"
    if not (prompt and reply):
        name = "prefill_tokens_per_s" if prompt else "decode_tokens_per_s"
        return f"{_with_ends(figures, name)} tokens/s predicted"
    if served.concurrency > 1:
        return "one request alone, as llama-bench runs it; the plan is for several at once"
    took, (low, high) = figures["request_s"], figures["request_s_interval"]
    tokens = prompt + reply
    return f"{_short(tokens / took)} tokens/s over both ({_short(tokens / high)} to {_short(tokens / low)}) predicted"


def _figures(figures: Figures) -> str:
    parts: Sequence[tuple[str, str]] = (
        ("request_s", "s a request"), ("ttft_s", "s to its first token"), ("prefill_tokens_per_s", "prompt tokens/s"),
        ("decode_tokens_per_s", "generated tokens/s"),
    )  # fmt: skip
    return ", ".join(f"{_with_ends(figures, name)} {unit}" for name, unit in parts if figures.get(name) is not None)


def _with_ends(figures: Figures, name: str) -> str:
    value, ends = figures.get(name), figures.get(f"{name}_interval")
    if value is None:
        return "none"
    return _short(value) + (f" ({_short(ends[0])} to {_short(ends[1])})" if ends else "")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
