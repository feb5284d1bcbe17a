"""The front door: commands, their options, and one clear line when something is wrong.

Modelled: `--json` prints exactly one JSON document on stdout; progress and remarks go to stderr. Every error the product
raises on purpose becomes one line on stderr and its exit status (2: bad input, 3: does not fit). Ignored: the work itself;
commands import what they need when they run, so that `moeplan --help` is quick.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .errors import InputError, MoeplanError
from .terminal import print_json, print_parallel_plan, print_plan, print_prediction
from .units import MIB

app = typer.Typer(name="moeplan", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Rehearse Mixture-of-Experts inference before you run it.")  # fmt: skip
trace_app = typer.Typer(no_args_is_help=True, help="Recordings of expert routing: import, look at, convert, make up.")
app.add_typer(trace_app, name="trace")

_EXIT_USAGE, _EXIT_INTERRUPTED = 2, 130
_TIMELINE_STEPS = 64
_MAX_PLAN_BYTES = 256 * MIB
# Newer typer carries its own copy of click, older typer imports it: the base of usage errors is found where it is.
_USAGE_ERROR: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
ModelOption = Annotated[str, typer.Option("--model", help="Bundled model name, or a Hugging Face config.json.")]
HardwareOption = Annotated[str, typer.Option("--hardware", help="Bundled machine name, or a profile.json.")]
TraceOption = Annotated[
    str, typer.Option("--trace", help="Recording (.safetensors), or 'bundled' for the project's own.")
]
MemoryOption = Annotated[
    str | None, typer.Option("--memory", help="Whole device budget, e.g. 6GiB; default: the device's memory.")
]
WindowOption = Annotated[int | None, typer.Option("--window", help="Replay only the first so many forward passes.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change one schedule option: key=value. Repeatable.")
]
DenseBitsOption = Annotated[str, typer.Option("--dense-bits", help="Weight format of everything but routed experts.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def bundled_trace_path() -> Path:
    """Return the path of the recording that the package carries."""
    return Path(__file__).resolve().parent / "traces" / "bundled" / "tiny-moe.safetensors"


def _open_trace(path: str) -> Any:
    from .traces.format import load_trace

    return load_trace(bundled_trace_path() if path == "bundled" else path)


def _rehearsal(model: str, hardware: str, trace: str, memory: str | None, window: int | None, dense_bits: str) -> Any:
    from .sim.simulate import Rehearsal
    from .specs import weight_format
    from .specs_io import load_hardware, load_model
    from .units import parse_bytes

    return Rehearsal(
        model=load_model(model), profile=load_hardware(hardware), trace=_open_trace(trace), window_steps=window,
        memory_bytes=None if memory is None else parse_bytes(memory, "--memory"), dense_format=weight_format(dense_bits),
    )  # fmt: skip


# --- trace --------------------------------------------------------------------------------------------------------------


@trace_app.command("import")
def trace_import(
    path: Annotated[str, typer.Argument(help="File or folder to read.")],
    kind: Annotated[str, typer.Option("--from", help="Source format.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Recording to write (.safetensors).")],
    option: Annotated[list[str] | None, typer.Option("--option", help="Reader option: key=value. Repeatable.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Read a recording of routing, or of expert loads, from an engine's file."""
    from .traces.format import save_profile, save_trace
    from .traces.readers import import_trace
    from .traces.recording import RoutingTrace

    recording = import_trace(kind, path, **_reader_options(kind, option or []))
    if isinstance(recording, RoutingTrace):
        save_trace(recording, output)
        facts: dict[str, Any] = {"kind": "routing", "num_tokens": recording.num_tokens, "top_k": recording.top_k}
    else:
        save_profile(recording, output)
        facts = {"kind": "load", "note": "counts only: no token routing, so no replay of caches"}
    facts |= {
        "num_layers": recording.num_layers,
        "num_experts": recording.num_experts,
        "model": recording.model,
        "path": str(output),
    }
    if as_json:
        print_json(facts)
    else:
        typer.echo(", ".join(f"{key} {value}" for key, value in facts.items()))


def _reader_options(kind: str, given: list[str]) -> dict[str, Any]:
    """Return reader options converted to the types of the reader's defaults."""
    from .errors import UnknownName
    from .traces.readers import reader_options

    valid = reader_options(kind)
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError("--option", text, "not of the form key=value", "write for instance --option top_k=8")
        if key not in valid:
            raise UnknownName("--option", key, valid)
        try:
            found[key] = int(value)
        except ValueError:
            found[key] = value
    return found


