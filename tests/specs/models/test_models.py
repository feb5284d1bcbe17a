"""What models count to: published totals, exact totals, bytes of experts and of the context, layer by layer."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError, UnknownName
from moeplan.specs.models import WEIGHT_FORMATS, AttentionSpec, ModelSpec, RecurrentSpec, weight_format
from moeplan.specs.models.load import is_bundled, list_models, load_model
from moeplan.specs.models.names import SAME_MODEL, SAME_SHAPE, bundled_name

# --- weight formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bits_per_weight"),
    [
        ("32", Fraction(32)), ("16", Fraction(16)), ("8", 8 + Fraction(1, 512)), ("mxfp4", Fraction(17, 4)),
        # Packed values, two 8-bit scales a group, and two 16-bit constants for each 128 scales.
        ("4", 4 + Fraction(16, 64) + Fraction(2 * 32, 64 * 128)),
        ("3", Fraction(32, 10) + Fraction(16, 64) + Fraction(2 * 32, 64 * 128)),
        ("2", 2 + Fraction(16, 16) + Fraction(2 * 32, 16 * 128)),
    ],
)  # fmt: skip
def test_bits_per_weight(name: str, bits_per_weight: Fraction) -> None:
    assert weight_format(name).bits_per_weight == bits_per_weight


def test_formats_are_named_by_word_or_number() -> None:
    assert weight_format(4) is weight_format("4")
    assert set(WEIGHT_FORMATS) == {"32", "16", "8", "4", "mxfp4", "3", "2"}
    assert [fmt.name for fmt in WEIGHT_FORMATS.values() if not fmt.quantised] == ["32", "16"]


def test_an_unknown_format_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'mxfp4'"):
        weight_format("mxfp")


@given(st.sampled_from(sorted(WEIGHT_FORMATS)), st.integers(0, 2**50))
def test_bytes_of_a_matrix_are_rounded_up(name: str, num_weights: int) -> None:
    fmt = weight_format(name)
    exact = fmt.bits_per_weight * num_weights / 8
    assert exact <= fmt.num_bytes(num_weights) < exact + 1
    assert fmt.vector_bytes(num_weights) == num_weights * (4 if name == "32" else 2)


# --- published numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "megabytes"), [("16", "352.3"), ("4", "93.8"), ("3", "76.1"), ("2", "66.7"), ("mxfp4", "93.6")]
)
def test_mixtral_expert_bytes(fmt: str, megabytes: str) -> None:
    """The sizes that Mixtral-offloading's packing gives (arXiv 2312.17238 §3.3)."""
    assert f"{load_model('mixtral-8x7b').expert_bytes(weight_format(fmt)) / 10**6:.1f}" == megabytes


def test_shrinking_from_four_to_two_bits_saves_less_than_half() -> None:
    mixtral = load_model("mixtral-8x7b")
    ratio = mixtral.expert_bytes(weight_format(4)) / mixtral.expert_bytes(weight_format(2))
    assert ratio == pytest.approx(1.4, abs=0.01)


