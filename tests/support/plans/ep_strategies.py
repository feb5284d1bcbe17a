"""Hypothesis strategies of expert parallelism: schedules, programs and cost tables, small enough to shrink."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from moeplan.sim.parallel.program import Program, Shape, build_program
from moeplan.sim.parallel.tables import EpTables
from moeplan.specs.schedules.parallel import EP_PRESETS, ExpertParallelSchedule, apply_ep_settings, load_ep_preset


@st.composite
def ep_schedules(draw: st.DrawFn) -> ExpertParallelSchedule:
    """Return a preset, or a schedule of any valid mixture of options."""
    if draw(st.booleans()):
        return load_ep_preset(draw(st.sampled_from(sorted(EP_PRESETS))))
    settings: dict[str, object] = {"parallel.attention": draw(st.sampled_from(["data", "tensor"]))}
    settings["all_to_all.kind"] = kind = draw(
        st.sampled_from(["all-choices", "per-rank", "hierarchical", "hierarchical"])
    )
    if kind == "hierarchical":
        settings["all_to_all.tiers"] = draw(st.sampled_from(["together", "in-turn", "free"]))
    settings["pipeline.shortcut"] = shortcut = draw(st.booleans())
    if not shortcut:
        settings["pipeline.micro_batches"] = draw(st.integers(1, 3))
    settings["pipeline.split"] = split = draw(st.sampled_from(["none", "expert", "token", "tile"]))
    if split != "none":
        settings["pipeline.num_groups"] = draw(st.integers(1, 4))
    parallelisms = ["expert"]
    if kind != "hierarchical" and not shortcut:
        parallelisms.append("sharded")
    if split == "none" and not shortcut:
        parallelisms += ["tensor", *(["node"] if settings["parallel.attention"] == "tensor" else [])]
    settings["parallel.experts"] = draw(st.sampled_from(parallelisms))
    return apply_ep_settings(ExpertParallelSchedule(name="drawn"), settings)


def make_ep_tables(rng: np.random.Generator, program: Program, num_ranks: int, *, scale: int, empty: float) -> EpTables:
    """Return tables of small whole numbers, so that ties are common; a share `empty` of all entries takes no time."""

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return rng.integers(1, scale + 1, shape) * (rng.random(shape) >= empty)

    ops, exchanges = len(program.op_kind), len(program.ex_kind)
    ex_ns = draw((exchanges, 2, num_ranks))
    # Whole tiers without bytes, as on one node, and whole exchanges without bytes.
    ex_ns[rng.random(exchanges) < empty] = 0
    ex_ns[rng.random(exchanges) < empty, 0] = 0
    ex_ns[rng.random(exchanges) < empty, 1] = 0
    return EpTables(work_ns=draw((ops, num_ranks)), op_tokens=rng.integers(0, 9, (ops, num_ranks)), ex_ns=ex_ns,
                    ex_bytes=ex_ns * 100, ex_tokens=ex_ns * 2)  # fmt: skip


@st.composite
def ep_runs(draw: st.DrawFn) -> tuple[ExpertParallelSchedule, Program, EpTables]:
    """Return everything one run takes."""
    schedule = draw(ep_schedules())
    program = build_program(schedule, Shape(num_layers=draw(st.integers(1, 4)), has_shared=draw(st.booleans())))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tables = make_ep_tables(rng, program, draw(st.integers(1, 4)), scale=draw(st.sampled_from([2, 5, 40])),
                            empty=draw(st.sampled_from([0.0, 0.2, 0.6])))  # fmt: skip
    return schedule, program, tables