@trace_app.command("stats")
def trace_stats_command(
    trace: Annotated[str, typer.Argument(help="Recording, or 'bundled'.")], as_json: JsonFlag = False
) -> None:
    """Show what a recording's routing is like: loads, reuse, affinity, working sets, LRU hits."""
    from .traces.format import load_recording
    from .traces.recording import RoutingTrace
    from .traces.stats import load_stats, trace_stats

    recording = load_recording(bundled_trace_path() if trace == "bundled" else trace)
    stats = trace_stats(recording) if isinstance(recording, RoutingTrace) else load_stats(recording)
    document = stats.as_json()
    if as_json:
        print_json(document)
    else:
        for key, value in document.items():
            if not isinstance(value, (list, dict)):
                typer.echo(f"{key:32} {value:.4f}" if isinstance(value, float) else f"{key:32} {value}")
            elif isinstance(value, dict):
                typer.echo(
                    f"{key:32} "
                    + "  ".join(f"{k}: {v:.4f}" if isinstance(v, float) else f"{k}: {v}" for k, v in value.items())
                )


@trace_app.command("convert")
def trace_convert(
    trace: Annotated[str, typer.Argument(help="Recording, or 'bundled'.")],
    kind: Annotated[str, typer.Option("--to", help="parquet or npz.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
) -> None:
    """Write a recording as Parquet or npz."""
    from .traces.convert import convert
    from .traces.format import load_recording

    convert(load_recording(bundled_trace_path() if trace == "bundled" else trace), kind, output)
    typer.echo(str(output))


# --- simulate -------------------------------------------------------------------------------------------------------------


@app.command()
def simulate(
    model: ModelOption,
    hardware: HardwareOption,
    trace: TraceOption,
    schedule: Annotated[str, typer.Option("--schedule", help="Preset to start from.")] = "mixtral-offloading",
    settings: SetOption = None,
    memory: MemoryOption = None,
    window: WindowOption = None,
    engine: Annotated[str, typer.Option("--engine", help="twin, simpy, or both (compared).")] = "twin",
    timeline: Annotated[Path | None, typer.Option("--timeline", help="Write a Perfetto timeline (.json).")] = None,
    dense_bits: DenseBitsOption = "16",
    as_json: JsonFlag = False,
) -> None:
    """Predict one schedule on one recording and one machine."""
    from .errors import UnknownName
    from .planner.plan import prediction_to_dict
    from .schedule import apply_settings, load_preset, parse_setting

    if engine not in ("twin", "simpy", "both"):
        raise UnknownName("--engine", engine, ("twin", "simpy", "both"))
    chosen = apply_settings(load_preset(schedule), dict(parse_setting(text) for text in settings or []))
    rehearsal = _rehearsal(model, hardware, trace, memory, window, dense_bits)
    prediction = rehearsal.predict(chosen, engine=engine, rows=timeline is not None)
    if timeline is not None:
        _write_timeline(timeline, prediction)
    document = prediction_to_dict(prediction)
    if as_json:
        print_json(document)
    else:
        print_prediction(document)


def _write_timeline(path: Path, prediction: Any) -> None:
    from .reports.perfetto import write_timeline

    timeline, steps = prediction.outcome.timeline, prediction.metrics.num_steps
    if steps > _TIMELINE_STEPS:  # a viewer chokes on more; the middle is past the cold start
        first = (steps - _TIMELINE_STEPS) // 2
        timeline = timeline.steps(first, first + _TIMELINE_STEPS - 1)
        sys.stderr.write(f"{path}: steps {first} to {first + _TIMELINE_STEPS - 1} of {steps}\n")
    write_timeline(path, timeline)


# --- plan -----------------------------------------------------------------------------------------------------------------


@app.command()
def plan(
    model: ModelOption,
    hardware: HardwareOption,
    trace: TraceOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="plan.json to write.")] = Path("plan.json"),
    mode: Annotated[str, typer.Option("--mode", help="offload (one device) or ep (expert parallel).")] = "offload",
    memory: MemoryOption = None,
    bits: Annotated[
        str,
        typer.Option("--bits", help="Weight formats the experts may have, e.g. 4 or 4,3,2; native: the checkpoint's."),
    ] = "native",
    objective: Annotated[
        str, typer.Option("--objective", help="tokens_per_s, p99_step_s or least_memory.")
    ] = "tokens_per_s",
    floor: Annotated[float | None, typer.Option("--floor", help="Tokens/s that least_memory must reach.")] = None,
    window: Annotated[int, typer.Option("--window", help="Forward passes to search on.")] = 2000,
    concurrency: Annotated[int, typer.Option("--concurrency", help="Requests decoded together.")] = 1,
    prefill_chunk: Annotated[
        int | None, typer.Option("--prefill-chunk", help="Prompt tokens per forward pass.")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="ep: nodes.")] = 1,
    ranks_per_node: Annotated[int, typer.Option("--ranks-per-node", help="ep: devices in each node.")] = 8,
    redundant: Annotated[int, typer.Option("--redundant", help="ep: slots beyond the model's experts.")] = 0,
    phase: Annotated[str, typer.Option("--phase", help="ep: prefill or decode.")] = "decode",
    context: Annotated[int, typer.Option("--context", help="ep: context tokens per request.")] = 4096,
    report: Annotated[Path | None, typer.Option("--report", help="Also write an HTML report (offload).")] = None,
    timeline: Annotated[
        Path | None, typer.Option("--timeline", help="Also write the best schedule's Perfetto timeline (offload).")
    ] = None,
    dense_bits: DenseBitsOption = "16",
    as_json: JsonFlag = False,
) -> None:
    """Search for the best schedule within a memory budget, and show what it beats and what would help."""
    from .errors import UnknownName
    from .specs_io import write_atomic

    formats = tuple(part.strip() for part in bits.split(",") if part.strip())
    if not formats:
        raise InputError("--bits", bits, "no weight format named", "write for instance --bits 4")
    if mode == "ep":
        if report is not None or timeline is not None:
            raise InputError(
                "--report", "ep", "pages are written for offload plans only", "leave out --report and --timeline"
            )
        document = _plan_parallel(model, hardware, trace, formats[0], nodes, ranks_per_node, redundant, phase, context)
    elif mode == "offload":
        from .planner.plan import PlanRequest, make_plan, plan_to_dict
        from .progress import reporter

        rehearsal = _rehearsal(model, hardware, trace, memory, window, dense_bits)
        request = PlanRequest(
            bits=formats, objective=objective, floor_tokens_per_s=floor, concurrency=concurrency,
            prefill_chunk_tokens=prefill_chunk,
        )  # fmt: skip
        found = make_plan(rehearsal, request, progress=reporter("plan"))
        document = plan_to_dict(found)
        if timeline is not None:
            _write_timeline(timeline, found.best)
        if report is not None:
            _write_report(report, document, rehearsal, found.best)
    else:
        raise UnknownName("--mode", mode, ("offload", "ep"))
    write_atomic(output, json.dumps(document, indent=1, allow_nan=False) + "\n")
    if as_json:
        print_json(document)
    elif mode == "ep":
        print_parallel_plan(document, str(output))
    else:
        print_plan(document, str(output))


