"""Tables of flags against the engines' own definitions, where their wheels are: MOEPLAN_ENGINE_WHEELS names a folder of them.

`pip download --no-deps sglang==0.5.23 vllm==0.33.0` fetches them; nothing is installed and nothing of them is run.
"""

from __future__ import annotations

import ast
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from moeplan.planner.emit.flags import OneOf
from moeplan.planner.emit.table import DEPRECATED, FORK, PENDING, RELEASED, EngineTable
from moeplan.planner.emit.targets import TARGETS


def sources(package: str, *folders: str) -> dict[str, str]:
    """Return the Python files of a wheel below `folders`; skips the test where the wheel is not there."""
    wheels = sorted(Path(os.environ.get("MOEPLAN_ENGINE_WHEELS") or os.devnull).glob(f"{package}-*.whl"))
    if not wheels:
        pytest.skip(f"no wheel of {package} in MOEPLAN_ENGINE_WHEELS")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        wanted = [name for name in wheel.namelist() if name.endswith(".py") and name.startswith(folders)]
        return {name: wheel.read(name).decode() for name in wanted}


def compare(table: EngineTable, defined: Mapping[str, str]) -> list[str]:
    """Return what a table says that an engine's definitions (flag to the text that defines it) do not."""
    wrong = []
    for flag, row in table.flags.items():
        if (row.standing in (RELEASED, DEPRECATED)) != (flag in defined):
            wrong.append(f"{flag}: {row.standing}")
        if row.standing == RELEASED and isinstance(row.kind, OneOf):
            wrong += [
                f"{flag} {value}"
                for value in row.kind.names
                if not re.search(rf"['\"]{value}['\"]", defined.get(flag, ""))
            ]
    return wrong


def test_sglang() -> None:
    files = sources("sglang", "sglang/srt/arg_groups/fields/", "sglang/srt/server_args.py")
    defined = {flag: text for text in files.values() for flag in re.findall(r'"(--[a-z0-9-]+)"', text)}
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                defined["--" + node.target.id.replace("_", "-")] = ast.unparse(node.annotation)
    assert compare(TARGETS["sglang"].table, defined) == []
    forked = {flag for flag, row in TARGETS["kt-kernel"].table.flags.items() if row.standing == FORK}
    assert forked == {flag for flag in TARGETS["kt-kernel"].table.flags if flag not in defined}


def test_vllm() -> None:
    files = sources("vllm", "vllm/config/parallel.py", "vllm/config/offload.py", "vllm/engine/arg_utils.py")
    every = "\n".join(files.values())
    defined = dict.fromkeys(re.findall(r'"(--[a-z0-9-]+)"', files["vllm/engine/arg_utils.py"]), every)
    for name in ("vllm", "vllm-ascend", "vllm-hygon"):
        assert compare(TARGETS[name].table, defined) == []
    keys = TARGETS["vllm"].table.keys
    config = every.partition("class EPLBConfig")[2].partition("\n@config")[0]
    found = {key for key in keys if re.search(rf"^    {key.split('.')[1]}:", config, re.MULTILINE)}
    assert found == {key for key, row in keys.items() if row.standing != PENDING}
