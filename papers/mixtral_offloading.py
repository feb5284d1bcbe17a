"""Mixtral-offloading (arXiv 2312.17238): tokens/s of Mixtral-8x7B on one GPU, by machine, expert bits and what is switched off.

Modelled: the paper's four algorithms (LRU per layer with guesses of the next gate; LRU alone; neither, so every chosen expert is
fetched; naive, so every expert of the next layer is), experts in 2 or 3 bits and attention in 4, k = 2 cached experts a layer
on 12 GB and 4 otherwise, batch 1, on a synthetic recording with the locality that Mixtral's own paper publishes (the preset
`mixtral-8x7b`). Copies run on the kernels' stream except where the paper says that they overlap (guesses; naive).

About 260 ms a token on the A100 are not transfer. Three constants stand for them: what the host spends on a layer (Python and
launches; the device may still be computing meanwhile), the bytes of device memory that expanding one quantised weight moves (so
that time follows the card's memory bandwidth), and what guessing adds to the host's time. They are fitted to three cells: the
A100 and the T4 without cache and guesses, and the A100 with both, all in 2 bits. Links are those of their PCIe generation from
other sources, because the rates in the bundled profiles of A100 and T4 were read off this very table. Ignored: prompts, the
memory that quantisers use while they expand, faster or slower hosts (one host time stands for all machines).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import scipy.optimize

from ..base.errors import Internal
from ..base.units import GIB, GIGA
from ..sim.offload.metrics import Metrics
from ..sim.offload.simulate import Simulation
from ..specs.machines.profile import Constant, Profile
from ..specs.machines.profile_file import load_hardware
from ..specs.models import BITS_PER_BYTE, WEIGHT_FORMATS, weight_format
from ..specs.models.load import load_model
from ..specs.schedules.offload import OffloadSchedule
from ..specs.schedules.presets import load_preset
from ..traces.format import RoutingTrace
from ..traces.synthesis.presets import preset
from ..traces.synthesis.synthesise import synth_trace
from .cells import CHECKED, FITTED, PREDICTED, Cell, FittedConstant, Reproduction

CITATION = (
    "Eliseev and Mazur, Fast Inference of MoE Language Models with Offloading, arXiv 2312.17238, table 2; batch 1"
)
TABLE = "Mixtral-8x7B generation"
FULL, LRU, NEITHER, NAIVE = "LRU + speculation", "LRU only", "neither", "naive"
ALGORITHMS = (FULL, LRU, NEITHER, NAIVE)
Key = tuple[str, str, str]
"""(algorithm, machine, bits)"""
# Tokens/s.
PUBLISHED: Mapping[Key, float] = MappingProxyType(
    {
        (algorithm, machine, bits): rate
        for (machine, bits), column in {
            ("a100-80gb-sxm", "2"): (3.061, 2.918, 2.265, 1.392),
            ("a100-80gb-sxm", "3"): (2.845, 2.683, 2.055, 1.246),
            ("t4", "2"): (2.092, 1.567, 1.168, 0.661),
        }.items()
        for algorithm, rate in zip(ALGORITHMS, column, strict=True)
    }
)
# What is known of the cells that come out more than a tenth off.
NOTES: Mapping[Key, str] = MappingProxyType(
    {
        (FULL, "t4", "2"): (
            "published, guessing saves 160 ms a token here, which is what all misses of LRU alone take to transfer, and 16 ms "
            "on the A100, a fifth of them. No one recall gives both. Here the guesses' transfers hide on both machines, and "
            "their host time, fitted on the A100 where nothing hides it, is charged to the T4 as well as far as its kernels "
            "do not cover it: too slow by about a tenth"
        ),
    }
)
# The paper's machines; those without published cells here are predicted.
MACHINES = ("a100-80gb-sxm", "rtx-3080-mobile", "rtx-3060", "t4")
BITS = ("2", "3")
FITTED_CELLS: tuple[Key, ...] = (
    (NEITHER, "a100-80gb-sxm", "2"), (NEITHER, "t4", "2"), (FULL, "a100-80gb-sxm", "2"),
)  # fmt: skip
# Bytes/s of large pinned copies, from sources other than this paper: 25 GB/s on A100's PCIe 4 x16 (ZaidQureshi/bam issue 54),
# 11 to 12 on PCIe 3 x16 (rapidsai/dask-cuda pull request 98). Any other machine keeps its profile's link.
_PCIE_4, _PCIE_3 = 25 * GIGA, 12 * GIGA
_LINKS = {"a100-80gb-sxm": _PCIE_4, "rtx-3080-mobile": _PCIE_4, "rtx-3060": _PCIE_3, "t4": _PCIE_3}
# Dense part and two experts: what the host launches for a layer of one token.
_LAUNCHES_PER_LAYER = 3
_DENSE_BITS = "4"
_SMALL_CARD_BYTES, _SMALL_CARD_EXPERTS, _LARGE_CARD_EXPERTS = 12 * GIB, 2, 4
_REQUESTS, _REQUEST_TOKENS = 6, 256
# Where the fit begins: 6 ms of host time a layer, 4 bytes a weight, 1 ms for guessing.
_START = np.array([6e-3, 4.0, 1e-3])


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """The three fitted constants."""

    layer_host_s: float
    """Host time of one layer: Python and launches."""
    expand_bytes_per_weight: float
    """Device memory traffic of expanding and multiplying one quantised weight."""
    guess_host_s: float
    """Host time that guessing the next layer's experts adds to a layer."""