def _plan_parallel(
    model: str,
    hardware: str,
    trace: str,
    bits: str,
    nodes: int,
    ranks_per_node: int,
    redundant: int,
    phase: str,
    context: int,
) -> dict[str, Any]:
    """Return the document of an expert-parallel plan; a recording of loads will do."""
    from .errors import UnknownName
    from .planner.ep_case import EpRequest
    from .planner.ep_plan import ep_plan_to_dict, make_ep_plan
    from .progress import reporter
    from .specs_io import load_hardware, load_model
    from .traces.format import load_recording

    if phase not in ("prefill", "decode"):
        raise UnknownName("--phase", phase, ("prefill", "decode"))
    spec = load_model(model)
    request = EpRequest(
        num_nodes=nodes, ranks_per_node=ranks_per_node, num_redundant=redundant, prefill=phase == "prefill",
        context_tokens=context, bits=spec.native_bits if bits == "native" else bits,
    )  # fmt: skip
    recording = load_recording(bundled_trace_path() if trace == "bundled" else trace)
    found = make_ep_plan(spec, load_hardware(hardware), recording, request, progress=reporter("plan"))
    return ep_plan_to_dict(found)


@app.command()
def emit(
    plan_path: Annotated[Path, typer.Argument(help="plan.json")],
    target: Annotated[str, typer.Option("--target", help="Engine to write the configuration for.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")] = Path("emitted"),
    as_json: JsonFlag = False,
) -> None:
    """Write a plan as an engine's own configuration, with notes on what that engine cannot express."""
    from .planner.emit.targets import emit as write
    from .specs_io import load_model, read_json

    document = read_json(plan_path, "plan", max_bytes=_MAX_PLAN_BYTES)
    model = load_model(str(_section(document, "provenance").get("model")))
    paths = [str(path) for path in write(document, target, model, output)]
    if as_json:
        print_json({"target": target, "paths": paths})
    else:
        typer.echo("\n".join(paths))


