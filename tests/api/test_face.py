"""The face of the package: which names there are, that importing it loads nothing, and that documented examples run."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import moeplan
from house import ROOT
from moeplan.base.errors import InputError
from moeplan.traces.recording import LoadProfile

FUNCTIONS = (
    "check",
    "diagnose",
    "emit",
    "fit",
    "load_machine",
    "load_model",
    "load_trace",
    "plan",
    "reproduce",
    "simulate",
    "simulate_parallel",
    "sweep",
    "validate",
)
HEAVY = ("numba", "numpy", "pandas", "plotly", "pydantic", "scipy", "torch", "typer")
BLOCK = re.compile(r"^```python( long)?\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
LONG = bool(os.environ.get("MOEPLAN_LONG"))


def test_public_names_are_these() -> None:
    assert sorted(moeplan.__all__) == [
        "CheckResult", "Diagnosis", "DoesNotFit", "FieldReproduction", "FitResult", "InputError", "LoadProfile",
        "ModelSpec", "MoeplanError", "OffloadPlan", "OffloadRequest", "OffloadSchedule", "ParallelPlan",
        "ParallelRequest", "ParallelResult", "Profile", "Reproduction", "RoutingTrace", "SimulationResult", "StudyResult", "Validation",
        "__version__", "check", "diagnose", "emit", "fit", "load_machine", "load_model", "load_trace", "plan",
        "reproduce", "simulate", "simulate_parallel", "sweep", "validate",
    ]  # fmt: skip
    assert set(moeplan.__all__) <= set(dir(moeplan))


def test_importing_loads_nothing_and_a_wrong_name_is_an_attribute_error() -> None:
    code = (
        "import sys; before = set(sys.modules); import moeplan; new = set(sys.modules) - before\n"
        f"assert not new & set({HEAVY!r}), new\n"
        "inside = {name for name in new if name.startswith('moeplan')}\n"
        "assert inside == {'moeplan', 'moeplan.base', 'moeplan.base.version'}, inside\n"
        "try: moeplan.simulat\n"
        "except AttributeError as error: assert 'simulat' in str(error)\n"
        "else: raise SystemExit('no error')\n"
        "from moeplan import load_model; assert 'torch' not in sys.modules and 'pandas' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_what_comes_back_and_take_options_by_name(name: str) -> None:
    function: Any = getattr(moeplan, name)
    assert (inspect.getdoc(function) or "").startswith("Return ") and "Raises " in (inspect.getdoc(function) or "")
    by_place = [
        one for one in inspect.signature(function).parameters.values() if one.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    assert len(by_place) <= 2
    hints = inspect.signature(function)
    assert all(one.annotation is not inspect.Parameter.empty for one in hints.parameters.values())


@pytest.mark.parametrize("page", ["docs/api.md"])
def test_documented_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((ROOT / page).read_text("utf-8"))
    assert len(blocks) > 5
    names: dict[str, Any] = {}
    for long, text in blocks:
        if LONG or not long:
            exec(compile(text, page, "exec"), names)


def test_the_command_says_what_the_function_says(capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    import json

    from moeplan.cli import main

    arguments = ["simulate", "--model", "tiny-moe", "--hardware", "t4", "--trace", "bundled", "--window", "9", "--set",
                 "cache.experts_per_layer=3", "--set", "machine.host.per_layer_s=20us", "--json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["moeplan", *arguments])
    with pytest.raises(SystemExit):
        main()
    settings = {"cache.experts_per_layer": 3, "machine.host.per_layer_s": "20us"}
    found = moeplan.simulate("tiny-moe", "t4", trace="bundled", window=9, settings=settings)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.to_dict()))
    loaded = moeplan.simulate(
        moeplan.load_model("tiny-moe"), moeplan.load_machine("t4"), trace=moeplan.load_trace("bundled"), window=9,
        settings=[f"{key}={value}" for key, value in settings.items()],
    )  # fmt: skip
    assert loaded.to_dict() == found.to_dict()


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    machine = moeplan.load_machine("rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB")
    with pytest.raises(InputError, match="load_machine"):
        moeplan.simulate("olmoe-1b-7b", machine, engine="vllm")
    with pytest.raises(InputError, match="settings"):
        moeplan.simulate("tiny-moe", "t4", trace="bundled", settings="cache.policy=lru")
    with pytest.raises(InputError, match="given twice"):
        moeplan.simulate("tiny-moe", "t4", trace="bundled", settings=["cache.policy=lru", "cache.policy=lfu"])
    with pytest.raises(InputError, match="one device only"):
        moeplan.plan("tiny-moe", "t4", trace="bundled", window=3, request=moeplan.ParallelRequest())  # type: ignore[call-overload]
    with pytest.raises(InputError, match="expert parallel only"):
        moeplan.plan("tiny-moe", "t4", trace="bundled", evaluate_on={"again": "bundled"})  # type: ignore[call-overload]
    with pytest.raises(InputError, match="says it already"):
        moeplan.plan(
            "tiny-moe", "t4", trace="bundled", memory="4GiB", request=moeplan.ParallelRequest(memory_bytes=2**32)
        )
    with pytest.raises(InputError, match="a plan or a grid"):
        moeplan.validate()
    counts: Any = LoadProfile(counts=[[1, 2]], model="", layer_ids=(0,), source="counts", licence="")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="loads only"):
        moeplan.simulate("tiny-moe", "t4", trace=counts)