# Billions of parameters as the model cards and papers print them.
PUBLISHED = {
    "mixtral-8x7b": 46.7, "mixtral-8x22b": 140.6, "gpt-oss-20b": 20.9, "gpt-oss-120b": 116.8, "deepseek-v2-lite": 15.7,
    "deepseek-v3": 671.0, "qwen3-30b-a3b": 30.5, "qwen3-235b-a22b": 235.1, "qwen3-next-80b-a3b": 79.7, "olmoe-1b-7b": 6.9,
    "dbrx": 131.6, "nllb-moe-54b": 54.5,
}  # fmt: skip
# parameters() of transformers 5.23.0 models made from the bundled configurations.
EXACT = {
    "dbrx": 131_596_523_520, "deepseek-v2-lite": 15_706_484_224, "deepseek-v3": 671_026_404_352,
    "gpt-oss-120b": 116_829_156_672, "gpt-oss-20b": 20_914_757_184, "mixtral-8x22b": 140_620_634_112,
    "mixtral-8x7b": 46_702_792_704, "nllb-moe-54b": 54_500_569_088, "olmoe-1b-7b": 6_919_161_856,
    "qwen3-235b-a22b": 235_093_634_560, "qwen3-30b-a3b": 30_532_122_624, "qwen3-next-80b-a3b": 79_674_391_296,
    "switch-base-128": 7_415_217_408, "switch-base-64": 3_790_748_928, "switch-base-8": 619_339_008,
    "switch-large-128": 26_309_291_008, "tiny-moe": 15_494_400,
    "deepseek-v4-flash": 284_332_230_231, "gemma-4-26b-a4b": 25_233_141_760, "glm-4.5-air": 106_852_245_504,
    "glm-4.7": 352_797_814_784, "glm-4.7-flash": 29_943_390_976, "kimi-k2.5": 1_026_408_209_408,
    "llama-4-scout": 107_769_861_120, "mimo-v2-flash": 308_778_768_832, "minimax-m2.5": 228_689_748_992,
    "minimax-text-01": 456_089_655_296, "nemotron-3-nano": 31_577_937_344, "nemotron-3-super": 120_668_687_360,
    "qwen3.5-122b-a10b": 122_111_526_912, "qwen3.5-35b-a3b": 34_660_610_688, "qwen3.5-397b-a17b": 396_346_350_336,
    "qwen3.6-35b-a3b": 34_660_610_688, "qwen3.8-flash-next": 176_943_899_520,
    "deepseek-v2": 235_741_434_880, "deepseek-v3.2": 671_877_929_216, "deepseek-v4-pro": 1_572_997_179_491, "dots.llm1": 142_774_373_888,
    "ernie-4.5-21b-a3b": 21_825_437_888, "ernie-4.5-300b-a47b": 298_636_913_856, "glm-5": 743_911_199_232,
    "granite-3.1-3b-a800m": 3_298_793_472, "granite-4.0-h-small": 32_207_337_984, "granite-4.0-h-tiny": 6_939_037_248,
    "hunyuan-a13b": 80_393_183_232, "jamba-1.5-mini": 51_570_323_328, "kimi-k2": 1_026_408_209_408, "kimi-linear-48b-a3b": 49_122_675_072,
    "lfm2-8b-a1b": 8_339_929_856, "ling-mini-2.0": 16_255_638_528, "llama-4-maverick": 400_711_848_960,
    "moonlight-16b-a3b": 15_960_108_544, "nemotron-3-ultra": 549_308_968_960, "phi-3.5-moe": 41_873_153_344,
    "qwen1.5-moe-a2.7b": 14_315_784_192, "qwen2-57b-a14b": 57_408_658_944, "qwen3-coder-480b-a35b": 480_154_875_392,
    "solar-open-100b": 102_651_793_408, "step-3.7-flash": 195_832_688_640, "trinity-mini": 26_123_974_400,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name: str) -> None:
    assert round(load_model(name).total_parameters / 1e9, 1) == PUBLISHED[name]


def test_totals_are_exact_for_every_bundled_model() -> None:
    assert {name: load_model(name).total_parameters for name in list_models()} == EXACT


@pytest.mark.parametrize(
    ("name", "expert_bytes", "gigabytes", "tolerance"),
    [
        # Pre-gated MoE (arXiv 2308.12066) prints 2.8, 15.2, 30.0 and 105.6 GB. Its Base-8 holds 0.3 GB more than the
        # parameters of the published checkpoint; the others agree within 1.2 %.
        ("switch-base-64", 18_874_368, 15.2, 0.012), ("switch-base-128", 18_874_368, 30.0, 0.012),
        ("switch-large-128", 33_554_432, 105.6, 0.012), ("switch-base-8", 18_874_368, 2.8, 0.12),
    ],
)  # fmt: skip
def test_switch_sizes(name: str, expert_bytes: int, gigabytes: float, tolerance: float) -> None:
    model, fmt = load_model(name), weight_format(32)
    assert model.expert_bytes(fmt) == expert_bytes
    whole = model.dense_bytes(fmt) + model.num_routed_experts * expert_bytes
    assert whole == 4 * model.total_parameters
    assert whole / 1e9 == pytest.approx(gigabytes, rel=tolerance)


def test_gpt_oss_checkpoint_size() -> None:
    """The published mxfp4 checkpoint of gpt-oss-20b has 13.76 GB."""
    model = load_model("gpt-oss-20b")
    experts = model.num_routed_experts * model.expert_bytes(weight_format("mxfp4"))
    assert (experts + model.dense_bytes(weight_format(16))) / 1e9 == pytest.approx(13.76, abs=0.01)


