"""Output of nvbandwidth and nccl-tests becomes samples; anything else is one clear line."""

from __future__ import annotations

import json

import pytest

from benchmark_outputs import nvbandwidth
from moeplan.base.errors import InputError
from moeplan.base.units import MIB
from moeplan.calibrate.imports.nccl_tests import read_nccl_tests
from moeplan.calibrate.imports.nvbandwidth import read_nvbandwidth


def test_nvbandwidth_copies_become_samples_of_one_buffer() -> None:
    found = read_nvbandwidth(nvbandwidth(), device=1)
    assert [(s.kind, s.labels["direction"]) for s in found] == [("copy", "h2d"), ("copy", "d2h"), ("copy_while", "h2d")]
    assert found[0].arguments == {"bytes": 512 * MIB}
    assert found[0].seconds == (pytest.approx(512 * MIB / 54.1e9),)
    assert found[2].labels["companion"] == "d2h"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "testcases"),
        ('{"nvbandwidth": {"testcases": []}}', "passed"),
        (nvbandwidth(testcases=[{"name": "host_to_device_memcpy_ce", "status": "Passed"}]), "device 0"),
        (
            nvbandwidth(
                testcases=[{"name": "host_to_device_memcpy_ce", "status": "Passed", "bandwidth_matrix": [["N/A"]]}]
            ),
            "above zero",
        ),
        (
            nvbandwidth(
                testcases=[{"name": "host_to_device_memcpy_ce", "status": "Passed", "bandwidth_matrix": [["-1"]]}]
            ),
            "above zero",
        ),
    ],
)
def test_other_nvbandwidth_output_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_nvbandwidth(text)


TEXT = """\
# nThread 1 nGpus 4 minBytes 1048576 maxBytes 4194304 step: 2(factor) warmup iters: 5 iters: 20 agg iters: 1 validation: 1
#
# Using devices
#  Rank  0 Group  0 Pid   6899 on node device  0 [0x04] NVIDIA H100
#  Rank  1 Group  0 Pid   6899 on node device  1 [0x05] NVIDIA H100
#  Rank  2 Group  0 Pid   6899 on node device  2 [0x0b] NVIDIA H100
#  Rank  3 Group  0 Pid   6899 on node device  3 [0x0c] NVIDIA H100
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
     1048576         65536     float    none      -1    25.50   41.12   30.84      0    24.90   42.11   31.58    N/A
     4194304        262144     float    none      -1    60.25   69.62   52.21      0    59.00   71.09   53.32    N/A
# Out of bounds values : 0 OK
"""


def test_nccl_text_becomes_samples_of_what_is_sent_to_others() -> None:
    found = read_nccl_tests(TEXT)
    assert [s.arguments for s in found] == [{"ranks": 4, "bytes": 786432}, {"ranks": 4, "bytes": 3145728}]
    assert [s.seconds for s in found] == [(25.5e-6,), (60.25e-6,)]
    assert found[0].labels == {"backend": "nccl", "pattern": "balanced", "companion": "none"}


def test_nccl_text_without_an_operation_column_reads_the_same() -> None:
    old = TEXT.replace("none      -1", "                ")
    assert [s.seconds for s in read_nccl_tests(old)] == [(25.5e-6,), (60.25e-6,)]


def nccl_json(**changes: object) -> str:
    place = {"time": 25.5, "alg_bw": 41.12, "bus_bw": 30.84, "nwrong": 0.0}
    result = {"size": 1048576, "count": 65536, "type": "float", "out_of_place": place | changes, "in_place": place}
    return json.dumps({"version": 3, "config": {"devices": [{"rank": n} for n in range(4)]}, "results": [result]})


def test_nccl_json_says_the_same_as_text() -> None:
    assert read_nccl_tests(nccl_json()) == read_nccl_tests(TEXT)[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ranks"),
        (TEXT.replace("#  Rank", "#  Row"), "ranks"),
        (TEXT.replace("52.21      0", "52.21      7"), "7 wrong values"),
        (TEXT.replace("60.25", "nan"), "above zero"),
        (TEXT.replace("60.25", "0.00"), "above zero"),
        ("#  Rank 0\n#  Rank 1\n 1024 16 float\n", "columns missing"),
        ("{", "not JSON"),
        ("{}", "no results"),
        (nccl_json(time="nan"), "above zero"),
        (nccl_json(nwrong=3.0), "3 wrong values"),
    ],
)
def test_other_nccl_output_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_nccl_tests(text)
