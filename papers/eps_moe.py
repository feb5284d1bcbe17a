"""EPS-MoE (arXiv 2410.12247): gains over sequence length, one layer, and time to first token against tensor parallelism.

Modelled: kernels as measured on an H100, whose multiprocessors the paper's H800 has, uniform routing, every choice sent on its own.
DeepSeek-V2 on 8 H800 has weights of 8 bits, as its authors serve it (arXiv 2405.04434 section 3.2.3), and sends 8 bits; its kernels are
SGLang's, as for DeepSeek's other published runs. Three constants are fitted to its gains: the grouped kernel's speed relative to
SGLang's (to the gain of switching kernels at 1K), the port's bandwidth (to the gain of five groups at 1K), and what a stage's exchange
costs besides its bytes (to the mean gain of twenty groups). The benchmark of one layer has slower kernels and a slower exchange than the
served model can have had: three constants of its own, fitted to two cells and the difference of two. Mixtral and DBRX have vLLM's kernels,
with which the paper ran them, and the exchange of the layer benchmark; nothing is fitted to them. Dense kernels share all multiprocessors
with exchanges (note 2 of the paper's table 5), and both slow each other down as elsewhere. Ignored: device-limited routing, so that the
port fitted to the gains is faster than NVLink; that 16 multiprocessors fewer cost the paper's grouped kernel nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import scipy.optimize

from ..base.units import GIGA, MS_PER_S, NS_PER_S
from ..sim.parallel.program import OP_COMBINE, OP_DISPATCH
from ..sim.parallel.simulate import ParallelSimulation
from ..sim.parallel.tiers import EpConstants, Tier, constants_of
from ..sim.parallel.traffic import StepLoad, expect_step
from ..specs.machines.profile import Profile
from ..specs.machines.profile_file import load_hardware
from ..specs.machines.serving import serving_machine
from ..specs.models import ModelSpec, weight_format
from ..specs.models.load import load_model
from ..specs.schedules.parallel import ExpertParallelSchedule, apply_ep_settings
from .cells import CHECKED, FITTED, PREDICTED, Cell, FittedConstant, Reproduction
from .published.eps_moe import (
    FIRST_TOKEN,
    FIRST_TOKEN_NOTES,
    GAIN_NOTES,
    GAINS,
    LAYER,
    LAYER_TOKENS,
    LAYER_WIDTHS,
    THROUGHPUT_NOTE,
)

CITATION = "EPS-MoE, arXiv 2410.12247v2: DeepSeek-V2 and DBRX on 8 H800, Mixtral-8x7B on 4 H800"
_PERCENT = 100.0
# Tokens on each GPU in a step: the paper's layer benchmark.
_TOKENS = 3072
_SM = 16 / 132
_BASE = "tensor parallel"
_LAYER_RANKS, _DEEPSEEK_RANKS = 4, 8
_FAR = 0.1
# As many as on each of the 8 GPUs of the whole model: twenty groups are then one expert each, for which the paper has dense kernels.
_LAYER_EXPERTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What is fitted: all but the speed of dense kernels to the gains, all but the stage to the benchmark of one layer."""

    grouped_rate: float
    """Speed of grouped kernels relative to the profile's."""
    port_bytes_per_s: float
    stage_s: float
    """What an exchange costs besides its bytes."""
    dense_rate: float = 1.0


_REDUCTIONS = ("all-reduce", "all-gather")
# Where the fit begins: H800's NVLink in one direction, ten times a copy's latency.
_START = Constants(grouped_rate=1.5, port_bytes_per_s=200 * GIGA, stage_s=20e-6)


# Where the layer's fit begins: 100 GB/s.
_LAYER_PORT = 100 * GIGA
_LAYER_FITTED = (("grouped", 1), ("dense", 1))
"""Rows and columns of the layer benchmark that kernels are fitted to."""
_LAYER_BYTES = ("grouped", "grouped, 8-bit exchange")
"""Its rows whose difference is half of an exchange's bytes, to which the port is fitted (3072 tokens, width 1536)."""


