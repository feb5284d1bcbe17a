"""All-to-alls between real processes, and what becomes of their times: tables that predict sizes and traffic left out."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibration_samples import lawful_samples
from exchange_samples import (
    BESIDE_COMPUTE,
    BESIDE_EXCHANGE,
    LATENCY_S,
    PORT,
    SHARED,
    lawful_exchanges,
    lawful_seconds,
)
from moeplan.base.errors import InputError, MissingCalibration, UnknownName
from moeplan.base.units import KIB, MIB
from moeplan.calibrate.all_to_all_matrices import (
    busiest_port,
    matrix_from_text,
    matrix_to_text,
    port_bytes,
    traffic,
)
from moeplan.calibrate.costs.all_to_all_table import exchange_table, measured_ranks
from moeplan.calibrate.fitting.fit import Fit, fit_profile
from moeplan.calibrate.imports.nccl_tests import read_nccl_tests
from moeplan.calibrate.imports.profile import with_device_link
from moeplan.calibrate.microbenchmarks import collectives as microbench_collectives
from moeplan.calibrate.microbenchmarks import measure
from moeplan.calibrate.microbenchmarks.collectives import (
    FULL_EXCHANGES,
    QUICK_EXCHANGES,
    ExchangeExtent,
    measure_all_to_all,
    measure_matrices,
    rank_counts,
)
from moeplan.calibrate.microbenchmarks.harness import Harness
from moeplan.calibrate.samples import Sample, SampleSet, samples_from_json, samples_to_json
from moeplan.devices.device import CpuDevice
from moeplan.specs.machines.profile import Profile, profile_to_json
from moeplan.specs.machines.profile_file import profile_from_json

LITTLE = ExchangeExtent(ranks=(2,), sizes=(KIB, 64 * KIB), while_sizes=(64 * KIB,), rounds=1, limit_s=60.0)


def with_exchanges(*exchanges: list[Sample]) -> SampleSet:
    whole = lawful_samples()
    return dataclasses.replace(whole, samples=(*whole.samples, *(s for part in exchanges for s in part)))


@pytest.fixture(scope="module")
def fit() -> Fit:
    return fit_profile(with_exchanges(lawful_exchanges(2, noise=0.03), lawful_exchanges(4, noise=0.03, seed=1)))


# --- traffic ------------------------------------------------------------------------------------------------------------


def test_traffic_of_each_pattern() -> None:
    assert traffic(3, 4096, "balanced").tolist() == [[0, 1365, 1365], [1365, 0, 1365], [1365, 1365, 0]]
    assert traffic(3, 4000, "hot").tolist() == [[0, 500, 500], [3000, 0, 500], [3000, 500, 0]]
    assert traffic(2, 3000, "zipf").tolist() == [[0, 1000], [2000, 0]]
    sent, received = port_bytes(traffic(4, 4000, "hot"))
    assert sent.tolist() == [999, 3666, 3666, 3666] and received.tolist() == [9000, 999, 999, 999]
    assert busiest_port(traffic(4, 4000, "hot")) == (9000, 999)
    assert busiest_port(traffic(4, 4096, "balanced")) == (3072, 3072)
    with pytest.raises(UnknownName, match="zipf"):
        traffic(2, 1, "zip")
    with pytest.raises(InputError, match="needs two"):
        traffic(1, 1, "hot")


@given(
    st.integers(2, 6).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 2**40), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_what_is_sent_is_received_and_a_matrix_survives_its_text(rows: list[list[int]]) -> None:
    matrix = np.array(rows, np.int64)
    sent, received = port_bytes(matrix)
    assert sent.sum() == received.sum() == matrix.sum() - np.trace(matrix)
    if sent.sum():
        assert (matrix_from_text(matrix_to_text(matrix), len(rows)) == matrix).all()


@pytest.mark.parametrize(
    ("text", "ranks", "message"),
    [
        ("1,2;3,4;5,6", 2, r"not square: 3 rows of \[2\] columns"),
        ("1,2,3;4,5,6", 2, "not square"),
        ("1,2;3", 2, "not square"),
        ("1,2;3,4", 3, "2 ranks where the sample says 3"),
        ("1,nan;3,4", 2, "not whole numbers"),
        ("1,-2;3,4", 2, "not whole numbers"),
        ("1,2.5;3,4", 2, "not whole numbers"),
        ("1,99999999999999999999;3,4", 2, "not whole numbers"),
        ("", 2, "2"),
        ("5,0;0,5", 2, "nothing is sent"),
        (7, 2, "not a text"),
    ],
)
def test_a_matrix_that_is_none_is_refused_in_one_line(text: object, ranks: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        matrix_from_text(text, ranks)
    assert "\n" not in str(caught.value)


def changed(**changes: object) -> str:
    """A file of samples in which one exchange is not as it should be."""
    one = lawful_exchanges(2)[0]
    row = {"kind": one.kind, "labels": dict(one.labels), "arguments": dict(one.arguments), "seconds": list(one.seconds)}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if not name:
            row[section] = value
        elif value is None:
            del row[section][name]  # type: ignore[attr-defined]
        else:
            row[section][name] = value  # type: ignore[index]
    import json

    head = json.loads(samples_to_json(SampleSet(device={"name": "a"}, conditions={}, samples=())))
    return json.dumps(head | {"samples": [row]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": [0.0]}, "above zero"),
        ({"seconds": [-1.0]}, "above zero"),
        ({"seconds": [float("nan")]}, "NaN where a finite number"),
        ({"seconds": []}, "no repetitions"),
        ({"labels__backend": None}, r"all_to_all\.backend"),
        ({"arguments__bytes": None}, r"all_to_all\.bytes"),
        ({"arguments__ranks": float("nan")}, "NaN where a finite number"),
        ({"arguments__bytes": -5}, r"all_to_all\.bytes"),
        ({"labels__matrix": "1,2;3"}, "not square"),
        ({"arguments__ranks": 3}, "2 ranks where"),
    ],
)
def test_samples_of_exchanges_that_are_not_right_are_refused(changes: dict[str, object], message: str) -> None:
    assert len(samples_from_json(changed()).samples) == 1
    with pytest.raises(InputError, match=message) as caught:
        samples_from_json(changed(**changes))
    assert "\n" not in str(caught.value)


def test_skewed_traffic_without_its_matrix_is_refused_by_the_fit() -> None:
    bare = [
        dataclasses.replace(s, labels={k: v for k, v in s.labels.items() if k != "matrix"}) if s.kind == "all_to_all" else s
        for s in lawful_exchanges(2)
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"hot traffic needs it|zipf traffic needs it"):
        fit_profile(with_exchanges(bare))
    empty = Sample(kind="all_to_all", labels={"backend": "gloo", "pattern": "balanced", "companion": "none"},
                   arguments={"ranks": 2, "bytes": 0}, seconds=(1.0,))  # fmt: skip
    with pytest.raises(InputError, match="nothing is sent"):
        fit_profile(with_exchanges([empty]))


# --- processes ----------------------------------------------------------------------------------------------------------


class Started:
    """Notes the processes that a test starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: list[subprocess.Popen[bytes]] = []
        start = subprocess.Popen

        def noted(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
            self.all.append(start(*arguments, **options))  # type: ignore[call-overload]
            return self.all[-1]

        monkeypatch.setattr(microbench_collectives.subprocess, "Popen", noted)

    def have_ended(self, count: int) -> bool:
        return len(self.all) == count and all(one.returncode is not None for one in self.all)


def test_processes_of_this_machine_exchange_bytes_and_compute_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    started, notes = Started(monkeypatch), []
    found = measure_all_to_all(2, extent=LITTLE, progress=lambda done, total, note: notes.append((done, total, note)))
    assert started.have_ended(2) and notes == [(1, 1, "all-to-all between 2 ranks")]
    exchanges = [s for s in found if s.kind == "all_to_all"]
    assert [(s.labels["pattern"], s.labels["companion"], s.arguments["bytes"]) for s in exchanges] == [
        ("balanced", "none", 512), ("zipf", "none", 682), ("hot", "none", 768), ("balanced", "none", 32 * KIB),
        ("balanced", "compute", 32 * KIB), ("zipf", "none", 43690), ("hot", "none", 48 * KIB),
    ]  # fmt: skip
    assert all(0 < s.median_s < 1 for s in exchanges)
    assert matrix_from_text(exchanges[1].labels["matrix"], 2).tolist() == [[0, 341], [682, 0]]
    products = {(s.labels["companion"], s.arguments["computing"]) for s in found if s.kind == "rank_product"}
    assert products <= {("all_to_all", 2.0), ("none", 2.0), ("none", 1.0)} and ("none", 1.0) in products


def test_a_rank_that_dies_ends_them_all_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(monkeypatch)
    whole = microbench_collectives._cases

    def broken(*arguments: object) -> list[dict[str, object]]:
        return [case | {"matrix": [[1, 1], [1]]} for case in whole(*arguments)]  # type: ignore[arg-type]

    monkeypatch.setattr(microbench_collectives, "_cases", broken)
    with pytest.raises(InputError, match=r"rank \d ended with status 1 \(.*IndexError") as caught:
        measure_all_to_all(2, extent=LITTLE)
    assert "\n" not in str(caught.value) and started.have_ended(2)


def test_ranks_that_hang_and_a_caller_who_stops_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(monkeypatch)
    with pytest.raises(InputError, match="did not end in 0 s"):
        measure_all_to_all(2, extent=dataclasses.replace(LITTLE, limit_s=0.01))
    assert started.have_ended(2)

    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(microbench_collectives, "time", SimpleNamespace(sleep=stop, monotonic=time.monotonic))
    with pytest.raises(KeyboardInterrupt):
        measure_all_to_all(2, extent=LITTLE)
    assert started.have_ended(4)


def test_a_rank_ends_when_the_process_that_started_it_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    (folder / "task.json").write_text('{"ranks": 2, "backend": "gloo", "cases": [], "limit_s": 60}')
    command = [sys.executable, "-m", "moeplan.calibrate.microbenchmarks.all_to_all_rank", str(folder), "0"]
    rank = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert rank.stdin is not None
    rank.stdin.close()  # as the system does when the parent ends, however it ends
    assert rank.wait(30) == 1
    assert not folder.exists()  # nobody else is left to remove it


def test_matrices_of_different_numbers_of_ranks_are_refused() -> None:
    with pytest.raises(InputError, match="not square, or not all of one size"):
        measure_matrices([("a", traffic(2, KIB, "hot")), ("b", traffic(3, KIB, "hot"))])
    with pytest.raises(InputError, match="not square"):
        measure_matrices([("a", np.ones((2, 3), np.int64))])
    with pytest.raises(InputError, match="nothing is sent"):
        measure_matrices([("a", np.eye(2, dtype=np.int64))])


@pytest.mark.parametrize(
    ("ranks", "backend", "message"), [(1, "gloo", "needs two"), (2, "mpi", "backend"), (64, "nccl", "GPUs")]
)
def test_exchanges_that_cannot_be_measured_are_refused(ranks: int, backend: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure_all_to_all(ranks, backend=backend)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (0, ((), "no GPU: no all-to-all")),
        (1, ((), "one GPU: no all-to-all")),
        (3, ((2, 3), None)),
        (8, ((2, 4, 8), None)),
    ],
)
def test_nccl_takes_as_many_ranks_as_there_are_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, expected: tuple[tuple[int, ...], str | None]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert rank_counts(FULL_EXCHANGES, "nccl") == expected


