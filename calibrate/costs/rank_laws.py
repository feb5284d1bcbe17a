"""What stages of a step cost ranks that are processes of one machine, as measured in steps like those that are predicted.

    dense         base + operations / rate + weights / bandwidth + keys and values / theirs    of each rank, then shared by all on the cores
    head          base + operations / rate + bytes / bandwidth              likewise
    expert.BITS   base + experts · item + operations / rate + bytes / bandwidth    likewise
    dispatch      start + max(slowest port between nodes, slowest port inside) + all bytes / what all ranks share
    combine       likewise
    busy.STAGE    start + all bytes / rate: for how long all ranks together keep cores during an exchange, packing rows and copying them
    reduce        as an exchange: an all-reduce round a ring of all ranks, `reduce.intra` round one of each node's

Modelled: a stage lasts from when the last rank was done with the one before until the last rank is done with it, so that stages of a step
without overlap add up to the step. Ranks that compute share the cores fairly, and one that has less to do leaves them to the others.
A node's ranks have one link to the other nodes; sums that go back pass it as soon as two ranks are done, before the last one is (a
dispatch begins with sizes, for which all wait). An exchange that runs beside kernels takes cores from them for as long as it keeps cores
busy, and its own part on cores takes longer by one measured factor (two where as many threads exchange as compute, with equal shares);
bytes on a link wait for nobody. Ignored: which rank waits for which core when.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...base.errors import MissingCalibration
from ...specs.machines.profile import Curve, Profile
from ...specs.models import ModelSpec, WeightFormat
from ...specs.models.pass_shape import PassShape, dense_arguments, head_arguments
from .all_to_all_table import measured_ranks

Array = npt.NDArray[np.float64]
DENSE, HEAD, EXPERT, DISPATCH, COMBINE, REDUCE = "dense", "head", "expert", "dispatch", "combine", "reduce"
BUSY = "busy"
TERMS: Mapping[str, tuple[str, ...]] = {
    DENSE: ("base", "flops", "weight_bytes", "kv_bytes"),
    HEAD: ("base", "flops", "bytes"),
    EXPERT: ("base", "items", "flops", "bytes"),
    DISPATCH: ("start", "inter_bytes", "intra_bytes", "total_bytes"),
    COMBINE: ("start", "inter_bytes", "intra_bytes", "total_bytes"),
    REDUCE: ("start", "inter_bytes", "intra_bytes", "total_bytes"),
    BUSY: ("start", "total_bytes"),
}
"""What each stage's seconds are straight in; `ranks.RANKSxNODES.STAGE` in a profile holds the seconds of one of each."""
CORES, LINK, TOGETHER = "cores", "link", "together"
"""Further entries: cores that ranks share, seconds of a byte on the link, how many times as long what exchanges do on cores takes beside
kernels."""
FIRST, STEP = "first", "step"
"""Whether exchanges went before kernels (1 or 0), and how far off whole steps are by laws fitted without their shape; both in newer
calibrations only."""
HEADER_BYTES_PER_CHOICE = 8
"""A dispatched row says for each of its choices which copy answers it, and with what weight."""
_VALUE_BYTES = 4
_NAME = re.compile(r"ranks\.(?P<ranks>\d+)x(?P<nodes>\d+)\.(?P<what>[\w.]+)")


def exchange_law(what: str, tier: int) -> str:
    """Return which law an exchange goes by: of all ranks at once (tier 2), or of ranks with one place in all nodes (0) or of one node (1).

    These are other groups of ranks: who has fewer partners waits for fewer, and fewer streams share a link.
    """
    return f"{what}{('.inter', '.intra', '')[tier]}"


