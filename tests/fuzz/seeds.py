"""The undamaged files, and the commands that read them: every reader, and every kind of file of the project's own.

Modelled: small files that the commands take without complaint. Ignored: the bundled models, machines and recordings.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench_writers import FORMATS, entry, latency_records, serve
from damaged_recordings import CASES, RNG_SEED
from emit_plans import SMALL, ep_plan, offload_plan
from moeplan.specs.catalog import HARDWARE_FOLDER, MODELS_FOLDER
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.provenance import made_of

WINDOW = "6"
_NVBANDWIDTH = {
    "nvbandwidth": {
        "testcases": [
            {"name": name, "status": "Passed", "bandwidth_description": "GB/s", "bandwidth_matrix": [["12.5"]]}
            for name in ("host_to_device_memcpy_ce", "device_to_host_memcpy_ce", "host_to_device_bidirectional_memcpy_ce")
        ]
    }
}  # fmt: skip
_NCCL = """# nThread 1 nGpus 2
#  Rank  0 Group  0 Pid 1 on host device  0 [0x00] NVIDIA H100
#  Rank  1 Group  0 Pid 1 on host device  1 [0x01] NVIDIA H100
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
     1048576        131072     float    none      -1    50.00   20.97   10.49      0    50.00   20.97   10.49    N/A
     4194304        524288     float    none      -1   200.00   20.97   10.49      0   200.00   20.97   10.49    N/A
    16777216       2097152     float    none      -1   800.00   20.97   10.49      0   800.00   20.97   10.49    N/A
"""
_GRID = """trace: bundled
steps: 4
repeats: 2
shapes:
  - {name: held out, hidden: 768, intermediate: 1024, vocab: 2048}
schedules:
  - on-demand
  - {preset: mixtral-offloading, name: mine, set: {predictor.depth: 2, predictor.width: 1}}
cache_experts_per_layer: [2, 4]
concurrency: [1]
bits: [32, "16"]
calibrate:
  shapes: [{name: small, hidden: 512, intermediate: 1024}]
  bits: [32]
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """Files of one kind, and a command that reads them."""

    name: str
    folder: Path
    """Its files: all of them are mutated, one at a time."""
    arguments: tuple[str, ...]
    """The command; `{in}` stands for the folder of the files, `{out}` for a folder that is empty."""


def make_seeds(root: Path) -> list[Seed]:
    """Return all seeds, their files below `root`."""
    return _readers(root) + _own(root)


def _readers(root: Path) -> list[Seed]:
    found = []
    for name, (kind, make, options) in sorted(CASES.items()):
        folder = root / f"import {name}"
        folder.mkdir(parents=True)
        path = make(folder, np.random.default_rng(RNG_SEED))
        given = [part for key, value in options.items() for part in ("--option", f"{key}={value}")]
        inside = "{in}" if path == folder else "{in}/" + str(path.relative_to(folder))
        arguments = ("trace", "import", inside, "--from", kind, "-o", "{out}/o.safetensors", *given)
        found.append(Seed(name=f"import {name}", folder=folder, arguments=arguments))
    return found


