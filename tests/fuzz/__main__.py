"""Damage every kind of file that is read, give it to the command that reads it, and see that the command says so decently.

    python tests/fuzz --count 4000 [--seed 0] [--keep out/fuzz] [--only "plan emit"] [--workers 2]

A case fails by an error that is not one line, a status that is none of 0, 2 and 3, a control character, more than 2 GiB beside what an
idle process has, more than 20 s, an output that a refusal left behind, or a remedy that names an option the command has not.
What failed is kept with its command; one seed always gives the same cases. Cases run inside worker processes, one after the other: a
worker that dies is a case that fails. Ignored: what commands print when they succeed, and whether they should have.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support" / "plans"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support" / "traces"))

from commands import run
from mutations import mutated
from seeds import Seed, make_seeds

MEMORY_BYTES = 2 << 30
LIMIT_S = 20
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
_PROGRESS = re.compile(
    r"^(plan|validate|calibrate|synthesis|fit|demo)[\w :]*: [0-9]+/[0-9]+ |^moeplan: compiling |^.*: steps [0-9]+ to "
)


class _Hang(BaseException):
    """The time of a case is over."""


def complaint(status: int, out: str, err: str, trouble: str, left: list[Path], options: set[str]) -> str:
    """Return what is wrong with how a command ended, nothing for a decent end."""
    if trouble:
        return trouble
    if status not in (0, 2, 3):
        return f"status {status}: {err}"
    shown = out + err
    steering = [letter for letter in shown if not (letter.isprintable() or letter in "\n\t" or ord(letter) >= 0xA0)]
    if steering:
        return f"control characters {steering[:5]!r}"
    lines = [line for line in err.splitlines() if not _PROGRESS.match(line)]
    if status and (len(lines) != 1 or not lines[0].startswith("moeplan: ") or len(lines[0]) > 2000):
        return f"not one line: {err[:2000]!r}"
    if status and "this machine's memory does not suffice" in err:
        return "more memory than it may take"
    if status and left:
        return f"left {', '.join(path.name for path in left)} behind"
    # A remedy may name another command: "moeplan plan --mode ep".
    said = re.sub(r"moeplan [a-z]+( --[a-z-]+)+", "", lines[0].rpartition("; ")[2]) if status else ""
    strange = set(_OPTION.findall(said)) - options
    if strange:
        return f"a remedy that names {', '.join(sorted(strange))}, which the command has not: {lines[0]}"
    return ""


def options_of(arguments: tuple[str, ...]) -> set[str]:
    """Return the options of the command that `arguments` call."""
    import typer

    from moeplan.commands.app import app

    found: Any = typer.main.get_command(app)
    for word in arguments:
        if not hasattr(found, "commands"):
            break
        found = found.commands[word]
    return {name for parameter in found.params for name in parameter.opts}


def case(seed: Seed, number: int, seed_number: int, folder: Path) -> tuple[list[str], Path]:
    """Return (arguments, damaged file) of one case, its files below `folder`."""
    rng = random.Random(f"{seed_number} {number}")
    inside, outside = folder / "in", folder / "out"
    for part in (inside, outside):
        shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(seed.folder, inside)
    outside.mkdir()
    file = rng.choice(sorted(path for path in inside.rglob("*") if path.is_file()))
    file.write_bytes(mutated(rng, file.name, file.read_bytes()))
    return [part.replace("{in}", str(inside)).replace("{out}", str(outside)) for part in seed.arguments], file


def work(seeds: list[Seed], numbers: list[int], seed_number: int, keep: Path, report: Any) -> None:
    """Run cases, and report (number, seconds, bytes, complaint) of each; (number,) when it begins."""
    signal.signal(signal.SIGALRM, _over)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with tempfile.TemporaryDirectory(prefix="moeplan-fuzz-") as place:
        folder = Path(place)
        os.chdir(folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
        for number in numbers:
            report.send((number,))
            seed = seeds[number % len(seeds)]
            arguments, file = case(seed, number, seed_number, folder)
            began = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
            try:
                found = run(arguments)
            except _Hang:
                found = (1, "", "", f"more than {LIMIT_S} s")
            signal.setitimer(signal.ITIMER_REAL, 0)
            left = [path for path in (folder / "out").rglob("*") if path.is_file()]
            wrong = complaint(*found, left, options_of(seed.arguments))
            if wrong:
                kept = keep / f"{number:06} {seed.name}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(folder / "in", kept / "in")
                said = f"{' '.join(arguments)}\n\ndamaged: {file.name}\n\n{wrong}\n"
                (kept / "said.txt").write_text(
                    said.replace(str(folder), str(kept)), encoding="utf-8", errors="backslashreplace"
                )
            report.send((number, time.monotonic() - began, found[0], wrong))
    report.send(())


def _over(number: int, frame: Any) -> None:
    raise _Hang


def forbid_running() -> None:
    """Let commands that would run schedules for real stop where they have read everything."""
    from moeplan.base.errors import DoesNotFit
    from moeplan.executor.validation import validate, validate_plan

    def stop(*arguments: Any, **named: Any) -> None:
        raise DoesNotFit("what was read is whole, and nothing is run here", 0)

    validate.validate_grid = stop
    for name in ("calibrate_device", "validate_cases"):
        setattr(validate_plan, name, stop)


def main() -> int:
    """Return 0 when every case ended decently."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"))
    parser.add_argument("--only", default="")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    asked = parser.parse_args()
    keep = asked.keep.resolve()
    shutil.rmtree(keep, ignore_errors=True)
    keep.mkdir(parents=True)
    os.environ["MOEPLAN_DEBUG"] = "1"
    with tempfile.TemporaryDirectory(prefix="moeplan-fuzz-") as place:
        seeds = [seed for seed in make_seeds(Path(place)) if asked.only in seed.name]
        forbid_running()
        whole = list(seeds)
        for seed in seeds:  # undamaged they pass; and everything is imported and compiled before workers are forked
            began = time.monotonic()
            (Path(place) / "out").mkdir(exist_ok=True)
            arguments = [
                part.replace("{in}", str(seed.folder)).replace("{out}", f"{place}/out") for part in seed.arguments
            ]
            status, _, err, trouble = run(arguments)
            if trouble or (status and "nothing is run here" not in err):
                sys.stderr.write(f"{seed.name} fails undamaged: {err}{trouble}\n")
                whole.remove(seed)
            if time.monotonic() - began > 3:
                sys.stderr.write(f"{seed.name}: {time.monotonic() - began:.1f} s undamaged\n")
        return _all(whole, asked, keep) or int(len(whole) < len(seeds))


