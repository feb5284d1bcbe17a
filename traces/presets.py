"""Dials for published localities, so that people without a recording can start.

Modelled: what the sources say about a model's routing. What they do not say is taken from recordings of other models and
named here as an assumption; a recording of one's own, fitted with `synth_fit`, is always better. Ignored: prompts of any
particular service; lengths are those of short chats.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..errors import UnknownName
from .dials import Dials

# Mixtral of Experts (arXiv 2401.04088), table 5: share of consecutive tokens with an expert in common among their two:
# layer 0 45–50 %, layer 15 62–67 %, layer 31 45–54 %, by domain (46 % by chance); no visible pattern of domains; loads
# nearly even (max/mean 1.1–1.3). `reuse_short`, `layer_reuse`, `skew` and `request_shift` give these. Recall of guesses of
# the next layer's own gate: reports lie between 60 and 90 % for two guesses; 80 % assumed, with 45, 90 and 95 % for one,
# three and four. Assumed: affinity, reach of repetition.
MIXTRAL_8X7B = Dials(
    num_layers=32,
    num_experts=8,
    top_k=2,
    skew=0.15,
    request_shift=0.1,
    domain_share=0.5,
    num_domains=8,
    reuse_short=0.25,
    short_span=1.5,
    reuse_long=0.04,
    long_decay=1.0,
    layer_reuse=(0.0, 1.0, 0.05),
    affinity=0.25,
    affinity_spread=0.1,
    prompt_tokens=(16, 64, 128, 256, 1024),
    decode_tokens=(32, 128, 256, 384, 512),
    guess_recall=((0.45, 0.80, 0.90, 0.95),),
)

# DeepSeek-R1: 58 MoE layers after three dense ones, 256 experts, top 8. Loads recorded by SGLang over several workloads:
# the busiest expert of a layer has 5.6–8.1 times the mean; `skew` gives 6.3. Repetition, affinity and shifts are not
# published: those of its small relative DeepSeek-V2-Lite are assumed, fitted to its routing published with ESFT (MIT).
DEEPSEEK_R1 = Dials(
    num_layers=58,
    num_experts=256,
    top_k=8,
    layer_ids=tuple(range(3, 61)),
    skew=0.85,
    request_shift=0.6,
    domain_share=0.5,
    num_domains=8,
    reuse_short=0.2,
    short_span=1.5,
    reuse_long=0.05,
    long_decay=1.4,
    affinity=0.95,
    affinity_spread=0.14,
    prompt_tokens=(128, 512, 1024, 2048, 4096),
    decode_tokens=(64, 256, 512, 1024, 2048),
)

PRESETS: Mapping[str, Dials] = MappingProxyType({"deepseek-r1": DEEPSEEK_R1, "mixtral-8x7b": MIXTRAL_8X7B})


def preset(name: str) -> Dials:
    """Return the dials of a published locality. Raises UnknownName."""
    if name not in PRESETS:
        raise UnknownName("preset", name, PRESETS)
    return PRESETS[name]
