r"""llama.cpp, offload: which layers' expert tensors stay in host memory, as `--n-cpu-moe` and as `--override-tensor`.

Modelled: one tensor holds all experts of a layer (`blk\.%d\.ffn_(up|down|gate|gate_up)_(ch|)exps`), so the plan's cache becomes
as many whole layers as it is worth, the last ones, as `--n-cpu-moe` divides them; for caches that change, the flags of
llama.cpp's own expert cache. Ignored: quantisation (the GGUF file's), batch and context sizes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ....base.errors import InputError
from ....base.units import MIB
from ....specs.drafting import has_drafts
from ....specs.models import ModelSpec
from ..checks import needed
from ..choices import Emission, OffloadChoice, as_run
from ..drafting import LLAMA_CPP, facts_of, llama_cpp_flags
from ..flags import FLAGS_FILE, SWITCH, TEXT, USE_FLAGS, WHOLE, FlagValue, flag_lines
from ..offload_notes import COMMON, guess_notes, other_notes, whole_layers
from ..table import EngineTable, flags_of, names, row
from ..target import OffloadTarget, Target
from .llamacpp_commands import DIALECTS, IK_SERVER_FILE, SERVER_FILE, check_served, render_served

OVERRIDE_FILE, CACHE_FILE = "flags_override_tensor.txt", "flags_expert_cache.txt"
TABLE = EngineTable(
    engine="llama.cpp",
    checked="2026-11-28",
    how="flags compared with the pull requests that brought them (not built); tensors' names with the expression those flags use",
    source="ggml-org/llama.cpp: common/arg.cpp; pull requests 11397, 14992, 15077, 29887",
    flags={
        "--n-gpu-layers": row(WHOLE, "layers on the device, the output matrix one more; more than there are is all", least=0),
        "--override-tensor": row(TEXT, "expression=buffer", since="pull request 11397 (April 2025)"),
        "--cpu-moe": row(SWITCH, "all layers' experts in host memory", since="pull request 14992 (July 2025)"),
        "--n-cpu-moe": row(WHOLE, "the first N layers' experts in host memory", since="pull request 15077 (August 2025)", least=0),
        "--moe-cache-mib": row(WHOLE, "a least-recently-used cache on the device for experts in host memory", least=1,
                               since="pull request 29887 (build b11480, experimental)"),
        "--split-mode": row(names("layer"), "whole layers over several cards"),
        "--tensor-split": row(TEXT, "shares of the cards, in order"),
        **LLAMA_CPP,
    },
)  # fmt: skip
# More than any model has: layers of drafts, which some files count among theirs, are included.
_ALL_LAYERS = 999
_OVERRIDE = re.compile(r"blk\\\.\((\d+(?:\|\d+)*)\)\\\.ffn_\(up\|down\|gate\|gate_up\)_\(ch\|\)exps=CPU")
_EXPERT_TENSORS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"


def render(choice: OffloadChoice, model: ModelSpec) -> Emission:
    """Return the flags of whole layers in two spellings, and those of the expert cache where the plan's cache changes."""
    if choice.served is not None and choice.served.engine in DIALECTS:
        return render_served(choice, choice.served, model)
    on_device = whole_layers(choice, model.num_experts)
    on_host = model.moe_layers[: model.num_moe_layers - on_device]
    common: dict[str, FlagValue] = {"--n-gpu-layers": _ALL_LAYERS, **llama_cpp_flags(choice.draft)}
    if choice.tensor_split:
        common |= {
            "--split-mode": "layer",
            "--tensor-split": ",".join(f"{share:.15g}" for share in choice.tensor_split),
        }
    first, override = dict(common), dict(common)
    if on_host:
        first["--n-cpu-moe"] = on_host[-1] + 1
        override["--override-tensor"] = rf"blk\.({'|'.join(map(str, on_host))}){_EXPERT_TENSORS}=CPU"
    files = {FLAGS_FILE: flag_lines(first), OVERRIDE_FILE: flag_lines(override)}
    usage = [USE_FLAGS, f"{OVERRIDE_FILE} says the same layer by layer; use one of the files, not both"]
    cache = choice.schedule.cache
    unused = choice.cached_experts - on_device * model.num_experts
    notes = []
    facts = [
        "--n-gpu-layers 999 is every layer and the output matrix; automatic fitting (-fit) stays out of the way where it is given"
    ]
    if on_host:
        facts.append(
            "--n-cpu-moe needs a build of August 2025 (pull request 15077) or newer, --override-tensor one of April 2025"
        )
    if has_drafts(model):
        facts.append(f"GGUF files may count draft (MTP) layers among theirs, after layer {model.num_layers - 1}: their experts stay on the "
                     "device, beyond the plan's bytes, unless the file was made without them")  # fmt: skip
    if on_host:
        notes.append(
            f"cache.policy={cache.policy}: single experts cannot be placed, a layer's experts are one tensor; {on_device} whole "
            f"layers are on the device, never changed, where the plan has {choice.cached_experts} experts ({unused} unused)"
        )
        notes.append(
            "experts in host memory are computed by the processor, not copied: the plan's copy times do not apply"
        )
    mib = choice.cached_experts * choice.expert_bytes // MIB
    if on_host and mib and cache.policy in ("lru", "lfu"):
        files[CACHE_FILE] = flag_lines(common | {"--cpu-moe": True, "--moe-cache-mib": mib})
        usage.append(f"{CACHE_FILE} is the nearest to the plan where llama.cpp has an expert cache; use it alone")
        notes.append(f"{CACHE_FILE}: llama.cpp divides the cache among layers and chooses victims itself")
        facts.append(
            f"{CACHE_FILE}: --moe-cache-mib needs build b11480 or newer and is experimental there; older builds refuse the flag"
        )
    facts += facts_of(choice.draft, model.name)
    notes += guess_notes(choice, "nothing is fetched ahead")
    notes += other_notes(choice)
    return Emission(
        engine=TABLE.engine, files=files, usage=tuple(usage), notes=tuple(notes), facts=tuple(facts),
        runs=None if on_host else as_run(choice.schedule, COMMON),
        unlike="the processor computes the experts in host memory, layer by layer" if on_host else "",
    )  # fmt: skip


def check(files: Mapping[str, str], model: ModelSpec) -> None:
    """Return nothing; raises InputError where llama.cpp would refuse a file of flags or files contradict each other."""
    if SERVER_FILE in files or IK_SERVER_FILE in files:
        check_served(files)
        return
    on_host: dict[str, list[int]] = {}
    for name, text in files.items():
        flags = flags_of(text, TABLE, name)
        if "--n-cpu-moe" in flags:
            on_host[name] = [layer for layer in model.moe_layers if layer < flags["--n-cpu-moe"]]
        if "--override-tensor" in flags:
            match = _OVERRIDE.fullmatch(flags["--override-tensor"])
            if not match:
                raise InputError(
                    f"{name}: --override-tensor", flags["--override-tensor"], "not whole layers' experts", "emit again"
                )
            on_host[name] = [int(layer) for layer in match[1].split("|")]
            if not set(on_host[name]) <= set(model.moe_layers):
                raise InputError(f"{name}: --override-tensor", on_host[name], "not MoE layers", "emit again")
        if "--moe-cache-mib" in flags:
            needed(flags, "--cpu-moe", name)
    if len({tuple(layers) for layers in on_host.values()}) > 1:
        raise InputError("files", on_host, "the files divide the layers differently", "emit again")


TARGET = Target(table=TABLE, offload=OffloadTarget(render=render, check=check))