@dataclass(slots=True)
class _Bench:
    """Runs of one model on one server, with the loads of uniform routing kept."""

    model: ModelSpec
    num_ranks: int
    engine: str
    """Whose kernels it has."""
    bits: str = "16"
    _loads: dict[tuple[object, ...], StepLoad] = field(default_factory=dict)
    _profile: Profile | None = None

    @property
    def profile(self) -> Profile:
        """The server."""
        if self._profile is None:
            self._profile = serving_machine(load_hardware("h800-sxm"), self.engine)
        return self._profile

    def simulation(self, constants: Constants, context: int) -> ParallelSimulation:
        """Return the simulator: the fitted exchange, reductions as measured, kernels as measured but for the fitted rates."""
        own = constants_of(self.profile, 1, self.num_ranks)
        reductions = {name: found for name, found in own.intra.kernels.items() if name in _REDUCTIONS}
        tier = Tier(bytes_per_s=constants.port_bytes_per_s, latency_s=constants.stage_s, source="published", relative_uncertainty=0.2,
                    kernels=reductions)  # fmt: skip
        made = EpConstants(inter=None, intra=tier, grouped_rate=constants.grouped_rate, dense_rate=constants.dense_rate,
                           shared_speed=own.shared_speed)  # fmt: skip
        return ParallelSimulation(self.model, self.profile, 1, self.num_ranks, context_tokens=context, constants=made,
                                  dense_format=weight_format(self.bits))  # fmt: skip

    def load(self, simulation: ParallelSimulation, schedule: ExpertParallelSchedule, tokens: int) -> StepLoad:
        """Return the counts of uniform routing with `tokens` on each rank."""
        key = (tokens, schedule.parallel, schedule.all_to_all.kind, schedule.num_groups, schedule.pipeline.split)
        if key not in self._loads:
            model = self.model
            chance = np.full((model.num_moe_layers, 1, model.num_experts), model.top_k / model.num_experts)
            self._loads[key] = expect_step(
                chance, np.full(self.num_ranks, tokens), simulation.topology(model.num_experts), schedule
            )
        return self._loads[key]

    def step_s(self, constants: Constants, schedule: ExpertParallelSchedule, tokens: int, context: int) -> float:
        """Return the seconds of one step."""
        simulation, schedule = self.simulation(constants, context), schedule.with_options(kernel__bits=self.bits)
        return simulation.run(schedule, self.load(simulation, schedule, tokens)).makespan_ns / NS_PER_S

    def layer_s(self, constants: Constants, schedule: ExpertParallelSchedule, tokens: int) -> float:
        """Return the seconds from the first dispatch to the last combine of a model of one layer."""
        simulation, schedule = self.simulation(constants, tokens), schedule.with_options(kernel__bits=self.bits)
        run, program = simulation.run(schedule, self.load(simulation, schedule, tokens)), simulation.program(schedule)
        begin = run.ex_start[program.ex_kind == OP_DISPATCH].min()
        return float(run.ex_end[program.ex_kind == OP_COMBINE].max() - begin) / NS_PER_S


def schedule_of(
    groups: int, kernel: str, *, sm_fraction: float = _SM, exchange_bytes: float = 1.0
) -> ExpertParallelSchedule:
    """Return the paper's schedule with `groups` expert groups; every choice is sent on its own, nothing else overlaps."""
    settings: dict[str, object] = {
        "all_to_all.kind": "all-choices", "kernel.choice": kernel, "pipeline.shared_overlap": False,
        "all_to_all.dispatch_bytes_per_value": exchange_bytes, "all_to_all.combine_bytes_per_value": exchange_bytes,
    }  # fmt: skip
    if groups > 1:
        settings |= {
            "pipeline.split": "expert",
            "pipeline.num_groups": groups,
            "pipeline.all_to_all_sm_fraction": sm_fraction,
        }
    return apply_ep_settings(ExpertParallelSchedule(name=f"N={groups}, {kernel}"), settings)


