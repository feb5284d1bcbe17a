"""Every option of every command counts or is refused: all of them are walked, in every mode of their command."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from bench_writers import as_json, entry, serve
from moeplan.cli import main
from moeplan.commands.app import app
from moeplan.commands.options.conditions import CONDITIONS, ConditionedCommand
from moeplan.papers.field.rows import BUNDLED
from moeplan.traces.format import save_profile, save_trace
from moeplan.traces.recording import LoadProfile
from strategies import make_trace
from tiny_models import build, save

TINY = ("--model", "tiny-moe", "--hardware", "t4", "--trace", "bundled", "--window", "8")
EP_MACHINE = ("--mode", "ep", "--model", "tiny-moe", "--hardware", "h800-sxm", "--nodes", "1", "--ranks-per-node", "2")
SERVED = "llama-server -m olmoe-1b-7b-Q4_K_M.gguf -ngl 99 -c 4096"
GRID = """configurations:
  - {model: tiny-moe, steps: 8}
"""
# How each command is called so that only the option under test is wrong, by mode.
CALLS: dict[str, dict[str, tuple[str, ...]]] = {
    "demo": {"": ()},
    "trace import": {"": ("r.npz", "--from", "npz", "-o", "r.safetensors", "--option", "num_experts=8")},
    "trace stats": {"": ("bundled",)},
    "trace convert": {"": ("bundled", "--to", "npz", "-o", "b.npz")},
    "trace synth": {"": ("--model", "tiny-moe", "--tokens", "20", "-o", "s.safetensors")},
    "simulate": {
        "recording": TINY, "lengths": ("--model", "tiny-moe", "--hardware", "rtx-3060", "--reply-tokens", "4"),
        "many": (*EP_MACHINE, "--trace", "loads.safetensors"),
    },
    "plan": {
        "offload": TINY,
        "requests": ("--model", "tiny-moe", "--hardware", "rtx-3060", "--prompt-tokens", "30", "--reply-tokens", "8"),
        "ep": (*EP_MACHINE, "--trace", "tokens.safetensors"),
        "ep, counts": (*EP_MACHINE, "--trace", "loads.safetensors"),
    },
    "diagnose": {
        "command": ("--hardware", "rtx-3060 + ryzen-5-3600 + ddr4-3200x2:32GiB", "--model", "olmoe-1b-7b", "--command", SERVED,
                    "--measured-decode", "50"),
        "lines": ("--hardware", "rtx-4090", "--from", "llama-bench", "l.json"),
    },
    "report": {"a plan": ("p.json", "--trace", "bundled"), "an ep plan": ("ep.json", "--trace", "loads.safetensors"),
               "studies": ("--store", "s.sqlite")},
    "emit": {"offload": ("p.json", "--target", "accelerate"), "ep": ("ep.json", "--target", "vllm")},
    "calibrate": {
        "measuring": ("-o", "c.json"), "ranks": ("-o", "c.json", "--ranks", "4", "--nodes", "2"),
        "importing": ("--from", "nvbandwidth", "n.json", "--hardware", "t4", "-o", "c.json"),
        "speeds": ("--from", "llama-bench", "l.json", "--hardware", "rtx-4090", "-o", "c.json"),
        "batches": ("--from", "vllm-bench", "v.json", "--hardware", "rtx-4090", "-o", "c.json"),
        "kernels": ("--from", "aiconfigurator", "--system", "h200_sxm", "-o", "c.json"),
        "runs": ("--model", "checkpoint", "--text", "prompt.txt", "-o", "c.json"),
    },
    "validate": {
        "plan": ("p.json",), "live": ("p.json", "--checkpoint", "checkpoint", "--prompt-file", "prompt.txt"),
        "grid": ("--grid", "g.yaml"), "compare": ("--from", "llama-bench", "l.json", "--hardware", "rtx-4090"),
    },
    "check": {
        "checking": ("--baseline", "t.csv", "--predictions", "t.csv"),
        "refreshing": ("--baseline", "t.csv", "--predictions", "t.csv", "--refresh", "-o", "t.json"),
    },
    "trace record": {
        "": ("--model", "checkpoint", "--text", "prompt.txt", "--prompt-tokens", "4", "--new-tokens", "2", "-o", "w.safetensors"),
    },
    "gates train": {"": ("--model", "checkpoint", "--text", "prompt.txt", "--steps", "1", "--length", "4", "-o", "w.safetensors")},
    "gates evaluate": {"": ("--model", "checkpoint", "--text", "prompt.txt", "--length", "4")},
    "sweep": {"here": ("study.yaml", "--store", "s.sqlite")},
    "run": {"": ("--model", "checkpoint", "--schedule", "mixtral-offloading", "--prompt-file", "prompt.txt", "--dry-run")},
    "reproduce": {"": ("deepep",), "any machine": ("pre-gated",), "reports": ("field", "--reports", "r.jsonl"),
                  "parallel": ("field", "--parallel", "--reports", "parallel.jsonl")},
    "fit": {"": ("--hardware", "rtx-3060 + ryzen-7-7700x + ddr5-5600x2:32GiB", "--model", "olmoe-1b-7b")},
    "model list": {"": ()},
    "model show": {"": ("tiny-moe",)},
    "machine": {"": ("--gpu", "rtx-3060")},
    "engine list": {"": ()},
    "engine show": {"": ("llama.cpp",)},
    "hardware list": {"": ()},
    "hardware show": {"": ("t4",)},
    "schedule list": {"": ()},
    "schedule show": {"": ("on-demand",)},
}  # fmt: skip
# Options that name files to write: any word is one.
OUTPUTS = {"output", "folder", "samples", "report", "timeline", "record", "share", "markdown", "parquet"}
NONSENSE = ("nonsense", "-7", "nan")
# A seed may be any whole number, a reason any text, a new store any file.
ALLOWED = {
    ("trace synth", "seed", "-7"),
    *((command, option, word) for command, option in (("check", "why"), ("sweep", "store")) for word in NONSENSE),
}
# A value of each option of `plan` that is not the default, by mode where it must be another.
VALUES: dict[str, Any] = {
    "model": "qwen3-30b-a3b", "hardware": "a100-sxm-80gb", "trace": "others.safetensors", "memory": "14GiB", "bits": "4",
    "objective": "p99_step_s", "floor": "3", "exhaustive": None, "window": "2000", "concurrency": "2", "ubatch": "4",
    "target": "llama.cpp", "engine": "vllm", "quant": "Q4_K_M", "prompt_tokens": "40", "reply_tokens": "12", "kv_type": "q8_0",
    "cached_tokens": "5", "length_spread": "2", "requests": "3", "lengths": "lengths.csv", "policy": "own.py",
    "reserve": "100MiB",
    "ttft": "2s", "tpot": "50ms", "draft_tokens": "1", "acceptance": "0.85", "prefill_share": "0.5", "draft": "n-gram", "speculative": None,
    "attention_tp": "2",
    "nodes": "2", "ranks_per_node": "4", "redundant": "2", "phase": "prefill", "context": "100", "tokens_per_rank": "7",
    "search_moves": "70", "against": "tbo", "factor": "replicas=2", "seconds": "60",
    "period": "loads.safetensors", "rebalance_every": "3", "count_window": "2", "moves": "at-once",
    "evaluate_on": "loads.safetensors", "dense_bits": "32", "settings": "machine.host.memory_bytes=16GiB",
}  # fmt: skip


@dataclass(frozen=True)
class Done:
    """What a call of the command line did."""

    status: int
    lines: list[str]
    """On stderr."""


def call(*arguments: str) -> Done:
    """Call the command line in this process."""
    before, sys.argv = sys.argv, ["moeplan", *arguments]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as stop:
        return Done(int(stop.code or 0), errors.getvalue().splitlines())
    finally:
        sys.argv = before
    return Done(0, errors.getvalue().splitlines())


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield (name, command) of all commands."""
    group = typer.main.get_command(app) if group is None else group
    for name, found in group.commands.items():
        if hasattr(found, "commands"):
            yield from commands(found, (*path, name))
        else:
            yield " ".join((*path, name)), found


