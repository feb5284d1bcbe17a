"""What a plan says of itself in one line: what binds, what would help, and how it stands beside the best an engine does today.

Modelled: the same schedule with a cache that knows the future, and with more memory; the fastest published schedule at the same
memory and bits that needs nothing but this model and this machine. Fewest misses are not least time (a cache that knows the future
starts empty, and moves where the cores would have computed), so a reference that is no faster is not offered as a gain. Ignored:
schedules that need another model or trained parts; they are shown apart and compared with by nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...base.bounds import binds
from ...base.errors import DoesNotFit, InputError
from ...base.units import GIB
from ...sim.offload.simulate import Prediction, Simulation
from ...specs.schedules.presets import NEEDS
from .objective import OF_REQUESTS, figures_of_metrics, value_of

# How much more device memory the verdict asks about: half as much again, and twice as much.
MORE_MEMORY = (1.5, 2.0)
# A change smaller than this is none.
_NOTICED = 0.0005


def run_ns(prediction: Prediction) -> int:
    """Return the time of a prediction's whole window in nanoseconds, which is what schedules are ranked by."""
    return int(prediction.outcome.step_end[-1])


def need_nothing(rivals: Sequence[Prediction]) -> list[Prediction]:
    """Return the published schedules that need nothing but the model and the machine."""
    return [one for one in rivals if one.schedule.name not in NEEDS]


def references_of(simulation: Simulation, best: Prediction) -> dict[str, Prediction]:
    """Return the same schedule with a cache that knows the future, and with more memory for the cache, as far as the host can
    hold what they need.
    """
    cache = best.schedule.cache
    if cache.policy == "none":
        return {}
    # A cache that changes has no fixed places, and one whose misses all stay on the cores would never change.
    changing = {"cache__placement": "popularity", "cache__host_layers": None}
    if best.schedule.kernel.miss == "cpu":
        changing["kernel__miss"] = "cheaper"
    asked = [(simulation, best.schedule.with_options(name="belady", cache__policy="belady", **changing))]
    size = "pooled_experts" if cache.pooled_experts is not None else "experts_per_layer"
    slots = getattr(cache, size)
    most = (
        simulation.num_experts if size == "pooled_experts" else simulation.trace.num_experts - cache.first_layer_extra
    )
    for factor in MORE_MEMORY:
        budget = int(simulation.budget_bytes * factor)
        more = (budget - simulation.budget_bytes) // simulation.expert_bytes(best.schedule)
        more = more if size == "pooled_experts" else more // simulation.trace.num_layers
        bigger = {f"cache__{size}": min(most, slots + int(more))}
        asked.append(
            (with_memory(simulation, budget), best.schedule.with_options(name=f"memory x{factor:g}", **bigger))
        )
    found = {}
    for roomy, schedule in asked:
        try:
            found[schedule.name] = roomy.predict(schedule)
        except DoesNotFit:  # what may leave the device must have a place in the host, and that may be too small
            continue
        except InputError:  # one pool of changing experts over several cards
            if simulation.split is None:
                raise
    return found


def with_memory(simulation: Simulation, memory_bytes: int) -> Simulation:
    """Return the same simulation with another device budget; of several cards each has its share of it, as it had."""
    if not simulation.card_budgets:
        return simulation.over(simulation.trace, memory_bytes=memory_bytes)
    total = sum(simulation.card_budgets)
    return simulation.over(
        simulation.trace, card_budgets=tuple(each * memory_bytes // total for each in simulation.card_budgets)
    )


def verdict(best: Prediction, rivals: Sequence[Prediction], references: dict[str, Prediction], *, same_as: str | None = None,
            floor_tokens_per_s: float | None = None, objective: str = "tokens_per_s") -> str:  # fmt: skip
    """Return in one line what limits the best schedule, what would help, and what it is beside the best there is today.

    same_as: the published schedule that the best one is. floor_tokens_per_s: the speed for which memory was sought. objective: what
    the best was chosen by, and what speeds are compared by.
    """

    def taken(one: Prediction) -> float:
        if objective not in OF_REQUESTS:
            return float(run_ns(one))
        return value_of(objective, figures_of_metrics(one.metrics))

    gains = {name: taken(best) / taken(one) - 1 for name, one in references.items()}
    policy = gains.get("belady", 0.0)
    memory = gains.get(f"memory x{MORE_MEMORY[0]:g}", 0.0)
    bound = binds(best.metrics.bound)
    if best.schedule.cache.policy == "none":
        said = [f"nothing is cached: {bound}"]
    else:
        limit = "working set" if memory > policy else "policy"
        said = [f"{limit}: {bound}" if max(policy, memory) >= _NOTICED else bound]
        helping = []
        if policy >= _NOTICED:
            empty = ", though it starts empty," if best.schedule.cache.policy == "static" else ""
            helping.append(f"a cache of this size that knows the future{empty} would be {policy:.1%} faster")
        if memory >= _NOTICED:
            helping.append(f"half as much memory again would make it {memory:.1%} faster")
        said.append(
            ", ".join(helping) or "no more memory and no knowledge of the future would make it noticeably faster"
        )
    if floor_tokens_per_s is not None:
        size = best.memory_breakdown.device_bytes / GIB
        said.insert(0, f"{floor_tokens_per_s:g} tokens/s need {size:.3f} GiB of device memory")
    fastest = min(need_nothing(rivals), key=taken, default=None)
    if same_as is not None:
        said.append(f"it is {same_as}, the best of the published schedules, which no other schedule searched beats")
    elif fastest is not None:
        said.append(
            f"{taken(fastest) / taken(best):.2f} times as fast as {fastest.schedule.name}, the fastest published schedule that "
            "needs no other model and nothing trained, at the same memory and bits"
        )
    return "; ".join(said)
