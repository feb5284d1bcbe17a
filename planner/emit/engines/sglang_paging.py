"""SGLang, offload: experts paged into a pool of each layer, or whole layers of experts fetched ahead.

Modelled: SGLang 0.5.23's paged experts, a least-recently-used cache of K experts a layer, wherever the plan's cache holds a
token's experts; else groups of layers of which the last ones are offloaded. Ignored: `--cpu-offload-gb`, which knows no experts.
"""

from __future__ import annotations

from collections.abc import Mapping

from ....base.errors import InputError
from ....specs.models import ModelSpec
from ..checks import check_groups, needed, text_of
from ..choices import Emission, OffloadChoice, as_run
from ..flags import FLAGS_FILE, USE_FLAGS, FlagValue, flag_lines
from ..offload_notes import COMMON, NO_GUESSES, guess_notes, other_notes, per_layer, pool_notes, whole_layers
from ..table import EngineTable, flags_of

# Buffers of whole layers that fetching ahead takes.
_PREFETCH_STEP = 1


def render_offload(choice: OffloadChoice, model: ModelSpec, table: EngineTable) -> Emission:
    """Return SGLang's offload flags; none where every expert is on the device."""
    policy, resident = choice.schedule.cache.policy, per_layer(choice, model.num_moe_layers)
    flags: dict[str, FlagValue] = {}
    usage, notes, facts, runs, unlike = [USE_FLAGS], [], [], None, ""
    if choice.cached_experts == model.num_moe_layers * model.num_experts:
        usage = ["every expert is on the device: no flag is needed"]
        runs = as_run(choice.schedule, COMMON)
    elif resident >= model.top_k:
        flags = {"--enable-paged-experts": True, "--paged-experts-num-resident": resident,
                 "--cuda-graph-backend-prefill": "disabled"}  # fmt: skip
        facts = [
            "paged experts: one device; experts run on the Triton or Marlin kernels, other quantisations are refused at the start",
            f"decode batches of up to {resident // model.top_k} requests keep their CUDA graphs; prefill's are off, as paging asks",
        ]
        notes += pool_notes(choice, model.num_moe_layers)
        if policy != "lru":
            notes.append(f"cache.policy={policy}: the least recently used expert of a layer makes room")
        runs = as_run(choice.schedule, COMMON, cache__policy="lru", cache__experts_per_layer=resident, cache__pooled_experts=None,
                      cache__bytes=None, **NO_GUESSES)  # fmt: skip
    else:
        kept = max(0, whole_layers(choice, model.num_experts) - _PREFETCH_STEP)
        group, inside = grouping(model, model.num_moe_layers - kept)
        flags = {
            "--offload-group-size": group,
            "--offload-num-in-group": inside,
            "--offload-prefetch-step": _PREFETCH_STEP,
        }
        notes.append(
            f"cache.policy={policy}: paged experts need {model.top_k} experts a layer where the plan has {resident}; so whole "
            f"layers are fetched, the last {inside} of every {group}, into a buffer of {model.num_experts} experts"
        )
        unlike = "whole layers are fetched a layer ahead, attention's weights with them"
    notes += guess_notes(choice, "experts are not guessed")
    notes += other_notes(choice, ("copy.fetch",))
    return Emission(
        engine=table.engine, files={FLAGS_FILE: flag_lines(flags)}, usage=tuple(usage), notes=tuple(notes), facts=tuple(facts),
        runs=runs, unlike=unlike,
    )  # fmt: skip


def grouping(model: ModelSpec, num_offloaded: int) -> tuple[int, int]:
    """Return (group, last of it) that offloads the fewest MoE layers, at least `num_offloaded`; the smallest group of equals."""
    found = []
    for group in range(1, model.num_layers + 1):
        for inside in range(1, group + 1):
            count = sum(layer % group >= group - inside for layer in model.moe_layers)
            if count >= num_offloaded:
                found.append((count, group, inside))
    _, group, inside = min(found)
    return group, inside


def check_offload(files: Mapping[str, str], model: ModelSpec, table: EngineTable) -> None:
    """Return nothing; raises InputError where SGLang would refuse the flags."""
    flags = flags_of(text_of(files, FLAGS_FILE), table, FLAGS_FILE)
    if "--paged-experts-num-resident" in flags:
        needed(flags, "--enable-paged-experts", FLAGS_FILE)
        resident = flags["--paged-experts-num-resident"]
        if not model.top_k <= resident <= model.num_experts:
            raise InputError(f"{FLAGS_FILE}: --paged-experts-num-resident", resident,
                             f"not from {model.top_k} to {model.num_experts}", "emit again")  # fmt: skip
        if flags.get("--cuda-graph-backend-prefill") not in ("disabled", "breakable"):
            raise InputError(f"{FLAGS_FILE}: --cuda-graph-backend-prefill", flags.get("--cuda-graph-backend-prefill"),
                             "paged experts need prefill graphs disabled or breakable", "write disabled")  # fmt: skip
    check_groups(flags)