def gain_percent(bench: _Bench, constants: Constants, groups: int, context: int) -> float:
    """Return the gain in tokens/s of `groups` with the better kernels over the unpipelined grouped kernel."""
    base = bench.step_s(constants, schedule_of(1, "grouped"), _TOKENS, context)
    return (base / bench.step_s(constants, schedule_of(groups, "best"), _TOKENS, context) - 1) * _PERCENT


def fit(bench: _Bench) -> Constants:
    """Return the three constants, from three equations."""

    def constants(x: np.ndarray) -> Constants:
        scale = np.abs(x)
        return Constants(grouped_rate=float(scale[0]) * _START.grouped_rate, stage_s=float(scale[2]) * _START.stage_s,
                         port_bytes_per_s=float(scale[1]) * _START.port_bytes_per_s)  # fmt: skip

    twenty = [gain for (groups, _), gain in GAINS.items() if groups == 20 and gain is not None]

    def missed(x: np.ndarray) -> list[float]:
        now = constants(x)
        return [
            gain_percent(bench, now, 1, 1024) - float(GAINS[1, 1024] or 0),
            gain_percent(bench, now, 5, 1024) - float(GAINS[5, 1024] or 0),
            float(np.mean([gain_percent(bench, now, 20, context) for context in (1024, 4096)]) - np.mean(twenty)),
        ]

    # Whole nanoseconds make steps of the gains: differences are taken over a thousandth.
    return constants(scipy.optimize.root(missed, np.ones(3), options={"eps": 1e-3, "xtol": 1e-4}).x)


def layer_schedules() -> dict[str, ExpertParallelSchedule]:
    """Return the schedules of the benchmark of one layer, by row; where dense kernels run, multiprocessors are not divided."""
    found = {}
    for row in LAYER:
        words = row.split(", ")
        groups = int(words[0].split()[0]) if "groups" in words[0] else 1
        kernel = "dense" if "dense" in words else "grouped"
        divided = kernel == "grouped" and "all SMs" not in words
        found[row] = schedule_of(groups, kernel, sm_fraction=_SM if divided else 0.0,
                                 exchange_bytes=1.0 if "8-bit exchange" in words else 2.0)  # fmt: skip
    return found


def fit_layer(stage_s: float, published: Mapping[str, tuple[float, ...]] = LAYER) -> Constants:
    """Return the constants of the benchmark of one layer, from two of its cells and the difference of two."""
    benches, schedules = layer_benches(), layer_schedules()

    def constants(x: np.ndarray) -> Constants:
        grouped, dense, port = np.abs(x)
        return Constants(grouped_rate=float(grouped), dense_rate=float(dense), port_bytes_per_s=float(port) * _LAYER_PORT,
                         stage_s=stage_s)  # fmt: skip

    def milliseconds(now: Constants, row: str, at: int) -> float:
        return benches[LAYER_WIDTHS[at]].layer_s(now, schedules[row], _TOKENS) * MS_PER_S

    def missed(x: np.ndarray) -> list[float]:
        now = constants(x)
        whole, half = (milliseconds(now, row, 0) for row in _LAYER_BYTES)
        moved = published[_LAYER_BYTES[0]][0] - published[_LAYER_BYTES[1]][0]
        return [milliseconds(now, row, at) / published[row][at] - 1 for row, at in _LAYER_FITTED] + [
            (whole - half) / moved - 1
        ]

    return constants(scipy.optimize.root(missed, np.array([0.5, 0.7, 1.0]), options={"eps": 1e-3, "xtol": 1e-4}).x)


