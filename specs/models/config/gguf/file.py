"""A GGUF file (or the parts of a split one) into a `ModelSpec`: sizes from its keys, bytes from its table of tensors.

Modelled: experts, everything else in the layers, token embedding and output matrix, each at the bits that the file's own tensors come
to; the sum is the file's to the byte. What the keys describe is compared with what the tensors hold, and refused where they differ.
Ignored: that experts of different layers may be stored in different types (they take their mean), draft layers (a remark says so).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from .....base.errors import InputError, one_line
from .....base.gguf import Header, Tensor, read_header
from ... import BITS_PER_BYTE, ModelSpec, stated_format, weight_format
from ...gguf_types import tensor_type
from ..read import read_config
from .keys import EXPERT, HeaderKeys, block_of

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})")
_MOST_PARTS = 999
_DIFFER = 0.03
"""Share of the layers' weights that keys need not explain: small tensors that engines keep for themselves."""
_REMEDY = "give a complete GGUF file of a model with experts, or its config.json and --quant"
_SIXTEEN = 2  # bytes of what is counted as unquantised


@dataclass(slots=True)
class _Kind:
    """Tensors of one kind."""

    weights: int = 0
    num_bytes: int = 0
    types: Counter[str] = field(default_factory=Counter)

    def add(self, tensor: Tensor, name: str) -> None:
        found = tensor_type(tensor.kind)
        if found is None:
            raise ValueError(f"tensor {name[:60]} has type {tensor.kind}, which is not known")
        num_bytes = found.num_bytes(tensor.shape)
        if num_bytes is None:
            raise ValueError(f"tensor {name[:60]} has rows of {tensor.shape[0]}, no whole blocks of {found.name}")
        self.weights += tensor.num_weights
        self.num_bytes += num_bytes
        self.types[found.name] += num_bytes

    @property
    def bits(self) -> Fraction:
        return Fraction(BITS_PER_BYTE * self.num_bytes, self.weights)

    @property
    def names(self) -> str:
        return ", ".join(name for name, _ in self.types.most_common(4)) or "none"


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Return whether a file's name says that it is one."""
    return os.fspath(path).lower().endswith(".gguf")


