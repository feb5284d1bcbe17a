"""Command lines of llama-server, llama-cli and llama-bench, of llama.cpp and ik_llama.cpp.

Modelled: layers and experts on card and cores, micro-batch, context, slots, cache types, threads, which device; that the engine places
layers itself where nobody says (`--fit`); which cards take part, and how they divide the model. Ignored: sampling, addresses, templates;
drafting and keys and values on the host are refused, since nothing is predicted for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

from ...base.errors import InputError
from ...specs.machines.engines import load_engine
from . import llamacpp_flags
from .call import ALL_LAYERS, MOST_CARDS, MOST_TOKENS, Call, kv_type, positive, quant_in, refuse
from .flags import FIELD, Flag, Told, read_flags, table

ENGINE, FORK = "llama.cpp", "ik_llama.cpp"
BENCH = "llama-bench"
SERVERS, OTHERS = ("llama-server", "server"), ("llama-cli", "main", "llama-completion", "llama-mtmd-cli", "llama-run")
SWEEP = "llama-sweep-bench"
PROGRAMS = (*SERVERS, *OTHERS, BENCH, SWEEP)
_DEVICES = {"cuda": "cuda", "rocm": "rocm", "hip": "rocm", "vulkan": "vulkan", "metal": "metal", "mtl": "metal"}
_DEFAULT_BATCH = 2048


def read(program: str, words: Sequence[str], engine: str | None) -> Call:
    """Return what a command line says; engine: which of the two it is of, None where its flags may tell."""
    told, name = _told(program, words, engine)
    if told.others:
        raise InputError(f"{FIELD}: word", told.others[0], f"{program} takes flags only", "write the flag before it")
    _check(told)
    batch = positive(told.whole("batch", 1, MOST_TOKENS), _DEFAULT_BATCH)
    ubatch = positive(told.whole("ubatch", 1, MOST_TOKENS), load_engine(name).prompt_chunk(0))
    layers, placed = _layers(told, program, name)
    overrides = tuple(
        _override(text) for value in told.values.get("overrides", ()) for text in _parts(value[0], program)
    )
    backend, cards = _device(told)
    prompt, reply, depth = _lengths(told, program)
    parallel, shares = _divided(told)
    remarks = []
    if _on(told, "flash_attn") is False or told.given("no_flash_attn"):
        remarks.append("flash attention off is not predicted: figures are with it")
    for role in ("fit", "fit_target", "fit_ctx"):
        if placed and told.given(role) and (role != "fit" or _on(told, "fit")):
            remarks.append(f"{told.names[role]} stays out of the way where layers are placed by hand")
    # Fitting gives up context, down to this, before it takes experts off the card.
    at_least = None if placed else told.whole("fit_ctx", 0, MOST_TOKENS) or None
    context = told.whole("context", 0, MOST_TOKENS) or at_least
    return Call(
        program=program, engine=name, text=" ".join((program, *words)),
        model=told.text("file") or told.text("model") or told.text("repository"),
        quant=quant_in(told.text("file"), told.text("model"), told.text("repository")), gpu_layers=layers, placed=placed,
        cpu_moe_layers=ALL_LAYERS if told.given("cpu_moe") else told.whole("n_cpu_moe", 0, ALL_LAYERS) or 0, overrides=overrides,
        uploads=_on(told, "no_op_offload") is not True, repacked=told.given("repack") and told.text("repack") != "0",
        ubatch=min(batch, ubatch), context=context, slots=max(1, told.whole("slots", -1, 1024) or 1),
        threads=_threads(told), kv_types=(_kv(told, "keys"), _kv(told, "values")), backend=backend, prompt=prompt, reply=reply,
        cards=cards, parallel=parallel, card_shares=shares, depth=depth, fit_free_mib=None if placed else _fit_target(told),
        remarks=tuple(remarks),
    )  # fmt: skip


def _told(program: str, words: Sequence[str], engine: str | None) -> tuple[Told, str]:
    """Return (what the flags say, the engine that has them): the fork's only where its own flags, or the caller, say so."""
    bench = program == BENCH
    tables = {ENGINE: _tables(program), FORK: _flags("IK_BENCH" if bench else "IK_SERVER")}
    if engine in tables:
        return read_flags(words, tables[engine], f"{program} of {engine}" if engine == FORK else program), str(engine)
    own = {name for name, flag in tables[FORK].items() if flag.kept_as in ("ik", "repack")} - set(tables[ENGINE])
    if program == SWEEP or any(word in own for word in words):
        return read_flags(words, tables[FORK], f"{program} of {FORK}"), FORK
    return read_flags(words, tables[ENGINE], program), ENGINE


