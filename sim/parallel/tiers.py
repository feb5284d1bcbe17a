"""The ports of ranks: what an exchange takes of each tier, by data sheets, by measured kernels or by measured tables.

Modelled: a latency and the bytes over a bandwidth, or the machine's own measurement; what all ranks of a node share. Ignored: congestion
in switches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ...base.errors import InputError, MissingCalibration
from ...base.units import NS_PER_S
from ...calibrate.costs.all_to_all_table import ExchangeTable, exchange_table
from ...calibrate.costs.estimate import merge_sources
from ...calibrate.costs.gpu.exchanges import kernels_of, quickest_s, reductions_of
from ...calibrate.costs.overlap_table import OverlapTable, overlap_table
from ...calibrate.costs.rank_laws import COMBINE, DISPATCH, RankLaws, rank_laws
from ...specs.machines.gpu_kernels import BETWEEN, INSIDE, ExchangeKernel
from ...specs.machines.overlap import shared_speed
from ...specs.machines.profile import Constant, Profile
from ..policies.state import Array
from .program import INTER, INTRA
from .traffic import FloatArray

_LEAST_BYTE_S = 1e-15
_REDUCTION_START_S = 108e-6
"""What an all-reduce over two nodes of H100 takes beyond one inside a node, while a server decodes.