def _all(seeds: list[Seed], asked: argparse.Namespace, keep: Path) -> int:
    """Run all cases in workers; a worker that dies is replaced."""
    context = get_context("fork")
    began = time.monotonic()
    shares = [list(range(at, asked.count, asked.workers)) for at in range(asked.workers)]
    statuses: Counter[int] = Counter()
    wrong: dict[int, str] = {}
    running = {}

    def start(numbers: list[int]) -> None:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(seeds, numbers, asked.seed, keep, theirs))
        process.start()
        theirs.close()
        running[process] = (ours, numbers)

    for share in shares:
        start(share)
    seconds: Counter[str] = Counter()
    while running:
        for process, (ours, numbers) in list(running.items()):
            at = None
            try:
                while ours.poll(0.05):
                    said = ours.recv()
                    if not said:
                        at = -1
                        break
                    at = said[0]
                    if len(said) > 1:
                        statuses[said[2]] += 1
                        seconds[seeds[at % len(seeds)].name] += said[1]
                        if said[3]:
                            wrong[at] = said[3].strip().splitlines()[-1]
                        numbers[: numbers.index(at) + 1] = []
            except EOFError:
                del running[process]
                process.join()
                if numbers:
                    wrong[numbers[0]] = f"the process died with {process.exitcode}"
                    start(numbers[1:])
                continue
            if at == -1:
                del running[process]
                process.join()
    for number, line in sorted(wrong.items()):
        sys.stdout.write(f"{number:6} {seeds[number % len(seeds)].name}: {line[:300]}\n")
    slowest = ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.most_common(5))
    print(json.dumps({"cases": asked.count, "kinds": len(seeds), "seed": asked.seed, "seconds": round(time.monotonic() - began, 1),
                      "statuses": dict(sorted(statuses.items())), "failed": len(wrong), "slowest": slowest}))  # fmt: skip
    if wrong:
        print(f"inputs that failed are in {keep}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