def law_name(ranks: int, nodes: int, what: str) -> str:
    """Return the name under which a profile keeps the law of a stage."""
    return f"ranks.{ranks}x{nodes}.{what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLaws:
    """All laws of one number of ranks in one number of nodes."""

    num_ranks: int
    num_nodes: int
    cores: float
    link_bytes_per_s: float
    """What the link between nodes was limited to; 0 for one node."""
    together: float
    """How many times as long what an exchange does on cores takes while kernels run on them too."""
    seconds: Mapping[str, Array]
    """Of one of each term, by stage."""
    relative_uncertainty: Mapping[str, float]
    source: str
    step_uncertainty: float | None = None
    """Of a whole step, whose stages are not all off in one direction; None in older calibrations."""
    exchanges_first: bool | None = None
    """Whether threads that exchange went before those that compute; None in older calibrations, where they did not."""

    def op_s(self, what: str, features: Array) -> Array:
        """Return seconds [...] of features [..., terms] of one rank alone on a core; raises MissingCalibration for a format."""
        if what not in self.seconds:
            known = ", ".join(name for name in self.seconds if name.startswith(EXPERT))
            raise MissingCalibration(
                f"ranks {self.num_ranks}x{self.num_nodes}", what, f"measured: {known}", "calibrate with --bits"
            )
        found: Array = features @ self.seconds[what]
        return found

    @property
    def knows_busy(self) -> bool:
        """Whether it was measured how long exchanges keep cores; older calibrations know `together` of an exchange's start only."""
        return any(what.partition(".")[0] == BUSY for what in self.seconds)

    def start_s(self, what: str) -> float:
        """Return the seconds of an exchange that moves nothing."""
        return float(self._exchange_law(what)[0])

    def lost_s(self, busy_s: float, seconds: float) -> float:
        """Return by how much kernels of all ranks that run beside exchanges for `seconds` take longer, where these keep cores for `busy_s`.

        Cores that no rank computes on are taken first.
        """
        spare = max(0.0, self.cores - self.num_ranks) * seconds
        return max(0.0, busy_s - spare) / min(self.cores, self.num_ranks)

    def busy_s(self, what: str, total: Array) -> Array:
        """Return for how many seconds [...] all ranks together keep cores for an exchange that moves `total: [...]` bytes in all.

        Nothing where that was not measured, as in older calibrations.
        """
        for name in (f"{BUSY}.{what}", f"{BUSY}.{what.partition('.')[0]}"):
            if name in self.seconds:
                start, each = self.seconds[name].tolist()
                return np.asarray(start + total * each)
        return np.zeros_like(total)

    def _exchange_law(self, what: str) -> Array:
        """Return an exchange's law; stages of their own, where they were not measured, go by that of all ranks.

        Raises MissingCalibration where neither was measured: older calibrations have no all-reduces.
        """
        for name in (what, what.partition(".")[0]):
            if name in self.seconds:
                return self.seconds[name]
        raise MissingCalibration(
            f"ranks {self.num_ranks}x{self.num_nodes}", what, f"measured: {', '.join(self.seconds)}", "calibrate again"
        )

    def exchange_s(self, what: str, inter: Array, intra: Array, total: Array) -> tuple[Array, Array]:
        """Return seconds [...] of each rank's port between nodes and inside, for bytes through them and of all ranks together."""
        start, between, inside, shared = self._exchange_law(what).tolist()
        common = start + total * shared
        return common + inter * between, common + intra * inside


def measured_laws(profile: Profile) -> dict[tuple[int, int], list[str]]:
    """Return what of which (ranks, nodes) a profile holds."""
    found: dict[tuple[int, int], list[str]] = {}
    for name in profile.curves:
        match = _NAME.fullmatch(name)
        if match is not None:
            found.setdefault((int(match["ranks"]), int(match["nodes"])), []).append(match["what"])
    return found


def rank_laws(profile: Profile, ranks: int, nodes: int) -> RankLaws | None:
    """Return the laws of so many ranks in so many nodes; None for one rank, and where a profile holds no laws, or exchanges inside a node.

    Raises MissingCalibration, naming what was measured, where there are laws, but not of these ranks.
    """
    known = measured_laws(profile)
    if (ranks, nodes) not in known:
        if not known or ranks == 1 or (nodes == 1 and measured_ranks(profile.curves)):
            return None
        said = " and ".join(f"{each[0]} ranks in {each[1]} node{'s' if each[1] > 1 else ''}" for each in sorted(known))
        raise MissingCalibration(
            f"hardware {profile.name}: ranks",
            f"{ranks} ranks in {nodes} nodes",
            f"measured: {said}",
            "use as many, or calibrate them",
        )
    return laws_of(profile.curves, ranks, nodes)


def laws_of(curves: Mapping[str, Curve], ranks: int, nodes: int) -> RankLaws:
    """Return the laws that stand among curves."""
    mine = {name.removeprefix(f"ranks.{ranks}x{nodes}."): curve for name, curve in curves.items()
            if name.startswith(f"ranks.{ranks}x{nodes}.")}  # fmt: skip
    link, step, first = mine.get(LINK), mine.get(STEP), mine.get(FIRST)
    return RankLaws(
        step_uncertainty=None if step is None else step.relative_uncertainty,
        exchanges_first=None if first is None else bool(first.seconds[0]),
        num_ranks=ranks, num_nodes=nodes, cores=mine[CORES].seconds[0],
        link_bytes_per_s=0.0 if link is None else 1 / link.seconds[0], together=mine[TOGETHER].seconds[0],
        seconds={what: _terms(what, curve.seconds) for what, curve in mine.items() if what.partition(".")[0] in TERMS},
        relative_uncertainty={what: curve.relative_uncertainty for what, curve in mine.items()}, source=mine[CORES].source,
    )  # fmt: skip


