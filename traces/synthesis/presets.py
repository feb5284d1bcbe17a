"""Dials for published localities, so that people without a recording can start.

Modelled: what the sources say about a model's routing. What they do not say is taken from recordings of other models and
named here as an assumption; a recording of one's own, fitted with `synth_fit`, is always better. Ignored: prompts of any
particular service; lengths are those of short chats.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ...base.errors import UnknownName
from .dial import Dials

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

# gpt-oss-20b: fitted with `trace synth --like` to the routing of 46 answers published by A. Priyanshu
# (github.com/AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting at 72b368f, Apache-2.0; 16,114 generated tokens). Assumed: request
# lengths, how often domains change, the recall of guesses (none).
_GPT_OSS_20B_POPULARITY = (
    1, 0.982, 0.758, 0.757, 0.744, 0.706, 0.525, 0.458, 0.454, 0.45, 0.449, 0.443, 0.432, 0.346, 0.332, 0.277,
    0.273, 0.269, 0.18, 0.137, 0.134, 0.13, 0.128, 0.108, 0.107, 0.0605, 0.0583, 0.0304, 0.0279, 0.026, 0.0142,
    0.0013,
)  # fmt: skip
GPT_OSS_20B = Dials(
    num_layers=24,
    num_experts=32,
    top_k=4,
    popularity=_GPT_OSS_20B_POPULARITY,
    request_shift=1.329,
    domain_share=0.197,
    reuse_short=0.142,
    short_span=1.192,
    reuse_long=0.069,
    long_decay=1.105,
    affinity=0.859,
    affinity_spread=0.004,
    num_domains=8,
    prompt_tokens=(16, 64, 128, 256, 1024),
    decode_tokens=(32, 128, 256, 384, 512),
)

# DeepSeek-V2-Lite: fitted likewise to the routing of 160 prompts of four tasks published with ESFT
# (github.com/deepseek-ai/ESFT at 579a771, MIT; 16,549 prompt tokens). Assumed: as above, and that generation routes alike.
_DEEPSEEK_V2_LITE_POPULARITY = (
    1, 0.509, 0.509, 0.509, 0.508, 0.507, 0.507, 0.507, 0.506, 0.506, 0.506, 0.505, 0.504, 0.504, 0.503, 0.502,
    0.502, 0.502, 0.502, 0.501, 0.5, 0.499, 0.498, 0.497, 0.497, 0.497, 0.497, 0.496, 0.496, 0.496, 0.495, 0.495,
    0.494, 0.494, 0.492, 0.491, 0.49, 0.486, 0.485, 0.485, 0.482, 0.482, 0.482, 0.478, 0.477, 0.474, 0.433, 0.427,
    0.427, 0.422, 0.421, 0.421, 0.403, 0.403, 0.341, 0.275, 0.242, 0.216, 0.214, 0.208, 0.207, 0.2, 0.199, 0.104,
)  # fmt: skip
DEEPSEEK_V2_LITE = Dials(
    num_layers=26,
    num_experts=64,
    top_k=6,
    layer_ids=tuple(range(1, 27)),
    popularity=_DEEPSEEK_V2_LITE_POPULARITY,
    request_shift=0.875,
    domain_share=0.924,
    reuse_short=0.195,
    short_span=1.543,
    reuse_long=0.053,
    long_decay=1.42,
    affinity=1.0,
    affinity_spread=0.137,
    num_domains=8,
    prompt_tokens=(16, 64, 128, 256, 1024),
    decode_tokens=(32, 128, 256, 384, 512),
)

PRESETS: Mapping[str, Dials] = MappingProxyType(
    {
        "deepseek-r1": DEEPSEEK_R1,
        "deepseek-v2-lite": DEEPSEEK_V2_LITE,
        "gpt-oss-20b": GPT_OSS_20B,
        "mixtral-8x7b": MIXTRAL_8X7B,
    }
)


def preset(name: str) -> Dials:
    """Return the dials of a published locality. Raises UnknownName."""
    if name not in PRESETS:
        raise UnknownName("preset", name, PRESETS)
    return PRESETS[name]
