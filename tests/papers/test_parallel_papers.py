"""Published tables beside the simulator's: what is promised of each paper, and that roles and errors are told."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from moeplan.base.errors import UnknownName
from moeplan.papers.cells import CHECKED, FITTED, PREDICTED, Cell, median
from moeplan.papers.deepep import NORMAL, benchmark_routing, reproduce_deepep
from moeplan.papers.eps_moe import reproduce_eps_moe
from moeplan.papers.grace_moe import Routing, draw_experts, ladder, reproduce_grace_moe, slowness_of
from moeplan.papers.published.grace_moe import INGREDIENTS, TABLE
from moeplan.papers.registry import PAPERS, reproduce
from moeplan.specs.models.load import load_model

LONG = os.environ.get("MOEPLAN_LONG") == "1"


def cell(**changes) -> Cell:
    given = {
        "table": "t",
        "row": "r",
        "column": "c",
        "unit": "%",
        "published": 20.0,
        "simulated": 25.0,
        "role": CHECKED,
    }
    return Cell(**given | changes)


def test_errors_of_cells():
    assert cell().relative_error == 0.25
    assert cell().difference == 5.0
    assert cell(published=None).relative_error is None
    assert cell(published=None).difference is None
    assert cell(published=0.0).relative_error is None
    assert set(cell().to_dict()) >= {"table", "row", "column", "published", "simulated", "relative_error", "role"}


def test_an_unknown_paper_is_named():
    assert sorted(PAPERS) == [
        "deepep",
        "engines",
        "eps-moe",
        "grace-moe",
        "lookahead",
        "mixtral-offloading",
        "pre-gated",
        "rebalancing",
    ]
    with pytest.raises(UnknownName, match="eps-moe"):
        reproduce("eps")


def test_deepep_follows_from_topology_and_byte_counts():
    found = reproduce_deepep()
    json.dumps(found.to_dict(), allow_nan=False)
    assert len(found.constants) == 3
    assert {each.role for each in found.cells} == {FITTED, CHECKED, PREDICTED}
    for each in found.cells:
        if each.role == FITTED:
            assert each.relative_error == pytest.approx(0, abs=1e-5)
        if each.role == CHECKED:
            assert abs(each.relative_error) < 0.09, each
    assert sum(each.role == CHECKED for each in found.cells) == 17
    # The constants are those of the hardware: NVLink of 160 GB/s at most, a network port of 50 at most.
    assert 120e9 < found.constants[0].value < 160e9
    assert 40e9 < found.constants[1].value < 50e9


def test_benchmark_routing_keeps_to_four_nodes():
    experts, source = benchmark_routing(64)
    assert sorted(set(source.tolist())) == list(range(64))
    nodes = np.sort(experts[:, 0] // 32, axis=1)
    assert (1 + (np.diff(nodes, axis=1) > 0).sum(axis=1)).max() <= 4
    assert all(len(set(row)) == 8 for row in experts[:50, 0].tolist())
    assert list(NORMAL) == [8, 16, 32, 64, 128]


def test_eps_moe_gains_within_four_points_of_cells_not_fitted():
    found = reproduce_eps_moe()
    json.dumps(found.to_dict(), allow_nan=False)
    assert len(found.constants) == 6
    gains = [each for each in found.cells if each.table == "DeepSeek-V2 gain"]
    assert sum(each.role == CHECKED for each in gains) == 8
    for each in gains:
        if each.published is not None:
            assert abs(each.difference) < 4.5, each
    assert sum(each.role == PREDICTED for each in gains) == 3
    # Tokens a second, to which nothing is fitted.
    for each in found.cells:
        if each.table == "DeepSeek-V2 prefill":
            assert abs(each.relative_error) < 0.05, each
    # The benchmark of one layer has constants of its own: two cells and a difference fitted.
    layer = [each for each in found.cells if each.table == "one layer"]
    assert sum(each.role == FITTED for each in layer) == 2
    assert all(abs(each.relative_error) < 1e-3 for each in layer if each.role == FITTED)
    assert median([each for each in layer if each.column.startswith("3072")])[CHECKED] < 0.13
    assert all(
        each.note
        for each in found.cells
        if each.role == CHECKED and abs(each.relative_error) > 0.1 and each.table == "one layer"
    )
    # Times to the first token: nothing fitted; every rung is faster than tensor parallelism.
    first = [each for each in found.cells if each.table.endswith("time to first token")]
    assert len(first) == 16 + 12
    for each in first:
        if each.unit == "s":
            assert abs(each.relative_error) < 0.21, each  # the residual stream is each rank's whole, as engines have it
        else:
            assert each.simulated < 0, each
            assert abs(each.difference) < 13, each


def test_ladder_measures_what_it_says():
    model = load_model("olmoe-1b-7b")
    routing = Routing(affinity=3.5, spread=1.0)
    experts = draw_experts(routing, tokens=2048, num_experts=64, top_k=8, layers=1)
    assert experts.shape == (2048, 1, 8)
    assert all(len(set(row)) == 8 for row in experts[:50, 0].tolist())
    measured = ladder(model, experts)
    assert len(measured) == 1 + len(INGREDIENTS)
    base, tiers, grouped, one, weighted, copied = measured
    assert tiers.cross_bytes < base.cross_bytes  # a token crosses once to a node, not once to each of its ranks
    assert grouped.cross_bytes < tiers.cross_bytes
    assert tiers.deviation == base.deviation  # the exchange does not move rows
    assert tiers.kernel_wait_ns == base.kernel_wait_ns
    assert base.exchange_wait_ns > 0 == tiers.exchange_wait_ns  # a node's ranks share a hierarchical exchange
    assert copied.exchange_ns < base.exchange_ns
    # Copies drawn by weight alone even loads out and cross nodes for it; the nearest one does not cross.
    assert weighted.deviation < grouped.deviation and one.deviation < grouped.deviation
    assert copied.cross_bytes < min(one.cross_bytes, weighted.cross_bytes)
    # OLMoE's published times after grouping: 506.93 ms of idle time beside 2846.38 of exchanges.
    row = grouped.row(slowness_of(measured))
    assert row[3] / row[0] == pytest.approx(506.93 / 2846.38)


@pytest.mark.skipif(not LONG, reason="about a minute; set MOEPLAN_LONG=1")
def test_grace_moe_order_and_magnitudes():
    found = reproduce_grace_moe()
    json.dumps(found.to_dict(), allow_nan=False)
    assert len(found.constants) == 3
    table = {(each.row, each.column): each for each in found.cells if each.table == "change against Occult, 2 x 2"}
    assert len(table) == 25
    for each in table.values():
        assert abs(each.difference) < 17, each
        assert abs(each.published) < 1 or np.sign(each.simulated) == np.sign(each.published), each
    for row in ("all-to-all time", "cross-node traffic", "intra-node traffic"):
        grouped, one, weighted, nearest = (table[row, ingredient].simulated for ingredient in INGREDIENTS[1:])
        # Published: copies drawn by weight undo a part of what grouping gains, nearest ones give it back.
        assert min(one, weighted) > max(grouped, nearest) + 2, row
    values = [table["load standard deviation", ingredient].simulated for ingredient in INGREDIENTS]
    assert np.argsort(values).tolist() == np.argsort(TABLE["load standard deviation"]).tolist()
    single = [each for each in found.cells if each.table.endswith(("exchange", "weighted"))]
    assert len(single) == 15 and all(each.simulated < 0 and abs(each.difference) < 21 for each in single)
    whole = [each for each in found.cells if each.row == "end to end"]
    assert len(whole) == 3 and all(abs(each.relative_error) < 0.1 for each in whole)
    assert all(
        each.note
        for each in found.cells
        if each.role == CHECKED and each.published and each.unit == "%" and abs(each.difference) > 12
    )
