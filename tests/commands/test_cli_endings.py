"""How commands end when nobody waits for the end: Ctrl-C at any moment, signals, killed parents, closed and full streams."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplan
from moeplan.base import text_files
from moeplan.base.streams import Guarded
from moeplan.base.text_files import write_atomic
from moeplan.cli import main
from moeplan.commands import demo as demo_command

PACKAGE = str(Path(str(moeplan.__file__)).parent)
RUN = [sys.executable, "-c", "from moeplan.cli import main; main()"]
NAMED = ["--model", "tiny-moe", "--hardware", "t4", "--trace", "bundled"]
# Commands that are done in an instant, with what each writes.
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "simulate": (["simulate", *NAMED, "--window", "4", "--simulator", "simpy", "--timeline", "t.json"], ["t.json"]),
    "trace stats": (["trace", "stats", "small.safetensors"], []),
    "trace convert": (["trace", "convert", "small.safetensors", "--to", "npz", "-o", "c.npz"], ["c.npz"]),
    "trace import": (["trace", "import", "c0.npz", "--from", "npz", "-o", "i.safetensors"], ["i.safetensors"]),
    "trace synth": (
        ["trace", "synth", "--set", "num_layers=2", "--set", "num_experts=4", "--set", "top_k=1", "--tokens", "50", "-o", "s.safetensors"],
        ["s.safetensors"],
    ),
    "calibrate": (
        ["calibrate", "--from", "nvbandwidth", "links.json", "--hardware", "t4", "-o", "p.json"],
        ["p.json", "p.samples.json"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the inputs of all commands."""
    folder = tmp_path_factory.mktemp("ground")
    experts = np.random.default_rng(0).permuted(np.tile(np.arange(8, dtype=np.uint8), (20, 3, 1)), axis=2)[:, :, :2]
    np.savez(folder / "c0.npz", experts=experts, seq=np.zeros(20, np.int32), pos=np.arange(20, dtype=np.int32),
             phase=np.ones(20, np.int8), layer_ids=np.arange(3))  # fmt: skip
    from moeplan.traces.format import save_trace
    from moeplan.traces.readers import import_trace

    save_trace(import_trace("npz", folder / "c0.npz", num_experts=8), folder / "small.safetensors")
    kinds = (("host_to_device_memcpy_ce", "->"), ("device_to_host_memcpy_ce", "<-"))
    rows = [
        {"name": name, "status": "Passed", "bandwidth_matrix": [["12.5"]],
         "bandwidth_description": f"memcpy CE CPU(row) {arrow} GPU(column) bandwidth (GB/s)"}
        for name, arrow in kinds
    ]  # fmt: skip
    (folder / "links.json").write_text(json.dumps({"nvbandwidth": {"testcases": rows}}))
    return folder


class Interrupting:
    """A profile function that presses Ctrl-C at one call within the package, or at the first after an output is complete."""

    def __init__(self, at: int, output: Path | None = None) -> None:
        self.at, self.output = at, output
        self.calls = 0

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE) or code.co_name.startswith("<"):
            return
        if "site-packages" in code.co_filename:
            return  # an environment that lies in the checkout
        if Path(code.co_filename).name in ("streams.py", "cli.py", "errors.py") or "/tests/" in code.co_filename:
            return  # the front door itself, where a Ctrl-C is caught a moment earlier or later
        self.calls += 1
        if self.calls == self.at or (self.output is not None and self.output.exists()):
            raise KeyboardInterrupt


def run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any, profile: Any = None
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["moeplan", *arguments])
    sys.setprofile(profile)
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.setprofile(None)
    shown = capsys.readouterr()
    return int(stop.value.code or 0), shown.out, shown.err


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_ctrl_c_at_any_moment_is_one_line_that_tells_the_truth(
    name: str, ground: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments, outputs = COMMANDS[name]
    monkeypatch.chdir(ground)

    def remove_outputs() -> None:
        for output in outputs:
            (ground / output).unlink(missing_ok=True)

    for _ in range(2):  # the second time everything is imported
        remove_outputs()  # what is there already takes calls of its own
        whole = Interrupting(-1)
        status, _, said = run(arguments, monkeypatch, capsys, whole)
        assert status == 0, said
    presses = [Interrupting(1 + int(share * whole.calls)) for share in (0, 0.2, 0.45, 0.7, 0.9, 0.97)]
    presses += [Interrupting(-1, ground / output) for output in outputs]
    for press in presses:
        remove_outputs()
        before = set(ground.iterdir())
        status, _, said = run(arguments, monkeypatch, capsys, press)
        assert status == 130, (press.at, press.output, said)
        line = said.splitlines()[-1]
        assert line.startswith("moeplan: interrupted; ") and line.endswith("the same command starts over")
        assert said.count("interrupted") == 1 and "Traceback" not in said
        left = {path for path in set(ground.iterdir()) - before if path.suffix != ".moeplan-part"}
        assert left <= {ground / output for output in outputs}, "something half-done was left"
        written = [path.name for path in left]
        assert all(name in line for name in written) and ("nothing was written" in line) == (not written), line
    # A Ctrl-C in the very moment in which a part is removed leaves it to the next run.
    assert run(arguments, monkeypatch, capsys)[0] == 0
    assert not outputs or not list(ground.glob(".*.moeplan-part"))


def test_an_interrupted_demo_says_what_it_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(demo_command, "_calibrate", lambda path: write_atomic(path, "{}"))

    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("moeplan.api.plan"), "plan", stop)
    status, _, said = run(["demo", "-o", str(tmp_path)], monkeypatch, capsys)
    assert (status, said) == (
        130,
        f"moeplan: interrupted; written: {tmp_path / 'answer.html'}, {tmp_path / 'cpu.json'}; the same command starts over\n",
    )


