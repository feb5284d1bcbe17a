"""docs/recordings.md names every kind of source and only options there are; its tables are what the readers know."""

from __future__ import annotations

import re
from pathlib import Path

from house import ROOT
from moeplan.traces.readers import READERS, import_trace, reader_options
from moeplan.traces.readers import account as causes
from moeplan.traces.readers.files.token_table import NAMES

GUIDE = (ROOT / "docs" / "recordings.md").read_text()


def test_every_kind_is_in_the_guide_and_every_option_exists() -> None:
    listed = {kind for line in GUIDE.splitlines() if line.startswith("| ") for kind in re.findall(r"`([a-z-]+)`", line)}
    assert set(READERS) <= listed
    commands = re.findall(r"^moeplan trace import .*--from ([a-z-]+)(.*)$", GUIDE, re.MULTILINE)
    assert len(commands) > 6
    for kind, rest in commands:
        for name in re.findall(r"--option ([a-z_]+)=", rest):
            assert name in reader_options(kind), (kind, name)
    for part, names in NAMES.items():
        row = next(line for line in GUIDE.splitlines() if f"`{part}_column`" in line)
        assert re.findall(r"`([a-z_]+)`", row)[:-1] == list(names)
    every = {name for kind in READERS for name in reader_options(kind)}
    for name in re.findall(r"`(?:--option )?([a-z_]+)=[^`]*`", GUIDE):
        assert name in every, name


def test_causes_are_the_ones_that_are_printed() -> None:
    printed = (causes.PADDING, causes.UNCAPTURED, causes.INCOMPLETE, causes.PARTLY)
    assert all(f"`{cause}`" in GUIDE for cause in printed)


def test_rows_of_the_guide_are_read(tmp_path: Path) -> None:
    lines = GUIDE.splitlines()
    line = next(line for line in lines if line.startswith('{"request"'))
    (tmp_path / "t.jsonl").write_text(line)
    assert import_trace("jsonl", tmp_path / "t.jsonl").layer_ids == (3,)
    at = next(i for i, line in enumerate(lines) if line.startswith("request,token"))
    (tmp_path / "t.csv").write_text("\n".join(lines[at : at + 2]))
    trace = import_trace("csv", tmp_path / "t.csv")
    assert trace.experts.tolist() == [[[9, 13]]]  # type: ignore[union-attr]
