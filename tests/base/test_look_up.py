"""Looking things up: every machine, constant and preset is listed with its source; the ways into the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import typer

from moeplan.base.terminal import print_table
from moeplan.cli import main
from moeplan.commands import emit, trace
from moeplan.commands.app import app
from moeplan.planner.emit.targets import list_targets
from moeplan.specs.catalog.schedules import OFFLOAD, PARALLEL
from moeplan.specs.machines.profile import profile_to_json
from moeplan.specs.machines.profile_file import list_hardware, load_hardware
from moeplan.specs.schedules.offload import OffloadSchedule, apply_settings
from moeplan.specs.schedules.parallel import EP_PRESETS, apply_ep_settings, load_ep_preset
from moeplan.specs.schedules.presets import PRESETS, load_preset
from moeplan.traces.convert import CONVERTERS
from moeplan.traces.readers import READERS


@pytest.fixture
def moeplan(tmp_path, monkeypatch, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["moeplan", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    return run


def document(moeplan, *arguments: str) -> dict[str, object]:
    status, text, said = moeplan(*arguments, "--json")
    assert (status, said) == (0, "")
    return json.loads(text)


def test_every_machine_is_listed(moeplan):
    rows = document(moeplan, "hardware", "list")["hardware"]
    assert [row["name"] for row in rows] == list_hardware()
    text = moeplan("hardware", "list")[1]
    assert len(text.splitlines()) == len(rows) + 1
    t4 = next(row for row in rows if row["name"] == "t4")
    assert (t4["memory_bytes"], t4["num_gpus"]) == (15 * 2**30, 1) and "15.0 GiB" in text


@pytest.mark.parametrize("name", list_hardware())
def test_every_constant_is_shown_with_its_source(moeplan, name):
    profile = load_hardware(name)
    found = document(moeplan, "hardware", "show", name)
    assert found["sha256"] and found["tables"] == []
    shown = {row["name"]: row for row in found["constants"]}
    text = {line.split()[0]: line for line in moeplan("hardware", "show", name)[1].splitlines()[2:]}
    assert list(shown) == [key for key in text if key != "kernels"] == [key for key, _ in profile.constants()]
    for key, one in profile.constants():
        facts = (shown[key]["value"], shown[key]["source"], shown[key]["citation"], shown[key]["relative_uncertainty"])
        assert facts == (one.value, one.source, one.citation, one.relative_uncertainty)
        assert " ".join(one.citation.split()) in text[key] and f"  {one.source}" in text[key]
        assert shown[key]["unit"] in ("bytes", "bytes/s", "FLOP/s", "s", "share", "number")


def test_a_machine_in_a_file_is_shown_and_a_wrong_name_is_one_line(moeplan, tmp_path):
    (tmp_path / "mine.json").write_text(profile_to_json(load_hardware("rtx-4090")))
    assert document(moeplan, "hardware", "show", "mine.json")["name"] == "rtx-4090"
    status, text, said = moeplan("hardware", "show", "rtx-4o80")
    assert (status, text, said.count("\n")) == (2, "", 1) and "'rtx-4080'" in said


def test_every_preset_is_listed_with_what_it_does_and_who_published_it(moeplan):
    rows = document(moeplan, "schedule", "list")["schedules"]
    kinds = {kind: [row["name"] for row in rows if row["kind"] == kind] for kind in ("offload", "parallel")}
    assert kinds == {"offload": list(PRESETS), "parallel": list(EP_PRESETS)}
    assert list(OFFLOAD) == list(PRESETS) and list(PARALLEL) == list(EP_PRESETS)
    assert all(row["what"] for row in rows)
    nobodys = {"resident", "affinity", "three-tiers"}
    assert {row["name"] for row in rows if not row["citation"]} == nobodys
    only = document(moeplan, "schedule", "list", "--kind", "parallel")["schedules"]
    assert [row["name"] for row in only] == list(EP_PRESETS)


@pytest.mark.parametrize("name", [*PRESETS, "n-cpu-moe=3"])
def test_an_offload_preset_sets_what_it_shows(moeplan, name):
    (found,) = document(moeplan, "schedule", "show", name, "--kind", "offload")["schedules"]
    assert apply_settings(OffloadSchedule(name=name.partition("=")[0]), found["sets"]) == load_preset(name)
    text = moeplan("schedule", "show", name, "--kind", "offload")[1]
    assert all(f"{key}=" in text for key in found["sets"]) and found["what"] in text


@pytest.mark.parametrize("name", EP_PRESETS)
def test_a_parallel_preset_sets_what_it_shows(moeplan, name):
    (found,) = document(moeplan, "schedule", "show", name, "--kind", "parallel")["schedules"]
    assert apply_ep_settings(load_ep_preset("ep"), found["sets"] | {"name": name}) == load_ep_preset(name)


def test_a_name_of_both_kinds_shows_both_and_a_wrong_one_is_one_line(moeplan):
    both = document(moeplan, "schedule", "show", "scmoe")["schedules"]
    assert [one["kind"] for one in both] == ["offload", "parallel"]
    for arguments in (["show", "eplbb"], ["list", "--kind", "paralel"], ["show", "fiddler", "--kind", "parallel"]):
        status, text, said = moeplan("schedule", *arguments)
        assert (status, text, said.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    "command", [[], ["hardware"], ["schedule", "show"], ["trace", "synth"], ["plan"], ["validate"]]
)
def test_h_is_help_everywhere(moeplan, command):
    status, text, said = moeplan(*command, "-h")
    assert (status, said) == (0, "") and "Usage: " in text


def parameters():
    """Yield (command, parameter) of everything that a command takes."""

    def walk(group, name=""):
        for key, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from walk(command, f"{name}{key} ")
            else:
                for parameter in command.params:
                    yield f"{name}{key}", parameter

    return walk(typer.main.get_command(app))


@pytest.mark.parametrize(
    ("command", "parameter"), [pytest.param(*one, id=f"{one[0]} {one[1].name}") for one in parameters()]
)
def test_help_says_what_everything_is(command, parameter):
    assert parameter.help and parameter.help[-1] in ".)", parameter.help
    # Where nothing given means something, help says what, or that it is optional by its words.
    known = {
        "--from": READERS, "--target": list_targets(), "--mode": ("offload", "ep"), "--phase": ("prefill", "decode"),
        "--device": ("cpu", "cuda"), "--simulator": ("compiled", "simpy", "both"), "--kind": ("offload", "parallel"), "--to": CONVERTERS,
        "--objective": ("request_s", "ttft_s", "decode_tokens_per_s", "requests_per_s", "tokens_per_s", "p99_step_s", "least_memory"),
    }  # fmt: skip
    if command in ("calibrate", "validate") and "--from" in parameter.opts:
        speeds = ("llama-bench", "vllm-bench")
        known["--from"] = speeds if command == "validate" else (*speeds, "nvbandwidth", "nccl-tests", "aiconfigurator")
    if command == "diagnose":
        known["--from"] = ("llama-bench",)
    for option in parameter.opts:
        for value in known.get(option, ()):
            assert re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", parameter.help), (option, value)


def test_lists_that_are_written_out_are_the_registries_own():
    assert trace.SOURCES.split(", ") == list(READERS) and emit.TARGETS.split(", ") == list_targets()


def run_process(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment
    )


def test_the_package_runs_as_a_module():
    done = run_process(sys.executable, "-m", "moeplan", "--version")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()


@pytest.mark.parametrize(
    ("words", "among"),
    [("moeplan sched", {"schedule"}), ("moeplan hardware show --js", {"--json"}), ("moeplan simulate --hardware rtx-4", {"rtx-4090"}),
     ("moeplan simulate --schedule hob", {"hobbit"}), ("moeplan plan --model tiny", {"tiny-moe"})],
)  # fmt: skip
def test_the_shell_completes_commands_options_and_names(words, among):
    start = [sys.executable, "-c", "import sys; sys.argv = ['moeplan']; from moeplan.cli import main; main()"]
    count = str(len(words.split()) - 1)
    done = run_process(*start, COMP_WORDS=words, COMP_CWORD=count, _MOEPLAN_COMPLETE="complete_bash")
    assert set(done.stdout.split()) == among, done.stderr


def test_tables_are_aligned_and_show_no_control_characters(capsys):
    print_table(("name", "size", "why"), [("a", 1, "x\x1b[31my\nz"), ("long", 1000, None)], right=(1,))
    assert capsys.readouterr().out == "name  size  why\na        1  x?[31my z\nlong  1000  -\n"
