"""A transformers model without its experts: everything else loaded, its experts modules empty and answered by whoever is asked.

    config.json ──► the model's own class, its experts stripped before any weight exists ──► from_pretrained ──► `Assembled`

Modelled: transformers' own extension points and nothing of any single family. `ALL_EXPERTS_FUNCTIONS` holds the function that
experts modules call (it is registered once, as "moeplan"); the class that is loaded is the model's own with an empty set of
expert weights, so that the loader never makes room for them. Routers are known by their place and shape beside the experts.
Ignored: models whose experts are no fused modules, which are refused by name, and where experts lie (`checkpoint`, `session`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....base.errors import InputError, one_line
from ....kernels.activation import ACTIVATIONS
from ....kernels.cpu import activated
from ....specs.models import ModelSpec
from ....specs.models.load import load_model
from .checkpoint import Checkpoint, Layout, open_checkpoint
from .pre_gates import PreGates, distance_of

NAME = "moeplan"
"""What the experts function is called in transformers' registry."""
Answer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of (column, tokens [T, H], choices [T, k], weights [T, k]), the experts' summed answers [T, H]; columns count MoE layers."""
_COLUMN = "moeplan_column"
_ANSWER = "moeplan_answer"
_PROBED = 12.0
"""Functions are compared from minus to plus this: beyond every bound that one clamps to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeLayer:
    """One MoE layer of a loaded model."""

    number: int
    """Of the decoder layer."""
    experts: nn.Module
    router: nn.Module


@dataclass(slots=True, kw_only=True)
class Assembled:
    """A model ready to compute, but for its experts."""

    folder: Path
    model: Any
    layers: tuple[MoeLayer, ...]
    spec: ModelSpec
    layout: Layout
    activation: str
    """Name of the function between an expert's matrices."""
    checkpoint: Checkpoint
    pre_gates: PreGates | None = None
    """Where its gates choose some blocks early."""

    @contextlib.contextmanager
    def answered_by(self, answer: Answer) -> Iterator[None]:
        """Let `answer` stand in for the experts while the context lasts."""
        for layer in self.layers:
            setattr(layer.experts, _ANSWER, answer)
        try:
            yield
        finally:
            for layer in self.layers:
                setattr(layer.experts, _ANSWER, None)


def require_transformers() -> Any:
    """Return the module; raises InputError where it, or torch, is not installed, or is too old for fused experts."""
    try:
        import transformers
        from transformers.integrations import moe
    except ImportError:
        raise InputError(
            "transformers", "(absent)", "running a model needs it", "pip install 'moeplan[run,hf]'"
        ) from None
    if not hasattr(moe, "ALL_EXPERTS_FUNCTIONS"):
        raise InputError(
            "transformers", transformers.__version__, "too old for fused experts", "install version 5 or later"
        )
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its remarks about a checkpoint without experts would mislead
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if NAME not in moe.ALL_EXPERTS_FUNCTIONS:
        moe.ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
    return transformers


