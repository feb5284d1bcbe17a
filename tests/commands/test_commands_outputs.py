"""Every command's outputs are checked before its work begins, and the most precious is written first."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from moeplan.api.load import bundled_trace_path
from moeplan.cli import main
from moeplan.commands.app import app

# What makes an option an output, and the commands' other arguments. A command with an option of such a name and no line here
# fails the test below.
_OUTPUTS = ("--output", "--report", "--timeline", "--samples", "--record", "--parquet")
_NAMED = ["--model", "model.json", "--hardware", "machine.json", "--trace", "trace.safetensors"]
_ARGUMENTS = {
    "demo": [],
    "simulate": _NAMED,
    "plan": _NAMED,
    "calibrate": ["--model", "model.json"],
    "diagnose": [
        "--model",
        "model.json",
        "--hardware",
        "rtx-3060",
        "--command",
        "llama-server -ngl 99",
        "--measured-decode",
        "5",
    ],
    "validate": ["plan.json"],
    "check": ["--baseline", "b.csv", "--predictions", "p.csv", "--refresh"],
    "report": ["plan.json", "--trace", "trace.safetensors"],
    "gates train": ["--model", "model", "--text", "file"],
    "trace record": ["--model", "model", "--text", "file"],
    "sweep": ["file", "--store", "s.sqlite"],
    "run": ["--model", "model", "--plan", "plan.json", "--prompt-file", "file"],
    "machine": ["--gpu", "rtx-3060"],
    "reproduce": ["field", "--reports", "reports.jsonl"],
    "trace import": ["file", "--from", "npz"],
    "trace convert": ["trace.safetensors", "--to", "npz"],
    "trace synth": ["--like", "trace.safetensors"],
}
_FOLDERS = ("demo",)  # their --output is one
_LATER = ("emit",)  # an engine decides which files there are: they are checked once they are rendered


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def moeplan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["moeplan", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return Done(stop.value.code or 0, shown.out, shown.err)

    return run


def commands(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, command) of every command below a group."""
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name}{key} ")
        else:
            yield f"{name}{key}", command


def outputs() -> Iterator[tuple[str, str]]:
    """Yield (command, option) of every output there is."""
    for name, command in commands(typer.main.get_command(app)):
        for option in command.params:
            if name not in _LATER and any(each in _OUTPUTS for each in option.opts):
                yield name, option.opts[0]


@pytest.mark.parametrize(("command", "option"), sorted(outputs()))
def test_an_output_is_tried_before_the_work_begins(command, option, moeplan, tmp_path, monkeypatch):
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    for module, name in (
        ("moeplan.specs.models.load", "load_model"), ("moeplan.specs.machines.profile_file", "load_hardware"),
        ("moeplan.base.json_files", "read_json"),
        ("moeplan.traces.format", "load_recording"), ("moeplan.traces.readers", "import_trace"),
        ("moeplan.executor.calibration.calibrate", "calibrate_device"),
    ):  # fmt: skip
        monkeypatch.setattr(f"{module}.{name}", work)
    for name in ("model.json", "machine.json", "trace.safetensors", "plan.json", "file"):
        (tmp_path / name).write_text("{}")
    folder = option == "--output" and command in _FOLDERS
    inputs = [one for one in _ARGUMENTS[command] if (tmp_path / one).exists()]
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    for place in ["file", "file/below"] if folder else [".", "absent/x.json", "file/x.json", *inputs]:
        rest = (
            []
            if option == "--output" or "--output" not in {o for c, o in outputs() if c == command}
            else ["-o", "out.json"]
        )
        done = moeplan(*command.split(), *_ARGUMENTS[command], *rest, option, place)
        assert done.returncode == 2, (place, done.stderr)
        assert option.strip("-") in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("one", ["--report", "--timeline"])
def test_outputs_of_one_command_are_different_files(one, moeplan, tmp_path):
    os.symlink("plan.json", tmp_path / "link.json")
    for name in ("plan.json", "link.json"):
        done = moeplan("plan", *_NAMED, "-o", "plan.json", one, name)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "is the same file as --output" in done.stderr


def test_the_plan_is_written_before_the_report(moeplan, tmp_path, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("a page that cannot be drawn")

    monkeypatch.setattr("moeplan.commands.plan.write_offload_report", fails)
    monkeypatch.setattr("moeplan.commands.plan.write_perfetto", fails)
    monkeypatch.setattr(sys, "argv", ["moeplan", "plan", "--model", "tiny-moe", "--hardware", "t4", "--trace", "bundled",
                                      "--window", "8", "--report", "r.html", "-o", "p.json"])  # fmt: skip
    with pytest.raises(SystemExit):
        main()
    assert json.loads((tmp_path / "p.json").read_text())["kind"] == "offload"


def test_an_engine_configuration_does_not_overwrite_its_plan(moeplan, tmp_path):
    from moeplan.planner.emit.targets import NOTES_FILE

    done = moeplan(
        "plan", "--model", "tiny-moe", "--hardware", "t4", "--trace", "bundled", "--window", "8", "-o", NOTES_FILE
    )
    assert done.returncode == 0, done.stderr
    written = Path(NOTES_FILE).read_bytes()
    done = moeplan("emit", NOTES_FILE, "--target", "vllm", "-o", ".")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "would overwrite the plan" in done.stderr
    assert Path(NOTES_FILE).read_bytes() == written and len(list(tmp_path.iterdir())) == 1


def test_a_link_to_the_bundled_recording_is_no_output(moeplan, tmp_path):
    os.symlink(bundled_trace_path(), tmp_path / "mine.safetensors")
    before = bundled_trace_path().read_bytes()
    done = moeplan("trace", "convert", "mine.safetensors", "--to", "npz", "-o", "mine.safetensors")
    assert done.returncode == 2 and bundled_trace_path().read_bytes() == before
