"""Samples survive their file, and a file that is not one is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibration_samples import lawful_samples
from moeplan.base.errors import InputError
from moeplan.base.text_files import write_atomic
from moeplan.calibrate.samples import (
    COLUMNS,
    Sample,
    SampleSet,
    merge,
    read_samples,
    samples_from_json,
    samples_to_json,
)


def copy(*seconds: float, size: float = 1024) -> Sample:
    return Sample(
        kind="copy", labels={"direction": "h2d", "memory": "pinned"}, arguments={"bytes": size}, seconds=seconds
    )


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    found = lawful_samples(noise=0.01)
    path = tmp_path / "one.samples.json"
    write_atomic(path, samples_to_json(found))
    again = read_samples(path)
    assert again == found
    assert samples_to_json(again) == samples_to_json(found)
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_written_where_the_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="output"):
        write_atomic(tmp_path / "no" / "file.json", "x")
    assert list(tmp_path.iterdir()) == []


def test_statistics_are_of_the_repetitions() -> None:
    sample = copy(4.0, 1.0, 2.0, 3.0, 5.0)
    assert sample.median_s == 3.0
    assert sample.spread == pytest.approx((4.0 - 2.0) / 3.0)
    assert 0 < sample.standard_error < sample.spread


def test_merging_puts_repetitions_of_one_measurement_together() -> None:
    one = SampleSet(device={"name": "a"}, conditions={}, samples=(copy(1.0), copy(2.0, size=8)), warnings=("warm",))
    two = SampleSet(device={"name": "a"}, conditions={}, samples=(copy(3.0),), warnings=("warm", "hot"))
    both = merge([one, two])
    assert [(s.arguments["bytes"], s.seconds) for s in both] == [(1024, (1.0, 3.0)), (8, (2.0,))]
    assert both.warnings == ("warm", "hot")
    with pytest.raises(InputError, match="different devices"):
        merge([one, SampleSet(device={"name": "b"}, conditions={}, samples=())])
    with pytest.raises(InputError, match="nothing to merge"):
        merge([])


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), True, "1"])
def test_a_time_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="seconds"):
        copy(value)  # type: ignore[arg-type]


def test_samples_with_columns_missing_are_refused() -> None:
    with pytest.raises(InputError, match=r"expert\.bits"):
        Sample(
            kind="expert",
            labels={},
            arguments={"tokens": 1, "hidden": 1, "intermediate": 1, "gated": 1},
            seconds=(1.0,),
        )
    with pytest.raises(InputError, match=r"expert\.gated"):
        Sample(
            kind="expert", labels={"bits": "4"}, arguments={"tokens": 1, "hidden": 1, "intermediate": 1}, seconds=(1.0,)
        )
    with pytest.raises(InputError, match="kind"):
        Sample(kind="guess", labels={}, arguments={}, seconds=(1.0,))
    with pytest.raises(InputError, match="no repetitions"):
        copy()
    with pytest.raises(InputError, match=r"copy\.bytes"):
        copy(1.0, size=float("nan"))


def document(**changes: object) -> str:
    return json.dumps(json.loads(samples_to_json(lawful_samples(bits=("16",)))) | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("[1]", "not a file of samples"),
        ("{}", "not a file of samples"),
        (document(schema_version=2), "schema_version"),
        (document(samples={}), "samples"),
        (document(device=None), "device"),
        (document(samples=[{"kind": "copy"}]), r"samples\[0\]"),
        (document(samples=[{"kind": "copy", "labels": {}, "arguments": {}, "seconds": [1.0]}]), "direction"),
        (
            document(samples=[{"kind": "host", "labels": {"what": "step"}, "arguments": {}, "seconds": [0]}]),
            "above zero",
        ),
        (
            document(samples=[{"kind": "host", "labels": {"what": "step"}, "arguments": {}, "seconds": [None]}]),
            "above zero",
        ),
        ('{"kind": "samples", "schema_version": 1, "seconds": [NaN', "NaN where a finite number"),
    ],
)
def test_a_file_that_is_not_one_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        samples_from_json(text)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_samples(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not text"):
        read_samples(tmp_path / "binary.json")


def test_every_kind_of_sample_has_distinct_columns() -> None:
    assert all(
        len(set(labels) | set(arguments)) == len(labels) + len(arguments) for labels, arguments in COLUMNS.values()
    )
