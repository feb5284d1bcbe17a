"""Files and repositories as they stand in commands name a bundled model, or none."""

import pytest

from moeplan.specs.models.load import list_models, named_in


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("unsloth/GLM-4.5-Air-GGUF:UD-Q4_K_XL", "glm-4.5-air"), ("Qwen/Qwen3-30B-A3B-GPTQ-Int4", "qwen3-30b-a3b"),
        ("gpt-oss:20b", "gpt-oss-20b"), ("qwen3:30b-a3b", "qwen3-30b-a3b"), ("mlx-community/Qwen3-30B-A3B-4bit", "qwen3-30b-a3b"),
        ("/models/gpt-oss-120b-mxfp4-00001-of-00003.gguf", "gpt-oss-120b"), ("deepseek-ai/DeepSeek-V3", "deepseek-v3"),
        ("C:\\m\\Qwen3-235B-A22B-Instruct-2507-IQ4_XS-00001-of-00003.gguf", "qwen3-235b-a22b"),
        ("Mixtral-8x7B-Instruct-v0.1.Q4_K_M.gguf", "mixtral-8x7b"), ("nvidia/DeepSeek-R1-0528-FP4", "deepseek-v3"),
        ("Qwen_Qwen3-30B-A3B-Q6_K_L.gguf", "qwen3-30b-a3b"), ("DeepSeek-V3-0324-IQ4_K_R4-00001-of-00010.gguf", "deepseek-v3"),
        ("RedHatAI/Llama-4-Scout-17B-16E-Instruct-quantized.w4a16", "llama-4-scout"),
        # Others, however alike.
        ("DeepSeek-R1-Distill-Llama-70B-Q4_K_M.gguf", None), ("Qwen3-8B-Q4_K_M.gguf", None), ("gpt-oss-120b-eagle3", None),
        ("MODEL.gguf", None), ("", None), (":", None), ("///", None), ("-", None), ("x" * 5000, None),
    ],
)  # fmt: skip
def test_names(text: str, name: str | None) -> None:
    assert named_in(text) == name


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize(
    "ending",
    ["", "-Q4_K_M.gguf", "-UD-Q2_K_XL-00002-of-00009.gguf", "-GGUF", "-AWQ", "-MLX-8bit", "-FP8", ".i1-IQ2_XS.gguf"],
)
def test_every_bundled_model_is_found_by_its_files(name: str, ending: str) -> None:
    assert named_in(f"/srv/models/{name}{ending}") == name
    assert named_in(f"{name}-abliterated{ending}") is None