def _own(root: Path) -> list[Seed]:
    found: list[Seed] = []

    def add(name: str, file: str, text: str | Path, *arguments: str) -> None:
        folder = root / f"{len(found):02} {name}"
        folder.mkdir(parents=True)
        if isinstance(text, Path):
            shutil.copy(text, folder / file)
        else:
            (folder / file).write_text(text, encoding="utf-8")
        found.append(Seed(name=name, folder=folder, arguments=arguments))

    recordings = _recordings(root)
    model = {
        **json.loads((MODELS_FOLDER / "olmoe-1b-7b.json").read_text()),
        "num_hidden_layers": 3,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    }
    named = ("--model", "olmoe-1b-7b", "--hardware", "t4", "--trace")
    small = {
        "--model": str(recordings / "model" / "config.json"),
        "--hardware": "t4",
        "--trace": str(recordings / "routing.safetensors"),
    }
    (recordings / "model").mkdir()
    (recordings / "model" / "config.json").write_text(json.dumps(model))

    def with_small(**changed: str) -> tuple[str, ...]:
        return tuple(
            part
            for name, value in (small | {f"--{key}": value for key, value in changed.items()}).items()
            for part in (name, value)
        )

    run = ("--memory", "6GiB", "--window", WINDOW)
    lru = ("--schedule", "mixtral-offloading-code")
    for name in ("routing", "load"):
        add(
            f"{name} stats",
            f"{name}.safetensors",
            recordings / f"{name}.safetensors",
            "trace",
            "stats",
            f"{{in}}/{name}.safetensors",
        )
    add(
        "recording convert",
        "r.safetensors",
        recordings / "routing.safetensors",
        "trace",
        "convert",
        "{in}/r.safetensors",
        "--to",
        "npz",
        "-o",
        "{out}/o.npz",
    )
    add(
        "recording simulate",
        "r.safetensors",
        recordings / "routing.safetensors",
        "simulate",
        *with_small(trace="{in}/r.safetensors"),
        *run,
        *lru,
    )
    add("model show", "config.json", json.dumps(model), "model", "show", "{in}/config.json", "--json")
    for path in sorted(MODELS_FOLDER.glob("*.json")):
        add(f"model {path.stem}", "config.json", path, "model", "show", "{in}/config.json")
    add(
        "model simulate",
        "config.json",
        json.dumps(model),
        "simulate",
        *with_small(model="{in}/config.json"),
        *run,
        *lru,
        "--json",
    )
    for name in ("t4", "h100-sxm"):
        add(f"machine {name}", "m.json", HARDWARE_FOLDER / f"{name}.json", "hardware", "show", "{in}/m.json")
    add(
        "machine simulate",
        "m.json",
        HARDWARE_FOLDER / "t4.json",
        "simulate",
        *with_small(hardware="{in}/m.json"),
        *run,
        *lru,
    )
    add(
        "nvbandwidth",
        "n.json",
        json.dumps(_NVBANDWIDTH),
        "calibrate",
        "--from",
        "nvbandwidth",
        "{in}/n.json",
        "--hardware",
        "t4",
        "-o",
        "{out}/p.json",
    )
    add(
        "nccl-tests",
        "n.txt",
        _NCCL,
        "calibrate",
        "--from",
        "nccl-tests",
        "{in}/n.txt",
        "--hardware",
        "h100-sxm",
        "-o",
        "{out}/p.json",
    )
    add("grid", "g.yaml", _GRID, "validate", "--grid", "{in}/g.yaml")
    lines = [entry(gen=8, speed=150.0), entry(prompt=64, speed=3000.0, n_cpu_moe=4), entry(prompt=16, gen=8, depth=64)]
    for form, write in FORMATS.items():
        add(
            f"llama-bench {form}", "l.txt", write(lines), "calibrate", "--from", "llama-bench", "{in}/l.txt", "--hardware", "rtx-4090",
            "-o", "{out}/p.json",
        )  # fmt: skip
    add(
        "vllm serve",
        "v.json",
        json.dumps(serve()),
        "validate",
        "--from",
        "vllm-bench",
        "{in}/v.json",
        "--hardware",
        "h100",
    )
    add(
        "vllm latency",
        "v.json",
        latency_records([1.0, 1.1]),
        "validate",
        "--from",
        "vllm-bench",
        "{in}/v.json",
        "--hardware",
        "h100",
    )
    offload, parallel = recordings / "offload.json", recordings / "ep.json"
    _plan(offload, "plan", *with_small(), *run)
    _plan(parallel, "plan", *with_small(hardware="h100-sxm"), "--mode", "ep", "--ranks-per-node", "4", "--redundant", "4", "--search-moves", "50", "--tokens-per-rank", "8")  # fmt: skip
    spread = ep_plan() | made_of(SMALL, load_hardware("h100-sxm"))
    # An engine with a list of models takes a plan for one of them.
    listed = offload_plan(cache__experts_per_layer=2) | made_of(SMALL, load_hardware("h100-sxm"))
    add("plan emit moe-infinity", "p.json", json.dumps(listed), "emit", "{in}/p.json", "--target", "moe-infinity", "-o", "{out}/e")  # fmt: skip
    for target in ("vllm", "llamacpp", "kt-kernel", "accelerate"):
        add(f"plan emit {target}", "p.json", offload, "emit", "{in}/p.json", "--target", target, "-o", "{out}/e")
    for target in ("sglang", "trtllm", "vllm", "vllm-ascend"):
        add(
            f"ep plan emit {target}",
            "p.json",
            json.dumps(spread),
            "emit",
            "{in}/p.json",
            "--target",
            target,
            "-o",
            "{out}/e",
        )
    for name, plan in (("plan", offload), ("ep plan", parallel)):
        add(
            f"{name} report", "p.json", plan, "report", "{in}/p.json", "--trace", small["--trace"], "-o", "{out}/r.html"
        )
    add(
        "plan validate",
        "p.json",
        offload,
        "validate",
        "{in}/p.json",
        "--trace",
        small["--trace"],
        "--steps",
        "2",
        "--repeats",
        "1",
    )
    del named
    return found


def _recordings(root: Path) -> Path:
    """Return a folder with a small recording of routing and one of loads."""
    from moeplan.traces.format import load_trace, save_profile, save_trace
    from moeplan.traces.readers import import_trace
    from moeplan.traces.recording import LoadProfile

    folder = root / "recordings"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    experts = rng.permuted(np.tile(np.arange(8, dtype=np.uint8), (240, 3, 1)), axis=2)[:, :, :2]
    np.savez(folder / "r.npz", experts=experts, seq=np.arange(240) // 4, pos=np.arange(240) % 4, phase=np.tile([0, 1, 1, 1], 60).astype(np.int8),
             layer_ids=np.arange(3))  # fmt: skip
    save_trace(import_trace("npz", folder / "r.npz", num_experts=8), folder / "routing.safetensors")
    load_trace(folder / "routing.safetensors")
    kind, make, options = CASES["trtllm"]
    load = import_trace(kind, make(folder, rng), **options)
    assert isinstance(load, LoadProfile)
    save_profile(dataclasses.replace(load), folder / "load.safetensors")
    return folder


def _plan(path: Path, *arguments: str) -> None:
    """Write a plan."""
    from commands import run

    status, _, said, trouble = run([*arguments, "-o", str(path)])
    if status or trouble:
        raise RuntimeError(said + trouble)