Fitted to four figures of one cluster (16 H100 that decode one request, github.com/tenstorrent/tt-inference-server/issues/356, some 122
reductions a token). NCCL's smallest all-reduce there takes 62 us where many follow each other (128 bytes,
github.com/NVIDIA/nccl/issues/1453), its own model says 25: alone, each waits for the slowest of all ranks and for the processors that
post its messages. Three other clusters, nothing fitted to them, are then 1.3 to 1.9 times slower than predicted (2.1 to 2.7 before).
"""
_REDUCTION_UNCERTAINTY = 0.9
"""Of measured starts the least is half of that, and other clusters take up to twice as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One rank's port of a tier: seconds = latency + (bytes + half size) / bandwidth, one direction; or as measured."""

    bytes_per_s: float
    latency_s: float
    half_size_bytes: float = 0.0
    source: str
    relative_uncertainty: float
    table: ExchangeTable | None = None
    """All-to-alls between just so many ranks, measured."""
    kernels: Mapping[str, tuple[ExchangeKernel, ...]] = field(default_factory=dict)
    """Measured kernels by operation (`specs.machines.gpu_kernels.EXCHANGES`): of several, the quickest for a size is taken."""

    def tree_ns(self, nodes: int) -> int:
        """Return what a tree over so many nodes takes beyond two of them: one start more each time they double."""
        return math.ceil((math.ceil(math.log2(nodes)) - 1) * self.latency_s * NS_PER_S)

    def port_ns(
        self,
        num_bytes: FloatArray | Array,
        speed: float = 1.0,
        *,
        total_bytes: FloatArray | Array | None = None,
        beside_compute: bool = False,
        operation: str = "",
    ) -> Array:
        """Return whole nanoseconds for `num_bytes: [..., ranks]`; nothing to move takes none.

        operation: which exchange it is, where each has kernels of its own.
        total_bytes: [..., ranks] or [..., 1], what all ranks of a rank's node send meanwhile; None takes all of them for one node's.
        beside_compute: all ranks compute meanwhile. Both count on a measured machine only.
        """
        measured = self.kernels.get(operation, ())
        if measured:
            seconds = quickest_s(measured, num_bytes, speed=speed)
        elif self.table is None:
            seconds = self.latency_s + (num_bytes + self.half_size_bytes) / (self.bytes_per_s * speed)
        else:
            total = np.sum(num_bytes, axis=-1, keepdims=True) if total_bytes is None else total_bytes
            seconds = self.table.seconds(num_bytes, total, speed=speed, beside_compute=beside_compute)
        return np.where(np.asarray(num_bytes) > 0, np.ceil(seconds * NS_PER_S), 0).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpConstants:
    """What the cost model of one device does not know."""

    inter: Tier | None
    """Between nodes; None where there is one node."""
    intra: Tier
    grouped_rate: float = 1.0
    """Speed of a grouped launch where compute bounds it, relative to the cost model's."""
    dense_rate: float = 1.0
    """The same for launches of one expert. DeepGEMM's README (8002b769) shows no gain on equal shapes: 1346 TFLOP/s grouped
    and 1265 dense for 4096 x 7168 on H800."""
    shared_nic: bool = False
    """The ranks of a node share one port between nodes (of the tier's bandwidth), instead of having one each."""
    half_duplex_nic: bool = False
    """What a port between nodes sends and receives adds up, as where the host's processor moves it."""
    shared_speed: float = 1.0
    """Of kernels beside an exchange, and of exchanges beside kernels, where no multiprocessors are kept for exchanges, relative to
    running alone: they share multiprocessors, memory and links."""
    ranks: RankLaws | None = None
    """What stages cost ranks that are processes of one machine, measured in their steps; then all durations are theirs."""
    overlap: OverlapTable | None = None
    """What overlap costs experts on this very GPU, where that was measured; then it goes before the rates above and `shared_speed`."""
    attention_rate: float = 1.0
    """Speed of what attention spends on context beyond a token's own, relative to the cost model's."""

    groups: Mapping[int, Tier] = field(default_factory=dict)
    """What so many ranks of a node reduce over, where that is not `intra`."""

    network: Tier | None = None
    """Of one rank between nodes: what reductions over several nodes run on; None: `inter`."""

    def group_tier(self, ranks: int, ranks_per_node: int) -> Tier:
        """Return what `ranks` ranks reduce over inside a node; all of its ranks over `intra`.

        An engine's own kernel reduces inside one node only: ranks of several run the library's, the first of those measured.
        """
        tier = self.intra if ranks >= ranks_per_node else self.groups.get(ranks, self.intra)
        if ranks <= ranks_per_node or "all-reduce" not in tier.kernels:
            return tier
        return dataclasses.replace(tier, kernels={**tier.kernels, "all-reduce": tier.kernels["all-reduce"][:1]})

    def among_s(self, operation: str, num_bytes: int, ranks: int, ranks_per_node: int) -> float:
        """Return the seconds of a reduction or gather among `ranks` consecutive ranks, of which each port carries (n-1)/n of `num_bytes`:
        inside nodes, then each rank with its peers of the other nodes, in a tree.
        """
        inside, nodes = min(ranks, ranks_per_node), max(1, ranks // ranks_per_node)
        found = 0
        if inside > 1:
            moved = np.array([num_bytes * (inside - 1) // inside])
            tier = self.group_tier(ranks, ranks_per_node)
            found += int(tier.port_ns(moved, total_bytes=moved * ranks_per_node, operation=operation)[0])
        if nodes > 1:
            network = self.network or self.tier(INTER)
            moved = np.array([num_bytes // inside * (nodes - 1) // nodes])
            found += int(network.port_ns(moved, total_bytes=moved * inside)[0]) + network.tree_ns(nodes)
        return found / NS_PER_S

    def tier(self, tier: int) -> Tier:
        """Return a tier; raises InputError for the missing one."""
        found = self.intra if tier == INTRA else self.inter
        if found is None:
            raise InputError("num_nodes", 1, "one node has no network", "describe the tier between nodes")
        return found


def _remedy(profile: Profile) -> str:
    """Return what to ask instead of ranks on a machine that is no server."""
    if profile.num_cards > 1:
        return (
            f"name one card of a server and how many there are, --hardware h200-sxm --nodes 1 --gpus-per-node {profile.num_cards}; "
            "cards in one box, as here, are predicted without --mode ep"
        )
    return f"choose a server's card (h100-sxm, h200-sxm, b200-sxm, mi300x …); of others leave out --mode ep and write 4 x {profile.name}"


def constants_of(profile: Profile, num_nodes: int, ranks_per_node: int = 1) -> EpConstants:
    """Return the tiers of a profile; raises MissingCalibration where it describes no server or no network, or where its own
    exchanges were measured, but not between `ranks_per_node` ranks. One rank has nobody to exchange with.
    """
    node = profile.node
    if node is None:
        raise MissingCalibration(
            f"hardware {profile.name}: node", None, "this profile describes no server", _remedy(profile)
        )
    laws = rank_laws(profile, num_nodes * ranks_per_node, num_nodes)
    if laws is not None:
        return _of_laws(laws)
    intra = _tier(node.gpu_link_bytes_per_s, node.gpu_link_latency_s)
    table = exchange_table(profile, ranks_per_node) if ranks_per_node > 1 else None
    if table is not None:
        intra = dataclasses.replace(
            intra, table=table, source=table.source, relative_uncertainty=table.relative_uncertainty
        )
    plain = intra
    intra = _with_kernels(intra, profile, INSIDE, ranks_per_node)
    parts = [ranks for ranks in range(2, ranks_per_node) if ranks_per_node % ranks == 0]
    groups = {ranks: _with_kernels(plain, profile, INSIDE, ranks) for ranks in parts}
    shared = shared_speed() if profile.device.kind == "gpu" else 1.0
    overlap = overlap_table(profile.curves)
    if overlap is not None and overlap.shared_speed is not None:
        shared = overlap.shared_speed
    if num_nodes == 1:
        return EpConstants(inter=None, intra=intra, shared_speed=shared, overlap=overlap, groups=groups)
    if node.nic_bytes_per_s is None or node.nic_latency_s is None:
        raise MissingCalibration(f"hardware {profile.name}: node.nic_bytes_per_s", None, "this profile describes no network",
                                 "use one node or choose another profile")  # fmt: skip
    network = _tier(node.nic_bytes_per_s, node.nic_latency_s)
    inter = _with_kernels(network, profile, BETWEEN, num_nodes)
    if profile.device.kind == "gpu":
        network = dataclasses.replace(
            network, latency_s=_REDUCTION_START_S, relative_uncertainty=_REDUCTION_UNCERTAINTY
        )
    return EpConstants(inter=inter, intra=intra, shared_speed=shared, overlap=overlap, groups=groups, network=network)


def _of_laws(laws: RankLaws) -> EpConstants:
    """Return the tiers that placements are searched by, where whole steps of these ranks were measured."""
    wrong = max(laws.relative_uncertainty[what] for what in (DISPATCH, COMBINE))
    start, between, inside, shared = laws.seconds[DISPATCH].tolist()

    def tier(per_byte: float) -> Tier:
        return Tier(
            bytes_per_s=1 / max(per_byte, _LEAST_BYTE_S),
            latency_s=start,
            source=laws.source,
            relative_uncertainty=wrong,
        )

    intra = tier(inside + laws.num_ranks * shared)
    if laws.num_nodes == 1:
        return EpConstants(inter=None, intra=intra, ranks=laws)
    return EpConstants(inter=tier(between + laws.num_ranks * shared), intra=intra, shared_nic=True, ranks=laws)


def _with_kernels(tier: Tier, profile: Profile, place: str, ranks: int) -> Tier:
    """Return a tier with the profile's measured exchanges between `ranks` ranks of a node, or nodes; its linear constants are then those of
    a dispatch, which placements are searched by. Reductions inside a node that nobody measured are steps over its links.
    """
    if tier.table is not None or ranks < 2:
        return tier
    measured = {} if profile.kernels is None else kernels_of(profile.kernels, place, ranks)
    found = dict(measured)
    if place == INSIDE and profile.device.kind == "gpu" and profile.node is not None:
        found |= reductions_of(measured, ranks, profile.node.gpu_link_latency_s, profile.node.gpu_link_bytes_per_s)
    if not measured or profile.kernels is None:
        return dataclasses.replace(tier, kernels=found)
    dispatch = found.get("normal-dispatch", next(iter(found.values())))[0]
    wrong = max(kernel.relative_uncertainty for group in found.values() for kernel in group[:1])
    return dataclasses.replace(
        tier, kernels=found, source=profile.kernels.source, relative_uncertainty=wrong, latency_s=dispatch.start_s,
        bytes_per_s=dispatch.bytes_per_s, half_size_bytes=0.0,
    )  # fmt: skip


def _tier(rate: Constant, latency: Constant) -> Tier:
    return Tier(bytes_per_s=rate.value, latency_s=latency.value, source=merge_sources(rate.source, latency.source),
                relative_uncertainty=rate.relative_uncertainty)  # fmt: skip
