"""What every test runs under: the installation that is meant, and examples that repeat."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hypothesis
import pytest

import moeplan

# `MOEPLAN_LONG=1` draws new examples in every run; otherwise a run repeats the one before it.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", deadline=None, print_blob=True)
hypothesis.settings.load_profile("long" if os.environ.get("MOEPLAN_LONG") == "1" else "repeatable")


def pytest_sessionstart() -> None:
    """Stop when another installation than the one under test would be imported; let tests press Ctrl-C."""
    meant = os.environ.get("MOEPLAN_TESTED_AT")
    found = Path(str(moeplan.__file__)).resolve()
    if meant and not found.is_relative_to(Path(meant).resolve()):
        pytest.exit(f"moeplan was to be tested at {meant} but is imported from {found}", returncode=4)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell starts what it runs in the background so; Python then makes no KeyboardInterrupt of the Ctrl-C that tests press.
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    """Say which installation is tested."""
    return f"moeplan {moeplan.__version__} from {Path(str(moeplan.__file__)).parent}"