# --- shapes of the bundled models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "moe_layers", "num_experts", "top_k", "kind"),
    [
        ("mixtral-8x7b", range(32), 8, 2, "gqa"), ("gpt-oss-20b", range(24), 32, 4, "gqa"),
        ("deepseek-v2-lite", range(1, 27), 64, 6, "mla"), ("deepseek-v3", range(3, 61), 256, 8, "mla"),
        ("qwen3-30b-a3b", range(48), 128, 8, "gqa"), ("olmoe-1b-7b", range(16), 64, 8, "mha"),
        ("switch-large-128", range(1, 24, 2), 128, 1, "mha"), ("nllb-moe-54b", range(3, 24, 4), 128, 2, "mha"),
        ("tiny-moe", range(6), 16, 2, "gqa"), ("dbrx", range(40), 16, 4, "gqa"),
    ],
)  # fmt: skip
def test_shapes(name: str, moe_layers: range, num_experts: int, top_k: int, kind: str) -> None:
    model = load_model(name)
    assert model.moe_layers == tuple(moe_layers) and model.num_moe_layers == len(moe_layers)
    assert (model.num_experts, model.top_k, model.attention.kind) == (num_experts, top_k, kind)


def test_encoder_decoders() -> None:
    switch, nllb = load_model("switch-large-128"), load_model("nllb-moe-54b")
    assert (switch.num_encoder_layers, len(switch.encoder_moe_layers), switch.cross_attention) == (24, 12, True)
    assert (nllb.num_encoder_layers, nllb.encoder_moe_layers) == (24, (3, 7, 11, 15, 19, 23))
    assert not switch.gated and not nllb.gated and nllb.expert_bias and switch.num_routed_experts == 24 * 128


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # Half the layers of gpt-oss have a window: a long context takes more in the others only.
        ("mixtral-8x7b", 32 * 8 * 2 * 128), ("gpt-oss-20b", 12 * 8 * 2 * 64), ("qwen3-30b-a3b", 48 * 4 * 2 * 128),
        # One latent vector and one shared position key a token, whatever the heads.
        ("deepseek-v2-lite", 27 * (512 + 64)), ("deepseek-v3", 61 * (512 + 64)),
        # Only every fourth layer has a cache.
        ("qwen3-next-80b-a3b", 12 * 2 * 2 * 256),
    ],
)  # fmt: skip
def test_kv_per_token(name: str, values: int) -> None:
    assert load_model(name).kv_bytes_per_token(1) == values
    assert load_model(name).kv_bytes_per_token() == 2 * values


def test_sliding_windows_cap_the_cache() -> None:
    model = load_model("gpt-oss-20b")
    layer_token = 8 * 2 * 64 * 2
    assert model.sliding_layers == tuple(range(0, 24, 2)) and model.sliding_window == 128
    assert model.kv_bytes(100) == 24 * 100 * layer_token
    assert model.kv_bytes(1000) == (12 * 128 + 12 * 1000) * layer_token
    assert model.kv_bytes(1000) == model.window_bytes() + 1000 * model.kv_bytes_per_token()


def test_states_do_not_grow_with_the_context() -> None:
    model = load_model("qwen3-next-80b-a3b")
    assert model.recurrent is not None and len(model.recurrent_layers) == 36
    state = 32 * 128 * 128 + 3 * (2 * 16 * 128 + 32 * 128)
    assert model.recurrent.state_values == state
    assert model.kv_bytes(10) == 2 * 36 * state + 10 * model.kv_bytes_per_token()


def test_cross_attention_keeps_the_input() -> None:
    model = load_model("switch-base-8")
    assert model.kv_bytes(5, 4, encoder_tokens=7) == 12 * (5 + 7) * 2 * 768 * 4


# --- a small model counted by hand -------------------------------------------------------------------------------------

