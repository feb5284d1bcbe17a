"""Which model a measured line is of, and how its weights are stored.

Modelled: the model asked for, held against the line's architecture, parameters and name; without one, the bundled model that
they fit. Weight formats by the line's or the command line's name, and so that the file has its stated size. Ignored: fine-tunes, which have
their model's sizes.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

from ....base.errors import InputError, UnknownName
from ....base.units import GIB, GIGA
from ....calibrate.imports.bench_line import BenchLine
from ....specs.models import ModelSpec, WeightFormat, weight_format
from ....specs.models.config.gguf.keys import FAMILIES
from ....specs.models.load import list_models, load_model, named_in
from ....specs.models.mixes.names import mix_names
from ..machine import NotExpressible
from ..rows import Report
from ..setup import formats_of, stored_by_name

# Architectures of GGUF files that stand for several families.
_MORE_FAMILIES = {"deepseek2": ("deepseek_v2", "deepseek_v32", "kimi_k2", "glm4_moe_lite"), "glm4moe": ("glm4_moe",)}
_SAME = 0.05
"""Parameters of one model differ by less: files may keep a draft layer."""
_SIZE_AGREES = 0.15
"""Files of one weight format are less than this apart in size."""


def model_of_line(line: BenchLine, asked: ModelSpec | None) -> tuple[ModelSpec | None, str | None]:
    """Return (model, None), or (None, why there is none)."""
    if asked is not None:
        other = _other_than(line, asked)
        return (asked, None) if other is None else (None, other)
    if line.architecture is not None and line.model_parameters is not None:
        # Parameters alone say too little: many models have about as many.
        families = _families(line)
        fitting = [model for model in _bundled() if model.family in families and _other_than(line, model) is None]
        nearest = sorted(fitting, key=lambda model: abs(model.total_parameters - (line.model_parameters or 0)))
        if nearest:
            return nearest[0], None
    elif line.model is not None:
        named = named_in(line.model)
        if named is not None:
            return load_model(named), None
    return None, f"of {str(line.model)[:60]}, and no bundled model is that for certain: name one with --model"


def _families(line: BenchLine) -> set[str]:
    """Return the families that a line's architecture stands for, none where it is not known."""
    architecture = line.architecture or ""
    return ({FAMILIES[architecture]} if architecture in FAMILIES else set()) | set(_MORE_FAMILIES.get(architecture, ()))


def _other_than(line: BenchLine, model: ModelSpec) -> str | None:
    """Return why a line cannot be of `model`, None where it can."""
    families = _families(line)
    known = {*FAMILIES.values(), *(name for names in _MORE_FAMILIES.values() for name in names)}
    if families and model.family in known and model.family not in families:
        return f"of {str(line.model)[:60]}, not {model.name}"
    if line.model_parameters is not None and abs(line.model_parameters / model.total_parameters - 1) > _SAME:
        stated, own = line.model_parameters / GIGA, model.total_parameters / GIGA
        return f"of {str(line.model)[:60]} with {stated:.2f} B parameters, {model.name} has {own:.2f} B"
    if line.architecture is None and line.model is not None:
        named = named_in(line.model)
        if named is not None and model.name in list_models() and not _alike(load_model(named), model):
            return f"of {line.model[:60]}, not {model.name}"
    return None


def _alike(one: ModelSpec, other: ModelSpec) -> bool:
    """Return whether two models have the same sizes."""
    renamed = dataclasses.replace(
        one, name=other.name, native_bits=other.native_bits, native_dense_bits=other.native_dense_bits
    )
    return renamed == other


@cache
def _bundled() -> tuple[ModelSpec, ...]:
    return tuple(load_model(name) for name in list_models())


def formats_of_line(
    line: BenchLine, model: ModelSpec, quant: str | None
) -> tuple[ModelSpec, WeightFormat, WeightFormat]:
    """Return the model with its experts as stored, and the formats of experts and of everything else.

    Raises InputError where `quant` is not known, or makes a file of another size than the line's.
    """
    stored = weight_format(model.native_dense_bits)
    if model.is_file:  # it says so itself
        if quant is not None:
            raise InputError("--quant", quant, f"{model.name} is a file, whose types are its own", "leave it out")
        return model, weight_format(model.native_bits), stored
    name = quant or line.quant
    if name is None:
        return model, weight_format(model.native_bits), _as_served(stored)
    try:
        experts, dense = stored_by_name(model, name, None if line.engine == "vllm" else name)
    except NotExpressible:
        if quant is not None:
            raise UnknownName("--quant", quant, mix_names()) from None
        raise InputError(
            f"{line.where}: weight format", line.quant, "not known", "name a known one with --quant"
        ) from None
    size = line.model_bytes
    if size is not None:
        if line.model_parameters is not None:  # without the layers that only draft
            size *= min(1.0, model.total_parameters / line.model_parameters)
        meant = model.dense_bytes(dense) + model.num_routed_experts * model.expert_bytes(experts)
        if quant is not None and abs(size / meant - 1) > _SIZE_AGREES:
            rule = f"{model.name} would have {meant / GIB:.2f} GiB, {line.where} is of a file of {size / GIB:.2f} GiB"
            raise InputError("--quant", quant, f"{rule} ({line.quant or 'format not stated'})", "leave it out")
        row = {"quant": {"experts": name, "dense": name, "file_bytes": size}}
        experts, dense, model = formats_of(Report(id=line.where, row=row, folder=Path()), model, [])
        return model, experts, dense
    if quant is not None and line.quant is not None and quant.upper() != line.quant.upper():
        raise InputError("--quant", quant, f"{line.where} is of {line.quant}", "leave it out")
    return dataclasses.replace(model, native_bits=experts.name), experts, dense


def _as_served(stored: WeightFormat) -> WeightFormat:
    """Return the format of a checkpoint's rest as engines serve it: at most 16 bits."""
    return stored if stored.bits_per_weight <= 16 else weight_format("16")