def assemble(folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> Assembled:
    """Return the model of the checkpoint in `folder`, all of it but its experts in memory, as numbers of `dtype`.

    Raises InputError for a folder without a checkpoint, a damaged one, one without MoE layers, or a model whose experts are not
    the fused modules that transformers 5 has.
    """
    transformers = require_transformers()
    spec, checkpoint, config = described(folder)
    kind = _class_of(transformers, config, folder)
    with _told(folder):
        model = _without_experts(kind).from_pretrained(
            folder, config=config, experts_implementation=NAME, dtype=dtype, local_files_only=True
        )
    layers = _moe_layers(model, spec, folder)
    layout = _layout(layers[0].experts)
    with torch.inference_mode():
        function = _activation(layers[0].experts, layout, folder)
    early = distance_of(config, len(layers), os.fspath(folder))
    found = Assembled(
        folder=Path(folder), model=model.eval(), layers=layers, spec=spec, layout=layout, activation=function,
        checkpoint=checkpoint, pre_gates=PreGates([layer.router for layer in layers], early) if early else None,
    )  # fmt: skip
    checkpoint.check([layer.number for layer in layers], spec.num_experts, found.layout)
    return found


def described(folder: str | os.PathLike[str]) -> tuple[ModelSpec, Checkpoint, Any]:
    """Return the model of `folder` as planners see it, its files, and its configuration; nothing is loaded."""
    transformers = require_transformers()
    if not os.path.isdir(folder):
        rule = "no folder of a checkpoint" if os.path.exists(folder) else "no such folder"
        raise InputError(
            "--model", os.fspath(folder), rule, "give the folder that holds config.json and safetensors files"
        )
    spec = load_model(folder)
    checkpoint = open_checkpoint(Path(folder))
    with _told(folder):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    return spec, checkpoint, config


@contextlib.contextmanager
def _told(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the loader raises over a checkpoint into one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        rule = f"transformers cannot load it ({one_line(str(error), 240)})"
        raise InputError(
            "--model", os.fspath(folder), rule, "check the checkpoint and the version of transformers"
        ) from None


def _class_of(transformers: Any, config: Any, folder: str | os.PathLike[str]) -> Any:
    known = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in known:
        rule = f"transformers has no causal language model of type {config.model_type!r}"
        raise InputError("--model", os.fspath(folder), rule, "give a decoder-only model")
    return known[type(config)]


def _without_experts(kind: Any) -> Any:
    """Return the class with a constructor that leaves its experts modules without weights."""

    class Stripped(kind):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            for module in self.modules():
                if _is_experts(module):
                    module._parameters.clear()
                    module._is_hf_initialized = True  # there is nothing to initialise

    for name in ("__name__", "__qualname__", "__module__"):  # the loader looks its rules up by these
        setattr(Stripped, name, getattr(kind, name))
    return Stripped


def _is_experts(module: nn.Module) -> bool:
    """Return whether transformers lets a function of our own answer for a module: its decorator has marked it."""
    return all(hasattr(module, name) for name in ("is_transposed", "is_concatenated", "has_gate", "has_bias"))


def _moe_layers(model: Any, spec: ModelSpec, folder: str | os.PathLike[str]) -> tuple[MoeLayer, ...]:
    found: list[MoeLayer] = []
    for name, module in model.named_modules():
        if not _is_experts(module):
            continue
        parent, _, _ = name.rpartition(".")
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        router = _router(model.get_submodule(parent), spec.num_experts)
        if router is None or len(numbers) != 1:
            raise InputError(
                "--model", os.fspath(folder), f"no router was found beside {name}", "this family is not run yet"
            )
        if getattr(module, "has_post_expert_norm", False):
            raise InputError("--model", os.fspath(folder), "its experts end in a norm", "this family is not run yet")
        setattr(module, _COLUMN, len(found))
        found.append(MoeLayer(number=numbers[0], experts=module, router=router))
    if not found:
        raise InputError(
            "--model",
            os.fspath(folder),
            "has no MoE layers whose experts transformers holds fused",
            "give an MoE model",
        )
    if len(found) != spec.num_moe_layers:
        rule = f"transformers finds {len(found)} MoE layers where its configuration describes {spec.num_moe_layers}"
        raise InputError("--model", os.fspath(folder), rule, "this family is not run yet")
    return tuple(found)


def _router(block: nn.Module, num_experts: int) -> nn.Module | None:
    """Return the module of an MoE block that chooses experts: the one whose matrix has a row for each of them."""
    for child in block.children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.shape[0] == num_experts > 1:
            return child
    return None


def _layout(experts: Any) -> Layout:
    return Layout(
        gated=bool(experts.has_gate), transposed=bool(experts.is_transposed), alternating=not experts.is_concatenated,
        bias=bool(experts.has_bias),
    )  # fmt: skip


def _activation(experts: Any, layout: Layout, folder: str | os.PathLike[str]) -> str:
    """Return the name of the kernels' function that a module's own agrees with; raises InputError where none does.

    Asked with numbers rather than by name: a family may call its function as it likes.
    """
    values = torch.linspace(-_PROBED, _PROBED, 96).view(6, 16)
    values = values[:, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    if layout.gated:
        theirs = experts._apply_gate(torch.stack(values.chunk(2, -1), -1).flatten(1) if layout.alternating else values)
    else:
        theirs = experts.act_fn(values)
    for function in ACTIVATIONS.values():
        if function.gated == layout.gated and torch.allclose(activated(values, function), theirs.float(), atol=1e-5):
            return function.name
    rule = f"its experts' activation is none of those that kernels have ({', '.join(ACTIVATIONS)})"
    raise InputError("--model", os.fspath(folder), rule, "this family is not run yet")


def _experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """Answer for an experts module: transformers calls this in its place."""
    answer: Answer | None = getattr(module, _ANSWER, None)
    if answer is None:
        raise InputError("experts", "(absent)", "the model was loaded without them", "run it through moeplan run")
    return answer(getattr(module, _COLUMN), hidden_states, top_k_index, top_k_weights)