def _tables(program: str) -> Mapping[str, Flag]:
    return _flags("BENCH" if program == BENCH else "SERVER" if program in SERVERS else "CLI")


@cache
def _flags(name: str) -> Mapping[str, Flag]:
    return table(getattr(llamacpp_flags, name))


def _check(told: Told) -> None:
    """Return nothing; raises InputError where two flags contradict each other, or where nothing is predicted with one."""
    if told.given("cpu_moe") and told.given("n_cpu_moe"):
        raise refuse(
            "--n-cpu-moe",
            told.text("n_cpu_moe"),
            "--cpu-moe keeps all experts on the cores already",
            "keep one of the two",
        )
    if told.given("op_offload") and told.given("no_op_offload"):
        raise refuse(
            "--op-offload", "(given)", f"{told.names['no_op_offload']} says the opposite", "keep one of the two"
        )
    if _on(told, "flash_attn") is False and _kv(told, "values") not in ("f16", "bf16", "f32"):
        rule = f"values kept as {_kv(told, 'values')} need flash attention"
        raise refuse(told.names["flash_attn"], told.text("flash_attn"), rule, "leave out one of the two")
    if _on(told, "no_kv_offload"):
        raise refuse(
            told.names["no_kv_offload"],
            told.text("no_kv_offload"),
            "keys and values in host memory are not predicted",
            "leave it out",
        )
    if told.text("moe_cache") not in (None, "0", "off", "auto"):
        raise refuse(told.names["moe_cache"], told.text("moe_cache"), "llama.cpp's cache of experts is not predicted yet",
                     "leave it out to see what is predicted without it")  # fmt: skip
    if told.text("device") == "none" and told.text("gpu_layers") not in (None, "0"):
        raise refuse(
            told.names["gpu_layers"],
            told.text("gpu_layers"),
            f"{told.names['device']} none leaves no card",
            "keep one of the two",
        )


def _layers(told: Told, program: str, engine: str) -> tuple[int | None, bool]:
    """Return (layers on the card, None for all; whether the command says where layers are)."""
    text = told.text("gpu_layers")
    fits = engine == ENGINE and program != BENCH and _on(told, "fit") is not False
    if (told.given("fit_target") and program == BENCH) or (engine == FORK and _on(told, "fit")):
        fits = True
    said = told.given("n_cpu_moe") or told.given("cpu_moe") or told.given("overrides")
    if text in (None, "auto", "-1"):
        if engine == FORK and not fits and text is None:
            return 0, True  # its layers stay on the cores unless it is told otherwise
        return None, said or not fits
    if text == "all":
        return None, True
    count = told.whole("gpu_layers", 0, 1_000_000)
    return (count if count is not None else None), True


def _fit_target(told: Told) -> int | None:
    """Return the MiB of the card that fitting leaves free; raises InputError where several cards have one each."""
    text = told.text("fit_target")
    if text is not None and "," in text:
        raise refuse(told.names["fit_target"], text, "several cards take part: not predicted", "give one number")
    return told.whole("fit_target", 0, 1_000_000)


def _threads(told: Told) -> int | None:
    count = told.whole("threads", -1, 4096)
    return None if count is None or count < 1 else count


def _kv(told: Told, role: str) -> str:
    return kv_type(told.text(role), told.names.get(role, role))


def _on(told: Told, role: str) -> bool | None:
    """Return whether a flag is on; None where it is not given, or automatic."""
    text = told.text(role)
    if text in (None, "auto"):
        return None
    return text not in ("off", "0")