def layer_benches() -> dict[int, _Bench]:
    """Return the benchmark of one layer for each width of its experts.

    Its weights must have 8 bits: twenty experts of width 15360 in 16 bits are 9.4 GB, of which 2.2 ms (256 tokens,
    published) read 7.4 GB at most.
    """
    model = dataclasses.replace(
        load_model("deepseek-v2"), num_layers=1, moe_layers=(0,), num_experts=_LAYER_EXPERTS * _LAYER_RANKS
    )
    return {
        width: _Bench(dataclasses.replace(model, expert_intermediate_size=width), _LAYER_RANKS, "sglang", bits="8")
        for width in LAYER_WIDTHS
    }


def reproduce_eps_moe() -> Reproduction:
    """Return the paper's tables beside the simulator's; three constants fitted to its gains, three to its layer benchmark."""
    bench = _Bench(load_model("deepseek-v2"), _DEEPSEEK_RANKS, "sglang", bits="8")
    constants = fit(bench)
    alone = fit_layer(constants.stage_s)
    fitted = {(1, 1024), (5, 1024), (20, 1024), (20, 4096)}
    cells = []
    for (groups, context), published in GAINS.items():
        role = PREDICTED if published is None else FITTED if (groups, context) in fitted else CHECKED
        cells.append(Cell(table="DeepSeek-V2 gain", row=f"N={groups}", column=str(context), unit="%", published=published,
                          simulated=gain_percent(bench, constants, groups, context), role=role,
                          note="" if published is None else GAIN_NOTES.get((groups, context), "")))  # fmt: skip
    cells += _throughput(bench, constants) + _layer(alone) + _first_token(alone)
    layer_cells = [f"one layer: {row}, {LAYER_WIDTHS[at]}" for row, at in _LAYER_FITTED]
    return Reproduction(
        paper="eps-moe", citation=CITATION, cells=tuple(cells),
        constants=(
            FittedConstant(name="grouped kernel over the profile's", value=constants.grouped_rate, unit="", fitted_to="N=1 at 1K"),
            FittedConstant(name="port", value=constants.port_bytes_per_s, unit="bytes/s", fitted_to="N=5 at 1K"),
            FittedConstant(name="exchange besides its bytes", value=constants.stage_s, unit="s", fitted_to="mean of N=20"),
            FittedConstant(name="one layer: grouped kernel over the profile's", value=alone.grouped_rate, unit="",
                           fitted_to=layer_cells[0]),
            FittedConstant(name="one layer: dense kernel over the profile's", value=alone.dense_rate, unit="",
                           fitted_to=layer_cells[1]),
            FittedConstant(name="one layer: port", value=alone.port_bytes_per_s, unit="bytes/s",
                           fitted_to=f"one layer: difference of {' and '.join(_LAYER_BYTES)}, {LAYER_WIDTHS[0]}"),
        ),
        notes=(
            f"the paper does not say how many tokens a step has: {_TOKENS} on each GPU are assumed, as in its layer benchmark",
            "N=20 at 1K and 4K are met on average only: no one stage cost meets both",
            "the layer benchmark and the gains have constants of their own: one set cannot give both (see papers/eps_moe.py)",
        ),
    )  # fmt: skip


def _throughput(bench: _Bench, constants: Constants) -> list[Cell]:
    """Return prefill tokens/s of 8 GPUs before and after."""
    found = []
    for row, schedule, published in (
        ("before", schedule_of(1, "grouped"), 100e3),
        ("after", schedule_of(5, "best"), 120e3),
    ):
        tokens = _TOKENS * _DEEPSEEK_RANKS
        found.append(Cell(table="DeepSeek-V2 prefill", row=row, column="8 x H800", unit="tokens/s", published=published,
                          simulated=tokens / bench.step_s(constants, schedule, _TOKENS, 1024), role=CHECKED,
                          note=THROUGHPUT_NOTE))  # fmt: skip
    return found