def test_what_can_be_gone_on_with_is_named(tmp_path: Path) -> None:
    text_files.forget_written()
    write_atomic(tmp_path / "a.json", "{}")
    write_atomic(tmp_path / "b.json", "{}", unfinished=True)
    write_atomic(tmp_path / "c.json", "{}", unfinished=True)
    (tmp_path / "c.json").unlink()
    assert text_files.written_files() == ((str(tmp_path / "a.json"),), (str(tmp_path / "b.json"),))


def _children(parent: int) -> list[int]:
    """Return the processes whose parent is `parent`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def _alive(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


WORKING = """
import os, sys, time
sys.argv = ["moeplan", "demo"]
import moeplan.commands.demo as demo
from moeplan.base.workers import worker_pool

def work(*arguments):
    with worker_pool(2) as pool:
        pending = [pool.submit(time.sleep, 600) for _ in range(2)]
        sys.stderr.write("working\\n")
        sys.stderr.flush()
        pending[0].result()

demo._calibrate = demo.output_folder = work
from moeplan.cli import main
main()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_workers_end_with_their_command(number: signal.Signals, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", WORKING], cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True
    )
    assert parent.stderr is not None
    assert parent.stderr.readline() == b"working\n"
    workers: list[int] = []
    while len(workers) < 2:
        workers = _children(parent.pid)
    time.sleep(0.2)  # let them begin
    if number == signal.SIGINT:  # a terminal sends it to all of them
        os.killpg(parent.pid, number)
    else:
        parent.send_signal(number)
    watchdog = threading.Timer(60, parent.kill)
    watchdog.start()
    said = parent.stderr.read().decode()  # ends when the last of them has
    watchdog.cancel()
    status = parent.wait()
    parent.stderr.close()
    for _ in range(200):  # its streams are closed a moment before a process is gone
        if not any(_alive(worker) for worker in workers):
            break
        time.sleep(0.05)
    else:
        pytest.fail("workers outlive their command")
    if number == signal.SIGKILL:
        assert (status, said) == (-9, "")
    else:
        assert status == 128 + number
        assert said.count("\n") == 1 and said.endswith("nothing was written; the same command starts over\n"), said


STATS = [*RUN, "trace", "stats", "bundled"]
SIMULATE = [*RUN, "simulate", *NAMED, "--window", "4", "--simulator", "simpy"]


def shell(command: list[str], redirections: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["/bin/sh", "-c", f'exec "$@" {redirections}', "sh", *command], capture_output=True, text=True,
                          check=False, timeout=300, env=os.environ | environment)  # fmt: skip


@pytest.mark.parametrize(
    ("redirections", "status", "said"),
    [
        (
            ">/dev/full",
            74,
            "moeplan: standard output cannot be written: no space left on device; what was printed is lost\n",
        ),
        (">&-", 74, "moeplan: standard output cannot be written: is closed; what was printed is lost\n"),
        ("2>/dev/full", 0, ""),
        ("2>&-", 0, ""),
        (">/dev/full 2>/dev/full", 74, ""),
        (">&- 2>&- <&-", 74, ""),
    ],
)
def test_full_and_closed_streams_end_in_a_line_and_a_status(redirections: str, status: int, said: str) -> None:
    done = shell(STATS, redirections)
    assert (done.returncode, done.stderr) == (status, said)
    assert bool(done.stdout) == (status == 0)


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    done = subprocess.run(["/bin/sh", "-c", '("$@"; echo "status $?" >&2) | head -n 1', "sh", *STATS], capture_output=True,
                          text=True, check=False, timeout=300)  # fmt: skip
    assert done.stderr == "status 0\n"


def test_errors_fit_streams_of_few_characters_and_full_ones() -> None:
    for redirections in ("2>/dev/full", "2>&-"):
        assert shell([*RUN, "trace", "stats", "absent"], redirections).returncode == 2
    done = shell(
        [*RUN, "trace", "stats", "absent\u2014\u65e5"], "", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C"
    )
    assert done.returncode == 2 and done.stderr.isascii() and done.stderr.count("\n") == 1


def test_plain_letters_stand_in_for_what_an_ascii_terminal_lacks() -> None:
    done = shell([*RUN, "hardware", "show", "t4"], "", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "+-" in done.stdout and done.stdout.isascii()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_nothing_printed_steers_the_terminal(encoding: str) -> None:
    raw = io.BytesIO()
    stream = Guarded(io.TextIOWrapper(raw, encoding=encoding, newline=""))
    stream.write("a\x1b[2Jb\x07\x9b\u202ec\udc80\td\n\u4e2d±\r")
    stream.flush()
    shown = raw.getvalue().decode(encoding)
    assert all(letter.isprintable() or letter in "\t\n" for letter in shown)
    assert shown.startswith("a\\x1b[2Jb\\x07\\x9b\\u202ec\\udc80\td\n")
    assert stream.lost_output is None