def _device(told: Told) -> tuple[str | None, tuple[int, ...] | None]:
    """Return (back end, numbers of the cards that take part), each None where nothing is said."""
    text = told.text("device")
    one = None
    if told.text("split_mode") == "none":
        one = (told.whole("main_card", 0, MOST_CARDS) or 0,)
    if text is None or text == "auto":
        return None, one
    if text == "none":
        return "cpu", None
    names = [re.fullmatch(r"([a-z]+)([0-9]{0,2})", name.strip().lower()) for name in re.split(r"[,/]", text)]
    known = [(_DEVICES.get(found[1]), int(found[2] or 0)) for found in names if found is not None]
    if (
        len(known) < len(names)
        or any(backend is None for backend, _ in known)
        or len({backend for backend, _ in known}) > 1
    ):
        raise refuse(
            told.names["device"],
            text,
            "not cards of one back end",
            "name them as --list-devices does, e.g. CUDA0,CUDA1",
        )
    cards = tuple(number for _, number in known)
    if len(set(cards)) < len(cards):
        raise refuse(told.names["device"], text, "a card is named twice", "name each once")
    return known[0][0], cards if one is None else (cards[min(one[0], len(cards) - 1)],)


def _divided(told: Told) -> tuple[str | None, tuple[float, ...]]:
    """Return (how several cards divide the model, what share of it each takes)."""
    mode = told.text("split_mode")
    if mode not in (None, "none", "layer", "row", "tensor"):
        raise refuse(
            told.names["split_mode"], mode, "dividing a model so is not predicted", "use layer, row, tensor or none"
        )
    text = told.text("tensor_split")
    if text is None or mode == "none":
        return (None if mode == "none" else mode), ()
    pieces = [piece.strip() for piece in re.split(r"[,/]", text)]
    if not all(re.fullmatch(r"[0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9}", piece) for piece in pieces):
        raise refuse(told.names["tensor_split"], text, "not a share for each card", "write for instance -ts 3,1")
    shares = tuple(float(piece) for piece in pieces)
    return mode, shares if sum(shares) > 0 and len(shares) > 1 else ()


def _override(text: str) -> tuple[str, str]:
    pattern, equals, buffer = text.rpartition("=")
    if not equals or not pattern:
        raise refuse(
            "-ot",
            text,
            "not an expression of tensors' names, an equals sign and a place",
            'write for instance -ot "exps=CPU"',
        )
    return pattern, buffer.strip()


def _parts(text: str, program: str) -> list[str]:
    """Return the pairs of one -ot: the server's are joined by commas, the benchmark's by semicolons."""
    parts = text.split(";") if program == BENCH else re.split(r",(?=[^,]*=)", text)
    return [part for part in parts if part.strip()]


def _lengths(told: Told, program: str) -> tuple[int | None, int | None, int]:
    """Return (prompt, reply, depth) of a benchmark's test; nothing for a server, whose requests are not on its command line."""
    if program != BENCH:
        reply = told.whole("reply", -2, MOST_TOKENS)
        return None, (reply if reply is not None and reply > 0 else None), 0
    for role in ("prompt", "reply", "depth", "ubatch", "n_cpu_moe", "gpu_layers", "threads"):
        text = told.text(role)
        if text is not None and not re.fullmatch(r"-?[0-9]{1,9}", text):
            raise refuse(
                told.names[role], text, "several tests in one command", "give the command of the one that was measured"
            )
    depth = told.whole("depth", 0, MOST_TOKENS) or 0
    both = told.text("both") or told.text("after")
    if both is not None:
        found = re.fullmatch(r"([0-9]{1,8}),([0-9]{1,8})", both)
        if found is None:
            raise refuse(
                told.names.get("both", "-pg"), both, "not a prompt and a reply", "write for instance -pg 512,128"
            )
        return int(found[1]), int(found[2]), depth
    return told.whole("prompt", 0, MOST_TOKENS), told.whole("reply", 0, MOST_TOKENS), depth
