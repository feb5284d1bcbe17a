r"""llama.cpp, offload: which layers' expert tensors stay in host memory, as `--n-cpu-moe` and as `--override-tensor`.

Modelled: one tensor holds all experts of a layer (`blk\.%d\.ffn_(up|down|gate|gate_up)_(ch|)exps`), so the plan's cache becomes
as many whole layers as it is worth, the last ones, as `--n-cpu-moe` divides them; for caches that change, the flags of
llama.cpp's own expert cache. Ignored: quantisation (the GGUF file's), batch and context sizes.
"""

from __future__ import annotations

from ...specs import ModelSpec
from ...units import MIB
from .choices import Emission, OffloadChoice
from .flags import FLAGS_FILE, USE_FLAGS, FlagValue, flag_lines
from .offload_notes import guess_notes, other_notes, whole_layers

OVERRIDE_FILE, CACHE_FILE = "flags_override_tensor.txt", "flags_expert_cache.txt"
_EXPERT_TENSORS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"


def render(choice: OffloadChoice, model: ModelSpec) -> Emission:
    """Return the flags of whole layers in two spellings, and those of the expert cache where the plan's cache changes."""
    on_device = whole_layers(choice, model.num_experts)
    on_host = model.moe_layers[: model.num_moe_layers - on_device]
    # One more than the layers: the output matrix counts as a layer of its own.
    common: dict[str, FlagValue] = {"--n-gpu-layers": model.num_layers + 1}
    first, override = dict(common), dict(common)
    if on_host:
        first["--n-cpu-moe"] = on_host[-1] + 1
        override["--override-tensor"] = rf"blk\.({'|'.join(map(str, on_host))}){_EXPERT_TENSORS}=CPU"
    files = {FLAGS_FILE: flag_lines(first), OVERRIDE_FILE: flag_lines(override)}
    usage = [USE_FLAGS, f"{OVERRIDE_FILE} says the same layer by layer; use one of the files, not both"]
    cache = choice.schedule.cache
    unused = choice.cached_experts - on_device * model.num_experts
    notes = []
    if on_host:
        notes.append(
            f"cache.policy={cache.policy}: single experts cannot be placed, a layer's experts are one tensor; {on_device} whole "
            f"layers are on the device, never changed, where the plan has {choice.cached_experts} experts ({unused} unused)"
        )
        notes.append(
            "experts in host memory are computed by the processor, not copied: the plan's copy times do not apply"
        )
    if on_host and choice.cached_experts and cache.policy in ("lru", "lfu"):
        mib = choice.cached_experts * choice.expert_bytes // MIB
        files[CACHE_FILE] = flag_lines(common | {"--cpu-moe": True, "--moe-cache-mib": mib})
        usage.append(f"{CACHE_FILE} is the nearest to the plan where llama.cpp has an expert cache; use it alone")
        notes.append(f"{CACHE_FILE}: llama.cpp divides the cache among layers and chooses victims itself")
    notes += guess_notes(choice, "nothing is fetched ahead")
    notes += other_notes(choice)
    return Emission(engine="llama.cpp", files=files, usage=tuple(usage), notes=tuple(notes))
