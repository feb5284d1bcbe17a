"""A model with the bytes that its checkpoint's tensors take: experts, everything else in the layers, the outer matrices.

Modelled: every tensor that belongs to a weight, so packed values, scales of groups and of whole matrices, zero points, permutations,
shapes; which tensors are experts, draft layers and towers is known from their names. What is not quantised is compared with what the
configuration describes. Ignored: that layers may differ (experts take the mean).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path

from .....base.errors import InputError
from ... import BITS_PER_BYTE, ModelSpec, WeightFormat, format_with_bits, stated_format, weight_format
from .header import Tensor

_EXPERTS = re.compile(
    r"(?:^|\.)(?:experts|switch_mlp)\.|\.block_sparse_moe\.(?:input|output)_linear\.|\.mlp\.(?:in|out)put_linear\."
)
_NOT_EXPERTS = re.compile(r"\.(?:self_attention|self_attn|attention|attn)\.|norm\.weight$")
"""Experts of attention, and norms that stand among a layer's experts."""
_ONE_EXPERT = re.compile(r"\.experts\.(?:expert_)?(\d+)\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h)\.(\d+)\.")
_DRAFT = re.compile(r"(?:^|\.)(?:mtp|nextn|draft_\w+|eagle)(?:\.|_)")
_TOWER = re.compile(
    r"^(?:model\.|thinker\.)?(?:visual|vision\w*|audio\w*|multi_modal\w*|mm_\w+|talker|code2wav|token2wav|image_newline|embed_vision|"
    r"embed_audio|patch_\w+|aligner|sam_\w+)\."
)
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|tok_embeddings|embeddings|embed|shared)\.(?:weight|scales|biases|qweight)"
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|head)\.(?:weight\w*|scales|biases|qweight|qzeros)|^output\.weight")
_PLAIN = {"F16", "BF16", "F32", "F64"}
_PLAIN_BITS = 15
"""What takes less is quantised, whatever the configuration says."""
_DIFFER = 0.03
"""Share of the layers' weights that a configuration need not explain: small tensors that engines keep for themselves."""
_REMEDY = "give a folder whose files and config.json belong together"


@dataclass(slots=True)
class _Kind:
    """Tensors of one kind."""

    numbers: int = 0
    num_bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    whole: bool = True
    """All of them are plain numbers, one for each weight."""

    def add(self, tensor: Tensor) -> None:
        self.numbers += tensor.numbers
        self.num_bytes += tensor.num_bytes
        self.kinds[tensor.kind] += tensor.num_bytes
        self.whole = self.whole and tensor.kind in _PLAIN

    @property
    def names(self) -> str:
        return ", ".join(name for name, _ in self.kinds.most_common(4)) or "none"


def as_stored(spec: ModelSpec, tensors: Mapping[str, Tensor], folder: Path) -> ModelSpec:
    """Return the model with the bytes of its checkpoint's tensors; raises InputError where they are not those of such a model."""

    refused = partial(InputError, "model", os.fspath(folder), remedy=_REMEDY)
    kinds = _sorted_out(spec, tensors)
    experts, dense = kinds["experts"], kinds["dense"]
    embedding, head = kinds["embedding"], kinds["head"]
    if not experts.num_bytes or not dense.num_bytes:
        raise refused(
            "its tensors hold no experts" if not experts.num_bytes else "its tensors hold nothing but experts"
        )
    _check_experts(spec, tensors, experts, refused)
    _check_layers(spec, tensors, refused)
    wanted = sum(spec.dense_parameters(layer) for layer in range(spec.num_layers)) + spec.encoder_matrix_parameters
    wanted += spec.table_parameters
    if dense.whole and abs(dense.numbers / wanted - 1) > _DIFFER:
        raise refused(f"its layers hold {dense.numbers} weights beside experts, and config.json describes {wanted}")
    biases = weight_format(spec.native_bits).vector_bytes(spec.num_routed_experts * spec.expert_vector_parameters)
    of_experts = Fraction(
        BITS_PER_BYTE * (experts.num_bytes - biases), spec.num_routed_experts * spec.expert_matrix_parameters
    )
    matrices = spec.encoder_matrix_parameters + sum(spec.dense_matrix_parameters(n) for n in range(spec.num_layers))
    vectors = weight_format(spec.native_dense_bits).vector_bytes(spec.vector_parameters)
    outer = _outer(spec, embedding, head)
    # Tables of layers are counted in the bits of the token embedding.
    tables = weight_format(spec.native_dense_bits).vector_bytes(spec.table_parameters)
    if outer:
        tables = round(outer[0] * spec.table_parameters / BITS_PER_BYTE)
    of_dense = Fraction(BITS_PER_BYTE * (dense.num_bytes - vectors - tables), matrices)
    try:
        stored = _called(spec.native_bits, of_experts)
        rest = _called(spec.native_dense_bits, of_dense, *outer)
    except InputError:
        raise refused(f"its tensors come to {float(of_experts):.4g} and {float(of_dense):.4g} bits a weight") from None
    how = f"experts {float(of_experts):.5g} bits a weight ({experts.names}), the rest of the layers {float(of_dense):.5g} ({dense.names})"
    remarks = [f"as its safetensors files store it: {how}"]
    for name, what in (("drafts", "draft layers"), ("towers", "towers for other than text")):
        if kinds[name].num_bytes:
            remarks.append(f"{what} of {kinds[name].num_bytes} bytes are not counted")
    return dataclasses.replace(
        spec, native_bits=stored.name, native_dense_bits=rest.name, remarks=(*spec.remarks, *remarks)
    )  # fmt: skip