@pytest.mark.parametrize(("cores", "expected"), [(1, (2,)), (2, (2,)), (3, (2,)), (4, (2, 4)), (64, (2, 4))])
def test_more_than_two_ranks_need_a_core_each(
    monkeypatch: pytest.MonkeyPatch, cores: int, expected: tuple[int, ...]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    assert rank_counts(FULL_EXCHANGES, "gloo") == (expected, None)


def test_a_calibration_keeps_each_number_of_ranks_as_a_part_and_says_what_it_could_not_measure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def some(ranks: int, **options: object) -> list[Sample]:
        if ranks == 4:
            raise InputError("all-to-all", "gloo", "rank 3 ended with status -9", "measure again")
        return lawful_exchanges(ranks)

    monkeypatch.setattr(measure, "measure_all_to_all", some)
    monkeypatch.setattr(measure, "rank_counts", lambda extent, backend: ((2, 4), None))
    device = CpuDevice(MIB)
    harness = Harness(device)
    measure._measure_exchanges(harness, device, FULL_EXCHANGES)
    found = harness.finish(model=None, quick=False)
    assert {s.arguments["ranks"] for s in found} == {2}
    assert found.warnings[0].startswith(
        "all-to-all between 4 ranks was not measured: all-to-all = 'gloo': rank 3 ended"
    )
    quick = QUICK_EXCHANGES
    assert quick.ranks == (2,) and set(quick.while_sizes) <= set(quick.sizes)


# --- the fit ------------------------------------------------------------------------------------------------------------


def test_the_law_comes_back_with_what_ranks_share(fit: Fit) -> None:
    node = fit.profile.node
    assert node is not None and node.num_gpus == 4
    assert node.gpu_link_latency_s.value == pytest.approx(LATENCY_S, rel=0.1)
    assert node.gpu_link_bytes_per_s.value == pytest.approx(1 / (1 / PORT + 4 / SHARED), rel=0.1)
    assert measured_ranks(fit.profile.curves) == {2: "all_to_all.gloo.2", 4: "all_to_all.gloo.4"}
    parameters = fit.tables["all_to_all.gloo.4"].parameters
    assert parameters["shared_bandwidth"] == pytest.approx(SHARED, rel=0.1)
    assert fit.profile.contention["exchange/compute"].value == pytest.approx(1 / BESIDE_COMPUTE, rel=0.05)
    assert fit.profile.contention["compute/exchange"].value == pytest.approx(1 / BESIDE_EXCHANGE, rel=0.05)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sizes_and_traffic_that_were_left_out_are_predicted_and_one_port_alone_would_not_do(
    fit: Fit, ranks: int
) -> None:
    table, skewed = fit.tables[f"all_to_all.gloo.{ranks}"], fit.tables[f"all_to_all.gloo.{ranks}.skewed"]
    assert (table.num_points, skewed.num_points) == (27, 18)
    assert 0 < table.median_error < 0.03 and table.p90_error < 0.1
    assert skewed.median_error < 0.05
    assert skewed.parameters["busiest_port_alone_p90"] > 2 * skewed.p90_error
    assert fit.tables[f"all_to_all.gloo.{ranks}.exchange/compute"].p90_error < 0.1
    assert fit.tables[f"all_to_all.gloo.{ranks}.compute/exchange"].p90_error < 0.1


@pytest.mark.parametrize("pattern", ["balanced", "zipf", "hot"])
def test_a_table_prices_what_was_measured_and_other_sizes_within_its_uncertainty(fit: Fit, pattern: str) -> None:
    table = exchange_table(profile_from_json(profile_to_json(fit.profile)), 4)
    assert table is not None
    for size in (KIB, 10 * KIB, 300 * KIB, 5 * MIB, 64 * MIB, 256 * MIB):
        matrix = traffic(4, size, pattern)
        port, total = busiest_port(matrix)[0], int(port_bytes(matrix)[0].sum())
        found = float(table.seconds(np.array([port]), np.array([total]))[0])
        assert found == pytest.approx(lawful_seconds(port, total), rel=max(0.05, table.relative_uncertainty))
        slower = float(table.seconds(np.array([port]), np.array([total]), beside_compute=True)[0])
        assert slower == pytest.approx(BESIDE_COMPUTE * found, rel=0.12)


def test_balanced_times_alone_leave_every_port_its_own() -> None:
    fit = fit_profile(with_exchanges(lawful_exchanges(2, patterns=("balanced",))))
    assert set(fit.tables["all_to_all.gloo.2"].parameters) == {"latency_s", "bandwidth"}
    assert "all_to_all.gloo.2.skewed" not in fit.tables
    assert fit.profile.node is not None
    assert fit.profile.node.gpu_link_bytes_per_s.value == pytest.approx(1 / (1 / PORT + 2 / SHARED), rel=0.02)


def test_one_size_is_a_table_too_and_none_is_no_server() -> None:
    one = [s for s in lawful_exchanges(2) if s.arguments.get("per_rank_bytes") == MIB]
    table = exchange_table(fit_profile(with_exchanges(one)).profile, 2)
    assert table is not None
    matrix = traffic(2, MIB, "balanced")
    exact = lawful_seconds(busiest_port(matrix)[0], int(port_bytes(matrix)[0].sum()))
    assert float(table.seconds(np.array([MIB // 2]), np.array([MIB]))[0]) == pytest.approx(exact, rel=0.3)
    bare = fit_profile(lawful_samples()).profile
    assert bare.node is None and exchange_table(bare, 2) is None


def test_numbers_of_ranks_that_were_not_measured_are_named(fit: Fit) -> None:
    with pytest.raises(MissingCalibration, match=r"3 ranks.*measured between 2, 4 ranks"):
        exchange_table(fit.profile, 3)


def test_another_tools_times_take_the_place_of_tables(fit: Fit) -> None:
    text = "# nThread\n#  Rank  0\n#  Rank  1\n" + "".join(
        f"{size} {size // 4} float none -1 {10 + size / 1e4} 1 1 0 {10 + size / 1e4} 1 1 N/A\n" for size in (2**16, 2**20, 2**24)
    )  # fmt: skip
    made = with_device_link(fit.profile, read_nccl_tests(text))
    assert measured_ranks(made.curves) == {} and isinstance(made, Profile) and made.node is not None
    assert made.node.gpu_link_bytes_per_s.citation == "nccl-tests alltoall_perf"
