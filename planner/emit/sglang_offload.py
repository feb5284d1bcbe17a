"""SGLang, offload: experts paged into a pool of each layer, or whole layers of experts fetched ahead.

Modelled: SGLang 0.5.23's paged experts, a least-recently-used cache of K experts a layer, wherever the plan's cache holds a
token's experts; else groups of layers of which the last ones are offloaded. Ignored: `--cpu-offload-gb`, which knows no experts.
"""

from __future__ import annotations

from ...specs import ModelSpec
from .choices import Emission, OffloadChoice
from .flags import FLAGS_FILE, USE_FLAGS, FlagValue, flag_lines
from .offload_notes import guess_notes, other_notes, per_layer, pool_notes, whole_layers

# Buffers of whole layers that fetching ahead takes.
_PREFETCH_STEP = 1


def render(choice: OffloadChoice, model: ModelSpec) -> Emission:
    """Return SGLang's offload flags; none where every expert is on the device."""
    policy, resident = choice.schedule.cache.policy, per_layer(choice, model.num_moe_layers)
    flags: dict[str, FlagValue] = {}
    usage, notes = [USE_FLAGS], []
    if choice.cached_experts == model.num_moe_layers * model.num_experts:
        usage = ["every expert is on the device: no flag is needed"]
    elif resident >= model.top_k:
        flags = {"--enable-paged-experts": True, "--paged-experts-num-resident": resident}
        usage.append(
            "add --disable-cuda-graph where the version asks for it: which experts to page is decided on the host"
        )
        notes += pool_notes(choice, model.num_moe_layers)
        if policy != "lru":
            notes.append(f"cache.policy={policy}: the least recently used expert of a layer makes room")
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
    notes += guess_notes(choice, "experts are not guessed")
    notes += other_notes(choice, ("copy.fetch",))
    return Emission(
        engine="SGLang 0.5.23", files={FLAGS_FILE: flag_lines(flags)}, usage=tuple(usage), notes=tuple(notes)
    )


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
