"""Signs that people measured on their own machines come out, with nothing fitted to them.

Three more need what is not modelled or not published: a cache beside two cards (noonghunna/club-3090#929: decoding +32 to +52 %, prompts
-14 to -66 %; which experts it held, and what it does in prompts, is not said), drafting, and a dense model (unslothai/unsloth#9872).
"""

from __future__ import annotations

import pytest

from moeplan.api.subject import open_subject
from moeplan.specs.schedules.presets import load_preset

LRU = load_preset("mixtral-offloading-code")


def test_long_contexts_leave_fewer_experts_on_a_small_card() -> None:
    """antirez/ds4#629: DeepSeek-V4-Flash, IQ2_XXS, RTX 3060: 255 slots at 8,000 tokens of context, 140 at 150,000."""
    short, long = (
        open_subject(model="deepseek-v4-flash", hardware="rtx-3060 + ryzen-9-7950x + ddr5-6000x2:64GiB + disk:3GB/s", quant="IQ2_XXS",
                     prompt_tokens=100, reply_tokens=4, context=context).simulation
        for context in (8_000, 150_000)
    )  # fmt: skip
    lost = short.slots_that_fit(LRU) - long.slots_that_fit(LRU)
    kept = long.model.kv_bytes(150_000, 2) - short.model.kv_bytes(8_000, 2)
    assert lost >= 100
    assert lost * short.expert_bytes(LRU) == pytest.approx(kept, rel=0.05)
    # 13.7 KiB a token of context there, where keys and values are kept at 32 bits.
    assert 13_000 < long.model.kv_bytes(150_000, 4) / 150_000 < 14_500


def test_a_cache_below_one_tokens_working_set_never_hits() -> None:
    """Helldez/BigMoeOnEdge#33: a pool for all layers that is smaller than what one token uses has lost an expert when it comes again."""
    simulation = open_subject(model="gpt-oss-20b", hardware="rtx-3060 + ryzen-9-7950x + ddr5-6000x2:64GiB", prompt_tokens=0,
                              reply_tokens=200).simulation  # fmt: skip
    used = simulation.model.num_moe_layers * simulation.model.top_k
    rates = [
        simulation.predict(LRU.with_options(cache__pooled_experts=round(share * used))).metrics.hit_rate
        for share in (0.25, 0.5, 1.25, 4)
    ]
    assert rates[:2] == [0, 0] and 0.3 < rates[2] < rates[3]