@functools.cache
def routing() -> RoutingTrace:
    """Return the synthetic recording: six requests of 256 generated tokens with Mixtral's published locality."""
    dials = dataclasses.replace(preset("mixtral-8x7b"), prompt_tokens=(0,), decode_tokens=(_REQUEST_TOKENS,))
    return synth_trace(dials, num_requests=_REQUESTS, seed=0, model="mixtral-8x7b")


def machine(name: str, constants: Constants) -> Profile:
    """Return a bundled or given machine with the paper's link and software in place of the profile's.

    Raises UnknownName for a machine that is not bundled.
    """
    profile = load_hardware(name)
    link = profile.host_to_device
    rate = _LINKS.get(profile.name)
    if rate is not None:
        link = dataclasses.replace(
            link, pinned_bytes_per_s=_constant(rate, "published", "large copies, by PCIe generation")
        )
    expanding = {
        fmt.name: _constant(
            min(1.0, float(fmt.bits_per_weight) / BITS_PER_BYTE / constants.expand_bytes_per_weight), "assumed",
            "fitted to Mixtral-offloading's table",
        )
        for fmt in WEIGHT_FORMATS.values() if fmt.quantised
    }  # fmt: skip
    nothing = _constant(0.0, "assumed", "inside the fitted host time of a layer")
    return dataclasses.replace(
        profile, host_to_device=link,
        device=dataclasses.replace(profile.device, dequantise_efficiency=expanding),
        host=dataclasses.replace(profile.host, per_kernel_s=nothing, per_layer_s=nothing),
    )  # fmt: skip


def schedule_of(algorithm: str, bits: str, cached_experts: int, constants: Constants) -> OffloadSchedule:
    """Return one of the paper's four algorithms with `cached_experts` a layer."""
    software = {"experts__bits": bits, "host__per_layer_s": constants.layer_host_s}
    if algorithm == FULL:
        return load_preset("mixtral-offloading").with_options(
            cache__experts_per_layer=cached_experts,
            host__per_kernel_s=constants.guess_host_s / _LAUNCHES_PER_LAYER,
            **software,
        )
    if algorithm == LRU:
        # The public code swaps; the table's differences leave no time for a copy back.
        plain = load_preset("mixtral-offloading-code").with_options(copy__write_back=False, **software)
        return plain.with_options(cache__experts_per_layer=cached_experts)
    on_demand = load_preset("on-demand").with_options(**software)
    if algorithm == NEITHER:
        return on_demand.with_options(copy__overlap=False)
    # The published times are those of the transfers alone, so whole layers must move while others compute.
    return load_preset("prefetch-all").with_options(**software)


def tokens_per_s(algorithm: str, name: str, bits: str, constants: Constants) -> float:
    """Return the simulated speed of one cell; raises DoesNotFit where experts in these bits do not fit the machine."""
    decode = simulate(algorithm, name, bits, constants).decode_tokens_per_s
    if decode is None:
        raise Internal("the recording decodes nothing")
    return decode


