"""A GGUF header's keys and shapes under the names that `config.json` has for them, and the family that reads them.

Modelled: the families that llama.cpp converts and this package knows; which layers have experts, a state, biases and norms is seen
from their tensors. Ignored: draft layers at the end, positions, what a tokenizer does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .....base.gguf import Header, Tensor

FAMILIES: Mapping[str, str] = {
    "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "qwen3vlmoe": "qwen3_vl_moe", "qwen3next": "qwen3_next",
    "qwen35moe": "qwen3_5_moe", "llama": "mixtral", "gpt-oss": "gpt_oss", "deepseek": "deepseek", "deepseek2": "deepseek_v3",
    "glm4moe": "glm4_moe", "olmoe": "olmoe", "minimax-m2": "minimax_m2", "phimoe": "phimoe", "granitemoe": "granitemoe",
    "ernie4_5-moe": "ernie4_5_moe", "dots1": "dots1", "bailingmoe": "bailing_moe", "bailingmoe2": "bailing_moe_v2",
}  # fmt: skip
"""`general.architecture`, and the `model_type` whose layers it has."""
_WITH_STATE = ("qwen3next", "qwen35moe")
EXPERT = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)(?:_exps|\.(\d+))\.(weight|bias)")
"""Experts of a layer in one tensor, or (older files) each in its own."""
_BLOCK = re.compile(r"blk\.(\d+)\.")


def block_of(name: str) -> int | None:
    """Return the layer that a tensor is of, None for one outside the layers."""
    found = _BLOCK.match(name)
    return None if found is None else int(found[1])


class HeaderKeys:
    """Keys of one header's architecture."""

    def __init__(self, header: Header) -> None:
        """Take the header; raises ValueError where it names no architecture."""
        self.header = header
        arch = header.values.get("general.architecture")
        if not isinstance(arch, str) or not arch:
            raise ValueError("names no general.architecture")
        self.architecture = arch

    def value(self, key: str) -> Any:
        """Return the value of an architecture's key, None where it is absent."""
        return self.header.values.get(f"{self.architecture}.{key}")

    def count(self, key: str, default: int | None = None) -> int:
        """Return a count; of one for each layer, the largest. Raises ValueError where it is absent, below zero or no whole number."""
        found = self.value(key)
        if isinstance(found, list) and found:
            found = max((one for one in found if type(one) is int), default=None)
        if found is None and default is not None:
            return default
        if type(found) is not int or not 0 <= found < 1 << 31:
            shown = "is absent" if found is None else f"is {str(found)[:40]!r}, not a count"
            raise ValueError(f"{self.architecture}.{key} {shown}")
        return found

    @property
    def num_layers(self) -> int:
        """Layers without those that only draft."""
        found = self.count("block_count") - self.count("nextn_predict_layers", 0)
        if found < 1:
            raise ValueError(f"{self.architecture}.block_count leaves {found} layers")
        return found

    def tensor(self, name: str) -> Tensor:
        """Return a tensor; raises ValueError where the table lacks it."""
        found = self.header.tensors.get(name)
        if found is None:
            raise ValueError(f"its table has no tensor {name}")
        return found

    def config(self) -> dict[str, Any]:
        """Return what a `config.json` of the same model says; raises ValueError where the header does not say it."""
        arch, tensors = self.architecture, self.header.tensors
        if arch not in FAMILIES:
            raise ValueError(
                f"architecture {arch[:40]!r} is not one whose keys are known: {', '.join(sorted(FAMILIES))}"
            )
        layers, embedding = self.num_layers, self.tensor("token_embd.weight")
        if len(embedding.shape) != 2:
            raise ValueError("token_embd.weight is no matrix")
        moe = sorted(
            {
                int(found[1])
                for name in tensors
                if (found := EXPERT.fullmatch(name)) is not None and int(found[1]) < layers
            }
        )
        if not moe:
            raise ValueError("no layer has experts: a dense model")
        heads = self.count("attention.head_count")
        config: dict[str, Any] = {
            "model_type": FAMILIES[arch], "num_hidden_layers": layers, "hidden_size": self.count("embedding_length"),
            "vocab_size": embedding.shape[1], "num_experts": self.count("expert_count"),
            "num_experts_per_tok": self.count("expert_used_count"), "moe_intermediate_size": self._expert_width(moe[0]),
            "moe_layer_indices": moe, "num_attention_heads": heads, "num_key_value_heads": self.count("attention.head_count_kv", heads),
            "tie_word_embeddings": "output.weight" not in tensors,
            "max_position_embeddings": self.count("context_length", 0) or None,
        }  # fmt: skip
        if len(moe) < layers:
            config["intermediate_size"] = self.count("feed_forward_length")
        shared = next((tensors[name] for name in tensors if name.endswith(".ffn_down_shexp.weight")), None)
        config |= {"num_shared_experts": 0} if shared is None else {
            "num_shared_experts": 1, "shared_expert_intermediate_size": shared.shape[0]
        }  # fmt: skip
        if self._some(".attn_q.bias", ".attn_qkv.bias"):
            config["attention_bias"] = True
        if self._some(".attn_q_norm.weight"):
            config["use_qk_norm"] = True
        window = self.count("attention.sliding_window", 0)
        if window:
            config["sliding_window"] = window
        return config | self._attention(heads) | self._states(layers)

    def _expert_width(self, layer: int) -> int:
        """Return the width of an expert: rows of the matrix that leads out of it."""
        for name in (f"blk.{layer}.ffn_down_exps.weight", f"blk.{layer}.ffn_down.0.weight"):
            if name in self.header.tensors:
                return self.header.tensors[name].shape[0]
        raise ValueError(f"layer {layer} has no matrix that leads out of its experts")

    def _attention(self, heads: int) -> dict[str, Any]:
        """Return the widths of heads, or of latents."""
        width = self.count("embedding_length") // max(heads, 1)
        key, value = self.count("attention.key_length", width), self.count("attention.value_length", width)
        rank = self.count("attention.kv_lora_rank", 0)
        if not rank:
            return {"head_dim": key, "v_head_dim": value}
        # Files for attention on latents give the latents' lengths there, and the heads' under names of their own.
        key, value = self.count("attention.key_length_mla", key), self.count("attention.value_length_mla", value)
        turned = self.count("rope.dimension_count")
        found = {
            "kv_lora_rank": rank,
            "qk_rope_head_dim": turned,
            "qk_nope_head_dim": key - turned,
            "v_head_dim": value,
        }
        of_queries = self.count("attention.q_lora_rank", 0)
        return found | ({"q_lora_rank": of_queries} if of_queries else {})

    def _states(self, layers: int) -> dict[str, Any]:
        """Return which layers keep a state, and its sizes."""
        with_state = {block_of(name) for name in self.header.tensors if ".ssm_" in name}
        if not with_state:
            return {}
        if self.architecture not in _WITH_STATE:
            raise ValueError(f"layers with a state are not known of architecture {self.architecture}")
        heads, inner = self.count("ssm.time_step_rank"), self.count("ssm.inner_size")
        kinds = ["linear_attention" if layer in with_state else "full_attention" for layer in range(layers)]
        return {
            "layer_types": kinds, "linear_num_key_heads": self.count("ssm.group_count"), "linear_num_value_heads": heads,
            "linear_key_head_dim": self.count("ssm.state_size"), "linear_value_head_dim": inner // max(heads, 1),
            "linear_conv_kernel_dim": self.count("ssm.conv_kernel"),
        }  # fmt: skip

    def _some(self, *endings: str) -> bool:
        return any(name.endswith(endings) for name in self.header.tensors)
