"""A policy file: one's own rules, registered by running the file, tried on examples and compiled before anything is simulated.

Modelled: the file is the user's own code and is run as such. What it does wrong is answered in one line that names the file's line:
while it runs, in a trial of each rule, when a rule is compiled, and in a run (`raise_fault`, which asks the rule the same question
again in plain Python). Ignored: what a rule is good for.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ...base.errors import InputError, one_line
from ...specs.schedules import rules as names
from ...specs.schedules.offload import CACHE_POLICIES, MISS_CHOICES
from .rule_code import MERIT_RULE, MISS_RULE, PREFETCH_RULE, VICTIM_RULE, handle
from .rules import CORES, FETCH, MERIT, REGISTRY, Expert, Guess, Miss, Now, Rule
from .state import CUSTOM, FAR, MISS_CUSTOM, PolicyConfig, PolicyState

_LOADED: dict[Path, PolicyFile] = {}
_DIGEST: dict[tuple[str, str], str] = {}
_NUMBERS = {names.VICTIM: VICTIM_RULE, MERIT: MERIT_RULE, names.PREFETCH: PREFETCH_RULE, names.MISS: MISS_RULE}
_FRACTIONS = ("merit", "age", "probability")
_FAR = int(FAR)
_NOW = Now(layer_step=130, layer=2, num_layers=4, num_experts=8, age=0.0)
_EXAMPLES: dict[str, list[tuple[Any, ...]]] = {
    names.VICTIM: [
        (Expert(layer=2, expert=3, tokens=17, stay_tokens=5, last_used=126, next_use=134, merit=0.0), _NOW),
        (Expert(layer=0, expert=0, tokens=0, stay_tokens=0, last_used=-1, next_use=_FAR, merit=0.0), _NOW),
    ],
    names.PREFETCH: [
        (Guess(layer=3, expert=1, rank=0, probability=0.9, distance=1, copy_ns=500_000, backlog_ns=0, layer_step_ns=300_000),),
        (Guess(layer=3, expert=7, rank=5, probability=0.01, distance=2, copy_ns=500_000, backlog_ns=10**9, layer_step_ns=1),),
    ],
    names.MISS: [
        (Miss(layer=0, expert=5, tokens=1, copy_ns=500_000, device_ns=20_000, cores_ns=900_000, link_ns=1_500_000, busy_ns=0,
              fetched=0),),
        (Miss(layer=3, expert=0, tokens=64, copy_ns=500_000, device_ns=30_000, cores_ns=9_000_000, link_ns=500_000,
              busy_ns=900_000, fetched=2),),
    ],
}  # fmt: skip
_EXAMPLES[MERIT] = _EXAMPLES[names.VICTIM]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFile:
    """What a file has registered."""

    path: Path
    digest: str
    """SHA-256 of its bytes, in hex."""
    rules: tuple[Rule, ...]

    def to_dict(self) -> dict[str, str]:
        """Return what a document says of it: names, bytes by digest, never the place of a machine."""
        return {"file": self.path.name, "sha256": self.digest} | self.settings()

    def settings(self) -> dict[str, str]:
        """Return the schedule's options that its rules answer, by key; of several rules of a kind the last one's."""
        keys = {names.VICTIM: "cache.policy", names.PREFETCH: "predictor.score", names.MISS: "kernel.miss"}
        return {keys[rule.kind]: rule.name for rule in self.rules if rule.kind in keys}


def load_policy(path: str | os.PathLike[str]) -> PolicyFile:
    """Return the rules of a policy file, run, tried and registered; raises InputError with the line that is wrong."""
    file = Path(path)
    try:
        where = file.resolve(strict=True)
        source = where.read_bytes()
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise InputError(
            "--policy", str(path), reason, "give a Python file with rules (docs/extend/policy-file.md)"
        ) from None
    if where in _LOADED:
        return _LOADED[where]
    digest, before = hashlib.sha256(source).hexdigest(), set(REGISTRY)
    _run(where, str(path), source, digest)
    found = [REGISTRY[key] for key in REGISTRY if key not in before]
    try:
        _check_names(str(path), found)
        for rule in found:
            _try(rule, str(path))
        for rule in found:
            _compile(rule, str(path), digest)
    except InputError:
        for rule in found:
            del REGISTRY[rule.kind, rule.name]
        raise
    for rule in found:
        _DIGEST[rule.kind, rule.name] = digest
        if rule.kind != MERIT:
            names.add(rule.kind, rule.name)
    _LOADED[where] = PolicyFile(path=file, digest=digest, rules=tuple(found))
    return _LOADED[where]


def _run(where: Path, given: str, source: bytes, digest: str) -> None:
    """Run the file as a module of its own, under a name by which machine code kept on disk finds it again."""
    name, before = f"moeplan_policy_{digest[:16]}", dict(REGISTRY)
    module = ModuleType(name)
    module.__file__ = str(where)
    sys.modules[name] = module
    try:
        exec(compile(source, str(where), "exec"), module.__dict__)  # noqa: S102 - the user's own code, run as such
    except BaseException as error:
        REGISTRY.clear()
        REGISTRY.update(before)
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise InputError("--policy", given, _told(error, where), "mend the file") from None


def _check_names(given: str, found: list[Rule]) -> None:
    if not found:
        raise InputError(
            "--policy", given, "registers no rule", 'write for instance @victim_score("mine") above a function'
        )
    own = {rule.name for rule in found if rule.kind == names.VICTIM}
    for rule in found:
        if rule.kind == MERIT and rule.name not in own:
            raise InputError(
                "--policy", given, f"the merit {rule.name!r} has no victim score of that name", "register one beside it"
            )
        if rule.name in {names.VICTIM: CACHE_POLICIES, names.MISS: MISS_CHOICES}.get(rule.kind, ()):
            raise InputError("--policy", given, f"{rule.name!r} is a bundled policy's name", "choose another")


def _try(rule: Rule, given: str) -> None:
    """Ask a rule about examples in plain Python."""
    for example in _EXAMPLES[rule.kind]:
        _ask(rule, example, given)


def _ask(rule: Rule, values: tuple[Any, ...], given: str) -> float:
    """Return a rule's answer in plain Python; raises InputError that names the line and what it was asked."""
    code = rule.function.__code__
    place = f"line {code.co_firstlineno}, {rule.function.__name__}"
    try:
        answer = rule.function(*values)
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        asked = ", ".join(f"{name}={value}" for name, value in values[0]._asdict().items())
        raise InputError(
            "--policy", given, f"{_told(error, Path(code.co_filename))} (asked of {asked})", "mend the rule"
        ) from None
    if isinstance(answer, (str, bytes)) or not hasattr(answer, "__float__"):
        raise InputError(
            "--policy", given, f"{place}: returns {type(answer).__name__}, not a number", "return a number"
        )
    number = float(answer)
    if rule.kind == names.MISS and number not in (FETCH, CORES):
        raise InputError("--policy", given, f"{place}: returns {answer}, neither FETCH nor CORES", "return one of them")
    if not math.isfinite(number):
        raise InputError("--policy", given, f"{place}: returns {answer}, no finite number", "return a finite number")
    return number


