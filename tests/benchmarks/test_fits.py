"""Programs that fit bundled constants end in one line where what they read is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark_modules import benchmark_module
from moeplan.calibrate.imports.aiconfigurator import tables


def test_a_fit_without_its_tables_is_one_line_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kernels = benchmark_module("fits.kernels")
    monkeypatch.setattr(tables, "installed_folder", lambda: None)
    monkeypatch.setattr(kernels, "KERNELS_FOLDER", tmp_path)
    for systems in ([], ["h100_sxm"], ["nonsense"]):
        assert kernels.main(systems) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and len(shown.err.splitlines()) == 1 and "aiconfigurator-core" in shown.err
    assert not list(tmp_path.iterdir())
