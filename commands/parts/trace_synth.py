"""The command that makes a recording up: from dials, from a published locality, or like a recording.

Modelled: where the dials come from, and the table of a fit: every statistic of the original beside the synthetic one.
Ignored: the synthesis and the fit themselves (`traces/`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...base.errors import InputError
from ...base.terminal import print_json
from ...base.text_files import check_outputs
from ..options.bounds import between
from ..options.declarations import JsonFlag, model_file

if TYPE_CHECKING:
    from ...traces.recording import RoutingTrace
    from ...traces.synthesis.closeness import ComparedFigure
    from ...traces.synthesis.dial import Dials


def trace_synth(
    output: Annotated[Path, typer.Option("--output", "-o", help="Recording to write (.safetensors).")],
    like: Annotated[
        str | None, typer.Option("--like", help="Recording to fit the dials to, or 'bundled'; takes a minute or so.")
    ] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="Published locality to start from.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Model whose layers, experts and top-k the recording shall have.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            help="Length in tokens at least: the last request comes to its end. With --like, the original's by default.",
            callback=between(1, 2**40, "tokens"),
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option("--requests", help="Length in whole requests instead.", callback=between(1, 10**8, "requests")),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            help="The same dials, length and seed give the same file.",
            callback=between(0, 2**63 - 1, "a seed"),
        ),
    ] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Turn one dial: dial=value, e.g. reuse_short=0.3 or prompt_tokens=[16,64]. Repeatable."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make up a recording: like another one, from a published locality, or from dials."""
    from ...api.load import as_routing
    from ...base.progress import reporter
    from ...traces.format import load_trace
    from ...traces.synthesis.closeness import ALLOWED_LRU_DIFFERENCE, closeness
    from ...traces.synthesis.dial import change_dials, dials_as_json
    from ...traces.synthesis.synthesise import synthesise

    check_outputs({"--output": output}, {"--like": like, "--model": None if model is None else model_file(model)})
    if like is not None and preset is not None:
        raise InputError("--like", like, "cannot be combined with --preset", "give one of the two")
    original: RoutingTrace | None = None if like is None else as_routing(like)
    if tokens is None and requests is None:
        if original is None:
            raise InputError("--tokens", None, "no length is given", "give --tokens or --requests")
        tokens = original.num_tokens
    changes = dict(_dial(text) for text in settings or [])
    dials = change_dials(_starting_dials(original, preset, model, changes), changes)
    report = reporter("synthesis")
    synthesise(
        dials,
        output,
        num_tokens=tokens,
        num_requests=requests,
        seed=seed,
        model=model or (original.model if original is not None else preset or ""),
        progress=lambda share: report(int(100 * share), 100, "%"),
    )
    made = load_trace(output)
    document: dict[str, Any] = {
        "num_tokens": made.num_tokens,
        "num_layers": made.num_layers,
        "num_experts": made.num_experts,
        "top_k": made.top_k,
        "num_requests": int(made.request[-1]) + 1,
        "seed": seed,
        "path": str(output),
        "dials": dials_as_json(dials),
    }
    compared = None if original is None else closeness(original, made)
    if compared is not None:
        document["closeness"] = compared.as_json()
    if as_json:
        print_json(document)
        return
    if compared is not None:
        typer.echo(f"{'':52}{'original':>12}{'synthetic':>12}{'difference':>12}")
        for row in (*compared.figures, *compared.lru_hit_fractions):
            typer.echo(_line(row))
        typer.echo(
            f"LRU hit rates at five capacities differ by at most {100 * compared.worst_lru_difference:.1f} points "
            f"({'' if compared.is_close else 'not '}within {100 * ALLOWED_LRU_DIFFERENCE:g})"
        )
    typer.echo(", ".join(f"{key} {value}" for key, value in document.items() if key not in ("dials", "closeness")))


def _starting_dials(
    original: RoutingTrace | None, preset: str | None, model: str | None, changes: dict[str, str]
) -> Dials:
    """Return the dials before any is turned: fitted, of a preset, or the neutral ones; in the shape of `model` if given."""
    from ...base.progress import reporter
    from ...traces.synthesis.dial import dials_from_json, reshape_dials
    from ...traces.synthesis.fit import fit_like
    from ...traces.synthesis.presets import preset as dials_of

    shape = {} if model is None else _shape(model)
    if original is not None:
        if any(getattr(original, name) != size for name, size in shape.items() if name != "layer_ids"):
            raise InputError("--model", model, "has another shape than the recording", "leave out --model")
        report = reporter("fit")
        return fit_like(original, progress=lambda share: report(int(100 * share), 100, "%"))
    if preset is not None:
        dials = dials_of(preset)
        return reshape_dials(dials, **shape) if shape else dials
    if not shape and not {"num_layers", "num_experts", "top_k"} <= set(changes):
        rule = "nothing says how many layers, experts and choices the recording has"
        raise InputError(
            "--model", None, rule, "give --like, --preset, --model, or --set num_layers=… num_experts=… top_k=…"
        )
    return dials_from_json(shape or changes)


def _shape(model: str) -> dict[str, Any]:
    """Return the dials that a model's shape decides."""
    from ...specs.models.load import load_model

    spec = load_model(model)
    return {
        "num_layers": spec.num_moe_layers, "num_experts": spec.num_experts, "top_k": spec.top_k,
        "layer_ids": tuple(spec.moe_layers),
    }  # fmt: skip


def _dial(text: str) -> tuple[str, str]:
    """Return (dial, value) of a `dial=value` argument. Raises InputError for a missing `=`."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError("--set", text, "not of the form dial=value", "write for instance --set skew=0.8")
    return name.strip(), value


def _line(row: ComparedFigure) -> str:
    """Return one statistic, original beside synthetic, as a line of the table."""
    cells = (row.original, row.synthetic, row.difference)
    shown = ("—" if cell is None else f"{cell:+.4f}" if at == 2 else f"{cell:.4f}" for at, cell in enumerate(cells))
    return f"{row.name:52}" + "".join(f"{cell:>12}" for cell in shown)