def read_gguf(path: str | os.PathLike[str]) -> ModelSpec:
    """Return the model of a GGUF file; of a split one, any part stands for all. Raises InputError with one line where it has none."""
    where = f"model {path}"
    try:
        header = _whole(Path(path))
        keys = HeaderKeys(header)
        name = _PART.sub(r"\1", Path(path).stem)
        spec = read_config(keys.config(), name, where)
        return _with_formats(spec, keys)
    except (OSError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(
            "model", os.fspath(path), f"cannot be read as GGUF ({one_line(reason, 240)})", _REMEDY
        ) from None


def _whole(path: Path) -> Header:
    """Return the header of a file, with the tensors of all parts where it is one of several."""
    first = read_header(path)
    _check_data(first)
    parts = first.values.get("split.count", 1)
    if type(parts) is not int or parts <= 1:
        return first
    found = _PART.fullmatch(path.stem)
    if found is None or parts > _MOST_PARTS or int(found[3]) != parts:
        raise ValueError(f"is one of {parts} parts, and its name is not NAME-00001-of-{min(parts, 99999):05d}.gguf")
    values = dict(first.values)
    tensors: dict[str, Tensor] = {}
    for number in range(1, parts + 1):
        beside = path.with_name(f"{found[1]}-{number:05d}-of-{parts:05d}{path.suffix}")
        if not beside.is_file():
            raise ValueError(f"is one of {parts} parts, and {beside.name} is not beside it")
        part = read_header(beside)
        _check_data(part)
        values = part.values | values if number > 1 else values | part.values
        if twice := tensors.keys() & part.tensors.keys():
            raise ValueError(f"two of its parts hold tensor {min(twice)[:60]!r}")
        tensors |= part.tensors
    return Header(values=values, tensors=tensors, data_start=0, data_bytes=0)


def _check_data(header: Header) -> None:
    """Return nothing; raises ValueError where some of the tensors' data is there and some is not. A header alone will do."""
    ends = [0]
    for tensor in header.tensors.values():
        found = tensor_type(tensor.kind)
        num_bytes = None if found is None else found.num_bytes(tensor.shape)
        ends.append(tensor.offset + (num_bytes or 0))
    if 0 < header.data_bytes < max(ends):
        raise ValueError(f"ends {max(ends) - header.data_bytes} bytes before its last tensor does: it is cut short")


def _with_formats(spec: ModelSpec, keys: HeaderKeys) -> ModelSpec:
    """Return the model with the formats in which the file's tensors are stored."""
    layers = keys.num_layers
    experts, biases, dense, embedding, head, drafts = (_Kind() for _ in range(6))
    tensors = keys.header.tensors
    for name, tensor in tensors.items():
        block, found = block_of(name), EXPERT.fullmatch(name)
        if block is not None and block >= layers:
            kind = drafts
        elif block is not None and name.endswith(".attn_kv_b.weight") and f"blk.{block}.attn_k_b.weight" in tensors:
            continue  # the same weights once more, for engines that do not work on latents
        elif found is not None:
            kind = experts if found[4] == "weight" else biases
        else:
            kind = {"token_embd.weight": embedding, "output.weight": head}.get(name, dense)
        kind.add(tensor, name)
    matrices = sum(spec.dense_matrix_parameters(layer) for layer in range(spec.num_layers))
    vectors = spec.dense_bytes(weight_format("16")) // _SIXTEEN - matrices - spec.embedding_parameters
    _check_weights(spec, experts, dense, matrices + vectors)
    of_experts = (
        experts.num_bytes + biases.num_bytes - _SIXTEEN * spec.num_routed_experts * spec.expert_vector_parameters
    )
    expert_bits = Fraction(BITS_PER_BYTE * of_experts, experts.weights)
    dense_bits = Fraction(BITS_PER_BYTE * (dense.num_bytes - _SIXTEEN * vectors), matrices)
    outer = embedding if spec.tied_embeddings else head
    rest = f"the rest of the layers {float(dense_bits):.4g} ({dense.names}), token embedding {embedding.names}, output matrix {outer.names}"
    remarks = [f"as its GGUF file stores it: experts {float(expert_bits):.4g} bits a weight ({experts.names}), {rest}"]
    if drafts.weights:
        remarks.append(f"draft layers of {drafts.num_bytes} bytes are not counted")
    try:
        stored = stated_format(expert_bits), stated_format(dense_bits, embedding.bits, outer.bits)
    except InputError:
        raise ValueError(
            f"its tensors come to {float(expert_bits):.4g} and {float(dense_bits):.4g} bits a weight"
        ) from None
    one = next(iter(experts.types)) if len(experts.types) == 1 and not biases.weights else None
    named = next(
        (fmt for name in _names(one) if (fmt := weight_format(name)).bits_per_weight == expert_bits), stored[0]
    )
    return dataclasses.replace(
        spec, native_bits=named.name, native_dense_bits=stored[1].name, remarks=(*spec.remarks, *remarks)
    )  # fmt: skip


def _names(kind: str | None) -> tuple[str, ...]:
    """Return the format that a single type goes by; none for several."""
    return () if kind is None else {"F16": ("16",), "BF16": ("16",), "F32": ("32",)}.get(kind, (kind,))


def _check_weights(spec: ModelSpec, experts: _Kind, dense: _Kind, described: int) -> None:
    """Return nothing; raises ValueError where the tensors hold other weights than the keys describe."""
    wanted = spec.num_routed_experts * spec.expert_matrix_parameters
    if experts.weights != wanted:
        raise ValueError(f"its tensors hold {experts.weights} weights of experts, and its keys describe {wanted}")
    if abs(dense.weights / described - 1) > _DIFFER:
        raise ValueError(f"its layers hold {dense.weights} weights beside experts, and its keys describe {described}")