def simulate(algorithm: str, name: str, bits: str, constants: Constants) -> Metrics:
    """Return the figures of one cell's run; raises DoesNotFit as above."""
    profile = machine(name, constants)
    simulation = Simulation(
        model=load_model("mixtral-8x7b"), profile=profile, trace=routing(), dense_format=weight_format(_DENSE_BITS)
    )
    return simulation.predict(schedule_of(algorithm, bits, cached_experts(profile), constants)).metrics


def cached_experts(profile: Profile) -> int:
    """Return the experts a layer caches: 2 on a card of 12 GB, 4 on a larger one."""
    return _SMALL_CARD_EXPERTS if profile.memory_bytes <= _SMALL_CARD_BYTES else _LARGE_CARD_EXPERTS


def reproduce_mixtral_offloading(hardware: str | None = None, bits: str | None = None) -> Reproduction:
    """Return the paper's table beside the simulator's; three constants fitted.

    hardware, bits: only this machine (any profile) or only this weight format instead of the paper's. Raises UnknownName for
    either, DoesNotFit where a machine that was asked for cannot hold the model.
    """
    machines = MACHINES if hardware is None else (load_hardware(hardware).name,)
    files = {name: name if hardware is None else hardware for name in machines}
    formats = BITS if bits is None else (weight_format(bits).name,)
    constants = fitted()
    cells = [
        _cell(algorithm, name, fmt, tokens_per_s(algorithm, files[name], fmt, constants))
        for name in machines for fmt in formats for algorithm in ALGORITHMS
    ]  # fmt: skip
    cells_of_fit = ["/".join(key) for key in FITTED_CELLS]
    return Reproduction(
        paper="mixtral-offloading", citation=CITATION, cells=tuple(cells),
        constants=(
            FittedConstant(name="host time of a layer", value=constants.layer_host_s, unit="s", fitted_to=cells_of_fit[0]),
            FittedConstant(name="device memory traffic of expanding a weight", value=constants.expand_bytes_per_weight,
                           unit="bytes", fitted_to=cells_of_fit[1]),
            FittedConstant(name="host time that guessing adds to a layer", value=constants.guess_host_s, unit="s",
                           fitted_to=cells_of_fit[2]),
        ),
        notes=(
            "routing is synthetic, with the repeat rates of Mixtral's paper; the next gate's recall is assumed to be 80 %",
            "links: 25 GB/s on PCIe 4 x16 and 12 on PCIe 3 x16, from other sources; the RTX 3060 of the paper sat on PCIe 3",
            "one host for all machines: the paper's had different processors, which this table does not name",
            "a laptop's RTX 3080 may have eight lanes; then transfers take twice as long as predicted here",
        ),
    )  # fmt: skip


def _cell(algorithm: str, name: str, bits: str, simulated: float) -> Cell:
    """Return one cell, with its role and what is known of its error."""
    key = (algorithm, name, bits)
    published = PUBLISHED.get(key)
    role = PREDICTED if published is None else FITTED if key in FITTED_CELLS else CHECKED
    return Cell(table=TABLE, row=algorithm, column=f"{name}, {bits} bits", unit="tokens/s", published=published,
                simulated=simulated, role=role, note=NOTES.get(key, ""))  # fmt: skip


def fit(published: Mapping[Key, float] = PUBLISHED) -> Constants:
    """Return the constants that meet the three fitted cells; no other cell is read."""
    seconds = np.array([1 / published[key] for key in FITTED_CELLS])

    def constants(scale: np.ndarray) -> Constants:
        host_s, expand, guess_s = np.abs(scale) * _START
        return Constants(layer_host_s=float(host_s), expand_bytes_per_weight=float(expand), guess_host_s=float(guess_s))

    def missed(scale: np.ndarray) -> np.ndarray:
        now = constants(scale)
        found = np.array([1 / tokens_per_s(*key, now) for key in FITTED_CELLS])
        return np.asarray(found / seconds - 1)

    return constants(scipy.optimize.root(missed, np.ones(3), options={"eps": 1e-3, "xtol": 1e-6}).x)


@functools.cache
def fitted() -> Constants:
    """Return the constants that meet the published cells."""
    return fit()


def _constant(value: float, source: str, citation: str) -> Constant:
    return Constant(value=value, source=source, citation=citation, relative_uncertainty=0.1)