def _told(error: BaseException, where: Path) -> str:
    """Return an error of a user's file in a few words, with the line of that file."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(where)]
    place = f"line {lines[-1].lineno}: " if lines else ""
    return f"{place}{type(error).__name__}: {one_line(error, 200)}"


def _compile(rule: Rule, given: str, digest: str) -> None:
    try:
        handle(rule, digest)
    except Exception as error:  # noqa: BLE001 - a compiler's errors have no base of their own
        line = _line_in(str(error), rule.function)
        first = next(iter(_REASON.findall(str(error))), type(error).__name__)
        raise InputError(
            "--policy", given, f"line {line}, {rule.function.__name__}: cannot be compiled ({one_line(first, 200)})",
            "use numbers, comparisons, loops and math functions",
        ) from None  # fmt: skip


def _line_in(text: str, function: Callable[..., Any]) -> int:
    """Return the last line of the user's file that a compiler's message names, else the function's first."""
    code = function.__code__
    name, found = os.path.basename(code.co_filename), code.co_firstlineno
    for line in text.splitlines():
        if f'{name}", line ' in line:
            found = int(line.split(f'{name}", line ')[1].split(":")[0].split(" ")[0].rstrip(")"))
    return int(found)


# How numba begins the lines that say what is wrong.
_REASON = re.compile(
    r"^\s*((?:Unknown attribute|No implementation of function|Cannot unify|Untyped global name|Use of unsupported|Invalid use of"
    r"|Undecided type|Unsupported|cannot determine)[^\n]*)",
    re.MULTILINE,
)


# --- in a run -------------------------------------------------------------------------------------------------------------


def _rules_of(config: PolicyConfig) -> dict[str, Rule]:
    """Return the rules of policy files that a run uses, by kind."""
    numbers = {
        names.VICTIM: config.policy - CUSTOM,
        names.PREFETCH: config.scored - 1,
        names.MISS: config.miss - MISS_CUSTOM,
    }
    found = {kind: REGISTRY[kind, names.added(kind)[number]] for kind, number in numbers.items() if number >= 0}
    own = found.get(names.VICTIM)
    if own is not None and (MERIT, own.name) in REGISTRY:
        found[MERIT] = REGISTRY[MERIT, own.name]
    return found


def use_rules(config: PolicyConfig, state: PolicyState) -> None:
    """Give a new state the handles of the rules of policy files that its run uses."""
    for kind, rule in _rules_of(config).items():
        state.rules[0][kind] = handle(rule, _DIGEST[kind, rule.name])


def raise_fault(config: PolicyConfig, state: PolicyState) -> None:
    """Return nothing; raises InputError where a rule did something wrong in a run, with its line and what it was asked."""
    if state.fault[0].kind == 0:
        return
    kind = next(kind for kind, number in _NUMBERS.items() if number == state.fault[0].rule)
    rule, given = _rules_of(config)[kind], state.asked.tolist()
    shape: tuple[Any, ...] = {names.PREFETCH: (Guess,), names.MISS: (Miss,)}.get(kind, (Expert, Now))
    values = []
    for made in shape:
        fields = zip(made._fields, given, strict=False)
        values.append(made(**{name: value if name in _FRACTIONS else int(value) for name, value in fields}))
        given = given[len(made._fields) :]
    path = next((str(file.path) for file in _LOADED.values() if rule in file.rules), "")
    _ask(rule, tuple(values), path)
    raise InputError("--policy", path, f"the {kind} rule {rule.name!r} failed once compiled, and not in plain Python",
                     "keep its numbers small and whole where they can be")  # fmt: skip
