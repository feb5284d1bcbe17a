"""LMDeploy's PyTorch engine: flags for expert parallelism with data-parallel attention, two micro-batches, experts in their order.

Modelled: `--ep`, `--dp` and `--nnodes` of `lmdeploy serve api_server` (0.16.0); DeepEP in both of its modes, which the engine picks by
itself (low latency for decode steps, normal for prompts). Experts lie in the model's order, without copies: LMDeploy takes loads, not
placements, and only for DeepSeek's blocked FP8 layers. Ignored: TurboMind, its other engine; offloading, which it has none of.
"""

from __future__ import annotations

from collections.abc import Mapping

from ....base.errors import InputError
from ....specs.models import ModelSpec
from ..checks import needed, text_of
from ..choices import Emission, EpChoice, Placement, as_run, left_out
from ..flags import FLAGS_FILE, SWITCH, TEXT, USE_FLAGS, WHOLE, FlagValue, flag_lines
from ..parallel_notes import (
    COMMON,
    attention_groups,
    exchange_kind,
    exchange_notes,
    micro_batch_notes,
    moved,
    normal_mode,
)
from ..table import EngineTable, flags_of, names, row
from ..target import ParallelTarget, Target

TABLE = EngineTable(
    engine="LMDeploy 0.16.0",
    checked="2026-11-28",
    how="flags, sums of devices and the load file compared with the repository at commit 1263d5cd (read, not started)",
    source="InternLM/lmdeploy: cli/utils.py, cli/serve.py, messages.py; pytorch/config.py, check_env/dist.py, nn/eplb.py, envs.py",
    flags={
        "--backend": row(names("pytorch", "turbomind"), "which of its two engines serves; only pytorch spreads experts with DeepEP"),
        "--ep": row(WHOLE, "devices that experts are spread over: all of them; above one it needs DeepEP and DeepGEMM", least=1),
        "--dp": row(WHOLE, "groups of devices with their own requests in attention; divides --ep; above one it needs ray", least=1),
        "--tp": row(WHOLE, "devices that slice everything; of attention it follows from --ep and --dp", least=1),
        "--nnodes": row(WHOLE, "nodes", least=1),
        "--node-rank": row(WHOLE, "this node", least=0),
        "--enable-microbatch": row(SWITCH, "two micro-batches in alternation, where a batch is large enough"),
        "--enable-eplb": row(SWITCH, "copies of experts by its own balancer, from LMDEPLOY_EPLB_EXPERTS_STATISTIC_FILE"),
        "--proxy-url": row(TEXT, "the proxy that divides requests among data-parallel groups"),
    },
    places=frozenset(),
)  # fmt: skip


def render(choice: EpChoice, model: ModelSpec) -> Emission:
    """Return the flags; experts stay in their order, so no placement is written.

    Raises InputError for a number of ranks that does not divide them.
    """
    planned, pipeline = choice.placement, choice.schedule.pipeline
    if model.num_experts % planned.num_ranks:
        rule = f"LMDeploy spreads the {model.num_experts} experts of a layer evenly"
        raise InputError(
            "plan: placement.num_ranks", planned.num_ranks, rule, "plan for a number of devices that divides them"
        )
    _, data = attention_groups(choice)
    flags: dict[str, FlagValue] = {"--backend": "pytorch", "--ep": planned.num_ranks, "--dp": data}
    if planned.num_nodes > 1:
        flags["--nnodes"] = planned.num_nodes
    flags["--enable-microbatch"] = pipeline.micro_batches > 1
    changes: dict[str, object] = {
        "placement__policy": "contiguous", "placement__num_redundant": 0, "pipeline__micro_batches": min(pipeline.micro_batches, 2),
        "all_to_all__kind": exchange_kind(choice), "all_to_all__tiers": "together",
    }  # fmt: skip
    notes = [*exchange_notes(choice), *micro_batch_notes(choice, 2)]
    if choice.schedule.placement.policy != "contiguous" or planned.num_redundant:
        notes.insert(
            0,
            "placement: LMDeploy takes none: experts stay in their order, without copies. For DeepSeek in blocked FP8, --enable-eplb "
            "makes copies itself from expert loads: a JSON array [layers, experts] named by LMDEPLOY_EPLB_EXPERTS_STATISTIC_FILE",
        )
    facts = [
        f"--ep {planned.num_ranks} is every device of the server; attention runs on groups of {planned.num_ranks // data}",
        "DeepEP and DeepGEMM must be installed: the start ends without them",
    ]
    if pipeline.micro_batches > 1:
        facts.append(
            "a step is split only from two requests on: ENABLE_MICROBATCH_DECODE_BATCHSIZE_THRESHOLD and its companions set it"
        )
    if not normal_mode(choice):
        facts.append("decode steps take DeepEP's low-latency kernels, prompts its normal ones")
    usage = [USE_FLAGS.replace("COMMAND", "lmdeploy serve api_server MODEL")]
    if planned.num_nodes > 1:
        usage.append(
            "start it on every node with --node-rank N, in one ray cluster, with the same LMDEPLOY_DP_MASTER_ADDR and _PORT"
        )
    if data > 1:
        usage.append("start lmdeploy serve proxy first and give its --proxy-url: requests of all groups go there")
    return Emission(
        engine=TABLE.engine, files={FLAGS_FILE: flag_lines(flags)}, usage=tuple(usage), facts=tuple(facts),
        notes=(*notes, *left_out(choice.schedule, COMMON)), runs=as_run(choice.schedule, COMMON, **moved(choice, changes)),
    )  # fmt: skip


def check(files: Mapping[str, str], model: ModelSpec) -> Placement | None:
    """Return None: LMDeploy is told no placement. Raises InputError where it would refuse the flags or experts do not divide."""
    flags = flags_of(text_of(files, FLAGS_FILE), TABLE, FLAGS_FILE)
    ranks, data = needed(flags, "--ep", FLAGS_FILE), flags.get("--dp", 1)
    if needed(flags, "--backend", FLAGS_FILE) != "pytorch":
        raise InputError(
            f"{FLAGS_FILE}: --backend", flags["--backend"], "spreads no experts with DeepEP", "write pytorch"
        )
    for name, value in (("--dp", data), ("--nnodes", flags.get("--nnodes", 1))):
        if ranks % value:
            raise InputError(f"{FLAGS_FILE}: {name}", value, f"does not divide --ep {ranks}", "give a divisor")
    if model.num_experts % ranks:
        raise InputError(
            f"{FLAGS_FILE}: --ep",
            ranks,
            f"does not divide the {model.num_experts} experts of a layer",
            "give a divisor",
        )
    return None


TARGET = Target(table=TABLE, parallel=ParallelTarget(render=render, check=check))