ATTENTION = AttentionSpec(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=3, v_head_dim=3, vector_parameters=5)
SMALL = ModelSpec(
    name="small", family="made-up", hidden_size=10, num_layers=3, moe_layers=(1, 2), num_experts=4, top_k=2,
    expert_intermediate_size=6, gated=True, vocab_size=7, attention=ATTENTION, expert_bias=True, router_bias=True,
    num_shared_experts=2, shared_intermediate_size=5, shared_gate=True, dense_intermediate_size=8,
)  # fmt: skip


def test_small_model_by_hand() -> None:
    attention = 10 * 12 + 2 * 10 * 6 + 12 * 10
    shared, router, norms = 2 * 3 * 10 * 5, 4 * 10 + 4, 2 * 10
    assert SMALL.attention.matrix_parameters(10) == attention
    assert SMALL.expert_matrix_parameters == 180 and SMALL.expert_vector_parameters == 6 + 6 + 10
    assert SMALL.expert_parameters == 202 and SMALL.expert_flops_per_token == 404
    assert SMALL.dense_parameters(0) == attention + 5 + norms + 3 * 10 * 8
    assert SMALL.dense_parameters(1) == attention + 5 + norms + shared + router + 10
    assert SMALL.dense_matrix_parameters(1) == attention + shared
    assert SMALL.embedding_parameters == 140 and SMALL.head_parameters == 80
    dense = SMALL.dense_parameters(0) + 2 * SMALL.dense_parameters(1) + 140 + 10
    assert SMALL.total_parameters == dense + 8 * 202
    assert SMALL.dense_bytes(weight_format(16)) == 2 * dense
    assert SMALL.expert_bytes(weight_format("mxfp4")) == -(-180 * 17 // 32) + 22 * 2


def test_quantised_dense_bytes_leave_vectors_alone() -> None:
    fmt = weight_format(4)
    matrices = sum(SMALL.dense_matrix_parameters(layer) for layer in range(3))
    rest = SMALL.dense_bytes(weight_format(16)) - 2 * matrices
    assert SMALL.dense_bytes(fmt) == fmt.num_bytes(matrices) + rest


def test_tying_and_plain_mlps() -> None:
    tied = dataclasses.replace(SMALL, tied_embeddings=True)
    plain = dataclasses.replace(SMALL, gated=False, expert_bias=False)
    assert SMALL.total_parameters - tied.total_parameters == 70 and tied.head_parameters == SMALL.head_parameters
    assert plain.expert_parameters == 2 * 10 * 6


def test_attention_flops_of_latents() -> None:
    """Decoding works on the latents, a long prompt expands them: whichever is less."""
    mla = load_model("deepseek-v2-lite").attention
    latent, wide, expand = 2 * 16 * (2 * 512 + 64), 2 * 16 * (192 + 128), 2 * 512 * 16 * (128 + 128)
    assert mla.flops(4096, 4096) == latent * 4096
    assert mla.flops(4096 * 4096, 4096) == wide * 4096 * 4096 + expand * 4096
    assert ATTENTION.flops(10, 3) == 2 * 4 * 6 * 10


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_size": 0}, "hidden_size"), ({"top_k": 5}, "top_k"), ({"moe_layers": ()}, "moe_layers"),
        ({"moe_layers": (2, 1)}, "moe_layers"), ({"moe_layers": (1, 1)}, "moe_layers"), ({"moe_layers": (3,)}, "moe_layers"),
        ({"moe_layers": (-1,)}, "moe_layers"), ({"encoder_moe_layers": (0,)}, "encoder_moe_layers"),
        ({"vocab_size": -1}, "vocab_size"), ({"sliding_layers": (9,)}, "sliding_layers"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(change: dict[str, object], field: str) -> None:
    with pytest.raises(InputError) as caught:
        dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize("layer", [-1, 3])
def test_layers_outside_the_model_are_refused(layer: int) -> None:
    with pytest.raises(InputError, match="choose 0 to 2"):
        SMALL.dense_parameters(layer)


@given(
    hidden=st.integers(1, 64), width=st.integers(1, 64), experts=st.integers(1, 16), layers=st.integers(1, 6),
    fmt=st.sampled_from(sorted(WEIGHT_FORMATS)), data=st.data(),
)  # fmt: skip
def test_parts_add_up(hidden: int, width: int, experts: int, layers: int, fmt: str, data: st.DataObject) -> None:
    moe = data.draw(st.sets(st.integers(0, layers - 1), min_size=1))
    states = data.draw(st.sets(st.integers(0, layers - 1)))
    model = dataclasses.replace(
        SMALL, hidden_size=hidden, expert_intermediate_size=width, num_experts=experts, top_k=1, num_layers=layers,
        moe_layers=tuple(sorted(moe)), recurrent_layers=tuple(sorted(states)),
        recurrent=RecurrentSpec(kind="made-up", matrix_parameters=11, vector_parameters=3, state_values=2),
    )  # fmt: skip
    dense = model.dense_bytes(weight_format(32)) // 4
    assert model.total_parameters == dense + model.num_routed_experts * model.expert_parameters
    assert model.expert_bytes(weight_format(fmt)) <= model.expert_bytes(weight_format(32))
    by_layer = sum(model.dense_layer_bytes(layer, weight_format(16)) for layer in range(layers))
    outside = 2 * (model.embedding_parameters + hidden)
    assert model.dense_bytes(weight_format(16)) == by_layer + outside
    assert model.kv_bytes(9) == 9 * model.kv_bytes_per_token() + 2 * 2 * len(states)


def test_models_of_one_shape_are_known_by_each_of_their_names() -> None:
    assert load_model("deepseek-r1") == load_model("deepseek-v3")
    assert is_bundled("glm-4.6") and is_bundled("glm-4.7") and not is_bundled("glm-9")
    assert set(SAME_SHAPE.values()) <= set(list_models()) and not set(SAME_SHAPE) & set(list_models())
    assert {SAME_SHAPE.get(name, name) for name in SAME_MODEL.values()} <= set(list_models())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"), ("qwen3-30b", "qwen3-30b-a3b"), ("gpt_oss_20b", "gpt-oss-20b"),
        ("GPT-OSS 120B", "gpt-oss-120b"), ("deepseek-ai/DeepSeek-R1-0528", "deepseek-v3"), ("DeepSeek-V3-0324", "deepseek-v3"),
        ("DeepSeek-V3.2-Exp", "deepseek-v3.2"), ("Llama-4-Scout-17B-16E-Instruct", "llama-4-scout"), ("GLM-4.5-Air", "glm-4.5-air"),
        ("zai-org/GLM-4.6", "glm-4.7"), ("Kimi-K2-Instruct-0905", "kimi-k2"), ("unsloth/Qwen3-Coder-480B-A35B-Instruct-GGUF",
        "qwen3-coder-480b-a35b"), ("dots.llm1.inst", "dots.llm1"), ("ERNIE-4.5-21B-A3B-Thinking", "ernie-4.5-21b-a3b"),
        ("mixtral-8x7b-instruct-v0.1", "mixtral-8x7b"), ("qwen3:30b", "qwen3-30b-a3b"), ("nemotron-3-nano-30b-a3b", "nemotron-3-nano"),
    ],
)  # fmt: skip
def test_models_are_known_as_people_write_them(text: str, name: str) -> None:
    assert bundled_name(text, list_models()) == name and load_model(text) == load_model(name)


@pytest.mark.parametrize(
    "text", ["qwen3-31b", "Qwen3-30B-A3B-FP8", "models/qwen3-30b-a3b", "/x/mixtral-8x7b", "-instruct", "", "instruct"]
)
def test_no_other_text_is_taken_for_a_bundled_model(text: str) -> None:
    assert bundled_name(text, list_models()) is None


@pytest.mark.parametrize(
    "text", ["Qwen3-30B-A3B-FP8", "Qwen/Qwen3-30B-A3B-AWQ", "qwen3-30b-a3b-Q4_K_M", "QuantTrio/Qwen3-30B-A3B-GPTQ-Int4"]
)
def test_a_name_with_a_format_is_answered_with_both_options(text: str) -> None:
    with pytest.raises(InputError, match="write --model qwen3-30b-a3b and its format as --quant"):
        load_model(text)


@pytest.mark.parametrize("text", ["Llama-3.3-70B", "qwen3-32b", "no such model"])
def test_a_model_that_is_not_known_is_answered_with_what_is_near_and_what_else_works(text: str) -> None:
    with pytest.raises(UnknownName, match=r"config.json or .gguf file") as error:
        load_model(text)
    assert len(str(error.value)) < 1000