def _terms(what: str, seconds: Sequence[float]) -> Array:
    """Return a law's terms; older calibrations took keys and values for weights."""
    older = what == DENSE and len(seconds) == len(TERMS[DENSE]) - 1
    return np.array([*seconds, seconds[-1]] if older else seconds)


def still_to_pass(sent: Array, came: Array, before_s: Array, link_bytes_per_s: float, ranks_per_node: int) -> Array:
    """Return bytes [...] that the busiest link between nodes still has to pass when the last rank begins an exchange.

    sent, came: [..., ranks] bytes of each rank to and from other nodes; before_s: [..., ranks] how long before the last rank each one
    began. Two ranks exchange once both are there, what is there passes in order, and what a rank sends is divided as its partners receive.
    """
    node = np.arange(sent.shape[-1]) // ranks_per_node
    away = node[:, None] != node[None, :]
    partners = (came[..., None, :] * away).sum(axis=-1)[..., None]
    between = sent[..., :, None] * came[..., None, :] * away / np.maximum(partners, 1e-30)  # [..., from, to]
    passed = np.minimum(before_s[..., :, None], before_s[..., None, :]) * link_bytes_per_s
    found = np.zeros(sent.shape[:-1])
    for each in range(int(node[-1]) + 1):
        for mine in (node == each)[:, None] & away, (node == each)[None, :] & away:  # out of the node and into it
            early, size = passed[..., mine], between[..., mine]
            order = np.argsort(-early, axis=-1, kind="stable")
            early, size = (np.take_along_axis(values, order, axis=-1) for values in (early, size))
            after = np.cumsum(size[..., ::-1], axis=-1)[..., ::-1]  # of this pair and all that come later
            found = np.maximum(found, (after - early).max(axis=-1, initial=0.0))
    return found


# --- features -----------------------------------------------------------------------------------------------------------


def dense_features(
    model: ModelSpec, layers: Sequence[int], tokens: int, context_tokens: int, share: int = 1, kv_shares: int = 1
) -> list[float]:
    """Return the terms of a rank's dense part with so many requests of so much context each; nothing without tokens.

    share: ranks that divide the layers' work and weights. kv_shares: over how many of them keys and values are divided.
    """
    if tokens == 0:
        return [0.0, 0.0, 0.0, 0.0]
    shape = PassShape(tokens=tokens, context_tokens=tokens * context_tokens, requests=tokens)
    found = dense_arguments(model, layers, shape, _VALUE_BYTES)
    # Attention over a context reads it once for one new token: what it computes there hides behind reading.
    return [1.0, found["flops"] / share, found["weight_bytes"] / share, found["kv_bytes"] / kv_shares]


def head_features(model: ModelSpec, tokens: int, share: int = 1) -> list[float]:
    """Return the terms of the output matrix, which `share` ranks divide."""
    if tokens == 0:
        return [0.0, 0.0, 0.0]
    found = head_arguments(model, tokens, _VALUE_BYTES)
    return [1.0, found["flops"] / share, found["weight_bytes"] / share]


def expert_features(model: ModelSpec, fmt: WeightFormat, rows: Array, active: Array) -> Array:
    """Return the terms [..., 4] of units with `rows` rows on `active` experts, both [...]; a stage is begun without rows too."""
    base = np.ones_like(rows)
    return np.stack([base, active, rows * model.expert_flops_per_token, active * model.expert_bytes(fmt)], axis=-1)


def shares(seconds: Array, cores: float) -> tuple[npt.NDArray[np.int64], Array]:
    """Return (order, weights) [..., ranks]: the last of ranks that begin together ends after Σ weights · seconds in that order.

    seconds: [..., ranks], each alone on a core. While more ranks compute than there are cores, each gets its share of them.
    """
    count = seconds.shape[-1]
    order = np.argsort(seconds, axis=-1, kind="stable")
    at_once = np.maximum(1.0, (count - np.arange(count)) / cores)
    return order, at_once - np.append(at_once[1:], 0.0)


def finish_s(seconds: Array, cores: float) -> Array:
    """Return when each of ranks that begin together ends, [..., ranks], where they share `cores` cores fairly."""
    count = seconds.shape[-1]
    order = np.argsort(seconds, axis=-1, kind="stable")
    ascending = np.take_along_axis(seconds, order, axis=-1)
    steps = np.diff(ascending, axis=-1, prepend=0.0) * np.maximum(1.0, (count - np.arange(count)) / cores)
    found = np.empty_like(seconds)
    np.put_along_axis(found, order, np.cumsum(steps, axis=-1), axis=-1)
    return found
