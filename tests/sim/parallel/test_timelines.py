"""What ran when, whole: two layers on two ranks under every preset, and what theory says of pipelines."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.sim.parallel.program import (
    EP_OPS,
    OP_DENSE,
    OP_EXPERT,
    OP_HEAD,
    OP_REDUCE,
    OP_SHARED,
    Program,
    Shape,
    build_program,
)
from moeplan.sim.parallel.simulators import first_ep_difference, run_ep_compiled, run_ep_simpy
from moeplan.sim.parallel.tables import EpTables
from moeplan.sim.parallel.timeline import EP_LANES, EpTimeline
from moeplan.sim.timeline import COLUMNS
from moeplan.specs.schedules.parallel import EP_PRESETS, ExpertParallelSchedule, load_ep_preset

# A layer: dense part 24 ns, shared experts 6, experts 16 (a nanosecond more for each stage on rank 1), exchanges 12 between and
# 4 inside nodes; reductions 7; the head 4. Parts of a divided layer take their share.


def tables_of(program: Program, parts: int, batches: int) -> EpTables:
    work = {OP_DENSE: 24 // batches, OP_SHARED: 6 // batches, OP_EXPERT: 16 // parts, OP_HEAD: 4 // batches}
    work_ns = np.array([[work[kind], work[kind] + (kind == OP_EXPERT)] for kind in program.op_kind.tolist()])
    each = np.array([[12 // parts, 12 // parts], [4 // parts, max(4 // parts - 1, 0)]])
    reduction = np.array([[0, 0], [7, 7]])
    ex_ns = np.array([reduction if kind == OP_REDUCE else each for kind in program.ex_kind.tolist()])
    return EpTables(work_ns=work_ns, op_tokens=work_ns * 0, ex_ns=ex_ns, ex_bytes=ex_ns * 10, ex_tokens=ex_ns * 0)


def text_of(timeline: EpTimeline) -> list[str]:
    """Each lane as a line: operation, layer, batch and group, from and to."""
    lines = []
    for rank in (0, 1):
        for lane, name in enumerate(EP_LANES):
            mine = [row for row in timeline.rows.tolist() if row[:2] == [rank, lane]]
            if mine:
                rows = " ".join(f"{EP_OPS[r[2]][:2]}{r[3]}{'ab'[r[4]]}{r[5]}@{r[6]}-{r[7]}" for r in mine)
                lines.append(f"{rank} {name}: {rows}")
    return lines


# Without overlap, placement and routing change the tables, not the program.
PLAIN = [
    "0 compute: de0a0@0-24 sh0a0@24-30 ex0a0@36-52 de1a0@65-89 sh1a0@89-95 ex1a0@101-117 he1a0@130-134",
    "0 inter: di0a0@24-36 co0a0@53-65 di1a0@89-101 co1a0@118-130",
    "0 intra: di0a0@24-28 co0a0@53-57 di1a0@89-93 co1a0@118-122",
    "1 compute: de0a0@0-24 sh0a0@24-30 ex0a0@36-53 de1a0@65-89 sh1a0@89-95 ex1a0@101-118 he1a0@130-134",
    "1 inter: di0a0@24-36 co0a0@53-65 di1a0@89-101 co1a0@118-130",
    "1 intra: di0a0@24-27 co0a0@53-56 di1a0@89-92 co1a0@118-121",
]
EXPERT_GROUPS = [
    "0 compute: de0a0@0-24 sh0a0@24-30 ex0a0@30-38 ex0a1@38-46 de1a0@54-78 sh1a0@78-84 ex1a0@84-92 ex1a1@92-100 he1a0@108-112",
    "0 inter: di0a0@24-30 di0a1@30-36 co0a0@39-45 co0a1@48-54 di1a0@78-84 di1a1@84-90 co1a0@93-99 co1a1@102-108",
    "0 intra: di0a0@24-26 di0a1@30-32 co0a0@39-41 co0a1@48-50 di1a0@78-80 di1a1@84-86 co1a0@93-95 co1a1@102-104",
    "1 compute: de0a0@0-24 sh0a0@24-30 ex0a0@30-39 ex0a1@39-48 de1a0@54-78 sh1a0@78-84 ex1a0@84-93 ex1a1@93-102 he1a0@108-112",
    "1 inter: di0a0@24-30 di0a1@30-36 co0a0@39-45 co0a1@48-54 di1a0@78-84 di1a1@84-90 co1a0@93-99 co1a1@102-108",
    "1 intra: di0a0@24-25 di0a1@30-31 co0a0@39-40 co0a1@48-49 di1a0@78-79 di1a1@84-85 co1a0@93-94 co1a1@102-103",
]
TIMELINES = {
    "tensor-parallel": [
        "0 compute: de0a0@0-24 sh0a0@31-37 ex0a0@37-53 de1a0@61-85 sh1a0@92-98 ex1a0@98-114 he1a0@122-126",
        "0 intra: re0a0@24-31 re0a1@54-61 re1a0@85-92 re1a1@115-122",
        "1 compute: de0a0@0-24 sh0a0@31-37 ex0a0@37-54 de1a0@61-85 sh1a0@92-98 ex1a0@98-115 he1a0@122-126",
        "1 intra: re0a0@24-31 re0a1@54-61 re1a0@85-92 re1a1@115-122",
    ],
    "ep": PLAIN,
    "eps-moe": EXPERT_GROUPS,
    "tbo": [
        (
            "0 compute: de0a0@0-12 de0b0@12-24 sh0a0@24-27 ex0a0@27-35 sh0b0@35-38 ex0b0@38-46 de1a0@46-58 de1b0@58-70 "
            "sh1a0@70-73 ex1a0@73-81 sh1b0@81-84 ex1b0@84-92 he1a0@92-94 he1b0@102-104"
        ),
        "0 inter: di0a0@12-18 di0b0@24-30 co0a0@36-42 co0b0@48-54 di1a0@60-66 di1b0@72-78 co1a0@84-90 co1b0@96-102",
        "0 intra: di0a0@12-14 di0b0@24-26 co0a0@36-38 co0b0@48-50 di1a0@60-62 di1b0@72-74 co1a0@84-86 co1b0@96-98",
        (
            "1 compute: de0a0@0-12 de0b0@12-24 sh0a0@24-27 ex0a0@27-36 sh0b0@36-39 ex0b0@39-48 de1a0@48-60 de1b0@60-72 "
            "sh1a0@72-75 ex1a0@75-84 sh1b0@84-87 ex1b0@87-96 he1a0@96-98 he1b0@102-104"
        ),
        "1 inter: di0a0@12-18 di0b0@24-30 co0a0@36-42 co0b0@48-54 di1a0@60-66 di1b0@72-78 co1a0@84-90 co1b0@96-102",
        "1 intra: di0a0@12-13 di0b0@24-25 co0a0@36-37 co0b0@48-49 di1a0@60-61 di1b0@72-73 co1a0@84-85 co1b0@96-97",
    ],
    "tutel": [
        (
            "0 compute: de0a0@0-24 sh0a0@24-30 ex0a0@32-40 ex0a1@40-48 de1a0@58-82 sh1a0@82-88 ex1a0@90-98 ex1a1@98-106 "
            "he1a0@116-120"
        ),
        "0 inter: di0a0@24-30 di0a1@32-38 co0a0@43-49 co0a1@52-58 di1a0@82-88 di1a1@90-96 co1a0@101-107 co1a1@110-116",
        "0 intra: di0a0@30-32 di0a1@38-40 co0a0@41-43 co0a1@50-52 di1a0@88-90 di1a1@96-98 co1a0@99-101 co1a1@108-110",
        (
            "1 compute: de0a0@0-24 sh0a0@24-30 ex0a0@32-41 ex0a1@41-50 de1a0@58-82 sh1a0@82-88 ex1a0@90-99 ex1a1@99-108 "
            "he1a0@116-120"
        ),
        "1 inter: di0a0@24-30 di0a1@32-38 co0a0@43-49 co0a1@52-58 di1a0@82-88 di1a1@90-96 co1a0@101-107 co1a1@110-116",
        "1 intra: di0a0@30-31 di0a1@38-39 co0a0@41-42 co0a1@50-51 di1a0@88-89 di1a1@96-97 co1a0@99-100 co1a1@108-109",
    ],
    # In these tables groups divide without loss, as tiles do.
    "comet": EXPERT_GROUPS,
    "scmoe": [
        "0 compute: de0a0@0-24 sh0a0@24-30 de1a0@30-54 ex0a0@54-70 sh1a0@70-76 ex1a0@76-92 he1a0@106-110",
        "0 inter: di0a0@24-36 di1a0@54-66 co0a0@71-83 co1a0@94-106",
        "0 intra: di0a0@24-28 di1a0@54-58 co0a0@71-75 co1a0@94-98",
        "1 compute: de0a0@0-24 sh0a0@24-30 de1a0@30-54 ex0a0@54-71 sh1a0@71-77 ex1a0@77-94 he1a0@106-110",
        "1 inter: di0a0@24-36 di1a0@54-66 co0a0@71-83 co1a0@94-106",
        "1 intra: di0a0@24-27 di1a0@54-57 co0a0@71-74 co1a0@94-97",
    ],
    "grace": PLAIN,
    "occult": PLAIN,
    "eplb": PLAIN,
    "eplb-hierarchical": PLAIN,
    "metro": PLAIN,
    "fsmoe": [
        (
            "0 compute: de0a0@0-24 sh0a0@24-30 ex0a0@32-40 ex0a1@40-48 de1a0@58-82 sh1a0@82-88 ex1a0@90-98 ex1a1@98-106 "
            "he1a0@116-120"
        ),
        "0 inter: di0a0@24-30 di0a1@30-36 co0a0@43-49 co0a1@52-58 di1a0@82-88 di1a1@88-94 co1a0@101-107 co1a1@110-116",
        "0 intra: di0a0@30-32 di0a1@36-38 co0a0@41-43 co0a1@50-52 di1a0@88-90 di1a1@94-96 co1a0@99-101 co1a1@108-110",
        (
            "1 compute: de0a0@0-24 sh0a0@24-30 ex0a0@32-41 ex0a1@41-50 de1a0@58-82 sh1a0@82-88 ex1a0@90-99 ex1a1@99-108 "
            "he1a0@116-120"
        ),
        "1 inter: di0a0@24-30 di0a1@30-36 co0a0@43-49 co0a1@52-58 di1a0@82-88 di1a1@88-94 co1a0@101-107 co1a1@110-116",
        "1 intra: di0a0@30-31 di0a1@36-37 co0a0@41-42 co0a1@50-51 di1a0@88-89 di1a1@94-95 co1a0@99-100 co1a1@108-109",
    ],
    "parallel-folding": [
        "0 compute: de0a0@0-24 sh0a0@31-37 ex0a0@43-59 de1a0@72-96 sh1a0@103-109 ex1a0@115-131 he1a0@144-148",
        "0 inter: di0a0@31-43 co0a0@60-72 di1a0@103-115 co1a0@132-144",
        "0 intra: re0a0@24-31 di0a0@31-35 co0a0@60-64 re1a0@96-103 di1a0@103-107 co1a0@132-136",
        "1 compute: de0a0@0-24 sh0a0@31-37 ex0a0@43-60 de1a0@72-96 sh1a0@103-109 ex1a0@115-132 he1a0@144-148",
        "1 inter: di0a0@31-43 co0a0@60-72 di1a0@103-115 co1a0@132-144",
        "1 intra: re0a0@24-31 di0a0@31-34 co0a0@60-63 re1a0@96-103 di1a0@103-106 co1a0@132-135",
    ],
    # As parallel folding, and the results are gathered before the next dense part.
    "parm": [
        "0 compute: de0a0@0-24 sh0a0@31-37 ex0a0@43-59 de1a0@79-103 sh1a0@110-116 ex1a0@122-138 he1a0@158-162",
        "0 inter: di0a0@31-43 co0a0@60-72 di1a0@110-122 co1a0@139-151",
        "0 intra: re0a0@24-31 di0a0@31-35 co0a0@60-64 re0a2@72-79 re1a0@103-110 di1a0@110-114 co1a0@139-143 re1a2@151-158",
        "1 compute: de0a0@0-24 sh0a0@31-37 ex0a0@43-60 de1a0@79-103 sh1a0@110-116 ex1a0@122-139 he1a0@158-162",
        "1 inter: di0a0@31-43 co0a0@60-72 di1a0@110-122 co1a0@139-151",
        "1 intra: re0a0@24-31 di0a0@31-34 co0a0@60-63 re0a2@72-79 re1a0@103-110 di1a0@110-113 co1a0@139-142 re1a2@151-158",
    ],
    # Tensor parallelism's order; what its ranks compute differs.
    "ppmoe": [
        "0 compute: de0a0@0-24 sh0a0@31-37 ex0a0@37-53 de1a0@61-85 sh1a0@92-98 ex1a0@98-114 he1a0@122-126",
        "0 intra: re0a0@24-31 re0a1@54-61 re1a0@85-92 re1a1@115-122",
        "1 compute: de0a0@0-24 sh0a0@31-37 ex0a0@37-54 de1a0@61-85 sh1a0@92-98 ex1a0@98-115 he1a0@122-126",
        "1 intra: re0a0@24-31 re0a1@54-61 re1a0@85-92 re1a1@115-122",
    ],
}


def run_preset(name: str):
    schedule = load_ep_preset(name)
    if schedule.pipeline.num_groups > 2:
        schedule = schedule.with_options(pipeline__num_groups=2)
    program = build_program(schedule, Shape(num_layers=2, has_shared=True))
    batches = schedule.pipeline.micro_batches
    return program, tables_of(program, schedule.num_groups * batches, batches)


@pytest.mark.parametrize("name", sorted(EP_PRESETS))
def test_whole_timeline_of_every_preset(name):
    program, tables = run_preset(name)
    slow, fast = run_ep_simpy(program, tables), run_ep_compiled(program, tables, rows=True)
    assert first_ep_difference(slow, fast) is None
    assert text_of(fast.timeline) == TIMELINES[name]


def test_frame_has_the_columns_that_all_timelines_share():
    frame = run_ep_compiled(*run_preset("ep"), rows=True).timeline.frame()
    assert tuple(frame.columns) == COLUMNS
    first = frame.iloc[0]
    assert (first.lane, first.op, first.device, first.start_ns, first.end_ns) == ("compute", "dense", "rank 0", 0, 24)
    assert sorted(set(frame.device)) == ["rank 0", "rank 1"]


# --- theory: groups of equal length in one layer, dispatch d, kernel k, combine c each -----------------------------------------


def one_layer(groups: int, dispatch: int, kernel: int, combine: int, *, split: str = "tile") -> int:
    """The makespan of one layer without dense part, divided into `groups`."""
    schedule = ExpertParallelSchedule()
    if groups > 1:
        schedule = schedule.with_options(pipeline__split=split, pipeline__num_groups=groups)
    program = build_program(schedule, Shape(num_layers=1, has_shared=False))
    work = np.array([[kernel if kind == OP_EXPERT else 0] for kind in program.op_kind.tolist()])
    ex_ns = np.array(
        [[[dispatch if kind == EP_OPS.index("dispatch") else combine], [0]] for kind in program.ex_kind.tolist()]
    )
    return run_ep_compiled(
        program, EpTables(work_ns=work, op_tokens=work, ex_ns=ex_ns, ex_bytes=ex_ns, ex_tokens=ex_ns)
    ).makespan_ns


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 12))
@settings(max_examples=examples(200), deadline=None)
def test_a_pipeline_is_bounded_by_its_busiest_lane(dispatch, kernel, combine, groups):
    span = one_layer(groups, dispatch, kernel, combine)
    network, compute = groups * (dispatch + combine), groups * kernel
    assert span >= max(network, dispatch + compute + combine)
    assert span <= network + compute
    if groups == 1:
        assert span == dispatch + kernel + combine


@given(st.integers(1, 30), st.integers(1, 30), st.integers(2, 12))
@settings(max_examples=examples(100), deadline=None)
def test_limits_of_a_pipeline(short, longer, groups):
    """Kernels that dwarf exchanges hide all but the first and last; exchanges that dwarf kernels hide all kernels but one."""
    kernel = 2 * short + longer
    assert one_layer(groups, short, kernel, short) == short + groups * kernel + short
    assert one_layer(groups, kernel, short, kernel) == 2 * groups * kernel + max(0, short - (groups - 1) * kernel)


def test_one_group_or_one_batch_is_no_pipeline():
    shape = Shape(num_layers=3, has_shared=True)
    plain = build_program(ExpertParallelSchedule(), shape)
    for split in ("expert", "token", "tile"):
        schedule = ExpertParallelSchedule().with_options(pipeline__split=split, pipeline__num_groups=1)
        for column, same in zip(build_program(schedule, shape), plain, strict=True):
            assert np.array_equal(column, same)