@app.command()
def reproduce(
    paper: Annotated[str, typer.Argument(help="deepep, eps-moe or grace-moe.")], as_json: JsonFlag = False
) -> None:
    """Set a paper's published figures beside the simulator's, cell by cell."""
    from .papers.registry import reproduce as run

    document = run(paper).to_dict()
    if as_json:
        print_json(document)
        return
    for cell in document["cells"]:
        error = cell.get("relative_error")
        off = "" if error is None else f"{error:+.1%}"
        typer.echo(
            f"{cell['table']:28} {cell['row']!s:28} {cell['column']!s:24} published {cell['published']!s:>10} "
            f"simulated {cell['simulated']!s:>22} {off:>8} {cell['role']}"
        )


# --- report ---------------------------------------------------------------------------------------------------------------


def _write_report(path: Path, document: dict[str, Any], rehearsal: Any, best: Any) -> None:
    """Write the HTML report of a plan, with the curves of hit rate against cache size."""
    from .reports.hit_curves import hit_curves
    from .reports.offload_page import write_plan_report

    lru, belady = hit_curves(rehearsal, best.schedule)
    write_plan_report(path, document, timeline=best.outcome.timeline, lru_curve=lru, belady_curve=belady, profile=rehearsal.profile,
                      command=document["provenance"].get("command"))  # fmt: skip


@app.command()
def report(
    plan_path: Annotated[Path, typer.Argument(help="plan.json")],
    trace: TraceOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    timeline: Annotated[Path | None, typer.Option("--timeline", help="Also write a Perfetto timeline (.json).")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write the HTML report of a plan; the plan's best schedule is replayed for its timeline."""
    from .planner.plan import planned_schedule
    from .specs_io import read_json

    document = read_json(plan_path, "plan", max_bytes=_MAX_PLAN_BYTES)
    provenance = _section(document, "provenance")
    rehearsal = _rehearsal(str(provenance.get("model")), str(provenance.get("hardware")), trace,
                           str(provenance.get("memory_bytes")),
                           provenance.get("window_steps"), str(provenance.get("dense_bits", "16")))  # fmt: skip
    best = rehearsal.predict(planned_schedule(document), rows=True)
    _write_report(output, document, rehearsal, best)
    if timeline is not None:
        _write_timeline(timeline, best)
    if as_json:
        print_json({"path": str(output)})
    else:
        typer.echo(str(output))


def _section(document: dict[str, Any], name: str) -> dict[str, Any]:
    part = document.get(name)
    if not isinstance(part, dict):
        raise InputError(f"plan.{name}", part, "missing from the plan", "give a plan.json written by moeplan plan")
    return part


# --- demo -----------------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the plan, the report and the timeline.")
    ] = Path("out/demo"),
    as_json: JsonFlag = False,
) -> None:
    """Plan the bundled recording for a small memory and write plan, report and Perfetto timeline."""
    from .planner.plan import PlanRequest, make_plan, plan_to_dict
    from .progress import reporter
    from .specs_io import write_atomic

    folder.mkdir(parents=True, exist_ok=True)
    rehearsal = _rehearsal("tiny-moe", DEMO_HARDWARE, "bundled", DEMO_MEMORY, 2000, "16")
    found = make_plan(rehearsal, PlanRequest(bits=("native",)), progress=reporter("demo"))
    document = plan_to_dict(found)
    paths = {"plan": folder / "plan.json", "report": folder / "report.html", "timeline": folder / "timeline.json"}
    write_atomic(paths["plan"], json.dumps(document, indent=1, allow_nan=False) + "\n")
    _write_timeline(paths["timeline"], found.best)
    _write_report(paths["report"], document, rehearsal, found.best)
    if as_json:
        print_json(
            {"predicted_tokens_per_s": document["best"]["tokens_per_s"]}
            | {name: str(path) for name, path in paths.items()}
        )
    else:
        print_plan(document, str(paths["plan"]))
        typer.echo(f"report    {paths['report']}\ntimeline  {paths['timeline']} (open it in Perfetto)")


DEMO_HARDWARE = "t4"
DEMO_MEMORY = "436MiB"


def main() -> None:
    """Run the command line; every purposeful error is one line on stderr and its own exit status."""
    try:
        status = app(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except MoeplanError as error:
        _fail(str(error), error.exit_status)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except _USAGE_ERROR as error:
        _fail(" ".join(error.format_message().split()), _EXIT_USAGE)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; nothing was written", _EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)


def _fail(message: str, status: int) -> None:
    sys.stderr.write(f"moeplan: {message}\n")
    sys.exit(status)