def _layer(constants: Constants) -> list[Cell]:
    """Return the layer benchmark, with its own constants."""
    found, benches, schedules = [], layer_benches(), layer_schedules()
    columns = [(tokens, width) for tokens in LAYER_TOKENS for width in LAYER_WIDTHS]
    for at, (tokens, width) in enumerate(columns):
        for row, published in LAYER.items():
            simulated = benches[width].layer_s(constants, schedules[row], tokens) * MS_PER_S
            found.append(Cell(table="one layer", row=row, column=f"{tokens} x {width}", unit="ms", published=published[at],
                              simulated=simulated, role=FITTED if (row, at) in _LAYER_FITTED else CHECKED,
                              note="" if abs(simulated / published[at] - 1) < _FAR else _layer_note(row, tokens, width)))  # fmt: skip
    return found


def _layer_note(row: str, tokens: int, width: int) -> str:
    """Return what is known of the cells of the layer benchmark that come out more than a tenth off."""
    narrow, grouped = width == LAYER_WIDTHS[0], "dense" not in row.split(", ")
    if tokens != _TOKENS and grouped and not narrow:
        return (
            "published, the grouped kernel does 1.2 to 1.4 times as many operations a second with a third or less of the tokens; here its "
            "speed falls with fewer rows, as that of every measured one"
        )
    if grouped and row.startswith("5 groups") and not narrow:
        return (
            "published, five groups take less time than one launch of all experts spends on kernels alone (29.7 ms): the paper's grouped "
            "kernel gets faster with fewer experts, and 16 multiprocessors fewer cost it 1 %; measured ones do neither"
        )
    if tokens == 1024 and row == "dense" and narrow:
        return "published, twenty experts one after the other take 2.7 times the kernels of five groups"
    if tokens == 256 and row == _LAYER_BYTES[1] and narrow:
        return "published, half of the bytes takes 1.5 times as long: an outlier of the paper's table"
    if tokens == 256:
        return (
            "exchanges and launches of 30 to 90 us are most of it; what each takes is fitted to other runs of the paper"
        )
    if narrow and grouped:
        return "the grouped kernel's speed is fitted on experts of width 15360; published, narrow ones are as fast, here they are slower"
    if tokens != _TOKENS:
        return "the dense kernel's speed is fitted to 3072 tokens; published, it loses nothing with a third of them"
    return "beside dense kernels the published exchange takes longer than the common slow-down says"


def _first_token(layer: Constants) -> list[Cell]:
    """Return times to the first token: vLLM's kernels as measured, the exchange of the layer benchmark."""
    constants = dataclasses.replace(layer, grouped_rate=1.0, dense_rate=1.0)
    shared, found = {"parallel__attention": "tensor"}, []
    grouped = schedule_of(1, "grouped", exchange_bytes=2.0).with_options(**shared)
    rows = {
        "TP+EP": grouped,
        "N=1": schedule_of(1, "best", exchange_bytes=2.0).with_options(**shared),
        "N=2": schedule_of(2, "best", sm_fraction=0.0, exchange_bytes=2.0).with_options(**shared),
    }
    for each in FIRST_TOKEN:
        bench = _Bench(load_model(each.model), each.ranks, "vllm")
        for context, seconds in each.seconds.items():
            tokens = each.batch * context // each.ranks
            base = bench.step_s(constants, grouped.with_options(parallel__experts="tensor"), tokens, context)
            table = f"{each.model} time to first token"
            found.append(Cell(table=table, row=_BASE, column=str(context), unit="s", published=seconds, simulated=base, role=CHECKED,
                              note=FIRST_TOKEN_NOTES.get(_BASE, "")))  # fmt: skip
            for row, published in each.changes.items():
                change = bench.step_s(constants, rows[row], tokens, context) / base - 1
                found.append(Cell(table=table, row=row, column=str(context), unit="%", published=published[context],
                                  simulated=change * _PERCENT, role=CHECKED, note=FIRST_TOKEN_NOTES.get(row, "")))  # fmt: skip
    return found
