"""Benchmarks of a real model keep each row as soon as it is measured."""

import json
from pathlib import Path

import pytest
from benchmarks.lookahead import kept_rows


def test_rows_measured_before_an_error_stay(tmp_path: Path) -> None:
    def rows():
        yield {"bits": "4", "link": "memory", "gain": 1.0}
        yield {"bits": "3", "link": "memory", "gain": 2.0}
        raise KeyboardInterrupt

    path = tmp_path / "rows.json"
    path.write_text(
        json.dumps({"rows": [{"bits": "4", "link": "disk", "gain": 0.5}, {"bits": "3", "link": "memory", "gain": 0.0}]})
    )
    with pytest.raises(KeyboardInterrupt):
        kept_rows(path, rows())
    kept = json.loads(path.read_text())["rows"]
    assert [(row["bits"], row["link"], row["gain"]) for row in kept] == [
        ("4", "memory", 1.0),
        ("3", "memory", 2.0),
        ("4", "disk", 0.5),
    ]