COMMANDS = dict(commands())


def options(name: str) -> list[Any]:
    """Return the options of a command."""
    return [each for each in COMMANDS[name].params if each.param_type_name == "option"]


def given(arguments: tuple[str, ...], option: Any, values: tuple[str, ...]) -> list[str]:
    """Return a call's arguments with an option set to `values`, in place of what it was."""
    found = list(arguments)
    for at, word in enumerate(arguments):
        if word in option.opts:
            del found[at : at + 1 + option.nargs]
            break
    return [*found, max(option.opts, key=len), *values]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the current folder, with every file that the calls name."""
    here, before = tmp_path_factory.mktemp("options"), Path.cwd()
    os.chdir(here)
    rng = np.random.default_rng(0)
    experts = rng.permuted(np.tile(np.arange(8, dtype=np.uint8), (20, 3, 1)), axis=2)[:, :, :2]
    np.savez(here / "r.npz", experts=experts, seq=np.zeros(20, np.int32), pos=np.arange(20, dtype=np.int32),
             phase=np.ones(20, np.int8), layer_ids=np.arange(3))  # fmt: skip
    from moeplan.specs.models.load import load_model

    model = load_model("tiny-moe")
    for number, name in enumerate(("tokens", "others")):
        trace = make_trace(np.random.default_rng(number), num_layers=model.num_moe_layers, num_experts=model.num_experts,
                           top_k=model.top_k, requests=[(3, 9)] * 12)  # fmt: skip
        save_trace(dataclasses.replace(trace, layer_ids=tuple(model.moe_layers)), here / f"{name}.safetensors")
    counts = rng.integers(1, 1000, (model.num_moe_layers, model.num_experts))
    save_profile(LoadProfile(counts=counts, model="", layer_ids=tuple(model.moe_layers), source="made up", licence="",
                             top_k=model.top_k), here / "loads.safetensors")  # fmt: skip
    (here / "r.jsonl").write_text((BUNDLED / "reports.jsonl").read_text(encoding="utf-8").splitlines()[0] + "\n")
    (here / "parallel.jsonl").write_text(
        (BUNDLED / "parallel.jsonl").read_text(encoding="utf-8").splitlines()[-13] + "\n"
    )
    (here / "g.yaml").write_text(GRID)
    rule = "@victim_score('command-option')\ndef rule(expert, now):\n    return expert.tokens\n"
    (here / "own.py").write_text("from moeplan.api.policies import victim_score\n\n" + rule)
    (here / "lengths.csv").write_text("prompt_tokens,reply_tokens\n30,5\n")
    (here / "t.csv").write_text("scenario,predicted,measured\na,1,1\n")
    (here / "n.json").write_text("{}")
    (here / "study.yaml").write_text(
        "base: {model: tiny-moe, hardware: t4, trace: bundled, window: 2, memory: 450MiB}\n"
    )
    (here / "prompt.txt").write_text("def main():")
    with contextlib.suppress(ImportError):  # without transformers every run is refused in one line
        save(build("mixtral"), here / "checkpoint")
    (here / "l.json").write_text(as_json([entry(gen=32)]))
    (here / "v.json").write_text(json.dumps(serve()))
    assert call("plan", *TINY, "--bits", "16", "-o", "p.json").status == 0
    assert call("plan", *CALLS["plan"]["ep, counts"], "-o", "ep.json").status == 0
    assert call("sweep", "study.yaml", "--store", "s.sqlite", "--jobs", "1").status == 0
    yield here
    os.chdir(before)


def test_the_table_names_options_that_exist_and_commands_that_look_into_it() -> None:
    for name, conditions in CONDITIONS.items():
        assert isinstance(COMMANDS[name], ConditionedCommand)
        assert set(conditions) <= {parameter.name for parameter in COMMANDS[name].params}, name
    for name, command in COMMANDS.items():
        assert not isinstance(command, ConditionedCommand) or name in CONDITIONS
        assert name in CALLS, f"say in CALLS how {name} is called"


WALK = [
    pytest.param(name, mode, option, id=f"{name} {mode} {option.name}".replace(" ", "-"))
    for name in COMMANDS
    for mode in CALLS.get(name, {})
    for option in options(name)
]


READ = [each for each in WALK if not each.values[2].is_flag and each.values[2].name not in OUTPUTS]


@pytest.mark.parametrize(("name", "mode", "option"), READ)
def test_nonsense_is_one_line_and_exit_2(name: str, mode: str, option: Any, folder: Path) -> None:
    """An option that is read cannot take every one of these; one that is ignored would."""
    for word in NONSENSE:
        if (name, option.name, word) in ALLOWED:
            continue
        done = call(*name.split(), *given(CALLS[name][mode], option, (word,) * option.nargs))
        assert (done.status, len(done.lines)) == (2, 1), (word, done)
        assert done.lines[0].startswith("moeplan: ")


# What the modes of a command take of the table's options; no other mode takes any of them.
COUNTS = {
    "offload": {
        "draft",
        "speculative",
        "objective",
        "exhaustive",
        "window",
        "concurrency",
        "ttft",
        "tpot",
        "engine",
        "quant",
        "prompt_tokens",
        "reply_tokens",
        "cached_tokens",
        "length_spread",
        "requests",
        "lengths",
        "ubatch",
        "kv_type",
        "reserve",
        "seconds",
    },
    "measuring": {"device", "quick", "model", "bits", "seconds", "samples", "ranks"},
    "ranks": {"device", "quick", "model", "bits", "seconds", "samples", "ranks", "nodes", "link", "text"},
    "runs": {"device", "quick", "model", "bits", "seconds", "samples", "text", "ranks"},
    "importing": {"hardware", "samples"},
    "speeds": {"hardware", "model", "quant", "engine"},
    "batches": {"hardware", "model", "quant", "engine", "prompt_tokens", "reply_tokens", "concurrency", "ubatch"},
    "kernels": {"system", "engine"},
    "compare": {"hardware", "model", "quant", "engine"},
    "command": {"measured_decode", "measured_prefill", "prompt_tokens", "reply_tokens", "concurrency"},
    "lines": set(),
    "checking": {"strict", "tolerance"},
    "refreshing": {"why", "output"},
    "live": {
        "trace",
        "baselines",
        "memory",
        "repeats",
        "profile",
        "device",
        "settings",
        "report",
        "checkpoint",
        "prompt_file",
        "max_new_tokens",
        "gates",
        "grid_path",
    },
    "plan": {
        "checkpoint",
        "trace",
        "baselines",
        "steps",
        "seconds",
        "memory",
        "repeats",
        "grid_path",
        "profile",
        "device",
        "settings",
        "report",
    },
    "grid": {"grid_path", "profile", "device", "settings", "report"},
    "ep": {
        "engine",
        "nodes",
        "ranks_per_node",
        "attention_tp",
        "redundant",
        "against",
        "factor",
        "seconds",
        "phase",
        "tokens_per_rank",
        "draft_tokens",
        "acceptance",
        "prefill_share",
        "ttft",
        "tpot",
        "search_moves",
        "evaluate_on",
        "period",
        "rebalance_every",
        "count_window",
        "moves",
    },
}
COUNTS["ep, counts"], COUNTS["requests"] = COUNTS["ep"], COUNTS["offload"]
COUNTS["offload"].add("speculative")
COUNTS["recording"] = COUNTS["lengths"] = {
    "quant",
    "ubatch",
    "window",
    "cached_tokens",
    "length_spread",
    "requests",
    "lengths",
}
COUNTS["a plan"] = COUNTS["an ep plan"] = {"trace", "timeline"}
COUNTS["studies"], COUNTS["here"] = {"study"}, {"jobs"}
COUNTS["many"] = {"nodes", "ranks_per_node", "phase", "tokens_per_rank", "bits", "ttft", "tpot", "prefill_share"}
COUNTS["many"] |= {"draft_tokens", "acceptance", "attention_tp"}
FOREIGN = [
    each
    for each in WALK
    if each.values[2].name in CONDITIONS.get(each.values[0], {}) and each.values[2].name not in COUNTS[each.values[1]]
]


@pytest.mark.parametrize(("name", "mode", "option"), FOREIGN)
def test_what_does_not_count_is_refused_even_with_its_default(name: str, mode: str, option: Any, folder: Path) -> None:
    values = () if option.is_flag else ("1" if option.default is None else str(option.default),)
    done = call(*name.split(), *given(CALLS[name][mode], option, values))
    assert done.status == 2
    assert len(done.lines) == 1
    assert any(f"{name} = " in done.lines[0] for name in option.opts)


class Reached(BaseException):
    """Raised in place of the search: what it was asked."""


@pytest.mark.parametrize("mode", CALLS["plan"])
def test_every_option_of_plan_reaches_the_search_or_is_refused(
    mode: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = importlib.import_module("moeplan.api.plan")

    def offload(simulation: Any, request: Any, **more: Any) -> None:
        trace = simulation.trace
        raise Reached(
            simulation.model, simulation.profile, trace.source, trace.num_tokens, simulation.window_steps,
            simulation.memory_bytes, simulation.dense_format, simulation.kv_bytes_per_value, simulation.context_tokens,
            simulation.own_rules, request,
        )  # fmt: skip

    def parallel(
        model: Any,
        profile: Any,
        recording: Any,
        request: Any,
        *,
        others: Any,
        engine: Any,
        ask: Any,
        period: Any,
        **more: Any,
    ) -> None:
        counted = getattr(recording, "experts", getattr(recording, "counts", None))
        raise Reached(model, profile, counted.tobytes(), request, tuple(others), engine, ask, period)

    monkeypatch.setattr(asks, "make_plan", offload)
    monkeypatch.setattr(
        asks,
        "make_served_plans",
        lambda each, request, engine, **more: offload(next(iter(each.values())), (request, engine)),
    )
    monkeypatch.setattr(asks, "make_ep_plan", parallel)

    def asked(arguments: list[str]) -> tuple[Any, ...] | Done:
        try:
            return call("plan", *arguments)
        except Reached as reached:
            return reached.args

    plain = asked(list(CALLS["plan"][mode]))
    assert isinstance(plain, tuple)
    for option in options("plan"):
        if option.name in OUTPUTS or option.name in ("as_json", "mode", "model"):
            continue
        assert option.name in VALUES, f"say in VALUES what {option.name} may be"
        value = VALUES[option.name]
        found = asked(given(CALLS["plan"][mode], option, () if value is None else (value,)))
        if isinstance(found, Done):
            assert (found.status, len(found.lines)) == (2, 1), (option.name, found)
        else:
            assert found != plain, f"{option.name} is ignored"