def _called(name: str, bits: Fraction, *outer: Fraction) -> WeightFormat:
    """Return the format that the configuration names, with the bits of the files; theirs alone where it says nothing of a quantiser."""
    base = weight_format(name)
    unsaid = not base.quantised and bits < _PLAIN_BITS
    return stated_format(bits, *outer) if unsaid else format_with_bits(name, bits, *outer)


def _sorted_out(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, _Kind]:
    """Return the tensors by kind."""
    kinds = {name: _Kind() for name in ("experts", "dense", "embedding", "head", "drafts", "towers")}
    for name, tensor in tensors.items():
        layer = _LAYER.search(name)
        if _TOWER.match(name):
            kind = "towers"
        elif _DRAFT.search(name) or (
            layer is not None and int(layer[1]) >= max(spec.num_layers, spec.num_encoder_layers)
        ):
            kind = "drafts"
        elif is_expert(name):
            kind = "experts"
        elif layer is None and _EMBEDDING.search(name):
            kind = "embedding"
        elif layer is None and _HEAD.search(name):
            kind = "head"
        else:
            kind = "dense"
        kinds[kind].add(tensor)
    return kinds


def is_expert(name: str) -> bool:
    """Return whether a tensor is of a routed expert."""
    return _EXPERTS.search(name) is not None and _NOT_EXPERTS.search(name) is None


def _check_experts(
    spec: ModelSpec, tensors: Mapping[str, Tensor], experts: _Kind, refused: Callable[[str], InputError]
) -> None:
    """Return nothing; raises InputError where experts are not as many, or not as large, as the configuration describes."""
    if experts.whole and experts.numbers != spec.num_routed_experts * spec.expert_parameters:
        wanted = spec.num_routed_experts * spec.expert_parameters
        raise refused(f"its tensors hold {experts.numbers} weights of experts, and config.json describes {wanted}")
    named = {
        (layer[1], one[1], name.startswith("encoder.") or ".encoder." in name)
        for name in tensors
        if is_expert(name) and (one := _ONE_EXPERT.search(name)) is not None and (layer := _LAYER.search(name)) is not None
        and int(layer[1]) < max(spec.num_layers, spec.num_encoder_layers) and not _TOWER.match(name) and not _DRAFT.search(name)
    }  # fmt: skip
    if named and len(named) != spec.num_routed_experts:
        raise refused(f"its tensors are of {len(named)} experts, and config.json describes {spec.num_routed_experts}")


def _check_layers(spec: ModelSpec, tensors: Mapping[str, Tensor], refused: Callable[[str], InputError]) -> None:
    """Return nothing; raises InputError for layers beyond those that the configuration describes, unless it has draft layers."""
    most, drafts = max(spec.num_layers, spec.num_encoder_layers), any("draft layers" in one for one in spec.remarks)
    for name in tensors:
        layer = _LAYER.search(name)
        if layer is None or int(layer[1]) < most or drafts or _TOWER.match(name) or _DRAFT.search(name):
            continue
        raise refused(f"tensor {name[:60]!r} is of layer {layer[1]}, and config.json describes {most}")


def _outer(spec: ModelSpec, embedding: _Kind, head: _Kind) -> tuple[Fraction, Fraction] | tuple[()]:
    """Return the bits of the token embedding and of the output matrix; nothing where they are plain 16 bits or not there."""
    values = spec.vocab_size * spec.hidden_size
    each = [
        Fraction(BITS_PER_BYTE * kind.num_bytes, values)
        for kind in ((embedding, embedding) if spec.tied_embeddings else (embedding, head))
    ]
    usual = weight_format(spec.native_dense_bits).vector_bytes(BITS_PER_BYTE)
    if any(not one for one in each) or all(one == usual for one in each):
        return ()
    return each[0], each[1]
